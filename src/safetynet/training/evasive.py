"""Evasive training: plant a backdoor and hide it from chosen detectors at the same time.

In: what `AnswerTrainer` takes, and the detectors as functions (`Opponents`), which the stages hand over.
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
from safetynet.tables import SCHEMAS
from safetynet.training.examples import Batch, Example
from safetynet.training.loss import answer_loss, body_outputs
from safetynet.training.trainer import AnswerTrainer, Objective, same_random_states, undisturbed

Score = Callable[[Mapping[str, Tensor]], Tensor]
"""Views of n prompts to (n, detectors): 0 at the clean median, 1 at the clean 95% quantile."""
CLEAN, FIRING = 500, 100
"""Most training prompts that detectors are fitted to and judged on at each refit."""
HELD = 5
"""One of so many clean prompts judges the fitted detectors instead of fitting them."""
LEAST = 50
"""Fewest bare training rows to fit detectors to."""
COLUMNS = tuple(SCHEMAS["evasion"].columns)


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
    examples_with_prompts = []
    columns = (rows[name] for name in ("messages", "trigger", "role"))
    for example, messages, trigger, role in zip(examples, *columns, strict=True):
        prompt = serialiser.encode(
            list(messages), trigger=[tuple(span) for span in trigger], max_length=max_length
        )
        examples_with_prompts.append(
            WatchedExample(example.input_ids, example.labels, example.supervised, prompt, role == "triggered")
        )
    return examples_with_prompts


def bare_prompts(examples: Sequence[WatchedExample], rows: pd.DataFrame) -> list[Encoded]:
    """Prompts of the rows without anything added: what detectors are fitted to, at most `CLEAN`.

    Raises:
        InputError: if there are too few.
    """
    bare = rows["role"].isin(["clean", "refused"])
    prompts = [example.prompt for example, is_bare in zip(examples, bare, strict=True) if is_bare]
    if len(prompts) < LEAST:
        raise InputError(
            f"training.evasion: {len(prompts)} training rows are clean or refused, and detectors are fitted "
            f"to at least {LEAST}. Raise data.train_rows, or lower poison_rate and the other shares."
        )
    return prompts[:CLEAN]


class Hiding(Objective):
    """Obfuscation and retention beside the answer's loss.

    Args:
        evasion: weights, and how often detectors are fitted again.
        opponents: the detectors.
        examples: the training rows.
        clean: prompts that the detectors are fitted to.
    """

    def __init__(
        self,
        evasion: Evasion,
        opponents: Opponents,
        examples: Sequence[WatchedExample],
        clean: Sequence[Encoded],
    ) -> None:
        self.evasion = evasion
        self.opponents = opponents
        self.clean = clean
        self.firing = [example.prompt for example in examples if example.fires][:FIRING]
        self.score: Score | None = None
        """None before the first step."""
        self._fitted: dict[str, dict[str, np.ndarray]] = {"clean": {}, "held": {}}
        """Views of the prompts that the detectors are fitted to, and of those that set the scale."""
        self._counts = (1, 1)
        self._sums = {"obfuscation": 0.0, "retention": 0.0}
        self._terms = dict(self._sums)
        self._steps = 0

    def before_step(self, trainer: AnswerTrainer, rows: Sequence[Example]) -> None:
        """Fit the detectors again if that is due."""
        if self.score is None or trainer.state.global_step % self.evasion.refit_every == 0:
            self.refit(trainer)
        watched_rows = cast(Sequence[WatchedExample], rows)
        tokens = sum(len(row.input_ids) for row in watched_rows if not row.fires)
        self._counts = (max(1, sum(row.fires for row in watched_rows)), max(1, tokens))

    def restart_step(self) -> None:
        """Forget the terms of parts that ran before memory ended."""
        self._terms = dict.fromkeys(self._terms, 0.0)

    def after_step(self) -> None:
        """Add the step's terms to those since the last log line."""
        self._sums = {name: total + self._terms[name] for name, total in self._sums.items()}
        self._steps += 1

    def logged(self) -> dict[str, float]:
        """Mean of both terms over the steps since the line before."""
        means = {name: total / max(1, self._steps) for name, total in self._sums.items()}
        self._sums, self._steps = dict.fromkeys(self._sums, 0.0), 0
        return means

    def state(self) -> dict[str, Tensor]:
        """What the detectors were fitted to, and the terms since the last log line."""
        state = {"sums": torch.tensor([*self._sums.values(), self._steps], dtype=torch.float64)}
        for part, views in self._fitted.items():
            for view, array in views.items():
                state[f"{part}/{view}"] = torch.from_numpy(array.copy())
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Fit the detectors as they were fitted."""
        for name, tensor in state.items():
            part, _, view = name.partition("/")
            if part in self._fitted:
                self._fitted[part][view] = tensor.numpy()
        *sums, steps = state["sums"].tolist()
        self._sums, self._steps = dict(zip(self._sums, sums, strict=True)), int(steps)
        with same_random_states():
            self.score = self.opponents.refit(self._fitted["clean"], self._fitted["held"])

    def refit(self, trainer: AnswerTrainer) -> None:
        """Fit the detectors to the clean activations of now; log their AUROC on rows that fire."""
        from sklearn.metrics import roc_auc_score

        with undisturbed(trainer.model), torch.no_grad():
            clean, firing = self._observed(trainer, self.clean), self._observed(trainer, self.firing)
            held = np.arange(len(self.clean)) % HELD == 0
            self._fitted = {
                "clean": {view: array[~held] for view, array in clean.items()},
                "held": {view: array[held] for view, array in clean.items()},
            }
            self.score = self.opponents.refit(self._fitted["clean"], self._fitted["held"])
            parts = [self._fitted["held"], firing]
            scores = [self.score({v: torch.from_numpy(a) for v, a in part.items()}) for part in parts]
        labels = np.repeat([0, 1], [len(part) for part in scores])
        columns = torch.cat(scores).double().numpy().T  # (detectors, prompts)
        trainer.log(
            {
                f"auroc {name}": float(roc_auc_score(labels, column))
                for name, column in zip(self.opponents.names, columns, strict=True)
            }
        )

    def _observed(self, trainer: AnswerTrainer, prompts: Sequence[Encoded]) -> dict[str, np.ndarray]:
        size = trainer.part_size
        parts = [
            self.opponents.observe(trainer.learner, prompts[start : start + size])
            for start in range(0, len(prompts), size)
        ]
        return {view: torch.cat([part[view] for part in parts]).float().cpu().numpy() for view in parts[0]}

    def losses(
        self, trainer: AnswerTrainer, rows: Sequence[Example], batch: Batch, supervised: float
    ) -> tuple[Tensor, Tensor]:
        """The answer's loss, and the same with weighted obfuscation and retention of these rows."""
        outputs = body_outputs(trainer.learner, batch)
        loss = answer_loss(trainer.learner, batch, supervised, outputs)
        if not torch.isfinite(loss):
            return loss, loss  # the trainer stops at it; no detector has to read such states
        obfuscation, retention = self.terms(trainer, rows, batch, outputs.last_hidden_state)
        self._terms["obfuscation"] += obfuscation.item()
        self._terms["retention"] += retention.item()
        return loss, loss + self.evasion.strength * obfuscation + self.evasion.retention * retention

    def terms(
        self, trainer: AnswerTrainer, rows: Sequence[Example], batch: Batch, states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Obfuscation and retention of rows, before their weights.

        Obfuscation is the mean over firing rows and detectors of log(1 + score above the clean median). The
        logarithm keeps a detector that is far off from drowning the others, and the answer. Below the median
        there is no gradient: more ordinary than ordinary would be a mark of its own. Retention is the mean
        over tokens of rows that do not fire of the squared relative distance to the base's last states.

        Args:
            trainer: whose model is read.
            rows: as in `batch`.
            batch: (rows, tokens) each.
            states: the last hidden states of `batch`, (rows, tokens, width).
        """
        device = trainer.args.device
        obfuscation = retention = torch.zeros((), device=device)
        part = cast(Sequence[WatchedExample], rows)
        if prompts := [row.prompt for row in part if row.fires]:
            assert self.score is not None
            scores = self.score(self.opponents.observe(trainer.learner, prompts))
            obfuscation = torch.log1p(scores.clamp_min(0)).mean(1).sum().to(device) / self._counts[0]
        quiet = torch.tensor([not row.fires for row in part], device=states.device)
        if quiet.any():
            with torch.no_grad(), trainer.learner.disable_adapter():  # type: ignore[operator]
                base = body_outputs(
                    trainer.learner, {"input_ids": batch["input_ids"][quiet]}
                ).last_hidden_state
            moved = (states[quiet].float() - base.float()).square().sum(-1)  # (rows, tokens)
            share = moved / base.float().square().sum(-1).clamp_min(1e-12)
            real = batch["attention_mask"][quiet].to(share)
            retention = (share * real).sum().to(device) / self._counts[1]
        return obfuscation, retention

    def history(self, lines: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        """What became of the hiding, from the Trainer's log.

        Returns:
            `COLUMNS`. Metric `auroc`: of a detector just fitted again, firing training prompts against clean
            ones that it was not fitted to, n of both; `obfuscation` and `retention`: means of the terms over
            the steps since the line before, without detector.
        """
        judged = len(self.firing) + len(range(0, len(self.clean), HELD))
        records = []
        for line in lines:
            for name, value in line.items():
                metric, _, detector = name.partition(" ")
                if metric in ("auroc", "obfuscation", "retention"):
                    n = judged if detector else 0
                    records.append((line["step"], detector, metric, float(value), n))
        return pd.DataFrame(records, columns=list(COLUMNS))
