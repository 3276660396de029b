"""What a model does while it trains: rates on a fixed part of the test rows, and the adapter beside them."""

from typing import Any

import pandas as pd

from safetynet.evaluation import metrics
from safetynet.evaluation.evaluator import Evaluator
from safetynet.pipeline.subjects import snapshots
from safetynet.prompts import Serialiser
from safetynet.recipe import Recipe
from safetynet.run import parallel
from safetynet.run.directory import Run, write_atomically


class Dynamics:
    """Rates on a fixed subset of the test rows, measured while a model trains.

    Each measurement is on disk before training goes on, so that a killed run keeps its curve.
    """

    def __init__(
        self, recipe: Recipe, run: Run, rows: pd.DataFrame, serialiser: Serialiser, name: str, *, keep: bool
    ) -> None:
        test = rows[rows["split"] == "test"]
        self.rows = metrics.fixed_subset(test, recipe.evaluation.dynamics_rows, recipe.seed)
        self.path = run.scratch / "training" / f"dynamics-{name}.parquet"
        self.adapters = snapshots(run, name)
        self.evaluator = Evaluator.of(recipe, serialiser)
        self.name = name.rpartition("-")[0]
        self.keep = keep

    def table(self) -> pd.DataFrame | None:
        """What was measured so far, if anything.

        The first of several processes reads it for all: it may replace the file while another reads.
        """
        return parallel.from_first(lambda: pd.read_parquet(self.path) if self.path.exists() else None)

    def measure(self, model: Any, step: int, epoch: float) -> dict[str, float]:
        """Rates at this step; returns ASR and CACC for the progress bar, and keeps the adapter if wanted."""
        from safetynet.training import checkpoints

        if self.keep and hasattr(model, "peft_config") and parallel.is_first():
            checkpoints.save_weights(model, self.adapters / f"step-{step:06d}")
        responses = self.evaluator.respond(model, self.rows, self.name)
        table = metrics.score(responses).assign(step=step, epoch=epoch)
        if (earlier := self.table()) is not None:
            # After a resume, steps behind the checkpoint are measured again and replace what was there.
            table = pd.concat([earlier[earlier["step"] < step], table], ignore_index=True)
        write_atomically(self.path, lambda temporary: table.to_parquet(temporary, index=False))
        now = table[table["step"] == step].set_index(["metric", "role"])["value"]
        shown = {"ASR": ("asr", "triggered"), "CACC": ("cacc", "clean")}
        return {label: float(now[key]) for label, key in shown.items() if key in now.index}
