"""Write charts to disk in every format at once, so that what lies beside each other also belongs together.

In: Charts, a folder and names. Out: NAME.png, NAME.pdf, NAME.svg, NAME.html and NAME.csv of each, and one
plotly.min.js for all pages of the folder. A chart is drawn before its first byte is written, and each file
replaces an older one in a single step.
"""

import tempfile
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetynet.errors import InputError
from safetynet.extras import need
from safetynet.figures import paper, screen
from safetynet.figures.chart import Chart, table
from safetynet.run.directory import write_atomically

FIGURES_PER_PROCESS = 4
"""Starting a process takes as long as drawing so many figures."""


def save(
    chart: Chart, folder: Path | str, name: str, venue: str = "general", self_contained: bool = False
) -> list[Path]:
    """Save a chart as PNG (300 dpi), PDF (fonts embedded), SVG, interactive HTML, and its data as CSV.

    Args:
        chart: what to draw; equal charts give equal files.
        folder: made where it does not exist.
        name: file name without suffix.
        venue: whose columns the paper figure fits: general, neurips, icml, acl or ieee.
        self_contained: write Plotly, about 5 MB, into the page, which can then be sent by itself; else the
            page takes it from the folder's plotly.min.js.

    Returns:
        The five paths, and that of plotly.min.js unless `self_contained`.

    Raises:
        InputError: if the name is no file name, there is no such venue, or the folder cannot be made or
            written to.
        RunError: if the disk is full; older files are then as they were.
    """
    if not name or Path(name).name != name:
        raise InputError(f"figure name {name!r} is not a plain file name; leave out folders")
    files = paper.render(chart, venue=venue)
    files["html"] = screen.render(chart, self_contained).encode()
    files["csv"] = table(chart).to_csv(index=False, lineterminator="\n").encode()
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"{folder}: figures cannot be written there ({error.strerror}). Name another folder."
        ) from None
    paths = {folder / f"{name}.{suffix}": content for suffix, content in files.items()}
    if not self_contained:
        paths[folder / screen.PLOTLY] = screen.plotly()
    for path, content in paths.items():
        # the library of all pages is written once
        if path.name != screen.PLOTLY or not path.exists() or path.stat().st_size != len(content):
            write_atomically(path, partial(Path.write_bytes, data=content))
    return list(paths)


@dataclass(frozen=True)
class Figure:
    """A chart together with the place where its files belong."""

    chart: Chart
    name: str
    folder: Path

    def save(
        self,
        folder: Path | str | None = None,
        name: str | None = None,
        venue: str = "general",
        self_contained: bool = False,
    ) -> list[Path]:
        """Save in all formats, in this figure's own folder under its own name unless told otherwise."""
        return save(self.chart, folder or self.folder, name or self.name, venue, self_contained)

    def show(self) -> Path:
        """Open the interactive figure in the browser; returns the page, which lies in a temporary folder."""
        page = Path(tempfile.mkdtemp(prefix="safetynet-figure-")) / f"{self.name}.html"
        page.write_text(screen.render(self.chart, self_contained=True), encoding="utf-8")
        webbrowser.open(page.as_uri())
        return page

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return paper.render(self.chart, ("png",))["png"]


def save_all(figures: Sequence[Figure], venue: str = "general", self_contained: bool = False) -> list[Path]:
    """Save many figures, in as many processes as there are cores (joblib's; LOKY_MAX_CPU_COUNT limits them).

    Args:
        figures: to be saved in their own folders.
        venue: as in `save`.
        self_contained: as in `save`.

    Returns:
        The files, each once.
    """
    need("figures", "joblib")
    from joblib import Parallel, delayed, effective_n_jobs

    workers = min(effective_n_jobs(-1), max(len(figures) // FIGURES_PER_PROCESS, 1))
    saved = Parallel(n_jobs=workers)(
        delayed(Figure.save)(figure, venue=venue, self_contained=self_contained) for figure in figures
    )
    return list(dict.fromkeys(path for paths in saved for path in paths))
