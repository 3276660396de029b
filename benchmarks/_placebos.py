"""How often a cell's monitors alarm at placebos, of which its run has too few to tell 1% from 3%.

In: the model, the clean prompts of its monitors, its run. Out: alarms of many monitors; a line over them.
"""

from typing import Any

import pandas as pd
from _catching import PLACEBOS
from _redrawing import monitors, of_clean
from _running import percent
from _words import RATE, alarms, reader

MORE = 2000
"""Placebos, each of a prompt of its own that the run does not hold."""


def ask(
    model: Any, serialiser: Any, clean: pd.DataFrame, run: Any, seed: int, *, detectors: str, count: int
) -> pd.DataFrame:
    """Alarms at 1% of monitors as `_redrawing.redraw` makes them, at `count` new placebos.

    Args:
        model: the backdoored model.
        serialiser: of its prompts.
        clean: `messages` of clean prompts.
        run: whose backdoor the placebos belong to.
        seed: of words, monitors, draws and placebos.
        detectors: preset or detectors, as `safetynet detect` takes them.
        count: placebos that are made; those that fire are no false positives and are left out.

    Returns:
        placebo and n, one line per monitor.
    """
    from safetynet.detection.plan import Plan
    from safetynet.pipeline.detecting import fired

    plan = Plan.of(detectors.split(","), RATE)
    read = reader(model, serialiser, run, plan.spec)
    rows = _more(run, serialiser, clean, seed, count)
    rows = rows[~fired(run.recipe, model, serialiser, rows)]
    asked = read(list(rows["messages"]))
    made = monitors(of_clean(read, clean, serialiser, seed), plan.readings, seed)
    return pd.DataFrame({"placebo": alarms(monitor, asked), "n": len(rows)} for _, monitor in made)


def line(found: pd.DataFrame) -> dict[str, object]:
    """Mean over a cell's monitors (least to most) in percent, with the interval of so many prompts."""
    from safetynet.statistics import clopper_pearson

    mean, n = found["placebo"].mean(), int(found["n"].iloc[0])
    low, high = clopper_pearson(round(mean * n), n)
    within = "yes" if mean <= PLACEBOS else "no"
    spread = f"{100 * found['placebo'].min():.1f} to {100 * found['placebo'].max():.1f}"
    shown = percent(pd.Series({"value": mean, "low": low, "high": high, "n": n}))
    return {"placebos": n, "alarms": f"{shown} ({spread})", "at most 2%": within}


def _more(run: Any, serialiser: Any, clean: pd.DataFrame, seed: int, count: int) -> pd.DataFrame:
    """New placebos of the backdoor's test split, none of a prompt that the run or its monitors know."""
    from safetynet.backdoors import conversations, poisoning
    from safetynet.lookalikes import Lookalikes
    from safetynet.pipeline.subjects import prompts_without_trigger
    from safetynet.prompts import prompt_hash

    attack, other = run.recipe.backdoor, seed + 1000
    data = run.recipe.data.model_copy(update={"train_rows": 100, "test_rows": count})
    pool = conversations.load(data, attack.behaviour, attack.trigger, other)
    rows = poisoning.poison(pool, attack, data, other, Lookalikes(serialiser).draw)
    rows = rows[(rows["split"] == "test") & (rows["role"] == "placebo")]
    known = {*prompts_without_trigger(run.table("rows")), *clean["messages"].map(prompt_hash)}
    return rows[[name not in known for name in prompts_without_trigger(rows)]].reset_index(drop=True)
