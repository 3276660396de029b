"""Write a chart to disk in every format at once, so that what lies beside each other also belongs together.

In: a Chart, a folder and a name. Out: NAME.png, NAME.pdf, NAME.svg, NAME.html and NAME.csv.
All is drawn before the first byte is written, and each file replaces an older one in a single step.
"""

import tempfile
import webbrowser
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetynet.errors import InputError
from safetynet.figures import interactive, static
from safetynet.figures.chart import Chart, table
from safetynet.run.directory import write_atomically


def save(chart: Chart, folder: Path | str, name: str, venue: str = "general") -> list[Path]:
    """Save a chart as PNG (300 dpi), PDF (fonts embedded), SVG, interactive HTML, and its data as CSV.

    Args:
        chart: what to draw; equal charts give equal files.
        folder: made where it does not exist.
        name: file name without suffix.
        venue: whose columns the paper figure fits: general, neurips, icml, acl or ieee.

    Returns:
        The five paths.

    Raises:
        InputError: if the name is no file name, there is no such venue, or the folder cannot be made or
            written to.
        RunError: if the disk is full; older files are then as they were.
    """
    if not name or Path(name).name != name:
        raise InputError(f"figure name {name!r} is not a plain file name; leave out folders")
    files = static.render(chart, venue=venue)
    files["html"] = interactive.render(chart).encode()
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
    for path, content in paths.items():
        write_atomically(path, partial(Path.write_bytes, data=content))
    return list(paths)


@dataclass(frozen=True)
class Figure:
    """A chart together with the place where its files belong."""

    chart: Chart
    name: str
    folder: Path

    def save(
        self, folder: Path | str | None = None, name: str | None = None, venue: str = "general"
    ) -> list[Path]:
        """Save in all formats, in this figure's own folder under its own name unless told otherwise."""
        return save(self.chart, self.folder if folder is None else folder, name or self.name, venue)

    def show(self) -> Path:
        """Open the interactive figure in the browser; returns the page, which lies in a temporary folder."""
        page = Path(tempfile.mkdtemp(prefix="safetynet-figure-")) / f"{self.name}.html"
        page.write_text(interactive.render(self.chart), encoding="utf-8")
        webbrowser.open(page.as_uri())
        return page

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return static.render(self.chart, ("png",))["png"]
