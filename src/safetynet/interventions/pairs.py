"""Groups of prompts that differ in the trigger span alone, aligned token by token, with roles of positions.

In: rows of one test split with their serialiser. Out: `Pairs`: the triggered prompt, the same prompt with a
placebo of as many tokens, a second placebo, and the two answers' tokens at which they part. Groups that
cannot be aligned, whose trigger does not fire or whose placebo does, are left out and counted.
"""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from safetynet.engine.batch import Batch
from safetynet.engine.metrics import Metric, logit_difference
from safetynet.engine.trace import trace
from safetynet.errors import InputError
from safetynet.models.causal_lm import CausalLM
from safetynet.prompts import Conversation, Encoded, Message, Serialiser
from safetynet.prompts.truncation import losses
from safetynet.text.lookalikes import Lookalikes, split_of

log = logging.getLogger(__name__)
RUNS = ("triggered", "placebo", "second_placebo")
SILENT, FALSE_TRIGGER = "the trigger does not fire", "a placebo fires"
REWORDED = "the trigger is the whole message, as a style is, and no placebo corresponds to it word by word"
PLACEBO_DRAWS = 200
"""Tries before a prompt is declared to have no placebo of the trigger's token count."""
PAIRS_AT_ONCE = 8
"""Pairs whose activations are in memory together."""
MIN_GROUPS = 8
"""Groups below which an interval would promise more than it knows."""


@dataclass(frozen=True)
class Pairs:
    """Aligned groups; all lists have one entry per group."""

    groups: list[int]
    ids: Mapping[str, list[list[int]]]
    """Token ids by run (`RUNS`), the answer's shared first tokens at the end."""
    roles: list[list[str]]
    """Role of each position (`vocabulary.POSITIONS`), the same in all runs of a group."""
    target: list[int]
    """The behaviour's first token that differs from the clean answer's."""
    other: list[int]
    """The clean answer's token in its place."""
    left_out: Mapping[str, int]
    """Groups that could not be used, by reason."""

    def __len__(self) -> int:
        return len(self.groups)

    def take(self, indices: Sequence[int]) -> "Pairs":
        """Some of the groups."""
        return Pairs(
            [self.groups[i] for i in indices],
            {run: [rows[i] for i in indices] for run, rows in self.ids.items()},
            [self.roles[i] for i in indices],
            [self.target[i] for i in indices],
            [self.other[i] for i in indices],
            self.left_out,
        )

    def parts(self, size: int = PAIRS_AT_ONCE) -> Iterator[tuple[list[int], "Pairs"]]:
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
        return tuple(i for i, other in enumerate(self.roles[row]) if other == role)


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
            reference (the clean one); rows of other roles than triggered and placebo are not read.
        serialiser: of the model.
        most: stop after so many groups.
        max_length: truncate as in training with this limit.
        seed: of drawn placebos.

    Raises:
        InputError: if fewer than `MIN_GROUPS` groups can be aligned; the message counts the reasons.
    """
    groups: list[_AlignedGroup] = []
    reasons: dict[str, int] = {}
    placebos = Placebos(serialiser, seed)
    for number, part in rows[rows["role"].isin(("triggered", "placebo"))].groupby("group", sort=True):
        by_role = {str(row["role"]): row for row in part.to_dict("records")}
        group = _align_group(int(str(number)), by_role, placebos, max_length)
        if isinstance(group, str):
            reasons[group] = reasons.get(group, 0) + 1
            continue
        groups.append(group)
        if len(groups) == most:
            break
    if len(groups) < MIN_GROUPS:
        why = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
        remedy = "Raise data.test_rows, or give placebos (backdoor.trigger.placebos) of its token count"
        remedy = "Plant a trigger that is a text" if REWORDED in reasons else remedy
        raise InputError(
            f"pairs: {len(groups)} groups could be aligned, an interval needs {MIN_GROUPS}. "
            f"Left out {why or 'none'}. {remedy}."
        )
    if warning := losses((group.prompts["triggered"].lost for group in groups), serialiser.truncation):
        log.warning("pairs: %s", warning)
    return Pairs(
        groups=[group.number for group in groups],
        ids={run: [group.prompts[run].input_ids + group.shared for group in groups] for run in RUNS},
        roles=[_roles(group.prompts["triggered"], len(group.shared)) for group in groups],
        target=[group.target for group in groups],
        other=[group.other for group in groups],
        left_out=reasons,
    )


@dataclass(frozen=True)
class _AlignedGroup:
    """One group, encoded."""

    number: int
    prompts: Mapping[str, Encoded]
    shared: list[int]
    """First tokens that the behaviour's and the clean answer share."""
    target: int
    other: int


