"""Every figure that a run's tables hold, of all stages.

In: a run's tables under their own names. Out: Figures, and what could not be drawn. Saves nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd

from safetynet.errors import InputError
from safetynet.figures.detection_visualizer import TABLES as OF_DETECTION
from safetynet.figures.detection_visualizer import detection_figures
from safetynet.figures.intervention_visualizer import intervention_figures
from safetynet.figures.mitigation_visualizer import mitigation_figures
from safetynet.figures.saving import Figure
from safetynet.figures.training_visualizer import training_figures

Draw = Callable[[Mapping[str, pd.DataFrame], Path, str, str], list[Figure]]
TRAINED = ("backdoored", "clean_twin")
MAKERS: tuple[tuple[Draw, tuple[str, ...]], ...] = (
    (training_figures, ("training",)),
    (training_figures, ("dynamics", "evaluation")),
    *(
        (intervention_figures, (name,))
        for name in (
            "effects", "tokens", "dynamics", "lens", "lens_map", "probes", "attention", "divergence", "drift",
            "tradeoff",
        )
    ),
    *((detection_figures, (name,)) for name in OF_DETECTION),
    (mitigation_figures, ("mitigation",)),
    (mitigation_figures, ("relearning",)),
)  # fmt: skip
"""What draws which tables. A stage with figures adds its line here, and they are in the report."""


def figures_of(
    tables: Mapping[str, pd.DataFrame], folder: Path, run: str, model: str
) -> tuple[list[Figure], list[str]]:
    """The figures of a run, and a sentence for each table that cannot be drawn.

    Args:
        tables: by the names they have in the run.
        folder: of the figures.
        run: name of the run, which every figure carries.
        model: name in titles.
    """
    rates = _rates(tables)
    figures: list[Figure] = []
    faults: list[str] = []
    for draw, names in MAKERS:
        own = rates if draw is training_figures else tables
        wanted = {name: own[name] for name in names if name in own}
        if not wanted:
            continue
        try:
            figures += draw(wanted, folder, run, model)
        except InputError as error:
            faults.append(str(error))
    return figures, faults


def _rates(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Histories and rates of all trained models, one below the other, as the training's figures take them."""
    found = {"evaluation": tables["evaluation"]} if "evaluation" in tables else {}
    for kind, name, column in (("history", "training", "run"), ("dynamics", "dynamics", "model")):
        parts = list(_of_models(tables, kind, column))
        if parts:
            found[name] = pd.concat(parts, ignore_index=True)
    return found


def _of_models(tables: Mapping[str, pd.DataFrame], kind: str, column: str) -> Iterable[pd.DataFrame]:
    for model in TRAINED:
        if f"{kind}_{model}" in tables:
            yield tables[f"{kind}_{model}"].assign(**{column: model})
