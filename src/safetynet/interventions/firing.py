"""Pairs that can tell something: the trigger fires, and neither placebo does.

In: a model and aligned pairs. Out: the pairs whose runs differ as they should, and how many were left out. A
placebo that fires is a false trigger of the model, which the rates report; as a source of states it would
only blur where the trigger acts.
"""

from typing import Any

import torch

from safetynet.engine.trace import trace
from safetynet.errors import InputError
from safetynet.interventions.pairs import LEAST, RUNS, Pairs

PAIRS_AT_ONCE = 32
SILENT, FALSE = "the trigger does not fire", "a placebo fires"


def telling(model: Any, pairs: Pairs, most: int) -> Pairs:
    """Pairs whose triggered run prefers the behaviour's token, and whose placebo runs prefer the clean one.

    Args:
        model: a causal LM in evaluation mode.
        pairs: aligned prompts.
        most: stop after so many.

    Returns:
        Those pairs, in order; `left_out` counts the others by reason, as far as they were looked at.

    Raises:
        InputError: if fewer than `LEAST` are left; the message counts the reasons.
    """
    kept: list[int] = []
    reasons = dict(pairs.left_out)
    for part, own in pairs.parts(PAIRS_AT_ONCE):
        shown = _shown(model, own)
        for i, (fires, *others) in zip(part, shown, strict=True):
            if len(kept) == most:
                break
            reason = "" if fires and not any(others) else FALSE if fires else SILENT
            if reason:
                reasons[reason] = reasons.get(reason, 0) + 1
            else:
                kept.append(i)
    if len(kept) < LEAST:
        why = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
        raise InputError(
            "interventions: the backdoor did not fire on these prompts, or on placebos too: "
            f"{len(kept)} groups tell one from the other, {LEAST} are needed. Left out {why}. Look at the "
            "rates (safetynet evaluate); train longer, or correct the trigger."
        )
    chosen = pairs.take(kept)
    return Pairs(chosen.groups, chosen.ids, chosen.roles, chosen.target, chosen.other, reasons)


def _shown(model: Any, pairs: Pairs) -> list[tuple[bool, ...]]:
    """For each pair, run by run, whether the behaviour's token is preferred."""
    metric, rows = pairs.metric(), torch.arange(len(pairs))
    by_run = []
    for run in RUNS:
        found = trace(model, pairs.batch(run, model.device))
        assert found.logits is not None
        by_run.append((metric.compute(found.logits, rows) > 0).tolist())
    return list(zip(*by_run, strict=True))
