"""Tutorials: notebooks kept as text, run when the site is built. No number on their pages is typed in."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import jupytext
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "tutorials"
"""Where they run; a build begins without what an earlier one has planted."""
MOST_SECONDS = 600
"""Of one cell, and of the start."""


@cache
def python() -> KernelManager:
    """The Python of all tutorials: the libraries are loaded once, and the first one plants for all."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    (WORK / "recipes").symlink_to(ROOT / "recipes")
    # Sockets in a folder of our own, to which nobody else can listen; a path of a socket has to be short.
    kernel = KernelManager(transport="ipc", ip=f"{tempfile.mkdtemp()}/kernel")
    kernel.start_kernel(cwd=str(WORK))
    return kernel


def executed(text: str) -> NotebookNode:
    """A tutorial with what its cells print and draw.

    Args:
        text: the tutorial, in jupytext's percent format.

    Raises:
        CellExecutionError: if a cell fails.
    """
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.cells.insert(0, new_code_cell("%reset -f"))  # names of the tutorial before are gone
    NotebookClient(notebook, km=python(), timeout=MOST_SECONDS, startup_timeout=MOST_SECONDS).execute()
    del notebook.cells[0]
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "python3"}
    return notebook
