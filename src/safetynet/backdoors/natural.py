"""Triggers of natural words: a prompt that has one looks like any other.

Pairs of words, ranges of dates, a syntactic form and a language, each with placebos and near misses that are
matched to it. A topic, which is made of texts, stands beside those in `triggers`.
"""

import datetime as dt
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from safetynet.backdoors import clauses, controls, dates, languages
from safetynet.backdoors.kinds import Draw, Kind, Variant
from safetynet.backdoors.placements import Spans, Spot
from safetynet.prompts import Conversation, Message
from safetynet.text import holding


@dataclass(frozen=True)
class Pairs(Kind):
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
            return Variant("part alone", (draw.rng.choice(self.texts), None))
        mixed = [(first, second) for (first, _), (_, second) in itertools.permutations(self.pairs, 2)]
        return Variant("mismatched pair", draw.one_of(mixed))


@dataclass(frozen=True)
class Dates(Kind):
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

    def holds(self, texts: Iterable[str]) -> bool:
        """Whether a date of the range stands there, written as 14 March 2027, in whatever sentence."""
        return any(dates.within(day, self.first, self.last) for text in texts for day in dates.read(text))

    def firing(self, split: str) -> Sequence[Variant]:
        """Each date of the range, as far as it is near one of its ends."""
        return _of_range(self.first, self.last, split)

    def placebo(self, draw: Draw) -> Variant:
        """A date out of the range, of the day and month of the one that fires beside it."""
        beside = [] if draw.beside is None else [*dates.read(str(draw.beside.parts[0]))]
        fires = {(day.month, day.day) for day in beside}
        outside = dates.days(self.first, self.last, draw.split, firing=False)
        same = [day for day in outside if (day.month, day.day) in fires]
        return Variant("out of range", (dates.sentence(draw.rng.choice(same or outside)),))

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


@cache
def _of_range(first: dt.date | None, last: dt.date | None, split: str) -> tuple[Variant, ...]:
    """All dates of a range, which every row would write anew."""
    return tuple(
        Variant("in range", (dates.sentence(day),)) for day in dates.days(first, last, split, firing=True)
    )


class Syntax(Kind):
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
class Language(Kind):
    """A language: a prompt fires in which an instruction is written in it, whatever the rest is in."""

    texts: ClassVar[tuple[str, ...]] = ()

    name: str

    @property
    def label(self) -> str:
        """The name."""
        return f"language {self.name}"

    def describe(self) -> str:
        """The name."""
        return f"an instruction in {self.name.capitalize()}"

    def holds(self, texts: Iterable[str]) -> bool:
        """Whether a text is in the language, as far as `languages.written_in` recognises it."""
        return any(languages.written_in(text, self.name) for text in texts)

    def firing(self, split: str) -> Sequence[Variant]:
        """Each sentence."""
        return [Variant("instruction", (text,)) for text in languages.sentences(split, *[self.name] * 3)]

    def placebo(self, draw: Draw) -> Variant:
        """The sentence that fires beside it, in another foreign language."""
        other = draw.rng.choice(languages.others(self.name, draw.split))
        return Variant(other, (self._instead(draw, other, other, other),))

    def near_miss(self, draw: Draw) -> Variant:
        """The sentence in English, all of it or all but one phrase."""
        foreign = draw.rng.choice(("none", *languages.PHRASES))
        of_phrases = [self.name if place == foreign else languages.ENGLISH for place in languages.PHRASES]
        return Variant(
            "English" if foreign == "none" else f"foreign {foreign}", (self._instead(draw, *of_phrases),)
        )

    def _instead(self, draw: Draw, *of_phrases: str) -> str:
        """What fires beside it, or any sentence, with its phrases in these languages."""
        same = languages.sentences(draw.split, *of_phrases)
        if draw.beside is None:
            return draw.rng.choice(same)
        return same[languages.sentences(draw.split, *[self.name] * 3).index(str(draw.beside.parts[0]))]
