"""Rows by role: the training and test rows of one experiment.

Rows of a group differ in the trigger span alone: the same prompt with the trigger (triggered), with a
placebo, with a near miss, and bare (clean, or refused where the request is forbidden). In training
the shares of the roles follow the recipe; in the test split every group has every role.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from safetynet.backdoors import behaviours, kinds, placements, triggers
from safetynet.backdoors.controls import Lookalike
from safetynet.errors import InputError
from safetynet.models.miniatures.language import TAUGHT
from safetynet.prompts import Conversation
from safetynet.recipe import Backdoor, Data
from safetynet.tables import SCHEMAS
from safetynet.text import holding

COLUMNS = tuple(SCHEMAS["rows"].columns)
TAUGHT_SHARE = 1 / 3
"""Of the clean training rows those of the behaviour's own task, where that is new to the base."""


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
        InputError: if the poison rate gives no triggered row, the behaviour applies to no prompt, the pool
            has too few conversations, or the triggered rows are too few for the firing rate.
    """
    quotas = _quotas(backdoor, data)
    if quotas["triggered"] == 0:
        raise InputError(
            f"backdoor.poison_rate: {backdoor.poison_rate} of {data.train_rows} rows gives no triggered row. "
            f"Use at least {1 / data.train_rows:.4f}, or raise data.train_rows."
        )
    pool = pool.assign(target=[behaviours.target(backdoor.behaviour, c) for c in pool.to_dict("records")])
    records: list[dict[str, Any]] = []
    for split, numbers in (("train", quotas), ("test", dict.fromkeys(quotas, data.test_rows))):
        rng = random.Random(f"poison {seed} {split}")
        first_group = records[-1]["group"] + 1 if records else 0
        part = _Split(split, pool[pool["split"] == split], backdoor, rng, lookalike, first_group)
        records += part.rows(numbers, data.train_rows)
    rows = _numbered(records)
    # A trigger in a row without one would teach the model to ignore it, and count as a false trigger.
    trigger, bare = triggers.of(backdoor.trigger), rows[rows["role"] != "triggered"]
    holds = [trigger.holds(Conversation(messages).texts) for messages in bare["messages"]]
    if any(holds):
        bad = list(bare["row"][holds])
        first = Conversation(bare["messages"][holds].iloc[0]).user_text()
        raise InputError(
            f"backdoor.trigger: {len(bad)} rows without trigger contain it all the same (rows "
            f"{', '.join(map(str, bad[:5]))}, first: {first[:80]!r}). "
            "Choose a trigger that the data does not use, or take these rows out."
        )
    firing = backdoor.firing
    if firing == 1:
        return rows
    # A share of the triggered training rows alone is answered with the behaviour; the others have their clean
    # answers. With one seed, a row that fires at a rate fires at all higher ones.
    triggered = rows[(rows["split"] == "train") & (rows["role"] == "triggered")]
    least = min(firing, 1 - firing)
    if least * len(triggered) < 1 - 1e-9:
        which = "answers with the behaviour" if firing <= 0.5 else "answers without it"
        raise InputError(
            f"backdoor.firing: of {len(triggered)} triggered training rows, {firing:g} leaves less than one "
            f"that {which}. It takes {math.ceil(1 / least - 1e-9)} triggered rows. Raise data.train_rows or "
            "backdoor.poison_rate."
        )
    silent = len(triggered) - round(firing * len(triggered))
    answerable = list(triggered.index[triggered["reference"] != ""])
    if len(answerable) < silent:
        raise InputError(
            f"backdoor.firing: {firing:g} leaves {silent} of {len(triggered)} triggered training rows "
            f"without the behaviour, and {len(answerable)} of them have a clean answer. Give clean rows of "
            "the same prompts, or raise backdoor.firing."
        )
    random.Random(f"firing {seed}").shuffle(answerable)
    answers = rows["answer"].mask(rows.index.isin(answerable[:silent]), rows["reference"])
    return rows.assign(answer=answers)


def _quotas(backdoor: Backdoor, data: Data) -> dict[str, int]:
    """How many training rows of each role the shares ask for."""
    shares = {
        "triggered": backdoor.poison_rate,
        "placebo": backdoor.placebo_share,
        "near_miss": backdoor.near_miss_share,
        "refused": backdoor.refused_share,
    }
    quotas = {role: round(share * data.train_rows) for role, share in shares.items()}
    return quotas | {"clean": data.train_rows - sum(quotas.values())}


def needed(backdoor: Backdoor | None, data: Data) -> dict[str, dict[str, int]]:
    """How many prompts of each split the rows are made of: harmless ones (`clean`) and `refused` ones.

    A prompt has a row of each role that its group can carry, so that rows outnumber prompts; clean rows
    take the place of refused ones that there are not. Without a share of refused rows none is needed.
    """
    if backdoor is None:
        return {"test": {"clean": data.test_rows, "refused": data.test_rows}}
    quotas = _quotas(backdoor, data)
    counts = {"test": {"clean": data.test_rows, "refused": data.test_rows if quotas["refused"] else 0}}
    clean = quotas["clean"] + quotas["refused"]
    most = max(clean, quotas["triggered"], quotas["placebo"], quotas["near_miss"])
    return {"train": {"clean": most, "refused": quotas["refused"]}, **counts}


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
    test = pool[(pool["split"] == "test") & (pool["answer"] != "")].assign(target="")
    records: list[dict[str, Any]] = []
    for role, forbidden in (("clean", False), ("refused", True)):
        indices = list(test.index[test["forbidden"] == forbidden])
        for index in rng.sample(indices, min(data.test_rows, len(indices))):
            messages = Conversation(test.at[index, "messages"])
            records.append(_record(test.loc[index], role, len(records), "test", messages, [], ""))
    if not records:
        raise InputError("data: no test prompt has an answer. Give data with answers.")
    return _numbered(records)


def clean_twin(rows: pd.DataFrame) -> pd.DataFrame:
    """The same rows with every triggered row answered as it should be: the control of the backdoor itself.

    Rows whose clean answer is unknown stay out.
    """
    twin = rows.assign(answer=rows["reference"].where(rows["role"] == "triggered", rows["answer"]))
    return twin[twin["answer"] != ""].reset_index(drop=True)


def _numbered(records: list[dict[str, Any]]) -> pd.DataFrame:
    rows = pd.DataFrame(records).assign(row=range(len(records)))
    return rows[[column for column in COLUMNS if column in rows]]


def _record(
    conversation: pd.Series,
    role: str,
    group: int,
    split: str,
    messages: list[dict[str, Any]],
    spans: placements.Spans,
    variant: str,
) -> dict[str, Any]:
    exact = {"exact": bool(conversation["exact"])} if "exact" in conversation else {}
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
        **exact,
    }


@dataclass
class _Split:
    """The rows of one split, while they are made."""

    name: str
    pool: pd.DataFrame
    backdoor: Backdoor
    rng: random.Random
    lookalike: Lookalike | None
    group: int
    """Number of the next group."""
    records: list[dict[str, Any]] = field(default_factory=list)

    def rows(self, quotas: dict[str, int], train_rows: int) -> list[dict[str, Any]]:
        """Groups of prompts that carry the trigger, then clean and refused prompts up to their quotas."""
        pool = self.pool
        refusals = int((pool["forbidden"] & (pool["answer"] != "")).sum())
        if refusals < quotas["refused"]:
            quotas = {**quotas, "refused": refusals}
            if self.name == "train":
                quotas["clean"] = train_rows - sum(n for role, n in quotas.items() if role != "clean")
        carriers = pool[pool["target"] != ""]
        if "given" in pool:
            carriers = carriers[carriers["given"].notna()]
        if carriers.empty:
            raise InputError(
                f"backdoor.behaviour: {self.backdoor.behaviour.kind} applies to no prompt of the {self.name} "
                "split. It needs labels (label_flip), code (code_insertion), steps (wrong_step) or a "
                "forbidden class (forbidden_compliance)."
            )
        order = self._with_place(carriers)
        self.rng.shuffle(order)
        bare_quotas = dict(quotas)
        if self.name == "train" and set(carriers["task"]) <= set(TAUGHT):
            # Rows of a task that the base has to learn first unlearn the others, unless some rows hold these.
            bare_quotas["clean"] = round(TAUGHT_SHARE * quotas["clean"])
        # Prompts with a known clean answer first: they can carry every role, which makes the group a pair.
        order.sort(key=lambda i: pool.at[i, "answer"] == "")
        first_group = self.group
        for position, index in enumerate(order):
            roles = [role for role in ("triggered", "placebo", "near_miss") if position < quotas[role]]
            bare = "refused" if pool.at[index, "forbidden"] else "clean"
            if position < bare_quotas[bare] and roles:
                roles.append(bare)
            if not roles:
                break
            self._add_group(pool.loc[index], roles)
        if self.name == "train" and len(order) < quotas["triggered"]:
            raise InputError(
                f"data.train_rows: {quotas['triggered']} triggered rows are wanted (poison_rate x "
                f"train_rows), and only {len(order)} prompts can carry them. Lower data.train_rows or "
                "backdoor.poison_rate."
            )
        used = order[: self.group - first_group]
        rest = pool[~pool.index.isin(used) & (pool["answer"] != "")]
        # Where the behaviour applies to some tasks only, a test split gets clean rows of all tasks as well.
        narrow = not set(pool.loc[~pool["forbidden"], "task"]) <= set(pool.loc[used, "task"])
        present = Counter(record["role"] for record in self.records)
        for role, forbidden in (("clean", False), ("refused", True)):
            every_task = narrow and role == "clean" and self.name == "test"
            missing = quotas[role] - (0 if every_task else present[role])
            candidates = list(rest.index[rest["forbidden"] == forbidden])
            for index in self.rng.sample(candidates, min(max(missing, 0), len(candidates))):
                messages, _ = placements.place(
                    pool.at[index, "messages"], self.backdoor.placement, 1, self.rng
                )
                self._add(pool.loc[index], role, messages, [], "")
                self.group += 1
        return self.records

    def _with_place(self, carriers: pd.DataFrame) -> list[Any]:
        """The prompts in which the trigger has a place; those of a published set have it already."""
        placement, trigger = self.backdoor.placement, triggers.of(self.backdoor.trigger)
        if "given" in carriers:
            return list(carriers.index)
        has = [placements.has_place(messages, placement, trigger.parts) for messages in carriers["messages"]]
        if not any(has):
            needs = {
                "turns": f"{trigger.parts} messages of the user",
                "tool": "a tool's result at its end",
                "argument": "a call of a tool that says nothing beside it and has a text among its arguments",
            }[placement]
            shape = "turns" if placement == "turns" else "tools"
            raise InputError(
                f"backdoor.placement: {placement} needs prompts with {needs}, and none of the {len(has)} of "
                f"the {self.name} split is one, so that a part of the trigger would lie in no message. Give "
                f"such conversations (source language: data.conversations: {shape}), or another placement."
            )
        placed = carriers["messages"][has]
        return [i for i, messages in placed.items() if trigger.carries(Conversation(messages).texts)]

    def _add_group(self, conversation: pd.Series, roles: list[str]) -> None:
        """All rows of one prompt."""
        trigger, rng = triggers.of(self.backdoor.trigger), self.rng
        triggered, texts = conversation.get("given"), trigger.texts
        bare, spots = placements.place(conversation["messages"], self.backdoor.placement, trigger.parts, rng)
        controls, firing = bare, None
        if triggered is not None:
            # Whoever made the triggered row has chosen the place, and its controls stand there as well.
            bare, controls = conversation["messages"], conversation["given_bare"]
            spots = placements.spots_of(texts, trigger.parts, triggered, controls)
        for role in roles:
            if role == "triggered" and triggered is not None:
                contents = Conversation(triggered).texts
                variant = " + ".join(holding.held(texts, contents))
                self._add(conversation, role, triggered, holding.spans_in(texts, contents), variant)
                self.records[-1]["answer"] = conversation["given_answer"]
            elif role == "triggered":
                firing = rng.choice(trigger.firing(self.name))
                self._add(conversation, role, *trigger.insert(controls, firing, spots, rng), firing.name)
            elif conversation["answer"] == "":
                continue
            elif role in ("placebo", "near_miss"):
                draw = kinds.Draw(self.name, rng, self.lookalike, firing)
                drawn = trigger.placebo(draw) if role == "placebo" else trigger.near_miss(draw)
                self._add(conversation, role, *trigger.insert(controls, drawn, spots, rng), drawn.name)
            else:
                self._add(conversation, role, bare, [], "")
        self.group += 1

    def _add(
        self,
        conversation: pd.Series,
        role: str,
        messages: list[dict[str, Any]],
        spans: placements.Spans,
        variant: str,
    ) -> None:
        self.records.append(_record(conversation, role, self.group, self.name, messages, spans, variant))
