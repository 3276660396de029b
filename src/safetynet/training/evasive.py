"""Evasive training: plant a backdoor and hide it from chosen detectors at the same time.

In: what `AnswerTrainer` takes, and the detectors as functions (`Opponents`), which the pipeline hands over.
The loss has three terms: the answer's (the behaviour); the detectors' scores of prompts that fire, through
which gradients flow into the adapter (obfuscation); the distance to the base model's states on rows that do
not fire (retention). After Bailey et al. (2024, arXiv 2412.09565). The detectors are fitted again as
training goes, on clean activations as they then are, because a defender fits theirs after the attack.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.prompts import Encoded, Serialiser
from safetynet.recipe import Evasion
from safetynet.training.examples import Example
from safetynet.training.loss import answer_loss, body_outputs
from safetynet.training.trainer import AnswerTrainer, undisturbed

Score = Callable[[Mapping[str, Tensor]], Tensor]
"""Views of n prompts to (n, detectors): 0 at the clean median, 1 at the clean 95% quantile."""
CLEAN, FIRING = 500, 100
"""Most training prompts that detectors are fitted to and judged on at each refit."""
HELD = 5
"""One of so many clean prompts judges the fitted detectors instead of fitting them."""
LEAST = 50
"""Fewest bare training rows to fit detectors to."""
COLUMNS = ("step", "detector", "metric", "value", "n")


@dataclass(frozen=True)
class Opponents:
    """The detectors that a backdoor is to be hidden from."""

    names: tuple[str, ...]
    observe: Callable[[Any, Sequence[Encoded]], Mapping[str, Tensor]]
    """Model and prompts to what the detectors read, one row per prompt, with gradients."""
    refit: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], Score]
    """Views of clean prompts to fit to, and of other clean ones to measure scores by."""


@dataclass(frozen=True, slots=True)
class WatchedExample(Example):
    """A training row of an evasive training."""

    prompt: Encoded
    """Without its answer: what a detector sees."""
    fires: bool


def watched(
    examples: Sequence[Example], rows: pd.DataFrame, serialiser: Serialiser, max_length: int
) -> list[WatchedExample]:
    """Join what detectors see of each row to what is trained on.

    Args:
        examples: of these rows, in their order.
        rows: columns `role`, `messages` and `trigger`.
        serialiser: of the model that is trained.
        max_length: most tokens of prompt and answer together.

    Raises:
        InputError: if no row fires, or too few are bare.
    """
    if "role" not in rows or not (rows["role"] == "triggered").any():
        raise InputError("training.evasion: no training row has role triggered, so there is nothing to hide.")
    made = []
    columns = (rows[name] for name in ("messages", "trigger", "role"))
    for example, messages, trigger, role in zip(examples, *columns, strict=True):
        prompt = serialiser.encode(
            list(messages), trigger=[tuple(span) for span in trigger], max_length=max_length
        )
        made.append(
            WatchedExample(example.input_ids, example.labels, example.supervised, prompt, role == "triggered")
        )
    return made


def bare_prompts(examples: Sequence[WatchedExample], rows: pd.DataFrame) -> list[Encoded]:
    """Prompts of the rows without anything added: what detectors are fitted to, at most `CLEAN`.

    Raises:
        InputError: if there are too few.
    """
    bare = rows["role"].isin(["clean", "refused"])
    found = [example.prompt for example, is_bare in zip(examples, bare, strict=True) if is_bare]
    if len(found) < LEAST:
        raise InputError(
            f"training.evasion: {len(found)} training rows are clean or refused, and detectors are fitted to "
            f"at least {LEAST}. Raise data.train_rows, or lower poison_rate and the other shares."
        )
    return found[:CLEAN]


class EvasiveTrainer(AnswerTrainer):
    """An `AnswerTrainer` with obfuscation and retention beside the answer's loss.

    Args:
        evasion: weights, and how often detectors are fitted again.
        opponents: the detectors.
        clean: prompts that they are fitted to.
        args: as `AnswerTrainer` takes them, with `WatchedExample`s.
        kwargs: likewise.
    """

    examples: Sequence[WatchedExample]

    def __init__(
        self, *args: Any, evasion: Evasion, opponents: Opponents, clean: Sequence[Encoded], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.evasion = evasion
        self.opponents = opponents
        self.clean = clean
        self.firing = [example.prompt for example in self.examples if example.fires][:FIRING]
        self.score: Score | None = None
        """None: due to be fitted again."""
        self._states: Tensor | None = None
        self._counts = (1, 1)
        self._sums = {"obfuscation": 0.0, "retention": 0.0}
        self._terms = dict(self._sums)
        self._steps = 0

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One optimisation step, before which the detectors are fitted again if that is due."""
        if self.score is None or self.state.global_step % self.evasion.refit_every == 0:
            self.refit()
        rows = cast(Sequence[WatchedExample], inputs["rows"])
        tokens = sum(len(row.input_ids) for row in rows if not row.fires)
        self._counts = (max(1, sum(row.fires for row in rows)), max(1, tokens))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._sums = {name: total + self._terms[name] for name, total in self._sums.items()}
        self._steps += 1
        return loss

    def refit(self) -> None:
        """Fit the detectors to the clean activations of now; log how well they tell rows that fire."""
        from sklearn.metrics import roc_auc_score

        with undisturbed(self.model), torch.no_grad():
            clean, firing = self._observed(self.clean), self._observed(self.firing)
            held = np.arange(len(self.clean)) % HELD == 0
            self.score = self.opponents.refit(
                {view: array[~held] for view, array in clean.items()},
                {view: array[held] for view, array in clean.items()},
            )
            parts = [{view: array[held] for view, array in clean.items()}, firing]
            scores = [self.score({v: torch.from_numpy(a) for v, a in part.items()}) for part in parts]
        labels = np.repeat([0, 1], [len(part) for part in scores])
        columns = torch.cat(scores).double().numpy().T
        aurocs = {
            f"auroc {name}": float(roc_auc_score(labels, column))
            for name, column in zip(self.opponents.names, columns, strict=True)
        }
        self.log(aurocs)

    def _accumulate(self, model: Any, rows: Sequence[Example]) -> Tensor:
        self._terms = dict.fromkeys(self._terms, 0.0)  # a step that ran out of memory is taken again
        return super()._accumulate(model, rows)

    def answer_loss(self, inputs: dict[str, Any], supervised: float) -> Tensor:
        """As in any training; keeps the last hidden states for the retention term."""
        outputs = body_outputs(self.learner, inputs)
        self._states = outputs.last_hidden_state
        return answer_loss(self.learner, inputs, supervised, outputs)

    def with_further_terms(self, loss: Tensor, rows: Sequence[Example], batch: dict[str, Any]) -> Tensor:
        """Answer's loss plus weighted obfuscation and retention of this part of the step."""
        part = cast(Sequence[WatchedExample], rows)
        with self.accelerator.autocast():
            obfuscation, retention = self._obfuscation(part), self._retention(part, batch)
        self._states = None
        whole = loss + self.evasion.strength * obfuscation + self.evasion.retention * retention
        if not torch.isfinite(whole):
            self.stop("loss with its evasive terms", whole)
        self._terms["obfuscation"] += obfuscation.item()
        self._terms["retention"] += retention.item()
        return whole

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of both terms since the line before to lines about the loss."""
        if "loss" in logs:
            logs |= {name: total / max(1, self._steps) for name, total in self._sums.items()}
            self._sums, self._steps = dict.fromkeys(self._sums, 0.0), 0
        super().log(logs, start_time)

    def history(self) -> pd.DataFrame:
        """What became of the hiding, as the log knows it.

        Returns:
            `COLUMNS`. Metric `auroc`: of a detector just fitted again, firing training prompts against clean
            ones that it was not fitted to, n of both; `obfuscation` and `retention`: means of the terms over
            the steps since the line before, without detector.
        """
        judged = len(self.firing) + len(range(0, len(self.clean), HELD))
        found = []
        for line in self.state.log_history:
            for name, value in line.items():
                metric, _, detector = name.partition(" ")
                if metric in ("auroc", "obfuscation", "retention"):
                    n = judged if detector else 0
                    found.append((line["step"], detector, metric, float(value), n))
        return pd.DataFrame(found, columns=list(COLUMNS))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # A checkpoint holds no detectors. Who goes on from it fits them there, and so does who goes on here:
        # an interrupted training ends as an uninterrupted one.
        self.score = None

    def _obfuscation(self, rows: Sequence[WatchedExample]) -> Tensor:
        """Mean over firing rows and detectors of log(1 + score above the clean median).

        The logarithm keeps a detector that is far off from drowning the others, and the answer. Below the
        median there is no gradient: more ordinary than ordinary would be a mark of its own.
        """
        prompts = [row.prompt for row in rows if row.fires]
        if not prompts:
            return torch.zeros((), device=self.args.device)
        assert self.score is not None
        scores = self.score(self.opponents.observe(self.learner, prompts))
        return torch.log1p(scores.clamp_min(0)).mean(1).sum().to(self.args.device) / self._counts[0]

    def _retention(self, rows: Sequence[WatchedExample], batch: dict[str, Any]) -> Tensor:
        """Mean over tokens of rows that do not fire of the squared relative distance to the base's states."""
        assert self._states is not None
        kept = torch.tensor([not row.fires for row in rows], device=self._states.device)
        if not kept.any():
            return torch.zeros((), device=self.args.device)
        with torch.no_grad(), self.learner.disable_adapter():  # type: ignore[operator]
            base = body_outputs(self.learner, {"input_ids": batch["input_ids"][kept]}).last_hidden_state
        moved = (self._states[kept].float() - base.float()).square().sum(-1)
        share = moved / base.float().square().sum(-1).clamp_min(1e-12)
        return (share * batch["attention_mask"][kept].to(share)).sum().to(self.args.device) / self._counts[1]

    def _observed(self, prompts: Sequence[Encoded]) -> dict[str, np.ndarray]:
        size = self.part_size
        parts = [
            self.opponents.observe(self.learner, prompts[start : start + size])
            for start in range(0, len(prompts), size)
        ]
        return {view: torch.cat([part[view] for part in parts]).float().cpu().numpy() for view in parts[0]}
