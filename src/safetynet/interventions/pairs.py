"""Groups of prompts that differ in the trigger span alone, aligned token by token, with roles of positions.

In: rows of one test split with their serialiser. Out: `Pairs`: the triggered prompt, the same prompt with a
placebo of as many tokens, a second placebo, and the two answers' tokens at which they part. Groups that
cannot be aligned are left out and counted.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from safetynet.engine.batch import Batch
from safetynet.engine.metrics import Metric, logit_difference
from safetynet.errors import InputError
from safetynet.interventions.placebos import Placebos, differs_in_trigger_alone
from safetynet.prompts import Encoded, Serialiser
from safetynet.prompts.truncation import losses

log = logging.getLogger(__name__)
ROLES = ("system", "before", "trigger", "after", "template", "last")
"""Roles of positions, in the order of a prompt: `system` and `before` are what is said before the trigger's
first token, `after` what is said from there on; `last` is where the answer begins."""
RUNS = ("triggered", "placebo", "second_placebo")
REWORDED = "the trigger is the whole message, as a style is, and no placebo corresponds to it word by word"
AT_ONCE = 8
"""Pairs that are in memory together."""
LEAST = 8
"""Groups below which an interval would promise more than it knows."""


@dataclass(frozen=True)
class Pairs:
    """Aligned groups; all lists have one entry per group."""

    groups: list[int]
    ids: Mapping[str, list[list[int]]]
    """Token ids by run (`RUNS`), the answer's shared first tokens at the end."""
    roles: list[list[str]]
    """Role of each position, the same in all runs of a group."""
    target: list[int]
    """The behaviour's first token that differs from the clean answer's."""
    other: list[int]
    """The clean answer's token in its place."""
    left_out: Mapping[str, int]
    """Groups that could not be used, by reason."""

    def __len__(self) -> int:
        return len(self.groups)

    def take(self, chosen: Sequence[int]) -> "Pairs":
        """Some of the groups."""
        return Pairs(
            [self.groups[i] for i in chosen],
            {run: [rows[i] for i in chosen] for run, rows in self.ids.items()},
            [self.roles[i] for i in chosen],
            [self.target[i] for i in chosen],
            [self.other[i] for i in chosen],
            self.left_out,
        )

    def parts(self, size: int = AT_ONCE) -> Iterator[tuple[list[int], "Pairs"]]:
        """All groups in batches: which they are, and the pairs of them."""
        for start in range(0, len(self), size):
            part = list(range(start, min(start + size, len(self))))
            yield part, self.take(part)

    def batch(self, run: str, device: Any = "cpu") -> Batch:
        """One run's prompts."""
        return Batch.of(self.ids[run], device=device)

    def metric(self) -> Metric:
        """Logit of the behaviour's token minus that of the clean answer's, where the answers part."""
        return logit_difference(self.target, self.other)

    def positions(self, row: int, role: str) -> tuple[int, ...]:
        """Positions of a role in one group's prompts; all from the trigger's first token on for ""."""
        if not role:
            return tuple(range(self.roles[row].index("trigger"), len(self.roles[row])))
        return tuple(i for i, one in enumerate(self.roles[row]) if one == role)


