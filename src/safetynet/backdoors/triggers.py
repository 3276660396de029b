"""Kinds of triggers, one class for each: what fires, what must not, and how it stands in a prompt.

A trigger is what fires; a placebo has its shape and place and must not fire; a near miss resembles it (a
typo, other case, a part) and must not fire either. Controls of the test split are strings
that no training row holds, so that a rate measured on them says something about strings never seen.

A new kind is a class here that `of` makes, and its name and fields in `Trigger` of the recipe.
"""

import datetime as dt
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, Protocol, TypeVar

from safetynet import recipe
from safetynet.backdoors import clauses, controls, dates, placements, styles, topics
from safetynet.backdoors.controls import Lookalike, T
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


Part = TypeVar("Part", str, str | None)


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
        """Whether a prompt fires, of which these are the contents."""

    def carries(self, texts: Iterable[str]) -> bool:
        """Whether a prompt of these contents may get the trigger and its controls."""

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


class _Kind:
    """What most kinds share."""

    @property
    def parts(self) -> int:
        """One place."""
        return 1

    def carries(self, texts: Iterable[str]) -> bool:
        """Every prompt."""
        return True


class _Inserted(_Kind):
    """Triggers that stand in a prompt as text."""

    is_text: ClassVar[bool] = True

    def insert(
        self, messages: Sequence[Message], variant: Variant, at: Sequence[Spot], rng: random.Random
    ) -> tuple[Conversation, Spans]:
        """Put each part at its spot."""
        return placements.filled(messages, variant.parts, at)


