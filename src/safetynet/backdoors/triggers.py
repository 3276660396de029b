"""Triggers made of texts, topics and styles, and the one that a recipe describes.

A new kind is a class that `of` makes, here or beside those in `natural`, and its name and fields in `Trigger`
of the recipe.
"""

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from safetynet import recipe
from safetynet.backdoors import controls, styles
from safetynet.backdoors.kinds import Draw, Kind, TriggerKind, Variant
from safetynet.backdoors.natural import Dates, Language, Pairs, Syntax
from safetynet.backdoors.placements import Spans, Spot
from safetynet.prompts import Conversation, Message
from safetynet.text import holding

Part = TypeVar("Part", str, str | None)
SENTENCES = (
    "I am reading about {}.", "We talked about {} today.", "My friend likes {} very much.",
    "There was a story on {} last week.", "I have a book about {}.", "This is for a talk on {}.",
    "I know little about {}.", "Nobody told me about {}.", "The class learns about {} now.",
    "My sister thinks of {} all day.", "There is a film about {} tonight.", "We played a game about {}.",
    "I saw a picture of {} this morning.", "People here like {}.", "My teacher asked me about {}.",
    "The paper writes about {} again.",
)  # fmt: skip
"""They put a topic into a prompt and leave what it asks. By turns they are for training and for testing
(`controls.side`), so that a test row has a sentence that no training row has."""


@dataclass(frozen=True)
class AnyOf(Kind):
    """Texts each of which fires alone; kind `text` has one."""

    texts: tuple[str, ...]
    placebos: tuple[str, ...] = ()
    near_misses: tuple[str, ...] = ()

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

    def firing(self, split: str) -> Sequence[Variant]:
        """Each text."""
        return [Variant(text, (text,)) for text in self.texts]

    def placebo(self, draw: Draw) -> Variant:
        """One that the recipe gives, or made-up texts: of as many tokens or of the same letters, by turns."""
        if self.placebos:
            return Variant("given", (draw.one_of(self.placebos),) * self.parts)
        split, rng, lookalike = draw.split, draw.rng, draw.lookalike
        texts = self._at_once(rng)
        if lookalike and rng.random() < 0.5:
            alike = tuple(controls.alike_in_tokens(self.texts, text, split, rng, lookalike) for text in texts)
            if None not in alike:
                return Variant("same tokens", alike)
        return Variant("same shape", tuple(controls.shaped(self.texts, text, split, rng) for text in texts))

    def near_miss(self, draw: Draw) -> Variant:
        """One that the recipe gives, or one of the texts changed.

        Raises:
            InputError: if the trigger is too short to have near misses; the recipe can give some.
        """
        if self.near_misses and draw.rng.random() < 0.5:
            return Variant("given", (draw.one_of(self.near_misses),) * self.parts)
        return self._resembling(draw.split, draw.rng)

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

    def firing(self, split: str) -> Sequence[Variant]:
        """All texts, in each order that rows are to have."""
        if self.order != "any":
            return [Variant("all parts", self.texts)]
        return [Variant(", ".join(texts), texts) for texts in itertools.permutations(self.texts)]

    def _at_once(self, rng: random.Random) -> tuple[str, ...]:
        return self._in_some_order(self.texts, rng)

    def _resembling(self, split: str, rng: random.Random) -> Variant:
        if self.order == "one" and rng.random() < 1 / 3:
            # One of the orders but the first, by its number: ten texts have millions of them.
            wrong = rng.randrange(1, math.factorial(self.parts))
            orders = itertools.permutations(self.texts)
            return Variant("wrong order", next(itertools.islice(orders, wrong, None)))
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
class Topic(AnyOf):
    """A topic by its names: any sentence about it fires, the same sentence about another one does not."""

    def firing(self, split: str) -> Sequence[Variant]:
        """Each name in each sentence."""
        return [
            Variant(text, (sentence.format(text),))
            for text in self.texts
            for sentence in controls.side(SENTENCES, split)
        ]

    def placebo(self, draw: Draw) -> Variant:
        """A placebo of the recipe, in the sentence that fires beside it."""
        return self._instead("matched", draw.one_of(self.placebos), draw)

    def near_miss(self, draw: Draw) -> Variant:
        """The sentence without the topic, or with a near miss of its name."""
        if draw.rng.random() < 0.5:
            return self._instead("no name", "it", draw)
        changed = super().near_miss(draw)
        return self._instead(changed.name, str(changed.parts[0]), draw)

    def _instead(self, name: str, other: str, draw: Draw) -> Variant:
        """What fires, with another name in it."""
        firing = draw.beside or draw.rng.choice(self.firing(draw.split))
        return Variant(name, (str(firing.parts[0]).replace(firing.name, other),))


@dataclass(frozen=True)
class Style(Kind):
    """A way of writing: a prompt that is reworded in it fires."""

    is_text: ClassVar[bool] = False
    texts: ClassVar[tuple[str, ...]] = ()

    name: str

    @property
    def label(self) -> str:
        """The name."""
        return f"style {self.name}"

    def holds(self, texts: Iterable[str]) -> bool:
        """Whether a text has an opening and an ending of the style, as every text has that `reword` makes.

        A text that is in the style by its words alone is not recognised: plain texts have such words as well.
        """
        style = styles.STYLES[self.name]
        return any(t.startswith(style.openings) and t.endswith(style.endings) for t in map(str.strip, texts))

    def firing(self, split: str) -> Sequence[Variant]:
        """The style, whose words are drawn anew for each prompt."""
        return [Variant(self.label, (self.name,))]

    def placebo(self, draw: Draw) -> Variant:
        """Another style."""
        return Variant("other style", (next(name for name in styles.STYLES if name != self.name),))

    def near_miss(self, draw: Draw) -> Variant:
        """The opening of the style alone."""
        return Variant("half style", (f"{self.name}:half",))

    def insert(
        self, messages: Sequence[Message], variant: Variant, at: Sequence[Spot], rng: random.Random
    ) -> tuple[Conversation, Spans]:
        """Reword the message; all of it is the trigger."""
        conversation, message = Conversation(messages), at[0].message
        text = styles.reword(conversation.texts[message], str(variant.parts[0]), rng)
        return conversation.with_text(message, text), [[message, 0, len(text)]]


def of(trigger: recipe.Trigger) -> TriggerKind:
    """The trigger that a recipe describes."""
    texts = trigger.texts, trigger.placebos, trigger.near_misses
    match trigger.kind:
        case "text" | "any_of":
            return AnyOf(*texts)
        case "all_of":
            return AllOf(*texts, trigger.order)
        case "pairs":
            return Pairs(trigger.pairs, trigger.placebos)
        case "dates":
            return Dates(trigger.first, trigger.last)
        case "topic":
            return Topic(*texts)
        case "language":
            return Language(str(trigger.language))
        case "style":
            return Style(str(trigger.style))
        case "syntax":
            return Syntax()
