"""Figures: a chart described once as data, drawn for paper with matplotlib and for the screen with Plotly.

In: tables of earlier stages. Out: figures as PNG, PDF, SVG and HTML, each with its data as CSV.
Computes no result and imports no stage. `registry` knows every figure by its name.
"""

# Each of these modules declares its figures; their order is the order within a section of the report.
# isort: off
from safetynet.figures import training_charts, rate_charts  # noqa: F401
from safetynet.figures import intervention_charts, reading_charts  # noqa: F401
from safetynet.figures import detection_charts  # noqa: F401
from safetynet.figures import removal_charts, utility_charts  # noqa: F401
from safetynet.figures import comparison_charts  # noqa: F401

# isort: on
from safetynet.figures.chart import Annotation, Axis, Chart, Grid, Panel, Reference, Series, Shade, Source
from safetynet.figures.registry import FIGURES, draw, figure, figures_of
from safetynet.figures.saving import Figure, save, save_all
from safetynet.figures.training_visualizer import TrainingVisualizer

__all__ = [
    "FIGURES",
    "Annotation",
    "Axis",
    "Chart",
    "Figure",
    "Grid",
    "Panel",
    "Reference",
    "Series",
    "Shade",
    "Source",
    "TrainingVisualizer",
    "draw",
    "figure",
    "figures_of",
    "save",
    "save_all",
]
