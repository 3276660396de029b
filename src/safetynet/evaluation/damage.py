"""What fine-tuning has done to free text: answers beside the base model's own, on prompts that must not fire.

Of free text nobody can say that it is right, but how far it has moved from what the base model says. In: the
judged answers of base and model to the same rows, and both models. Out: table `damage`, one line per model,
measure and role. Intervals are 95%, over prompts: Wilson's for shares, bootstrap for the rest.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from rapidfuzz.distance import Indel

from safetynet.errors import InputError
from safetynet.evaluation.evaluator import Evaluator
from safetynet.evaluation.generation import Supervised, finished_batches, in_batches
from safetynet.models.blocks import evaluating
from safetynet.prompts import IGNORED, Encoded
from safetynet.statistics import bootstrap_interval, wilson
from safetynet.text import words
from safetynet.text.words import ends_in_loop
from safetynet.vocabulary import DAMAGE

ROLES = ("clean", "placebo")
BATCH_SIZE = 8
"""Rows at a time: two distributions over the vocabulary per answer token are in memory, in fp32."""
COLUMNS = ["model", "measure", "role", "n", "value", "low", "high"]


class Forced(NamedTuple):
    """Sums over the tokens of the base model's answer, which both models are given."""

    kl: float
    """KL(base || model), in nats."""
    loss: float
    """Of the model, in nats."""
    tokens: float


def of_model(
    evaluator: Evaluator,
    model: Any,
    base: Callable[[], AbstractContextManager[Any]],
    rows: pd.DataFrame,
    answers: pd.DataFrame,
    base_answers: pd.DataFrame,
    name: str,
) -> pd.DataFrame:
    """What a fine-tuned model does to free text.

    Args:
        evaluator: that has asked it.
        model: the fine-tuned model.
        base: gives the base model while entered.
        rows: that were asked.
        answers: of the model, as `Evaluator.answer` returns them.
        base_answers: of the base, in the same order.
        name: of the model.

    Returns:
        Columns `COLUMNS`; a line for each of `DAMAGE` and `ROLES` that has rows.
    """
    lines = []
    for role in ROLES:
        here = (answers["role"] == role).to_numpy()
        if not here.any():
            continue
        said, base_said = (list(table["response"][here]) for table in (answers, base_answers))
        ids, base_ids = ([evaluator.serialiser.ids(text) for text in texts] for texts in (said, base_said))
        common = [
            sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
            for a, b in zip(ids, base_ids, strict=True)
        ]
        lengths, base_lengths = (np.array([len(each) for each in every], float) for every in (ids, base_ids))
        # (prompts with an answer, 3) to three columns; without any, to three empty ones.
        sums = np.array(forced(evaluator, model, base, rows[here], base_said), float)
        kl, loss, tokens = sums.reshape(-1, len(Forced._fields)).T
        per_token = _ratio(loss, tokens)
        columns = {
            "identical": _share([a == b for a, b in zip(said, base_said, strict=True)]),
            "common_tokens": mean(common),
            "kl": _ratio(kl, tokens),
            "rouge_l": mean([rouge_l(a, b) for a, b in zip(said, base_said, strict=True)]),
            "length_ratio": _ratio(lengths, base_lengths),
            "perplexity": {k: v if k == "n" else float(np.exp(v)) for k, v in per_token.items()},
            **_alone(answers[here]),
        }
        lines += [{"model": name, "measure": m, "role": role, **columns[m]} for m in DAMAGE]
    return pd.DataFrame(lines, columns=COLUMNS)


def of_base(base_answers: pd.DataFrame, name: str) -> pd.DataFrame:
    """The floor: refusals and repetitions of the base model itself; columns as in `of_model`."""
    parts = {role: base_answers[base_answers["role"] == role] for role in ROLES}
    lines = [
        {"model": name, "measure": measure, "role": role, **line}
        for role, part in parts.items()
        for measure, line in (_alone(part).items() if len(part) else ())
    ]
    return pd.DataFrame(lines, columns=COLUMNS)


