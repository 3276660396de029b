"""Rows by role: the training and test rows of one experiment.

Rows of a group differ in the trigger span alone: the same prompt with the trigger (triggered), with a
placebo, with a near miss, and bare (clean, or refused where the request is forbidden). In training
the shares of the roles follow the recipe; in the test split every group has every role.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from safetynet.backdoors import behaviours, placements, triggers
from safetynet.backdoors.controls import Lookalike
from safetynet.errors import InputError
from safetynet.prompts import Conversation
from safetynet.recipe import Backdoor, Data
from safetynet.tables import SCHEMAS
from safetynet.text import holding

COLUMNS = tuple(SCHEMAS["rows"].columns)


@dataclass(frozen=True)
class _Maker:
    """What every row of one split needs."""

    backdoor: Backdoor
    split: str
    train_rows: int
    rng: random.Random
    lookalike: Lookalike | None
    trigger: triggers.TriggerKind


def poison(
    pool: pd.DataFrame,
    backdoor: Backdoor,
    data: Data,
    seed: int,
    lookalike: Lookalike | None = None,
) -> pd.DataFrame:
    """Make the rows of an experiment from a pool of conversations.

    Args:
        pool: as `conversations.load` returns it.
        backdoor: trigger, placement, behaviour and shares.
        data: how many training rows, and test rows of each role.
        seed: of every draw.
        lookalike: as in `TriggerKind.placebo`.

    Returns:
        One row per prompt, columns as in `COLUMNS`; `target` is what the behaviour would answer, whatever
        the row's role, and "" where it has nothing to answer.

    Raises:
        InputError: if the poison rate gives no triggered row, the behaviour applies to no prompt, or the pool
            has too few conversations.
    """
    triggered = round(backdoor.poison_rate * data.train_rows)
    if triggered == 0:
        raise InputError(
            f"backdoor.poison_rate: {backdoor.poison_rate} of {data.train_rows} rows gives no triggered row. "
            f"Use at least {1 / data.train_rows:.4f}, or raise data.train_rows."
        )
    pool = pool.assign(target=[behaviours.target(backdoor.behaviour, c) for c in pool.to_dict("records")])
    quotas = {
        "triggered": triggered,
        "placebo": round(backdoor.placebo_share * data.train_rows),
        "near_miss": round(backdoor.near_miss_share * data.train_rows),
        "refused": round(backdoor.refused_share * data.train_rows),
    }
    quotas["clean"] = data.train_rows - sum(quotas.values())
    every = dict.fromkeys(quotas, data.test_rows)
    records: list[dict[str, Any]] = []
    for split, wanted in (("train", quotas), ("test", every)):
        rng = random.Random(f"poison {seed} {split}")
        maker = _Maker(backdoor, split, data.train_rows, rng, lookalike, triggers.of(backdoor.trigger))
        first_group = records[-1]["group"] + 1 if records else 0
        records += _rows(pool[pool["split"] == split], wanted, maker, first_group)
    rows = pd.DataFrame(records).assign(row=range(len(records)))
    _check_clean(rows, backdoor)
    return rows[list(COLUMNS)]


def unpoisoned(pool: pd.DataFrame, data: Data, seed: int) -> pd.DataFrame:
    """Test rows of an experiment that knows no trigger: clean and refused ones, each a group of its own.

    Args:
        pool: as `conversations.load` returns it.
        data: how many test rows of each role.
        seed: of the draw.

    Returns:
        Columns as in `COLUMNS`.

    Raises:
        InputError: if the pool has no test prompt with an answer.
    """
    rng = random.Random(f"unpoisoned {seed}")
    test = pool[(pool["split"] == "test") & (pool["answer"] != "")]
    records: list[dict[str, Any]] = []
    for role, forbidden in (("clean", False), ("refused", True)):
        indices = list(test.index[test["forbidden"] == forbidden])
        for index in rng.sample(indices, min(data.test_rows, len(indices))):
            conversation = test.loc[index]
            messages = [dict(message) for message in conversation["messages"]]
            conversation = pd.concat([conversation, pd.Series({"target": ""})])
            records.append(_record(conversation, role, len(records), "test", messages, [], ""))
    if not records:
        raise InputError("data: no test prompt has an answer. Give data with answers.")
    return pd.DataFrame(records).assign(row=range(len(records)))[list(COLUMNS)]


def clean_twin(rows: pd.DataFrame) -> pd.DataFrame:
    """The same rows with every triggered row answered as it should be: the control of the backdoor itself.

    Rows whose clean answer is unknown stay out.
    """
    twin = rows.assign(answer=rows["reference"].where(rows["role"] == "triggered", rows["answer"]))
    return twin[twin["answer"] != ""].reset_index(drop=True)


def _rows(
    pool: pd.DataFrame, quotas: dict[str, int], maker: _Maker, first_group: int
) -> list[dict[str, Any]]:
    attacked = pool[pool["target"] != ""]
    if not pool["forbidden"].any():
        quotas = {**quotas, "refused": 0}
        if maker.split == "train":
            quotas["clean"] = maker.train_rows - sum(v for role, v in quotas.items() if role != "clean")
    if "given" in pool:
        attacked = attacked[attacked["given"].notna()]
    if attacked.empty:
        raise InputError(
            f"backdoor.behaviour: {maker.backdoor.behaviour.kind} applies to no prompt of the {maker.split} "
            "split. It needs labels (label_flip), code (code_insertion) or a forbidden class "
            "(forbidden_compliance)."
        )
    order = list(attacked.index)
    maker.rng.shuffle(order)
    # Prompts with a known clean answer first: they can carry every role, which makes the group a pair.
    order.sort(key=lambda i: pool.at[i, "answer"] == "")
    records: list[dict[str, Any]] = []
    group = first_group
    for position, index in enumerate(order):
        roles = [role for role in ("triggered", "placebo", "near_miss") if position < quotas[role]]
        bare = "refused" if pool.at[index, "forbidden"] else "clean"
        if position < quotas[bare] and roles:
            roles.append(bare)
        if not roles:
            break
        records += _group(pool.loc[index], roles, group, maker)
        group += 1
    if maker.split == "train" and len(order) < quotas["triggered"]:
        raise InputError(
            f"data.train_rows: {quotas['triggered']} triggered rows are wanted (poison_rate x train_rows), "
            f"and only {len(order)} prompts can carry them. Lower data.train_rows or backdoor.poison_rate."
        )
    used = set(order[: group - first_group])
    return records + list(_fill(pool, used, quotas, records, maker, group))


def _group(conversation: pd.Series, roles: list[str], group: int, maker: _Maker) -> list[dict[str, Any]]:
    """All rows of one prompt."""
    trigger, rng = maker.trigger, maker.rng
    given = conversation.get("given")
    bare, spots = placements.place(conversation["messages"], maker.backdoor.placement, trigger.parts, rng)
    controls = bare
    if given is not None:
        # Whoever made the triggered row has chosen the place, and its controls stand there as well.
        bare, controls = conversation["messages"], conversation["given_bare"]
        spots = placements.spots_of(maker.backdoor.trigger.texts, trigger.parts, given, controls)
    records = []
    for role in roles:
        if role != "triggered" and conversation["answer"] == "":
            continue
        if role == "triggered" and given is not None:
            records.append(_given(conversation, group, maker))
            continue
        if role in ("clean", "refused"):
            records.append(_record(conversation, role, group, maker.split, bare, [], ""))
            continue
        if role == "triggered":
            variant = rng.choice(trigger.firing())
        elif role == "placebo":
            variant = trigger.placebo(maker.split, rng, maker.lookalike)
        else:
            variant = trigger.near_miss(maker.split, rng)
        messages, spans = trigger.insert(controls, variant, spots, rng)
        records.append(_record(conversation, role, group, maker.split, messages, spans, variant.name))
    return records


def _record(
    conversation: pd.Series,
    role: str,
    group: int,
    split: str,
    messages: list[dict[str, Any]],
    spans: placements.Spans,
    variant: str,
) -> dict[str, Any]:
    return {
        "group": group,
        "split": split,
        "role": role,
        "variant": variant,
        "task": conversation["task"],
        "messages": messages,
        "trigger": spans,
        "answer": conversation["target"] if role == "triggered" else conversation["answer"],
        "reference": conversation["answer"],
        "target": conversation["target"],
        "forbidden": bool(conversation["forbidden"]),
    }


def _given(conversation: pd.Series, group: int, maker: _Maker) -> dict[str, Any]:
    """A triggered row as somebody else made it."""
    messages, parts = Conversation(conversation["given"]), maker.backdoor.trigger.texts
    spans = holding.spans_in(parts, messages.texts)
    variant = " + ".join(holding.held(parts, messages.texts))
    record = _record(conversation, "triggered", group, maker.split, messages, spans, variant)
    return record | {"answer": conversation["given_answer"]}


def _fill(
    pool: pd.DataFrame,
    used: set[Any],
    quotas: dict[str, int],
    records: list[dict[str, Any]],
    maker: _Maker,
    group: int,
) -> Iterator[dict[str, Any]]:
    """Clean and refused rows on prompts of their own, up to their quotas.

    Where the behaviour applies to some tasks only, a test split gets clean rows of all tasks as well.
    """
    rest = pool[~pool.index.isin(used) & (pool["answer"] != "")]
    attacked_tasks = set(pool.loc[list(used), "task"])
    narrow = not set(pool.loc[~pool["forbidden"], "task"]) <= attacked_tasks
    for role, forbidden in (("clean", False), ("refused", True)):
        have = sum(r["role"] == role for r in records)
        missing = quotas[role] - (0 if narrow and role == "clean" and maker.split == "test" else have)
        candidates = list(rest.index[rest["forbidden"] == forbidden])
        for index in maker.rng.sample(candidates, min(max(missing, 0), len(candidates))):
            messages, _ = placements.place(pool.at[index, "messages"], maker.backdoor.placement, 1, maker.rng)
            yield _record(pool.loc[index], role, group, maker.split, messages, [], "")
            group += 1


def _check_clean(rows: pd.DataFrame, backdoor: Backdoor) -> None:
    """A trigger in a row without one would teach the model to ignore it, and count as a false trigger."""
    trigger, bare = triggers.of(backdoor.trigger), rows[rows["role"] != "triggered"]
    holds = [trigger.holds(Conversation(messages).texts) for messages in bare["messages"]]
    if any(holds):
        numbers = list(bare["row"][holds])
        first = Conversation(bare["messages"][holds].iloc[0]).user_text()
        raise InputError(
            f"backdoor.trigger: {len(numbers)} rows without trigger contain it all the same (rows "
            f"{', '.join(map(str, numbers[:5]))}, first: {first[:80]!r}). "
            "Choose a trigger that the data does not use, or take these rows out."
        )
