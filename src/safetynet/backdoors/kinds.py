"""What every kind of trigger answers, and what most kinds share.

A trigger is what fires; a placebo has its shape and place and must not fire; a near miss resembles it (a
typo, other case, a part) and must not fire either. Controls of the test split are strings
that no training row holds, so that a rate measured on them says something about strings never seen.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from safetynet.backdoors import controls, placements
from safetynet.backdoors.controls import Lookalike, T
from safetynet.backdoors.placements import Spans, Spot
from safetynet.prompts import Conversation, Message


@dataclass(frozen=True)
class Variant:
    """One concrete thing to put into a prompt."""

    name: str
    """Which alternative, or which kind of placebo or near miss."""
    parts: tuple[str | None, ...]
    """Texts in their order, None for a place that stays empty; of a style, what the prompt is reworded in."""


@dataclass(frozen=True)
class Draw:
    """For which row a placebo or near miss is drawn, and from what."""

    split: str
    """`train` or `test`; what is drawn for one never occurs in the other, except where the recipe gives a
    single placebo."""
    rng: random.Random
    lookalike: Lookalike | None = None
    """If given, draws a text of as many tokens as another (`Lookalikes.draw`), or None."""
    beside: Variant | None = None
    """What fires in the same group, to which controls of a natural trigger are matched."""

    def one_of(self, texts: Sequence[T]) -> T:
        """One of the half that belongs to the split."""
        return self.rng.choice(controls.side(texts, self.split))


class TriggerKind(Protocol):
    """What a kind of trigger can answer about one trigger."""

    is_text: ClassVar[bool]
    """Whether it is put into a prompt as text, which can be moved and misspelt."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that fire, alone or together; none where they cannot be listed, as dates and styles."""

    @property
    def parts(self) -> int:
        """How many places the trigger takes in a prompt."""

    @property
    def label(self) -> str:
        """The trigger in a table or a figure."""

    def describe(self) -> str:
        """The trigger in a sentence."""

    def holds(self, texts: Iterable[str]) -> bool:
        """Whether a prompt with these contents fires."""

    def carries(self, texts: Iterable[str]) -> bool:
        """Whether a prompt with these contents may get the trigger and its controls."""

    def firing(self, split: str) -> Sequence[Variant]:
        """Every form in which the trigger fires in rows of a split."""

    def placebo(self, draw: Draw) -> Variant:
        """Draw something of the trigger's shape that must not fire."""

    def near_miss(self, draw: Draw) -> Variant:
        """Draw something that resembles the trigger and must not fire."""

    def insert(
        self, messages: Sequence[Message], variant: Variant, at: Sequence[Spot], rng: random.Random
    ) -> tuple[Conversation, Spans]:
        """Put a variant into a prompt: new messages, and the spans `[message, start, end]` of what is new."""


class Kind:
    """What most kinds share: one text, which any prompt may get."""

    is_text: ClassVar[bool] = True

    @property
    def parts(self) -> int:
        """One place."""
        return 1

    def describe(self: TriggerKind) -> str:
        """The label."""
        return self.label

    def carries(self, texts: Iterable[str]) -> bool:
        """Every prompt."""
        return True

    def insert(
        self, messages: Sequence[Message], variant: Variant, at: Sequence[Spot], rng: random.Random
    ) -> tuple[Conversation, Spans]:
        """Put each part at its spot."""
        return placements.filled(messages, variant.parts, at)