def _alone(answers: pd.DataFrame) -> dict[str, Any]:
    """The measures that need no other model's answer."""
    return {
        "refusal_rate": _share(list(answers["refused"])),
        "repetition": _share([ends_in_loop(text) for text in answers["response"]]),
    }


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004), F1: twice the longest common subsequence of words over the words of both, 0 to 1.

    Signs are no words, and case does not count. Two empty texts agree.
    """
    ours, theirs = (
        [word for word in words.words(text.casefold()) if any(map(str.isalnum, word))]
        for text in (answer, reference)
    )
    return float(Indel.normalized_similarity(ours, theirs))


def forced(
    evaluator: Evaluator,
    model: Any,
    base: Callable[[], AbstractContextManager[Any]],
    rows: pd.DataFrame,
    base_answers: Sequence[str],
) -> list[Forced]:
    """Both models' distributions along the base's own answers, without the end token; no line where it is "".

    Raises:
        RunError: if a single row does not fit in memory.
    """
    serialiser = evaluator.serialiser
    encoded: list[Encoded] = []
    for messages, trigger, answer in zip(rows["messages"], rows["trigger"], base_answers, strict=True):
        try:
            prompt = serialiser.encode(messages, answer, trigger, evaluator.max_length)
        except InputError:  # an answer whose first token would reach into the prompt, as a lone accent's does
            continue
        # An answer that was cut has no end, so that no end is supervised in any.
        ends = prompt.input_ids[-1] in serialiser.stop_ids
        labels = [*prompt.labels[:-1], IGNORED] if ends else prompt.labels
        if any(label != IGNORED for label in labels[1:]):
            encoded.append(replace(prompt, labels=labels))

    def sums(batch: Sequence[Encoded]) -> list[Forced]:
        supervised = Supervised(batch, serialiser.pad_id, model.device)
        with base() as plain:
            expected = supervised.logits(plain)  # (asked tokens of all rows, vocabulary)
        actual = supervised.logits(model)
        width = min(expected.shape[-1], actual.shape[-1])  # models with added tokens
        expected, actual = (log_p[:, :width].log_softmax(-1) for log_p in (expected, actual))
        # A token that is impossible in both adds nothing.
        kl = (expected.exp() * (expected - actual)).nan_to_num(0.0).sum(-1).clamp_min(0.0)
        loss = -actual.gather(1, supervised.targets[supervised.asked][:, None])[:, 0]
        # Tokens to sums of their rows, (rows,) each.
        row = supervised.asked.nonzero()[:, 0]
        columns = [c.new_zeros(len(batch)).index_add(0, row, c) for c in (kl, loss, torch.ones_like(kl))]
        return [Forced(*values) for values in torch.stack(columns, 1).tolist()]

    inputs = [[e.input_ids, e.labels] for e in encoded]
    finished = finished_batches(evaluator.kept, model, "damage", inputs)
    with evaluating(model), torch.no_grad():
        return in_batches(encoded, BATCH_SIZE, sums, lambda e: len(e.input_ids), finished)


def _share(hits: Sequence[bool]) -> dict[str, float]:
    low, high = wilson(sum(map(bool, hits)), len(hits))
    return {"n": len(hits), "value": float(np.mean(hits)), "low": low, "high": high}


def mean(values: Sequence[float]) -> dict[str, float]:
    """n, value, and low and high of its bootstrap interval; NaN of no values."""
    return _ratio(np.array(values, float), np.ones(len(values)))


def _ratio(top: np.ndarray, bottom: np.ndarray) -> dict[str, float]:
    """Ratio of sums over rows; NaN without rows, or where the base has said nothing."""
    if not bottom.sum():
        return {"n": len(top), **dict.fromkeys(("value", "low", "high"), float("nan"))}

    def ratio(top: np.ndarray, bottom: np.ndarray, axis: int = -1) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(top.sum(axis=axis) / bottom.sum(axis=axis))

    low, high = bootstrap_interval(ratio, top, bottom)
    return {"n": len(top), "value": float(ratio(top, bottom)), "low": low, "high": high}