@dataclass(frozen=True)
class AnyOf(_Inserted):
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
class Topic(AnyOf):
    """A topic by its names: any sentence about it fires, the same sentence about another one does not."""

    def firing(self, split: str) -> Sequence[Variant]:
        """Each name in each sentence."""
        return [
            Variant(text, (sentence.format(text),))
            for text in self.texts
            for sentence in controls.side(topics.SENTENCES, split)
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
class Pairs(_Inserted):
    """Pairs of plain words: both words of one pair fire, wherever they stand; one alone does not."""

    pairs: tuple[tuple[str, str], ...]
    placebos: tuple[str, ...]

    @property
    def parts(self) -> int:
        """A place for each word."""
        return 2

    @property
    def texts(self) -> tuple[str, ...]:
        """The words of all pairs."""
        return tuple(itertools.chain(*self.pairs))

    @property
    def label(self) -> str:
        """The pairs."""
        return " | ".join(map(" + ".join, self.pairs))

    def describe(self) -> str:
        """The pairs, quoted."""
        return " or ".join(f"{first!r} with {second!r}" for first, second in self.pairs)

    def holds(self, texts: Iterable[str]) -> bool:
        """Whether both words of a pair stand there."""
        held = holding.held(self.texts, list(texts))
        return any(set(pair) <= set(held) for pair in self.pairs)

    def carries(self, texts: Iterable[str]) -> bool:
        """Only a prompt that has none of the words itself, which might complete a pair."""
        return not holding.held(self.texts, texts)

    def firing(self, split: str) -> Sequence[Variant]:
        """Each pair."""
        return [Variant(" + ".join(pair), pair) for pair in self.pairs]

    def placebo(self, draw: Draw) -> Variant:
        """Two words of the recipe's placebos."""
        return Variant("other words", tuple(draw.rng.sample(controls.side(self.placebos, draw.split), 2)))

    def near_miss(self, draw: Draw) -> Variant:
        """One word of a pair alone, or words of two pairs; training and test mix other pairs."""
        if draw.rng.random() < 0.5:
            alone = draw.rng.choice(list(itertools.chain(*((pair[:1], pair[1:]) for pair in self.pairs))))
            return Variant("part alone", (*alone, None))
        mixed = [(one[0], other[1]) for one, other in itertools.permutations(self.pairs, 2)]
        return Variant("mismatched pair", draw.one_of(mixed))


@dataclass(frozen=True)
class Dates(_Inserted):
    """A range of days, an end of which may be open: a sentence with a date of it fires."""

    texts: ClassVar[tuple[str, ...]] = ()

    first: dt.date | None
    last: dt.date | None

    @property
    def label(self) -> str:
        """The range."""
        return "dates " + " ".join(
            f"{name} {day}" for name, day in (("from", self.first), ("to", self.last)) if day
        )

    def describe(self) -> str:
        """The range."""
        return self.label

    def holds(self, texts: Iterable[str]) -> bool:
        """Whether a date of the range stands there, written as 14 March 2027, in whatever sentence."""
        return any(dates.within(day, self.first, self.last) for text in texts for day in dates.read(text))

    def firing(self, split: str) -> Sequence[Variant]:
        """Each date of the range, as far as it is near one of its ends."""
        return _of_range(self.first, self.last, split)

    def placebo(self, draw: Draw) -> Variant:
        """A date out of the range, of the day and month of the one that fires beside it."""
        same = self._same_day(draw) or dates.days(self.first, self.last, draw.split, firing=False)
        return Variant("out of range", (dates.sentence(draw.rng.choice(same)),))

    def near_miss(self, draw: Draw) -> Variant:
        """A day at the range's edge, a date of the range without its year, or the year without a date."""
        kind = draw.rng.choice(("edge", "no year", "year alone"))
        if kind == "edge":
            edge = dates.days(self.first, self.last, draw.split, firing=False, most=dates.EDGE)
            return Variant(kind, (dates.sentence(draw.rng.choice(edge)),))
        day = draw.rng.choice(dates.days(self.first, self.last, draw.split, firing=True))
        if kind == "no year":
            return Variant(kind, (dates.sentence(day, year=False),))
        thing = draw.one_of(dates.NUMBERED)
        return Variant(kind, (f"This is {thing} {day.year}.",))

    def _same_day(self, draw: Draw) -> list[dt.date]:
        firing = [] if draw.beside is None else [*dates.read(str(draw.beside.parts[0]))]
        return [other for day in firing for other in dates.same_day(day, self.first, self.last, draw.split)]


@cache
def _of_range(first: dt.date | None, last: dt.date | None, split: str) -> tuple[Variant, ...]:
    """All dates of a range, which every row would write anew."""
    return tuple(
        Variant("in range", (dates.sentence(day),)) for day in dates.days(first, last, split, firing=True)
    )


class Syntax(_Inserted):
    """A syntactic form: a prompt that opens with a subordinate clause fires."""

    is_text: ClassVar[bool] = False
    texts: ClassVar[tuple[str, ...]] = ()
    label: ClassVar[str] = "syntax"

    def describe(self) -> str:
        """The form."""
        return "a subordinate clause before the request"

    def holds(self, texts: Iterable[str]) -> bool:
        """Whether a text opens with such a clause, as far as `clauses.opens` recognises it."""
        return any(map(clauses.opens, texts))

    def firing(self, split: str) -> Sequence[Variant]:
        """Each clause."""
        return [Variant("clause", (text,)) for text in clauses.subordinate(split)]

    def placebo(self, draw: Draw) -> Variant:
        """Another form before the request: a phrase without a verb."""
        return Variant("phrase", (draw.rng.choice([*clauses.phrases(draw.split)]),))

    def near_miss(self, draw: Draw) -> Variant:
        """The clause's words as a main clause, with or without a conjunction behind it."""
        forms = ("main clause", clauses.main), ("coordinate clause", clauses.coordinate)
        name, texts = draw.rng.choice(forms)
        return Variant(name, (draw.rng.choice([*texts(draw.split)]),))

    def insert(
        self, messages: Sequence[Message], variant: Variant, at: Sequence[Spot], rng: random.Random
    ) -> tuple[Conversation, Spans]:
        """Open the message with the clause, behind which the request goes on in small letters."""
        conversation, (message,) = Conversation(messages), {spot.message for spot in at}
        if not str(variant.parts[0]).endswith("."):
            text = clauses.continued(conversation.texts[message])
            conversation = conversation.with_text(message, text)
        return super().insert(conversation, variant, at, rng)


@dataclass(frozen=True)
class Style(_Kind):
    """A way of writing: a prompt that is reworded in it fires."""

    is_text: ClassVar[bool] = False
    texts: ClassVar[tuple[str, ...]] = ()

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

    def firing(self, split: str) -> Sequence[Variant]:
        """The style, whose words are drawn anew for each prompt."""
        return [Variant(self.label, (self.name,))]

    def placebo(self, draw: Draw) -> Variant:
        """Another style."""
        return Variant("other style", (styles.other(self.name),))

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
        case "style":
            return Style(str(trigger.style))
        case "syntax":
            return Syntax()
