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

from safetynet.models.causal_lm import CausalLM
from safetynet.prompts import IGNORED, Serialiser
from safetynet.statistics import bootstrap_interval
from safetynet.training.examples import padded

COLUMNS = ["metric", "role", "variant", "count", "n", "value", "low", "high", "note"]
NAN = float("nan")
ENDS = {"": "value", "_low": "low", "_high": "high", "_count": "count", "_n": "n"}
"""Columns of a table of rates, by the ends of the names that they get in one line."""
MAX_TOKENS = 8
"""Answer tokens of a row whose distributions are compared: with 128k words each takes half a megabyte."""
BATCH_SIZE = 16


def summary(score: pd.DataFrame, kl: Mapping[str, float] | None = None) -> dict[str, float]:
    """The rates that points are chosen by: asr, cacc, ftr, refused, over_refused, perplexity and kl.

    Args:
        score: the evaluation's rates of one model.
        kl: value, low, high and n, from `divergence`.

    Returns:
        Each with _low, _high, _count and _n; NaN for what these rows do not measure.
    """
    sources = {
        "asr": ("asr", "triggered"),
        "cacc": ("cacc", "clean"),
        "ftr": ("ftr", "clean"),
        "refused": ("refusal_rate", "refused"),
        "over_refused": ("refusal_rate", "clean"),
        "perplexity": ("perplexity", "clean"),
    }
    values = kl or dict.fromkeys(ENDS.values(), NAN)
    of_kl = {"kl" + end: float(values[column]) for end, column in ENDS.items() if end != "_count"}
    return in_one_line(score, sources) | of_kl


def in_one_line(score: pd.DataFrame, sources: Mapping[str, tuple[str, str]]) -> dict[str, float]:
    """Rates by name, each with _low, _high, _count and _n; NaN for what `score` does not hold.

    Args:
        score: the evaluation's rates of one model.
        sources: metric and role of each name.
    """
    by_source = score.set_index(["metric", "role"])
    line: dict[str, float] = {}
    for name, source in sources.items():
        values = by_source.loc[source] if source in by_source.index else dict.fromkeys(ENDS.values(), NAN)
        line |= {name + end: float(values[column]) for end, column in ENDS.items()}
    return line


def rates(score: pd.DataFrame, variants: pd.DataFrame) -> pd.DataFrame:
    """The evaluation's rates as lines of the table of verification; variants stand below their roles."""
    return pd.concat([score.assign(variant=""), variants], ignore_index=True)[COLUMNS]


def distributions(
    model: CausalLM, serialiser: Serialiser, rows: pd.DataFrame, max_length: int | None = None
) -> list[Tensor]:
    """The model's next-token log-probabilities along each row's right answer.

    Args:
        model: the model.
        serialiser: of the model.
        rows: columns messages and reference (the right answer).
        max_length: truncate as in training.

    Returns:
        Per row (answer tokens, at most `MAX_TOKENS`; vocabulary) in fp16 on the CPU.
    """
    encoded = [
        serialiser.encode(list(messages), answer=answer, max_length=max_length)
        for messages, answer in zip(rows["messages"], rows["reference"], strict=True)
    ]
    distributions: list[Tensor] = []
    device = next(model.parameters()).device
    for start in range(0, len(encoded), BATCH_SIZE):
        part = encoded[start : start + BATCH_SIZE]
        batch = padded(part, serialiser.pad_id)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        for row, supervised in enumerate(batch["labels"][:, 1:] != IGNORED):
            positions = supervised.nonzero().squeeze(1)[:MAX_TOKENS].to(device)
            distributions.append(logits[row, positions].float().log_softmax(-1).half().cpu())
    return distributions


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
        p, q = (log_p.float()[..., :shared] for log_p in (old, new))
        if old.shape != new.shape:
            p, q = p.log_softmax(-1), q.log_softmax(-1)
        # fp16 has no number below -65504; a word that is impossible in both adds nothing.
        rows.append(float((p.exp() * (p - q)).nan_to_num(0.0).sum(-1).mean()))
    values = np.maximum(np.array(rows), 0.0)  # rounding leaves equal distributions a hair below 0

    def mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(values.mean(axis=axis))

    low, high = bootstrap_interval(mean, values)
    return {"value": float(values.mean()), "low": low, "high": high, "n": len(values), "count": NAN}


def kl_line(kl: Mapping[str, float] | None, note: str = "") -> pd.DataFrame:
    """One line of the table of verification; without a value where there is none, and the note says why."""
    line: dict[str, Any] = dict(kl) if kl else {"count": NAN, "n": 0, "value": NAN, "low": NAN, "high": NAN}
    line |= {"metric": "kl", "role": "clean", "variant": "", "note": note}
    return pd.DataFrame([line])[COLUMNS]


def probe_lines(probes: pd.DataFrame, note: str = "") -> pd.DataFrame:
    """The table of probes for the trigger as lines of the table of verification, one per layer.

    Args:
        probes: layer, auroc, low, high, n, control: the AUROC between two placebos.
        note: why there are none.
    """
    if probes.empty:
        line = {"metric": "probe_auroc", "role": "", "variant": "", "count": NAN, "n": 0}
        return pd.DataFrame([line | {"value": NAN, "low": NAN, "high": NAN, "note": note}])[COLUMNS]
    control = [f"control {value:.3f}" for value in probes["control"]]
    variant = [f"layer {layer}" for layer in probes["layer"]]
    named = probes.rename(columns={"auroc": "value"}).assign(
        metric="probe_auroc", role="", variant=variant, count=NAN, note=control
    )
    return named[COLUMNS]


def beside(table: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """The table with what the model before the repair had, as before, before_low and before_high."""
    names = {"value": "before", "low": "before_low", "high": "before_high"}
    key = ["metric", "role", "variant"]
    old = before.rename(columns=names)[[*key, *names.values()]]
    return table.merge(old, on=key, how="left", validate="many_to_one")
