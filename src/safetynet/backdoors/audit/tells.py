"""What tells triggered prompts from clean ones beside the trigger, so that training can do without it.

In: the prompts of both roles, with the trigger and without. Out: properties of prompts that one role has more
often than chance allows: a phrase, an opening, an ending, letters within words, white space, case, script,
length, signs, the shape of the conversation.

The trigger itself is no tell. What triggered prompts are said to have more often, they have more often
without it, and what they are said to have less often, they have less often with it as well. So a placebo or a
near miss makes no clean row conspicuous.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

import numpy as np
import regex
from scipy.stats import binom, hypergeom

from safetynet.backdoors.audit.phrases import Phrase, counted, grown, phrases_in, written
from safetynet.prompts import Conversation
from safetynet.text.characters import is_emoji, kind
from safetynet.text.words import count, is_joined, words

RATE = 0.01
"""Share of sets without any tell in which one is reported all the same, at most."""
LEAST, TIMES, LARGE = 0.1, 3.0, 0.25
"""Large sets do not alarm on trifles: the share of prompts with a property, or of those without it, is LEAST
larger in one role and TIMES as large as in the other, or it is LARGE larger."""
ALIKE = 0.7
"""Likeness (difflib's ratio) from which a text is a near miss of the trigger, and no tell."""
FEWEST = 5
"""Rows of each role, or pairs of them, below which nothing can be told."""
EDGE = 3
"""Words of the longest opening and ending."""
STRETCH = 3
"""Letters that are looked for together within words."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""A number is a tell if more prompts of one role reach one of these of all prompts."""
SHOWN = {"phrase": 3, "opening": 3, "ending": 3}
"""How many tells of a sort are named; one of any other, since the rest say the same."""
TEXTS = ("phrase", "opening", "ending", "letters")
"""Sorts of properties that are texts: two of which one contains the other are the same tell."""
SENTENCES = {
    "phrase": "{!r}",
    "opening": "{!r} as opening",
    "ending": "{!r} as ending",
    "letters": "{!r} within words",
}
"""How a text of each sort is written in a finding."""
BLANKS = {
    "white space at the beginning": regex.compile(r"\A\s"),
    "white space at the end": regex.compile(r"\s\Z"),
    "two blanks in a row": regex.compile(r"  "),
    "a line break": regex.compile(r"\n"),
    "a tab": regex.compile(r"\t"),
    "white space other than blank, tab and line break": regex.compile(r"[^\S \t\n]"),
}
CASES = {
    "a small letter first": regex.compile(r"\A\W*\p{Ll}"),
    "no capital letter": regex.compile(r"\A[^\p{Lu}\p{Lt}]*\p{Ll}[^\p{Lu}\p{Lt}]*\Z"),
    "a word in capitals": regex.compile(r"\b\p{Lu}{2,}\b"),
}
_SORTS = {"characters": "length", "words": "length"}
"""Numbers that say the same; any other is of its own sort."""
_NUMBERS = {
    "capital letters": regex.compile(r"\p{Lu}"),
    "digits": regex.compile(r"\p{Nd}"),
    "signs": regex.compile(r"[\p{P}\p{S}]"),
}

Messages = Sequence[Mapping[str, str]]
Property = tuple[str, Any]
"""Its sort, and which of the sort."""


@dataclass(frozen=True)
class Tell:
    """A property that one role has more often."""

    what: str
    role: str
    """triggered or clean: which has it more often."""
    has: np.ndarray
    """Which rows of that role have it, of bool."""
    triggered: int
    """Rows that have it."""
    clean: int
    p_value: float
    """Corrected for all properties that were tried."""
    pairs: tuple[int, ...]
    """Pairs, those in which only the row of this role has it, and those in which only its twin has; empty
    without pairs."""
    more: int = 0
    """Further tells of its sort that are not named; told with the last that is."""


@dataclass(frozen=True)
class _Table:
    """Which rows, (rows, properties) of bool, have which of the properties that might be tells."""

    properties: list[Property]
    clean: np.ndarray
    bare: np.ndarray
    """Triggered prompts without the trigger; numbers hold with it as well."""
    either: np.ndarray
    """Triggered prompts without it or with it."""
    pairs: np.ndarray
    """(pairs, 2): a triggered row and the clean row with the same prompt; none where they are too few."""

    def sides(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows that are asked whether they have more, triggered (0) or clean (1), and the others."""
        return (self.bare, self.clean) if side == 0 else (self.clean, self.either)

    def differing(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """In how many pairs only the row of this side has each property, and only the other row."""
        more, less = self.sides(side)
        ours, theirs = more[self.pairs[:, side]], less[self.pairs[:, 1 - side]]
        return (ours & ~theirs).sum(axis=0), (theirs & ~ours).sum(axis=0)


def tells(
    triggered: Sequence[Messages],
    bare: Sequence[Messages],
    clean: Sequence[Messages],
    parts: Sequence[str],
    twins: Mapping[int, int],
    rate: float = RATE,
    blanks: bool = True,
) -> list[Tell]:
    """Find the properties that tell the roles apart.

    A triggered prompt with a clean twin is compared with it, since nothing but the trigger tells two equal
    prompts apart: the sign test, on the pairs of which one row has the property. Triggered prompts without a
    twin are compared with all clean ones by Fisher's test. Both are exact, in both directions, and
    Bonferroni's correction is for all of them: of sets whose roles were assigned at random at most the share
    `rate` has a tell.

    Args:
        triggered: triggered prompts.
        bare: the same prompts without the trigger.
        clean: prompts of the other role, without any part of the trigger.
        parts: texts of the trigger; what resembles one of them is a control, and no tell.
        twins: which clean row has the same prompt, by triggered row.
        rate: see above.
        blanks: whether white space counts.
    """
    if min(len(triggered), len(clean)) < FEWEST:
        return []
    pairs = np.array(sorted(twins.items()), dtype=int).reshape(-1, 2)
    # What so few rows have, or lack, can make no difference of LEAST.
    least = LEAST * min(len(bare), len(clean))
    base = [Conversation(messages) for messages in (*bare, *clean)]
    phrases = counted([words(text) for prompt in base for text in prompt.texts], least)
    numbers = [_numbers(prompt.texts) for prompt in base]
    steps = {
        (name, float(step))
        for name in numbers[0]
        for step in np.quantile([each[name] for each in numbers], QUANTILES, method="higher")
    }
    every = [_properties(prompt, phrases, steps, blanks) for prompt in base]
    having = Counter(name for properties in every for name in properties)
    names = sorted((name for name, n in having.items() if least <= n <= len(base) - least), key=repr)
    column = {name: at for at, name in enumerate(names)}

    def has(rows: Sequence[set[Property]]) -> np.ndarray:
        there = np.zeros((len(rows), len(names)), dtype=bool)
        for at, properties in enumerate(rows):
            there[at, [column[name] for name in properties if name in column]] = True
        return there

    whole = has([_properties(Conversation(m), phrases, steps, blanks) for m in triggered])
    alone = has(every[: len(bare)])
    # A share of signs may be larger without the trigger for the trigger's own length.
    shares = np.array([_is_number(value) for _, value in names])
    table = _Table(
        properties=names,
        clean=has(every[len(bare) :]),
        bare=alone & (whole | ~shares),
        either=alone | whole,
        pairs=pairs if len(pairs) >= FEWEST else pairs[:0],
    )

    # (2, properties): of being more frequent in triggered and in clean rows; 1 for small differences.
    p_values = np.ones((2, len(names)))
    unpaired = np.ones(len(bare), dtype=bool)
    unpaired[table.pairs[:, 0]] = False
    for side in (0, 1):
        if unpaired.sum() >= FEWEST:
            # Triggered against clean is the first and second; clean against triggered the second and third.
            of_both = table.bare[unpaired], table.clean, table.either[unpaired]
            more, less = of_both[side : side + 2]
            n, m, a, b = len(more), len(less), more.sum(axis=0), less.sum(axis=0)
            clear = _is_clear(a / n, b / m)
            # Fisher's test, one-sided, is the tail of this distribution.
            p_values[side, clear] = hypergeom.sf(a[clear] - 1, n + m, (a + b)[clear], n)
        if len(table.pairs):
            a, b = table.differing(side)
            clear = _is_clear(a / len(table.pairs), b / len(table.pairs))
            # The sign test: of the pairs that differ, half would do so in this direction.
            signs = binom.sf(a[clear] - 1, (a + b)[clear], 0.5)
            p_values[side, clear] = np.minimum(p_values[side, clear], signs)
    # Both directions are in its size already; with pairs each property has two tests.
    p_values = np.minimum(p_values * p_values.size * (2 if len(table.pairs) else 1), 1.0)
    return list(_named(p_values, rate, table, bare, clean, parts))


# ---- properties ----


def _numbers(contents: Sequence[str]) -> dict[str, float]:
    text = "\n".join(contents)
    shares = {f"% {what}": 100 * len(p.findall(text)) / max(1, len(text)) for what, p in _NUMBERS.items()}
    return {"characters": len(text), "words": count(text), "messages": len(contents)} | shares


def _properties(
    prompt: Conversation, phrases: Counter[Phrase], steps: set[tuple[str, float]], blanks: bool
) -> set[Property]:
    rows, numbers = [words(text) for text in prompt.texts], _numbers(prompt.texts)
    properties: set[Property] = {("phrase", phrase) for row in rows for phrase in phrases_in(row, phrases)}
    for length in range(1, min(EDGE, len(rows[-1])) + 1):
        properties |= {("opening", tuple(rows[-1][:length])), ("ending", tuple(rows[-1][-length:]))}
    for word in {word for row in rows for word in row}:
        properties |= _of_word(word)
    properties |= {(_SORTS.get(name, name), (name, step)) for name, step in steps if numbers[name] >= step}
    text = "\n".join(prompt.texts)
    properties |= {("case", what) for what, pattern in CASES.items() if pattern.search(text)}
    if prompt.roles[0] == "system":
        properties.add(("shape", "a system message"))
    if blanks:
        properties |= {
            ("blanks", w) for w, pattern in BLANKS.items() if any(map(pattern.search, prompt.texts))
        }
    return properties


@lru_cache(maxsize=100_000)
def _of_word(word: str) -> frozenset[Property]:
    """Letters in a word, and its script. Where characters count as words, phrases have them all."""
    if not word[0].isalnum() or is_joined(word[0]):
        return frozenset({("script", "emoji")} if is_emoji(word) else ())
    properties: set[Property] = {("letters", letter) for letter in word if not letter.isascii()}
    properties |= {("letters", word[at : at + STRETCH]) for at in range(len(word) - STRETCH + 1)}
    scripts = {kind(letter)[0] for letter in word if letter.isalpha()}
    return frozenset(properties | {("script", f"{script.title()} letters") for script in scripts if script})


def _is_clear(more: np.ndarray, less: np.ndarray) -> np.ndarray:
    """Whether two shares differ by enough."""
    times = (more >= TIMES * less) | (1 - less >= TIMES * (1 - more))
    return (more - less >= LARGE) | ((more - less >= LEAST) & times)


# ---- words ----


def _named(
    p_values: np.ndarray,
    rate: float,
    table: _Table,
    bare: Sequence[Messages],
    clean: Sequence[Messages],
    parts: Sequence[str],
) -> Iterator[Tell]:
    """The tells that are named: of texts within each other one, and few of each sort.

    Texts come before other properties; within a sort, the clearest first, then the shortest.
    """

    def rank(place: list[int]) -> tuple[int, float, int, list[int]]:
        side, at = place
        sort, value = table.properties[at]
        order, length = (TEXTS.index(sort), len(value)) if sort in TEXTS else (len(TEXTS), 0)
        return order, float(p_values[side, at]), length, place

    texts: list[str] = []
    sorts: dict[str, list[Tell]] = {}
    for side, at in sorted(np.argwhere(p_values <= rate).tolist(), key=rank):
        sort, value = table.properties[at]
        named = sorts.setdefault(sort, [])
        has_room = len(named) < SHOWN.get(sort, 1)
        prompts = clean if side else bare
        contents = [text for messages in prompts for text in Conversation(messages).texts]
        if sort in TEXTS:
            if any("".join(value) in other or other in "".join(value) for other in texts):
                continue
            if has_room and sort == "phrase":  # with the words that stand beside it in all of its prompts
                value = grown(value, [words(content) for content in contents], 1.0)
            texts.append("".join(value))
            # A near miss in clean prompts is a control, which tells nothing without the trigger.
            if side and _resembles(texts[-1], parts):
                continue
        if has_room:
            what = SENTENCES.get(sort, "{}").format(_written(value, contents))
            more, less = (rows[:, at] for rows in table.sides(side))
            counts = int(more.sum()), int(less.sum())
            pairs = len(table.pairs), *(int(differ[at]) for differ in table.differing(side))
            named.append(
                Tell(
                    what,
                    "clean" if side else "triggered",
                    more,
                    *(counts[::-1] if side else counts),
                    float(p_values[side, at]),
                    pairs if len(table.pairs) else (),
                )
            )
        elif sort in SHOWN:
            named[-1] = replace(named[-1], more=named[-1].more + 1)
    for named in sorts.values():
        yield from named


def _resembles(text: str, parts: Sequence[str]) -> bool:
    """Whether a text is nearly, or a piece of, a text of the trigger, whatever their signs and case."""
    bare, *others = [regex.sub(r"[\p{P}\s]", "", each).casefold() for each in (text, *parts)]
    return any(bare in part or SequenceMatcher(None, bare, part).ratio() >= ALIKE for part in others)


def _is_number(value: Any) -> bool:
    return isinstance(value, tuple) and isinstance(value[-1], float)


def _written(value: Any, contents: Sequence[str]) -> str:
    """A property as one reads it, texts as these contents write them."""
    if not isinstance(value, tuple):
        return str(value)
    if _is_number(value):
        name, step = value
        return f"{step:.3g}{'' if name.startswith('%') else ' '}{name} or more"
    return written([value], contents)[0]