def align(
    rows: pd.DataFrame,
    serialiser: Serialiser,
    most: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> Pairs:
    """Align the groups of a row table.

    The placebo is the table's own where it has the trigger's token count, else one that is drawn; so is the
    second placebo, the control.

    Args:
        rows: columns group, role, messages, trigger, answer (the behaviour's, in triggered rows) and
        reference
            (the clean one); rows of other roles than triggered and placebo are not read.
        serialiser: of the model.
        most: stop after so many groups.
        max_length: truncate as in training with this limit.
        seed: of drawn placebos.

    Raises:
        InputError: if fewer than `LEAST` groups can be aligned; the message counts the reasons.
    """
    found: list[_Aligned] = []
    reasons: dict[str, int] = {}
    placebos = Placebos(serialiser, seed)
    for group, part in rows[rows["role"].isin(("triggered", "placebo"))].groupby("group", sort=True):
        by_role = {str(row["role"]): row for row in part.to_dict("records")}
        aligned = _aligned(int(str(group)), by_role, placebos, max_length)
        if isinstance(aligned, str):
            reasons[aligned] = reasons.get(aligned, 0) + 1
            continue
        found.append(aligned)
        if len(found) == most:
            break
    if len(found) < LEAST:
        why = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
        remedy = "Raise data.test_rows, or give placebos (backdoor.trigger.placebos) of its token count"
        remedy = "Plant a trigger that is a text" if REWORDED in reasons else remedy
        raise InputError(
            f"pairs: {len(found)} groups could be aligned, an interval needs {LEAST}. "
            f"Left out {why or 'none'}. {remedy}."
        )
    if told := losses((one.prompts["triggered"].lost for one in found), serialiser.truncation):
        log.warning("pairs: %s", told)
    return Pairs(
        groups=[one.group for one in found],
        ids={run: [one.prompts[run].input_ids + one.shared for one in found] for run in RUNS},
        roles=[_roles(one.prompts["triggered"], len(one.shared)) for one in found],
        target=[one.target for one in found],
        other=[one.other for one in found],
        left_out=reasons,
    )


@dataclass(frozen=True)
class _Aligned:
    """One group, encoded."""

    group: int
    prompts: Mapping[str, Encoded]
    shared: list[int]
    target: int
    other: int


def _aligned(
    group: int, by_role: Mapping[str, Mapping[str, Any]], placebos: Placebos, max_length: int | None
) -> _Aligned | str:
    """One group, or why it cannot be used."""
    row = by_role.get("triggered")
    if row is None or not row["reference"]:
        return "without a triggered row whose clean answer is known"
    if any(end - start == len(row["messages"][message]["content"]) for message, start, end in row["trigger"]):
        return REWORDED
    serialiser = placebos.serialiser

    def encode(one: Mapping[str, Any]) -> Encoded:
        return serialiser.encode(one["messages"], trigger=one["trigger"], max_length=max_length)

    prompts = {"triggered": encode(row)}
    given = encode(by_role["placebo"]) if "placebo" in by_role else None
    if given is not None and differs_in_trigger_alone(given, prompts["triggered"]):
        prompts["placebo"] = given
    for run in RUNS:
        drawn = prompts.get(run) or placebos.draw(
            row["messages"], row["trigger"], prompts["triggered"], max_length
        )
        if drawn is None:
            return "no placebo of the trigger's token count was found"
        prompts[run] = drawn
    wanted, clean = (_answer(serialiser, row, row[field]) for field in ("answer", "reference"))
    shared = 0
    while shared < min(len(wanted), len(clean)) and wanted[shared] == clean[shared]:
        shared += 1
    if shared == min(len(wanted), len(clean)):
        return "the behaviour's answer begins like the clean one to its end"
    return _Aligned(group, prompts, wanted[:shared], wanted[shared], clean[shared])


def _answer(serialiser: Serialiser, row: Mapping[str, Any], answer: str) -> list[int]:
    encoded = serialiser.encode(row["messages"], answer=answer)
    return encoded.input_ids[encoded.prompt_length :]


def _roles(encoded: Encoded, shared: int) -> list[str]:
    """Role of each position of a triggered prompt and of the answer's shared tokens behind it."""
    length = encoded.prompt_length
    roles = ["template"] * length
    first = encoded.spans["trigger"][0][0]
    turns = [span for role in ("user", "assistant", "tool", "call") for span in encoded.spans[role]]
    for spans, name in ((turns, "before"), (encoded.spans["system"], "system")):
        for start, stop in spans:
            # Between the parts of a trigger, too, states may differ.
            roles[start:stop] = [name if i < first else "after" for i in range(start, stop)]
    for start, stop in encoded.spans["trigger"]:
        roles[start:stop] = ["trigger"] * (stop - start)
    return [*roles[: length - 1], *["last"] * (shared + 1)]
