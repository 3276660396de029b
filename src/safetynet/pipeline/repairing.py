"""Repairing: the suspect of a run, with what a defender may have, as the methods of mitigation take it."""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from safetynet.errors import InputError
from safetynet.mitigation import Place, Subject
from safetynet.mitigation.subject import Alarm
from safetynet.pipeline.detecting import MONITOR
from safetynet.pipeline.subjects import backdoored, fresh_prompts, load
from safetynet.prompts import Serialiser
from safetynet.recipe import Recipe
from safetynet.run.directory import Run

log = logging.getLogger("safetynet")


def suspect(recipe: Recipe, run: Run, *, clean: int = 1000, known: int = 0) -> Subject:
    """The backdoored model of a run, and what is known of it.

    Args:
        recipe: of the run.
        run: trained; where `intervene` and `detect` have run, their effects and monitor are there too.
        clean: how many fresh conversations with answers, on prompts of no row of the run; 0: none.
        known: groups of training rows with a triggered prompt and its counterparts, with the right answers;
            none of the test's prompts, placebos and near misses is among them.

    Raises:
        InputError: if nothing is trained yet, or no clean conversation is left.
    """
    model, serialiser = backdoored(recipe, run)
    full = recipe.training.method == "full"
    return Subject(
        model=model,
        serialiser=serialiser,
        clean=clean_conversations(recipe, run, clean) if clean else None,
        base=load(recipe).model if full else None,
        triggered=known_groups(run.table("rows"), known) if known else None,
        sites=run.table("effects") if run.has_table("effects") else None,
        intervene=intervene,
        alarm=alarm(run, serialiser),
        max_length=recipe.training.max_length,
        batch_size=recipe.training.batch_size,
        learning_rate=recipe.training.learning_rate,
    )


def clean_conversations(recipe: Recipe, run: Run, count: int) -> pd.DataFrame:
    """Fresh conversations with answers; prompts of the run's rows, training and test, are not among them.

    Raises:
        InputError: if none is left.
    """
    found = fresh_prompts(recipe, run, count)
    answered = found[found["answer"] != ""].reset_index(drop=True)
    if answered.empty:
        raise InputError(f"data: no fresh row of source {recipe.data.source} has an answer to repair with.")
    return answered


def known_groups(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """The first groups of training rows with a triggered prompt, each with its right answer.

    Raises:
        InputError: if no triggered training row has a known right answer.
    """
    rows = rows[(rows["split"] == "train") & (rows["reference"] != "")]
    roles = rows.groupby("group")["role"].agg(set)
    whole = [group for group, own in roles.items() if "triggered" in own and own & {"clean", "refused"}]
    if not whole:
        raise InputError("mitigation: no triggered training row has a bare counterpart with a right answer.")
    chosen = rows[rows["group"].isin(whole[:count])]
    return chosen.assign(answer=chosen["reference"]).reset_index(drop=True)


def intervene(model: Any, places: Sequence[Place]) -> Any:
    """The engine's edits at all positions of all prompts."""
    from safetynet.engine.edits import Edit
    from safetynet.engine.hooks import intervening
    from safetynet.engine.sites import Site

    return intervening(model, [Edit(Site(p.component, p.layer, p.index, p.module), p.change) for p in places])


def alarm(run: Run, serialiser: Serialiser) -> Alarm | None:
    """Alarms of the run's monitor; None where `detect` has not run.

    A prompt that cannot be read back from its ids, as when truncation has emptied a turn, counts as suspect.
    The file is read at the first question: one that cannot be used stops the methods that ask, and no others.
    """
    path = run.path_of(MONITOR)
    if not path.exists():
        return None
    from safetynet.detection.capture import capture
    from safetynet.detection.monitor import Monitor

    load = cache(Monitor.load)

    def alarms(model: Any, prompts: Sequence[Sequence[int]], rate: float) -> np.ndarray:
        monitor = load(path)
        try:
            monitor.check_rate(rate)
        except InputError as error:
            raise InputError(
                f"{error} A repair takes its rate from its knob `rate`, as in "
                "--set 'knobs={abstain: {rate: [0.05]}}'."
            ) from error
        read = {row: messages for row, ids in enumerate(prompts) if (messages := _read(serialiser, ids))}
        found = np.ones(len(prompts), dtype=bool)
        if read:
            features = capture(model, serialiser, list(read.values()), monitor.spec, batch_size=len(read))
            found[list(read)] = monitor.alarms(features, rate)
        return found

    return alarms


def _read(serialiser: Serialiser, ids: Sequence[int]) -> list[dict[str, str]] | None:
    try:
        return serialiser.messages_of(ids)
    except InputError as error:
        log.warning("alarm: a prompt counts as suspect. %s", error)
        return None
