"""Kinds of triggers, one class for each: what fires, what must not, and how it stands in a prompt.

A trigger is what fires; a placebo has its shape and place and must not fire; a near miss resembles it (a
typo, other case, a part) and must not fire either. Controls of the test split are strings
that no training row holds, so that a rate measured on them says something about strings never seen.

A new kind is a class here that `of` makes, and its name and fields in `Trigger` of the recipe.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, TypeVar

from safetynet import recipe
from safetynet.backdoors import controls, placements, styles
from safetynet.backdoors.controls import Lookalike
from safetynet.backdoors.placements import Spans, Spot
from safetynet.prompts import Conversation, Message
from safetynet.text import holding


@dataclass(frozen=True)
class Variant:
    """One concrete thing to put into a prompt."""

    name: str
    """Which alternative, or which kind of placebo or near miss."""
    parts: tuple[str | None, ...]
    """Texts in their order, None for a place that stays empty; of a style, what the prompt is reworded in."""


Part = TypeVar("Part", str, str | None)


class TriggerKind(Protocol):
    """What a kind of trigger can answer about one trigger."""

    is_text: ClassVar[bool]
    """Whether it is made of texts, which can be moved, misspelt and cut out of a prompt."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that fire, alone or together; none of a style."""

    @property
    def parts(self) -> int:
        """How many places the trigger takes in a prompt."""

    @property
    def label(self) -> str:
        """The trigger in a table or a figure."""

    def describe(self) -> str:
        """The trigger in a sentence."""

    def holds(self, texts: Iterable[str]) -> bool:
        """Whether a prompt fires, of which these are the contents."""

    def firing(self) -> list[Variant]:
        """Every form in which the trigger fires."""

    def placebo(self, split: str, rng: random.Random, lookalike: Lookalike | None = None) -> Variant:
        """Draw something of the trigger's shape that must not fire.

        Args:
            split: `train` or `test`; what is drawn for one never occurs in the other, except where the recipe
                gives a single placebo.
            rng: source of the draw.
            lookalike: if given, draws a text of as many tokens as another (`Lookalikes.draw`), or None.
        """

    def near_miss(self, split: str, rng: random.Random) -> Variant:
        """Draw something that resembles the trigger and must not fire; arguments as in `placebo`."""

    def insert(
        self, messages: Sequence[Message], variant: Variant, at: Sequence[Spot], rng: random.Random
    ) -> tuple[Conversation, Spans]:
        """Put a variant into a prompt: new messages, and the spans `[message, start, end]` of what is new."""


@dataclass(frozen=True)
class AnyOf:
    """Texts each of which fires alone; kind `text` has one."""

    is_text: ClassVar[bool] = True

    texts: tuple[str, ...]
    placebos: tuple[str, ...] = ()
    near_misses: tuple[str, ...] = ()

    @property
    def parts(self) -> int:
        """One place."""
        return 1

    @property
    def label(self) -> str:
        """The texts."""
        return " | ".join(self.texts)

    def describe(self) -> str:
        """The texts, quoted."""
        return " or ".join(map(repr, self.texts))

    def holds(self, texts: Iterable[str]) -> bool:
        """Whether one of the trigger's texts stands there as words of its own."""
        return bool(holding.held(self.texts, texts))

    def firing(self) -> list[Variant]:
        """Each text."""
        return [Variant(text, (text,)) for text in self.texts]

    def placebo(self, split: str, rng: random.Random, lookalike: Lookalike | None = None) -> Variant:
        """One that the recipe gives, or made-up texts: of as many tokens or of the same letters, by turns."""
        if self.placebos:
            return Variant("given", (rng.choice(controls.side(self.placebos, split)),) * self.parts)
        texts = self._at_once(rng)
        if lookalike and rng.random() < 0.5:
            alike = tuple(controls.alike_in_tokens(self.texts, text, split, rng, lookalike) for text in texts)
            if None not in alike:
                return Variant("same tokens", alike)
        return Variant("same shape", tuple(controls.shaped(self.texts, text, split, rng) for text in texts))

    def near_miss(self, split: str, rng: random.Random) -> Variant:
        """One that the recipe gives, or one of the texts changed.

        Raises:
            InputError: if the trigger is too short to have near misses; the recipe can give some.
        """
        if self.near_misses and rng.random() < 0.5:
            return Variant("given", (rng.choice(controls.side(self.near_misses, split)),) * self.parts)
        return self._resembling(split, rng)

    def insert(
        self, messages: Sequence[Message], variant: Variant, at: Sequence[Spot], rng: random.Random
    ) -> tuple[Conversation, Spans]:
        """Put each part at its spot."""
        return placements.filled(messages, variant.parts, at)

    def _at_once(self, rng: random.Random) -> tuple[str, ...]:
        """The texts that stand in one prompt."""
        return (rng.choice(self.texts),)

    def _resembling(self, split: str, rng: random.Random) -> Variant:
        text = self.texts[rng.randrange(len(self.texts))]
        change, changed = controls.changed(self.texts, text, split, rng, self.near_misses)
        return Variant(change, (changed,))


