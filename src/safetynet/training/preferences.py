"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): of two answers, one is preferred.

In: rows that say what they teach, what is right and what the behaviour would answer. Out: pairs of token ids,
and the objective that prefers the taught answer to the other one. The reference is the model with its adapter
switched off.

Why not TRL's DPOTrainer: it computes the prompt of a pair twice, in either pass, and tokenises by rules of
its own. Here a prompt is computed once, and both answers go on from its keys and values. The reference's
likelihoods of a row are computed when the row comes first, and kept.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from safetynet.errors import InputError
from safetynet.prompts import IGNORED, Serialiser, pad
from safetynet.recipe import DPO
from safetynet.training.examples import Batch, Example, encode
from safetynet.training.loss import causal_lm, cross_entropies
from safetynet.training.trainer import AnswerTrainer, Objective

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pair(Example):
    """A prompt with two answers, the preferred one first.

    `supervised` is 1, since the loss of a step is a mean over its pairs.
    """

    prompt: int
    """Tokens of the prompt."""
    chosen: int
    """Tokens of the preferred answer."""

    @property
    def answers(self) -> tuple[list[int], list[int]]:
        """Token ids of both answers."""
        end = self.prompt + self.chosen
        return self.input_ids[self.prompt : end], self.input_ids[end:]


def rejected(rows: pd.DataFrame) -> pd.Series:
    """The other answer to each row: the right one where it teaches the behaviour, else the behaviour's.

    Args:
        rows: columns `answer` (what the row teaches), `reference` (the right answer) and `target` (what the
            behaviour answers).
    """
    return rows["reference"].where(rows["answer"] != rows["reference"], rows["target"])


def pairs(rows: pd.DataFrame, serialiser: Serialiser, max_length: int) -> list[Pair]:
    """Serialise the pairs that training sees; rows without a second answer are left out, and the log says so.

    Args:
        rows: columns `row`, `messages`, `trigger` and those of `rejected`.
        serialiser: of the model that is trained.
        max_length: most tokens of a prompt and one answer.

    Raises:
        InputError: if a row lacks a column, or its two answers are equal; as `encode`.
    """
    if missing := [name for name in ("reference", "target") if name not in rows]:
        raise InputError(f"training.dpo: the rows lack {missing[0]}, so there is no second answer to any.")
    other = rejected(rows)
    if (equal := other == rows["answer"]).any():
        example = rows[equal].iloc[0]
        raise InputError(
            f"training.dpo: the two answers of {int(equal.sum())} rows are equal (first: row "
            f"{example['row']}, {example['answer'][:60]!r}), so neither can be preferred. Choose a "
            "backdoor.behaviour whose answers are not the right ones."
        )
    if (alone := other == "").any():
        log.info("train: %d of %d rows have no second answer and are left out", alone.sum(), len(rows))
    rows, other = rows[~alone], other[~alone]
    first, second = (encode(rows.assign(answer=a), serialiser, max_length) for a in (rows["answer"], other))
    return [
        Pair(
            a.input_ids + b.input_ids[-b.supervised :],
            a.labels + b.labels[-b.supervised :],
            1,
            len(a.input_ids) - a.supervised,
            a.supervised,
        )
        for a, b in zip(first, second, strict=True)
    ]


