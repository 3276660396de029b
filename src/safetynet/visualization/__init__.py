"""Figures: a chart described once as data, drawn for paper with matplotlib and for the screen with Plotly.

In: tables of earlier stages. Out: figures as PNG, PDF, SVG and HTML, each with its data as CSV.
Computes no result and imports no stage.
"""

from safetynet.visualization.chart import Annotation, Axis, Chart, Panel, Reference, Series, Source
from safetynet.visualization.comparison_visualizer import ComparisonVisualizer, draw_comparison
from safetynet.visualization.detection_visualizer import DetectionVisualizer, draw_detection
from safetynet.visualization.grid import Grid, Shade
from safetynet.visualization.intervention_visualizer import InterventionVisualizer, draw_interventions
from safetynet.visualization.mitigation_visualizer import MitigationVisualizer, draw_mitigation
from safetynet.visualization.saving import Figure, save
from safetynet.visualization.training_visualizer import TrainingVisualizer, draw_training

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
    "draw_comparison",
    "draw_detection",
    "draw_interventions",
    "draw_mitigation",
    "draw_training",
    "save",
]