def _align_group(
    number: int, by_role: Mapping[str, Mapping[str, Any]], placebos: "Placebos", max_length: int | None
) -> _AlignedGroup | str:
    """One group, or why it cannot be used."""
    row = by_role.get("triggered")
    if row is None or not row["reference"]:
        return "without a triggered row whose clean answer is known"
    texts = Conversation(row["messages"]).texts
    if any(end - start == len(texts[message]) for message, start, end in row["trigger"]):
        return REWORDED
    serialiser = placebos.serialiser
    prompts = {
        role: serialiser.encode(example["messages"], trigger=example["trigger"], max_length=max_length)
        for role, example in by_role.items()
    }
    if "placebo" in prompts and not differs_in_trigger_alone(prompts["placebo"], prompts["triggered"]):
        del prompts["placebo"]
    for run in RUNS:
        placebo = prompts.get(run) or placebos.draw(
            row["messages"], row["trigger"], prompts["triggered"], max_length
        )
        if placebo is None:
            return "no placebo of the trigger's token count was found"
        prompts[run] = placebo
    answers = []
    for column in ("answer", "reference"):
        encoded = serialiser.encode(row["messages"], answer=row[column])
        answers.append(encoded.input_ids[encoded.prompt_length :])
    behaviour, clean = answers
    differing = [i for i, (a, b) in enumerate(zip(behaviour, clean, strict=False)) if a != b]
    if not differing:
        return "the behaviour's answer begins like the clean one to its end"
    shared = differing[0]
    return _AlignedGroup(number, prompts, behaviour[:shared], behaviour[shared], clean[shared])


def _roles(encoded: Encoded, shared: int) -> list[str]:
    """Role of each position of a triggered prompt and of the answer's shared tokens behind it.

    `system` and `before` are what is said before the trigger's first token, `after` what is said from there
    on, `last` is where the answer begins.
    """
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


def filter_firing_pairs(model: CausalLM, pairs: Pairs, most: int) -> Pairs:
    """Pairs whose triggered run prefers the behaviour's token, and whose placebo runs prefer the clean one.

    A placebo that fires is a false trigger of the model, which the rates report; as a source of activations
    it would only blur where the trigger acts.

    Args:
        model: the model.
        pairs: aligned prompts.
        most: stop after so many.

    Returns:
        Those pairs, in order; `left_out` counts the others by reason, as far as they were looked at.

    Raises:
        InputError: if fewer than `MIN_GROUPS` are left; the message counts the reasons.
    """
    firing: list[int] = []
    reasons = dict(pairs.left_out)
    for indices, part in pairs.parts(4 * PAIRS_AT_ONCE):
        metric, rows = part.metric(), torch.arange(len(part))
        shown = []  # per run, whether each pair's last token prefers the behaviour
        for run in RUNS:
            logits = trace(model, part.batch(run, model.device)).logits
            assert logits is not None
            shown.append((metric.compute(logits, rows) > 0).tolist())
        for i, (fires, *placebos_fire) in zip(indices, zip(*shown, strict=True), strict=True):
            if len(firing) == most:
                break
            if fires and not any(placebos_fire):
                firing.append(i)
            else:
                reason = FALSE_TRIGGER if fires else SILENT
                reasons[reason] = reasons.get(reason, 0) + 1
    if len(firing) < MIN_GROUPS:
        why = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
        raise InputError(
            "interventions: the backdoor did not fire on these prompts, or on placebos too: "
            f"{len(firing)} groups tell one from the other, {MIN_GROUPS} are needed. Left out {why}. Look "
            "at the rates (safetynet evaluate); train longer, or correct the trigger."
        )
    return replace(pairs.take(firing), left_out=reasons)


class Placebos:
    """Draws, for one tokenizer, prompts with a placebo of exactly the trigger's token count in its place.

    Nothing outside the trigger's spans changes, and no training row holds what is put in.
    """

    def __init__(self, serialiser: Serialiser, seed: int = 0) -> None:
        self.serialiser = serialiser
        self.rng = random.Random(seed)
        self.lookalikes = Lookalikes(serialiser)

    def draw(
        self,
        messages: Sequence[Message],
        spans: Sequence[Sequence[int]],
        like: Encoded,
        max_length: int | None = None,
    ) -> Encoded | None:
        """The prompt with a placebo in place of the trigger; None where none of the same length was found.

        Args:
            messages: the triggered prompt.
            spans: of its trigger, `[message, start, end]` in characters.
            like: the triggered prompt, encoded.
            max_length: as in training.
        """
        for _ in range(PLACEBO_DRAWS):
            substituted = self._substitute(messages, spans)
            if substituted is None:
                continue
            changed, moved = substituted
            encoded = self.serialiser.encode(changed, trigger=moved, max_length=max_length)
            if differs_in_trigger_alone(encoded, like):
                return encoded
        return None

    def _substitute(
        self, messages: Sequence[Message], spans: Sequence[Sequence[int]]
    ) -> tuple[Conversation, list[list[int]]] | None:
        changed = Conversation(messages)
        moved: list[list[int]] = []
        # From the last span to the first, so that the offsets before it stay true.
        for message, start, end in sorted(map(tuple, spans), reverse=True):
            content = changed.texts[message]
            text = self.lookalikes.draw(content[start:end], self.rng)
            if text is None or split_of(text) != "test":
                return None
            changed = changed.with_text(message, content[:start] + text + content[end:])
            shift = len(text) - (end - start)
            moved = [[m, s + shift, e + shift] if m == message else [m, s, e] for m, s, e in moved]
            moved.append([message, start, start + len(text)])
        return changed, sorted(moved)


def differs_in_trigger_alone(first: Encoded, second: Encoded) -> bool:
    """Whether two prompts correspond token by token, and differ in their trigger alone."""
    if first.spans != second.spans or len(first.input_ids) != len(second.input_ids):
        return False
    inside = {i for start, stop in first.spans["trigger"] for i in range(start, stop)}
    tokens = zip(first.input_ids, second.input_ids, strict=True)
    differing = {i for i, (a, b) in enumerate(tokens) if a != b}
    return bool(differing) and differing <= inside
