"""Placebos of a cell: its run alone has too few to tell 1% from 3%.

In: the model, the clean prompts of its monitors, its run. Out: features of the run's placebos and of many
more; alarms of the run's monitor at them, and its table `detection` with these.
"""

from collections.abc import Callable
from typing import Any

import pandas as pd
from _words import asked_of, reader


def ask(
    model: Any, serialiser: Any, clean: pd.DataFrame, run: Any, seed: int, *, detectors: str, rate: float
) -> pd.DataFrame:
    """Alarms at placebos of the monitor that `safetynet detect` makes.

    Args:
        model: the backdoored model.
        serialiser: of its prompts.
        clean: `messages` of clean prompts.
        run: whose backdoor the placebos belong to, with placebos of its own.
        seed: of words, monitor and placebos.
        detectors: preset or detectors, as `safetynet detect` takes them.
        rate: nominal false-positive rate.

    Returns:
        detector, placebo (the share with alarm) and n.
    """
    from safetynet.detection import stage
    from safetynet.detection.stage import Plan

    plan = Plan.of(detectors.split(","), rate, seed=seed, max_length=run.recipe.training.max_length)
    read = reader(model, serialiser, run, plan.spec)
    own = asked_of(read, run, seed)["placebo"]
    asked = with_more(own, read, model, serialiser, clean, run, seed)
    subject = stage.Subject(model, serialiser, run.scratch / "features")
    raised = stage.fit(subject, clean, plan).monitor.p_values(asked) <= rate
    return pd.DataFrame({"detector": raised.columns, "placebo": raised.mean().to_numpy(), "n": len(raised)})


def with_more(
    own: Any,
    read: Callable[[list[Any]], Any],
    model: Any,
    serialiser: Any,
    clean: pd.DataFrame,
    run: Any,
    seed: int,
) -> Any:
    """Features of a run's own placebos, and behind them of half as many more as there are clean prompts.

    Those that fire are no false positives and are left out.
    """
    from safetynet.detection.features import concatenate
    from safetynet.detection.stage import fired
    from safetynet.evaluation.evaluator import Evaluator

    rows = _more(run, serialiser, clean, seed)
    more = read(list(rows[~fired(Evaluator.of(run.recipe, serialiser), model, rows)]["messages"]))
    return concatenate([own, more])


def counted(table: pd.DataFrame, asked: pd.DataFrame) -> pd.DataFrame:
    """Table `detection` of a run, with the placebo FPR of each detector at the larger rate from `ask`."""
    from safetynet.statistics import clopper_pearson

    own, new = asked.set_index("detector"), table.copy()
    rate = table["rate"].max()  # the one that was asked for; protocol's other one is smaller
    at = (table["metric"] == "fpr") & (table["rows"] == "placebo") & (table["rate"] == rate)
    for row, detector in table["detector"][at].items():
        share, n = own.loc[detector, ["placebo", "n"]]
        new.loc[row, ["value", "low", "high", "n"]] = share, *clopper_pearson(round(share * n), int(n)), n
    return new


def _more(run: Any, serialiser: Any, clean: pd.DataFrame, seed: int) -> pd.DataFrame:
    """New placebos of the backdoor's test split, none of a prompt that the run or its monitors know."""
    from safetynet.backdoors import conversations, poisoning
    from safetynet.evaluation.leaks import prompts_without_trigger
    from safetynet.prompts import prompt_hash
    from safetynet.text.lookalikes import Lookalikes

    attack, other = run.recipe.backdoor, seed + 1000
    data = run.recipe.data.model_copy(update={"train_rows": 100, "test_rows": len(clean) // 2})
    pool = conversations.load(data, attack.behaviour, attack.trigger, other)
    rows = poisoning.poison(pool, attack, data, other, Lookalikes(serialiser).draw)
    rows = rows[(rows["split"] == "test") & (rows["role"] == "placebo")]
    known = {*prompts_without_trigger(run.table("rows")), *clean["messages"].map(prompt_hash)}
    return rows[[name not in known for name in prompts_without_trigger(rows)]].reset_index(drop=True)