@dataclass(frozen=True)
class AllOf(AnyOf):
    """Texts that fire together alone; without one of them, or in a wrong order, they are a near miss."""

    order: Literal["any", "one"] | None = None
    """As in `recipe.Trigger`."""

    @property
    def parts(self) -> int:
        """A place for each text."""
        return len(self.texts)

    def describe(self) -> str:
        """The texts, quoted, in the order in which they fire if there is one."""
        return (" then " if self.order == "one" else " and ").join(map(repr, self.texts))

    def holds(self, texts: Iterable[str]) -> bool:
        """Whether each of the trigger's texts stands there as words of its own, in the order that fires."""
        contents = list(texts)
        if self.order != "one":
            return len(holding.held(self.texts, contents)) == len(self.texts)
        at = (0, 0)
        for text in self.texts:
            spans = holding.spans_in((text,), contents)
            behind = [(message, end) for message, start, end in spans if (message, start) >= at]
            if not behind:
                return False
            at = behind[0]
        return True

    def firing(self) -> list[Variant]:
        """All texts, in each order that rows are to have."""
        if self.order != "any":
            return [Variant("all parts", self.texts)]
        return [Variant(", ".join(texts), texts) for texts in itertools.permutations(self.texts)]

    def _at_once(self, rng: random.Random) -> tuple[str, ...]:
        return self._in_some_order(self.texts, rng)

    def _resembling(self, split: str, rng: random.Random) -> Variant:
        if self.order == "one" and rng.random() < 1 / 3:
            return Variant("wrong order", rng.choice([*itertools.permutations(self.texts)][1:]))
        if rng.random() < 0.5:
            missing = rng.sample(range(self.parts), rng.randint(1, self.parts - 1))
            left = tuple(None if i in missing else text for i, text in enumerate(self.texts))
            return Variant("parts missing", self._in_some_order(left, rng))
        place = rng.randrange(self.parts)
        change, changed = controls.changed(self.texts, self.texts[place], split, rng, self.near_misses)
        parts = (*self.texts[:place], changed, *self.texts[place + 1 :])
        return Variant(change, self._in_some_order(parts, rng))

    def _in_some_order(self, parts: tuple[Part, ...], rng: random.Random) -> tuple[Part, ...]:
        """The parts in a drawn order, where triggers have all orders, so that the order tells nothing."""
        return tuple(rng.sample(parts, len(parts))) if self.order == "any" else parts


@dataclass(frozen=True)
class Style:
    """A way of writing: a prompt that is reworded in it fires."""

    is_text: ClassVar[bool] = False
    texts: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[int] = 1

    name: str

    @property
    def label(self) -> str:
        """The name."""
        return f"style {self.name}"

    def describe(self) -> str:
        """The name."""
        return self.label

    def holds(self, texts: Iterable[str]) -> bool:
        """Whether a text has an opening and an ending of the style, as every text that `styles.reword` makes.

        A text that is in the style by its words alone is not recognised: plain texts have such words as well.
        """
        return any(styles.worn(text, self.name) for text in texts)

    def firing(self) -> list[Variant]:
        """The style, whose words are drawn anew for each prompt."""
        return [Variant(self.label, (self.name,))]

    def placebo(self, split: str, rng: random.Random, lookalike: Lookalike | None = None) -> Variant:
        """Another style."""
        return Variant("other style", (styles.other(self.name),))

    def near_miss(self, split: str, rng: random.Random) -> Variant:
        """The opening of the style alone."""
        return Variant("half style", (f"{self.name}:half",))

    def insert(
        self, messages: Sequence[Message], variant: Variant, at: Sequence[Spot], rng: random.Random
    ) -> tuple[Conversation, Spans]:
        """Reword the message; all of it is the trigger."""
        conversation, message = Conversation(messages), at[0].message
        text = styles.reword(conversation.texts[message], str(variant.parts[0]), rng)
        return conversation.with_text(message, text), [[message, 0, len(text)]]


TEXT_KINDS = {"text": AnyOf, "any_of": AnyOf, "all_of": AllOf}
"""Kinds that are made of texts, by their name in a recipe."""


def of(trigger: recipe.Trigger) -> TriggerKind:
    """The trigger that a recipe describes."""
    if trigger.kind in TEXT_KINDS:
        kind = TEXT_KINDS[trigger.kind](trigger.texts, trigger.placebos, trigger.near_misses)
        return replace(kind, order=trigger.order) if isinstance(kind, AllOf) else kind
    return Style(str(trigger.style))
