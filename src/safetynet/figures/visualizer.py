"""What the visualizers of a run have in common: whose figures they draw, and where these are saved."""

from pathlib import Path

from safetynet.figures.chart import Chart, Source
from safetynet.figures.saving import Figure


class Visualizer:
    """Figures of one run, from its tables."""

    def __init__(self, model: str, run: str | None = None, folder: Path | str | None = None) -> None:
        """Say whose figures these are.

        Args:
            model: name in titles.
            run: name of the run that every file carries; `{model}/backdoor` unless given.
            folder: where figures are saved; `results/{run}/figures` unless given.
        """
        self.model = model
        self.run = run or f"{model}/backdoor"
        self.folder = Path("results") / self.run / "figures" if folder is None else Path(folder)

    def _source(self, table: str) -> Source:
        return Source(self.run, table)

    def _figure(self, chart: Chart, name: str) -> Figure:
        return Figure(chart, name, self.folder)