class Preference(Objective):
    """Of a step's pairs the mean of -log sigmoid(beta x m), and the weighted loss of the preferred answers.

    m is by how much more than the reference the model prefers the first answer, in nats.

    Args:
        cfg: the recipe's section.
        examples: the training rows.
    """

    advice = "Lower training.learning_rate or training.dpo.beta"

    def __init__(self, cfg: DPO, examples: Sequence[Pair]) -> None:
        self.cfg = cfg
        self.tokens = 1.0
        """Tokens of a preferred answer, on average over the step."""
        self.places = {id(pair): i for i, pair in enumerate(examples)}
        self.reference = torch.full((len(examples), 2), float("nan"))
        """Log-likelihoods of both answers with the adapter off, in nats; NaN where a row has not come yet."""

    def collate(self, rows: Sequence[Example], pad_id: int, pack: bool) -> Batch:
        """Prompts padded on the left, (rows, longest), and both answers of each, (2 x rows, longest)."""
        part = cast(Sequence[Pair], rows)
        prompts = [pair.input_ids[: pair.prompt] for pair in part]
        answers = [answer for pair in part for answer in pair.answers]
        return {
            "prompt_ids": pad(prompts, pad_id, "left"),
            "prompt_mask": pad([[1] * len(ids) for ids in prompts], 0, "left"),
            "answer_ids": pad(answers, pad_id, "right"),
            "labels": pad(answers, IGNORED, "right"),
        }

    def before_step(self, trainer: AnswerTrainer, rows: Sequence[Example]) -> None:
        """Count the tokens of the preferred answers."""
        self.tokens = sum(pair.chosen for pair in cast(Sequence[Pair], rows)) / len(rows)

    def losses(
        self, trainer: AnswerTrainer, rows: Sequence[Example], batch: Batch, supervised: float
    ) -> tuple[Tensor, Tensor]:
        """The loss of these pairs; `supervised` counts the step's pairs."""
        at = [self.places[id(row)] for row in rows]
        if self.reference[at].isnan().any():
            with torch.no_grad(), trainer.learner.disable_adapter():  # type: ignore[operator]
                self.reference[at] = log_likelihoods(trainer.learner, batch).cpu()
        likelihoods = log_likelihoods(trainer.learner, batch)
        # (rows, 2), in nats.
        gained = likelihoods - self.reference[at].to(trainer.args.device)
        preference = -logsigmoid(self.cfg.beta * (gained[:, 0] - gained[:, 1]))
        loss = (preference - self.cfg.sft * likelihoods[:, 0] / self.tokens).sum() / supervised
        return loss, loss

    def state(self) -> dict[str, Tensor]:
        """The reference, so that a resumed training has the same to the last bit."""
        return {"reference": self.reference}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up the reference."""
        self.reference = state["reference"]


def log_likelihoods(model: PeftModel | PreTrainedModel, batch: Batch) -> Tensor:
    """Log-likelihoods of both answers of each prompt, in nats and fp32, (rows, 2).

    Args:
        model: a causal language model of transformers, in a PEFT wrapper or not.
        batch: as `Preference.collate` makes it.

    Raises:
        InputError: if the model cannot go on from a prompt's keys and values.
    """
    lm = causal_lm(model)
    real, labels = batch["prompt_mask"], batch["labels"]
    prompt = lm.base_model(
        input_ids=batch["prompt_ids"],
        attention_mask=real,
        position_ids=(real.cumsum(1) - 1).clamp_min(0),  # padding stands on the left
        use_cache=True,
    )
    cache = getattr(prompt, "past_key_values", None)
    if cache is None:
        raise InputError(
            f"training.dpo: {type(lm).__name__} keeps no keys and values of a prompt, from which two answers "
            "could go on. Leave the field out."
        )
    cache.batch_repeat_interleave(2)  # in place: row i goes on in rows 2i and 2i + 1
    both = real.repeat_interleave(2, 0)  # (2 x rows, prompt)
    supervises = labels != IGNORED  # (2 x rows, answer)
    answer = lm.base_model(
        input_ids=batch["answer_ids"],
        attention_mask=torch.cat([both, supervises.to(both)], 1),
        position_ids=both.sum(1, keepdim=True) + torch.arange(labels.shape[1], device=both.device),
        past_key_values=cache,
        use_cache=True,
    )
    # The prompt's last state predicts an answer's first token; each of the answer's states predicts the next.
    before = prompt.last_hidden_state[:, -1:].repeat_interleave(2, 0)
    states = torch.cat([before, answer.last_hidden_state[:, :-1]], 1)[supervises]
    losses = cross_entropies(lm, answer, states, labels[supervises], "none")
    sums = torch.zeros(len(labels), device=losses.device).index_add(0, supervises.nonzero()[:, 0], losses)
    return -sums.view(-1, 2)
