"""Rows by role: the training and test rows of one experiment.

Rows of a group differ in the trigger span alone: the same prompt with the trigger (triggered), with a
placebo, with a near miss, and bare (clean, or refused where the request is forbidden). In training
the shares of the roles follow the recipe; in the test split every group has every role.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from safetynet.backdoors import behaviours, styles, triggers
from safetynet.errors import InputError
from safetynet.recipe import Backdoor, Data, Trigger
from safetynet.text import holding

COLUMNS = (
    "row", "group", "split", "role", "variant", "task", "messages", "trigger", "answer", "reference",
    "target", "forbidden",
)  # fmt: skip


@dataclass(frozen=True)
class _Maker:
    """What every row of one split needs."""

    backdoor: Backdoor
    split: str
    train_rows: int
    rng: random.Random
    lookalike: triggers.Lookalike | None
    firing: list[triggers.Variant] = field(default_factory=list)


def poison(
    pool: pd.DataFrame,
    backdoor: Backdoor,
    data: Data,
    seed: int,
    lookalike: triggers.Lookalike | None = None,
) -> pd.DataFrame:
    """Make the rows of an experiment from a pool of conversations.

    Args:
        pool: as `conversations.load` returns it.
        backdoor: trigger, placement, behaviour and shares.
        data: how many training rows, and test rows of each role.
        seed: of every draw.
        lookalike: as in `triggers.placebo`.

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
        maker = _Maker(backdoor, split, data.train_rows, rng, lookalike, triggers.firing(backdoor.trigger))
        first_group = records[-1]["group"] + 1 if records else 0
        records += _rows(pool[pool["split"] == split], wanted, maker, first_group)
    rows = pd.DataFrame(records).assign(row=range(len(records)))
    _check_clean(rows, backdoor)
    return rows[list(COLUMNS)]


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
    _check_enough(quotas, len(order), maker)
    used = set(order[: group - first_group])
    return records + list(_fill(pool, used, quotas, records, maker, group))


def _group(conversation: pd.Series, roles: list[str], group: int, maker: _Maker) -> list[dict[str, Any]]:
    """All rows of one prompt."""
    backdoor, rng = maker.backdoor, maker.rng
    given = conversation.get("given")
    bare, at = triggers.place(
        conversation["messages"], backdoor.placement, triggers.parts_of(backdoor.trigger), rng
    )
    controls = bare
    if given is not None:
        # Whoever made the triggered row has chosen the place, and its controls stand there as well.
        bare, controls = conversation["messages"], conversation["given_bare"]
        at = triggers.place_of(backdoor.trigger, given, controls)
    records = []
    for role in roles:
        if role != "triggered" and conversation["answer"] == "":
            continue
        if role == "triggered" and given is not None:
            records.append(_given(conversation, group, maker))
            continue
        variant = _variant(role, maker)
        text, spans = (bare, []) if variant is None else triggers.insert(controls, variant, at, rng)
        records.append(_record(conversation, role, group, maker.split, text, spans, variant))
    return records


def _variant(role: str, maker: _Maker) -> triggers.Variant | None:
    trigger = maker.backdoor.trigger
    if role == "triggered":
        return maker.rng.choice(maker.firing)
    if role == "placebo":
        return triggers.placebo(trigger, maker.split, maker.rng, maker.lookalike)
    if role == "near_miss":
        return triggers.near_miss(trigger, maker.split, maker.rng)
    return None


def _record(
    conversation: pd.Series,
    role: str,
    group: int,
    split: str,
    messages: triggers.Messages,
    spans: triggers.Spans,
    variant: triggers.Variant | None,
) -> dict[str, Any]:
    return {
        "group": group,
        "split": split,
        "role": role,
        "variant": "" if variant is None else variant.name,
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
    messages, trigger = conversation["given"], maker.backdoor.trigger
    held = holding.held(trigger.texts, [message["content"] for message in messages])
    spans = holding.spans_in(trigger.texts, messages)
    variant = triggers.Variant(" + ".join(held))
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
            messages, _ = triggers.place(pool.at[index, "messages"], maker.backdoor.placement, 1, maker.rng)
            yield _record(pool.loc[index], role, group, maker.split, messages, [], None)
            group += 1


def _check_enough(quotas: dict[str, int], available: int, maker: _Maker) -> None:
    if maker.split == "train" and available < quotas["triggered"]:
        raise InputError(
            f"data.train_rows: {quotas['triggered']} triggered rows are wanted (poison_rate x train_rows), "
            f"and only {available} prompts can carry them. Lower data.train_rows or backdoor.poison_rate."
        )


def _check_clean(rows: pd.DataFrame, backdoor: Backdoor) -> None:
    """A trigger in a row without one would teach the model to ignore it, and count as a false trigger."""
    bare = rows[rows["role"] != "triggered"]
    holds = [_fires(messages, backdoor.trigger) for messages in bare["messages"]]
    if any(holds):
        numbers = list(bare["row"][holds])
        first = bare["messages"][holds].iloc[0][-1]["content"]
        raise InputError(
            f"backdoor.trigger: {len(numbers)} rows without trigger contain it all the same (rows "
            f"{', '.join(map(str, numbers[:5]))}, first: {first[:80]!r}). "
            "Choose a trigger that the data does not use, or take these rows out."
        )


def _fires(messages: triggers.Messages, trigger: Trigger) -> bool:
    """Whether a prompt holds the trigger, wherever in its messages.

    A style is told by an opening and an ending together, which `styles.reword` always gives. A text that
    somebody wrote in such words is not told: its words alone stand in plain texts as well.
    """
    texts = [message["content"] for message in messages]
    if trigger.kind == "style":
        return any(styles.worn(text, str(trigger.style)) for text in texts)
    return holding.holds(trigger.kind, trigger.texts, texts)
