"""What a repaired model does and what it still knows, beside the model before the repair.

In: answers of both, judged, on rows that no choice was made on. Out: tables, one row per measurement with
count and interval. The rates are the evaluation's own; here they are put side by side, and two
measurements are added that need no judge: how far the clean answers' distributions have moved, and whether
the trigger can still be read from the states inside.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from safetynet.prompts import IGNORED, Serialiser, pad
from safetynet.statistics import bootstrap_interval

COLUMNS = ["metric", "role", "variant", "count", "n", "value", "low", "high", "note"]
MOST_TOKENS = 8
"""Answer tokens of a row whose distributions are compared: with 128k words each takes half a megabyte."""
AT_ONCE = 16


def summary(score: pd.DataFrame, kl: Mapping[str, float] | None = None) -> dict[str, float]:
    """The rates that points are chosen by: asr, cacc, ftr, refused, over_refused, perplexity and kl.

    Args:
        score: the evaluation's rates of one model.
        kl: value, low, high and n, from `divergence`.

    Returns:
        Each with _low, _high, _count and _n; NaN for what these rows cannot tell.
    """
    places = {
        "asr": ("asr", "triggered"),
        "cacc": ("cacc", "clean"),
        "ftr": ("ftr", "clean"),
        "refused": ("refusal_rate", "refused"),
        "over_refused": ("refusal_rate", "clean"),
        "perplexity": ("perplexity", "clean"),
    }
    by_place = score.set_index(["metric", "role"])
    line: dict[str, float] = {}
    for name, place in places.items():
        found = by_place.loc[place] if place in by_place.index else None
        for end, column in (
            ("", "value"),
            ("_low", "low"),
            ("_high", "high"),
            ("_count", "count"),
            ("_n", "n"),
        ):
            line[name + end] = float("nan") if found is None else float(found[column])
    for end, column in (("", "value"), ("_low", "low"), ("_high", "high"), ("_n", "n")):
        line["kl" + end] = float("nan") if kl is None else float(kl[column])
    return line


def rates(score: pd.DataFrame, variants: pd.DataFrame) -> pd.DataFrame:
    """The evaluation's rates in the form of the table of verification; variants stand beside their roles."""
    whole = score.assign(variant="")
    return pd.concat([whole, variants], ignore_index=True)[COLUMNS]


def distributions(
    model: Any, serialiser: Serialiser, rows: pd.DataFrame, max_length: int | None = None
) -> list[Tensor]:
    """The model's next-token log-probabilities along each row's right answer.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        serialiser: of the model.
        rows: columns messages and reference (the right answer).
        max_length: truncate as in training.

    Returns:
        Per row (answer tokens, at most `MOST_TOKENS`; vocabulary) in fp16 on the CPU.
    """
    encoded = [
        serialiser.encode(list(messages), answer=answer, max_length=max_length)
        for messages, answer in zip(rows["messages"], rows["reference"], strict=True)
    ]
    found: list[Tensor] = []
    device = next(model.parameters()).device
    for start in range(0, len(encoded), AT_ONCE):
        part = encoded[start : start + AT_ONCE]
        labels = pad([e.labels for e in part], IGNORED, "right")[:, 1:]
        mask = pad([[1] * len(e.input_ids) for e in part], 0, "right").to(device)
        ids = pad([e.input_ids for e in part], serialiser.pad_id, "right").to(device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        for row, wanted in enumerate(labels != IGNORED):
            positions = wanted.nonzero().squeeze(1)[:MOST_TOKENS].to(device)
            found.append(logits[row, positions].float().log_softmax(-1).half().cpu())
    return found


def divergence(before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, float]:
    """Kullback-Leibler divergence, KL(before || after), of the clean answers' next-token distributions.

    Of models with vocabularies of different sizes, the tokens that both have are compared.

    Args:
        before: from `distributions`, of the model before the repair.
        after: of the repaired one, on the same rows.

    Returns:
        value: mean over rows of the mean over tokens, in nats; low, high: 95% bootstrap over rows; n: rows.
    """
    rows = []
    for old, new in zip(before, after, strict=True):
        shared = min(old.shape[-1], new.shape[-1])
        p, q = (found.float()[..., :shared] for found in (old, new))
        if old.shape != new.shape:
            p, q = p.log_softmax(-1), q.log_softmax(-1)
        # fp16 has no number below -65504; a word that is impossible in both adds nothing.
        rows.append(float((p.exp() * (p - q)).nan_to_num(0.0).sum(-1).mean()))
    values = np.maximum(np.array(rows), 0.0)  # rounding leaves equal distributions a hair below 0

    def mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(values.mean(axis=axis))

    low, high = bootstrap_interval(mean, values)
    return {"value": float(values.mean()), "low": low, "high": high, "n": len(values), "count": float("nan")}


def kl_line(kl: Mapping[str, float] | None, note: str = "") -> pd.DataFrame:
    """One line of the table of verification; without a value where there is none, and the note says why."""
    nan = float("nan")
    line: dict[str, Any] = dict(kl) if kl else {"count": nan, "n": 0, "value": nan, "low": nan, "high": nan}
    line |= {"metric": "kl", "role": "clean", "variant": "", "note": note}
    return pd.DataFrame([line])[COLUMNS]


def probe_lines(probes: pd.DataFrame, note: str = "") -> pd.DataFrame:
    """The table of probes for the trigger as lines of the table of verification, one per layer.

    Args:
        probes: layer, auroc, low, high, n, control: what tells two placebos apart equally well.
        note: why there are none.
    """
    if probes.empty:
        nan = float("nan")
        line = {"metric": "probe_auroc", "role": "", "variant": "", "count": nan, "n": 0}
        return pd.DataFrame([line | {"value": nan, "low": nan, "high": nan, "note": note}])[COLUMNS]
    control = [f"control {value:.3f}" for value in probes["control"]]
    variant = [f"layer {layer}" for layer in probes["layer"]]
    named = probes.rename(columns={"auroc": "value"}).assign(
        metric="probe_auroc", role="", variant=variant, count=float("nan"), note=control
    )
    return named[COLUMNS]


def beside(table: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """The table with what the model before the repair had, as before, before_low and before_high."""
    names = {"value": "before", "low": "before_low", "high": "before_high"}
    key = ["metric", "role", "variant"]
    old = before.rename(columns=names)[[*key, *names.values()]]
    return table.merge(old, on=key, how="left", validate="many_to_one")
