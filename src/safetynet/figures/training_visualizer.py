"""Figures of a training from what people have: the Trainer's log, a tracker's history, a run's tables, lists.

In: measurements. Out: Figures.
"""

from collections.abc import Sequence
from pathlib import Path

from safetynet.figures.rate_charts import Interval, accuracy
from safetynet.figures.registry import draw, place
from safetynet.figures.saving import Figure
from safetynet.tables import Data


class TrainingVisualizer:
    """Figures of one model's training.

    Example:
        >>> visualizer = TrainingVisualizer("qwen")
        >>> figure = visualizer.plot_accuracy_trends([0.98, 0.97], [0.40, 1.0], epochs=[1, 2])
        >>> figure.save()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str,
        task: str = "backdoor",
        results: Path | str = "results",
        folder: Path | str | None = None,
        source: str | None = None,
    ) -> None:
        """Say whose figures these are.

        Args:
            model: name in titles and in the default folder.
            task: the run's task, for the default folder.
            results: root of the default folder `results/{model}/{task}/figures`.
            folder: where figures are saved instead.
            source: name of the run that every file carries; `{model}/{task}` unless given.
        """
        self.model = model
        self.run = source or f"{model}/{task}"
        self.folder = Path(results) / model / task / "figures" if folder is None else Path(folder)

    def plot_loss_curves(self, training_data: Data | Path | str) -> Figure:
        """Loss over steps, of training rows and, where it was measured, of held-out rows.

        Args:
            training_data: the Trainer's `log_history`, the path of a `trainer_state.json`, a W&B history
                (`train/loss` and `train/global_step`) or MLflow's metrics (key, value and step) as a
                DataFrame, records, or a file .csv or .json of them, the folder of a W&B run that was recorded
                offline, or columns step and loss as a DataFrame or a dict of lists, with eval_loss and run
                (backdoored, clean twin) where known.

        Raises:
            InputError: if a column is missing, has another length, or holds something else than numbers, or
                the file holds no log.
        """
        return self._draw("loss", training_data)

    def plot_learning_rate(self, training_data: Data | Path | str) -> Figure:
        """Learning rate over steps; data as in `plot_loss_curves`, column learning_rate."""
        return self._draw("learning-rate", training_data)

    def plot_gradient_norm(self, training_data: Data | Path | str) -> Figure:
        """Gradient norm over steps; data as in `plot_loss_curves`, column grad_norm."""
        return self._draw("gradient-norm", training_data)

    def plot_accuracy_trends(
        self,
        clean_acc: Sequence[float],
        backdoor_acc: Sequence[float],
        epochs: Sequence[float],
        clean_interval: Interval | None = None,
        backdoor_interval: Interval | None = None,
    ) -> Figure:
        """Clean accuracy and attack success over epochs.

        Args:
            clean_acc: share of clean rows answered correctly, 0 to 1.
            backdoor_acc: share of triggered rows that show the behaviour, 0 to 1.
            epochs: where they were measured.
            clean_interval: (low, high) of clean_acc, for a band.
            backdoor_interval: (low, high) of backdoor_acc.

        Raises:
            InputError: if lengths differ, nothing is given, or a rate lies outside 0 to 1.
        """
        chart = accuracy((clean_acc, clean_interval), (backdoor_acc, backdoor_interval), epochs)
        return place(chart, "accuracy-trends", "dynamics", self.model, self.run, self.folder)

    def plot_rates_by_role(self, dynamics: Data) -> Figure:
        """ASR, FTR of each role, clean accuracy, refusals and perplexity over steps.

        Args:
            dynamics: one row per measurement: step, model (backdoored, clean_twin, base), metric (asr,
                asr_off_floor, ftr, cacc, refusal_rate, perplexity), role, value, low, high; count and n
                where known.

        Raises:
            InputError: if a column is missing, a word is unknown, or a value is no number.
        """
        return self._draw("rates-by-role", dynamics)

    def plot_final_rates(self, evaluation: Data) -> Figure:
        """The same rates at the end of training; `evaluation` has the same columns without step."""
        return self._draw("final-rates", evaluation)

    def _draw(self, name: str, data: Data | Path | str) -> Figure:
        return draw(name, data, model=self.model, run=self.run, folder=self.folder)
