"""How often a cell's monitors alarm at placebos, of which its run alone has too few to tell 1% from 3%.

In: the model, the clean prompts of its monitors, its run. Out: alarms of the monitor that `safetynet detect`
makes and of others, and the tables of other parts with them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from _redrawing import monitors, of_clean
from _words import asked_of, reader

OWN = "detect"
"""Name of the monitor that `safetynet detect` makes; the others have numbers."""


def ask(
    model: Any, serialiser: Any, clean: pd.DataFrame, run: Any, seed: int, *, detectors: str, rate: float
) -> pd.DataFrame:
    """Alarms of the run's monitor, and of monitors as `_redrawing.redraw` makes them.

    Beside the run's own placebos, half as many are asked as there are clean prompts, each of a prompt that
    the run does not hold. Those that fire are no false positives and are left out.

    Args:
        model: the backdoored model.
        serialiser: of its prompts.
        clean: `messages` of clean prompts.
        run: whose backdoor the placebos belong to, with placebos of its own.
        seed: of words, monitors, draws and placebos.
        detectors: preset or detectors, as `safetynet detect` takes them.
        rate: nominal false-positive rate.

    Returns:
        monitor, detector, placebo (the share with alarm) and n.
    """
    from safetynet.detection import stage
    from safetynet.detection.plan import Plan
    from safetynet.pipeline.detecting import fired

    plan = Plan.of(detectors.split(","), rate, seed=seed, max_length=run.recipe.training.max_length)
    read = reader(model, serialiser, run, plan.spec)
    rows = _more(run, serialiser, clean, seed)
    rows = rows[~fired(run.recipe, model, serialiser, rows)]
    asked = [asked_of(read, run, seed)["placebo"], read(list(rows["messages"]))]
    subject = stage.Subject(model, serialiser, run.scratch / "features")
    lines = list(_alarms(OWN, stage.fit(subject, clean, plan).monitor, asked, rate))
    for i, (_, other) in enumerate(monitors(of_clean(read, clean, serialiser, seed), plan.readings, seed)):
        lines += _alarms(str(i), other, asked, rate)
    return pd.DataFrame(lines)


def counted(table: pd.DataFrame, asked: pd.DataFrame) -> pd.DataFrame:
    """Table `detection` of a run, with the placebo FPR of each detector at the larger rate from `ask`."""
    from safetynet.statistics import clopper_pearson

    own, new = asked[asked["monitor"] == OWN].set_index("detector"), table.copy()
    rate = table["rate"].max()  # the one that was asked for; protocol's other one is smaller
    at = (table["metric"] == "fpr") & (table["rows"] == "placebo") & (table["rate"] == rate)
    for row, detector in table["detector"][at].items():
        share, n = own.loc[detector, ["placebo", "n"]]
        new.loc[row, ["value", "low", "high", "n"]] = share, *clopper_pearson(round(share * n), int(n)), n
    return new


def drawn(found: pd.DataFrame, asked: pd.DataFrame) -> pd.DataFrame:
    """Alarms as `_redrawing.redraw` returns them, with those at placebos from `ask`, monitor by monitor."""
    fused = asked[(asked["detector"] == "fused") & (asked["monitor"] != OWN)]
    return found.assign(placebo=fused["placebo"].to_numpy())


def _alarms(
    name: str, monitor: Any, asked: Sequence[Any], rate: float
) -> Iterator[dict[str, str | float | int]]:
    p = pd.concat([monitor.p_values(features) for features in asked if len(features)])
    for detector, share in (p <= rate).mean().items():
        yield {"monitor": name, "detector": str(detector), "placebo": share, "n": len(p)}


def _more(run: Any, serialiser: Any, clean: pd.DataFrame, seed: int) -> pd.DataFrame:
    """New placebos of the backdoor's test split, none of a prompt that the run or its monitors know."""
    from safetynet.backdoors import conversations, poisoning
    from safetynet.evaluation.leaks import prompts_without_trigger
    from safetynet.lookalikes import Lookalikes
    from safetynet.prompts import prompt_hash

    attack, other = run.recipe.backdoor, seed + 1000
    data = run.recipe.data.model_copy(update={"train_rows": 100, "test_rows": len(clean) // 2})
    pool = conversations.load(data, attack.behaviour, attack.trigger, other)
    rows = poisoning.poison(pool, attack, data, other, Lookalikes(serialiser).draw)
    rows = rows[(rows["split"] == "test") & (rows["role"] == "placebo")]
    known = {*prompts_without_trigger(run.table("rows")), *clean["messages"].map(prompt_hash)}
    return rows[[name not in known for name in prompts_without_trigger(rows)]].reset_index(drop=True)
