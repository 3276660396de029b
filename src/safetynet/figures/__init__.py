"""Figures: a chart described once as data, drawn for paper with matplotlib and for the screen with Plotly.

In: tables of earlier stages. Out: figures as PNG, PDF, SVG and HTML, each with its data as CSV.
Computes no result and imports no stage.
"""

from safetynet.figures.chart import Annotation, Axis, Chart, Panel, Reference, Series, Source
from safetynet.figures.comparison_visualizer import ComparisonVisualizer, draw_comparison
from safetynet.figures.detection_visualizer import DetectionVisualizer, detection_figures
from safetynet.figures.grid import Grid, Shade
from safetynet.figures.intervention_visualizer import InterventionVisualizer, intervention_figures
from safetynet.figures.mitigation_visualizer import MitigationVisualizer, mitigation_figures
from safetynet.figures.saving import Figure, save
from safetynet.figures.training_visualizer import TrainingVisualizer, training_figures

__all__ = [
    "Annotation",
    "Axis",
    "Chart",
    "ComparisonVisualizer",
    "DetectionVisualizer",
    "Figure",
    "Grid",
    "InterventionVisualizer",
    "MitigationVisualizer",
    "Panel",
    "Reference",
    "Series",
    "Shade",
    "Source",
    "TrainingVisualizer",
    "detection_figures",
    "draw_comparison",
    "intervention_figures",
    "mitigation_figures",
    "save",
    "training_figures",
]
