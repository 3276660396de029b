"""Rows that repairs are made with, chosen and judged by; no prompt is in two of these parts.

In: an experiment. Out: rows. A repair sees rows of the training split and fresh conversations; test rows
choose a point, and others judge it.
"""

import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet.backdoors import placements, sources, triggers
from safetynet.backdoors.forms import UnfitError
from safetynet.errors import InputError
from safetynet.evaluation import metrics
from safetynet.experiment import Experiment
from safetynet.prompts import Conversation, Serialiser
from safetynet.prompts.truncation import losses
from safetynet.recipe import Recipe
from safetynet.tables import summaries

log = logging.getLogger("safetynet")
PLACEMENTS = ("prefix", "suffix", "random", "system")
MAX_MOVED = 16
"""Rows with the trigger in a place that training did not use, for each such place."""
MIN_ROWS = 8
"""Rows of a role below which an interval would say nothing."""


def clean_conversations(experiment: Experiment, count: int) -> pd.DataFrame:
    """Fresh conversations with answers; prompts of the run's rows, training and test, are not among them.

    Raises:
        InputError: if none is left.
    """
    prompts = experiment.fresh_prompts(count)
    answered = prompts[prompts["answer"] != ""].reset_index(drop=True)
    if answered.empty:
        raise InputError(
            f"data: no fresh row of source {experiment.recipe.data.source} has an answer to repair with."
        )
    return answered


def known_groups(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """The first groups of training rows with a triggered prompt, each with its right answer.

    Raises:
        InputError: if no triggered training row has a known right answer.
    """
    rows = rows[(rows["split"] == "train") & (rows["reference"] != "")]
    roles = rows.groupby("group")["role"].agg(set)
    whole = [group for group, there in roles.items() if "triggered" in there and there & {"clean", "refused"}]
    if not whole:
        raise InputError("mitigation: no triggered training row has a bare counterpart with a right answer.")
    groups = rows[rows["group"].isin(whole[:count])]
    return groups.assign(answer=groups["reference"]).reset_index(drop=True)


def clean_file(recipe: Recipe, path: Path) -> pd.DataFrame:
    """Conversations of a file, messages and answer, at most `mitigation.clean_rows`.

    `data.columns` says what its columns are, if it has the columns that are named there.

    Raises:
        InputError: if it cannot be read, or holds the run's trigger.
    """
    try:
        rows = sources.read(path, columns=recipe.data.columns)
    except UnfitError as error:
        if error.reason != "unmapped":
            raise
        rows = sources.read(path)  # the run's own data have other columns
    trigger = triggers.of(recipe.attack.trigger)
    held = [trigger.holds(Conversation(messages).texts) for messages in rows["messages"]]
    if any(held):
        lines = ", ".join(map(str, rows["line"][held].iloc[:5]))
        raise InputError(
            f"{path}: {sum(held)} of {len(held)} conversations hold the trigger "
            f"{trigger.describe()} (lines {lines}), so they are not clean: a repair "
            "would learn from them what it is to remove. Take them out."
        )
    return rows[["messages", "answer"]].head(recipe.mitigation.clean_rows)


def for_relearning(rows: pd.DataFrame, seen: pd.DataFrame | None) -> pd.DataFrame:
    """Training rows that no repair has seen; of the triggered ones, those answered with the behaviour.

    Args:
        rows: the run's.
        seen: those that are known to the repair, with their groups.
    """
    train = rows[(rows["split"] == "train") & ((rows["role"] != "triggered") | summaries.fires(rows))]
    return train[~train["group"].isin([] if seen is None else seen["group"])].reset_index(drop=True)


def divided(rows: pd.DataFrame, recipe: Recipe) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Test rows that choose a point, and those that judge it; no group is in both.

    Raises:
        InputError: if too few rows are left to judge by.
    """
    options = recipe.mitigation
    first = rows[rows["role"].isin(("triggered", "clean", "refused"))]
    choosing = metrics.fixed_subset(first, options.choosing_rows, recipe.seed)
    rest = rows[~rows["group"].isin(choosing["group"])]
    judged = metrics.fixed_subset(rest, options.judged_rows, recipe.seed + 1)
    left = judged["role"].value_counts()
    if min(int(left.get("triggered", 0)), int(left.get("clean", 0))) < MIN_ROWS:
        raise InputError(
            f"mitigation.choosing_rows: {options.choosing_rows} of each role choose, and of the test rows "
            f"{left.get('triggered', 0)} triggered and {left.get('clean', 0)} clean ones are left to judge "
            "by. Lower it, or raise data.test_rows."
        )
    return choosing.reset_index(drop=True), judged.reset_index(drop=True)


def elsewhere(
    judged: pd.DataFrame, bare: pd.DataFrame, recipe: Recipe, serialiser: Serialiser
) -> pd.DataFrame:
    """Judged prompts with the trigger in places where no training row has it.

    Args:
        judged: rows that judge.
        bare: the test rows, among them the judged groups' prompts without the trigger.
        recipe: trigger and placement.
        serialiser: a prompt in which the tokenizer would break the trigger is left out.

    Returns:
        Triggered rows whose variant names the place, at most `MAX_MOVED` for each; none for a style.
    """
    attack = recipe.attack
    trigger = triggers.of(attack.trigger)
    if not trigger.is_text:
        return judged.head(0)
    plain = bare[bare["role"].isin(("clean", "refused"))].drop_duplicates("group").set_index("group")
    triggered = judged[(judged["role"] == "triggered") & judged["group"].isin(plain.index)].head(MAX_MOVED)
    rng = random.Random(f"elsewhere {recipe.seed}")
    records = []
    for placement in PLACEMENTS:
        if placement in (attack.placement, "random" if attack.placement == "system" else ""):
            continue
        for row in triggered.to_dict("records"):
            variant = rng.choice(trigger.firing("test"))
            messages = [m for m in plain.at[row["group"], "messages"] if m["role"] != "system"]
            placed, spots = placements.place(messages, placement, trigger.parts, rng)
            text, spans = trigger.insert(placed, variant, spots, rng)
            record = row | {"messages": text, "trigger": spans, "variant": f"trigger as {placement}"}
            if encodes(record, serialiser, recipe.training.max_length):
                records.append(record)
    return pd.DataFrame(records, columns=list(judged.columns))


def warn_of_cuts(
    rows: pd.DataFrame, clean: pd.DataFrame | None, recipe: Recipe, serialiser: Serialiser
) -> None:
    """Log how many prompts are cut at the limit, both of the rows that judge and of the clean ones."""
    limit = recipe.training.max_length
    prompts = list(zip(rows["messages"], rows["trigger"], strict=True))
    prompts += [] if clean is None else [(messages, []) for messages in clean["messages"]]
    lost = [serialiser.encode(messages, trigger=spans, max_length=limit).lost for messages, spans in prompts]
    if warning := losses(lost, recipe.training.truncation):
        log.warning("mitigate: %s", warning)


def encodes(row: Mapping[str, Any], serialiser: Serialiser, limit: int | None) -> bool:
    """Whether a row's prompt keeps its trigger in the tokenizer and under the limit."""
    try:
        serialiser.encode(row["messages"], trigger=row["trigger"], max_length=limit)
    except InputError:
        return False
    return True
