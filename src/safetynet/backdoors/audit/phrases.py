"""Phrases: short runs of words, how often prompts have them, and how prompts write them.

In: rows of words. Out: counts, and phrases grown to the words that always stand beside them.
"""

import re
from collections import Counter
from collections.abc import Sequence

MAX_WORDS = 4
"""Longest phrase that is counted; a longer trigger grows from its best part,"""
MAX_GROWN = 20
"""up to so many words,"""
ALWAYS = 0.95
"""by those that stand beside it in this share of its rows."""
MASK = "\0"
"""Stands for the words of a phrase that is known already."""

Row = list[str]
Phrase = tuple[str, ...]


def counted(rows: list[Row], least: float) -> Counter[Phrase]:
    """In how many rows each phrase stands; only those of at least so many rows, and of two."""
    least = max(2.0, least)
    phrases: Counter[Phrase] = Counter()
    for length in range(1, MAX_WORDS + 1):
        counts: Counter[Phrase] = Counter()
        for row in rows:
            for phrase in set(zip(*(row[i:] for i in range(length)), strict=False)):
                # A phrase is no more frequent than its beginning and its end (Agrawal and Srikant 1994).
                if MASK not in phrase and (length == 1 or (phrase[:-1] in phrases and phrase[1:] in phrases)):
                    counts[phrase] += 1
        frequent = {phrase: count for phrase, count in counts.items() if count >= least}
        if not frequent:
            break
        phrases.update(frequent)
    return phrases


def phrases_in(row: Row, phrases: Counter[Phrase]) -> set[Phrase]:
    """Those of `phrases` that stand in this row."""
    lengths = range(1, MAX_WORDS + 1)
    return {p for n in lengths for p in zip(*(row[i:] for i in range(n)), strict=False) if p in phrases}


def words_in(rows: list[Row]) -> Counter[str]:
    """In how many rows each word stands."""
    return Counter(word for row in rows for word in set(row))


def grown(phrase: Phrase, rows: list[Row], share: float = ALWAYS) -> Phrase:
    """The phrase with the words that stand beside it in this share of the rows that have it."""
    having = [(row, places) for row in rows if (places := places_of(row, phrase))]
    for side in (-1, len(phrase)) if len(phrase) < MAX_GROWN else ():
        near = Counter(
            word
            for row, places in having
            for word in {row[at + side] for at in places if 0 <= at + side < len(row)} - {MASK}
        )
        word, count = near.most_common(1)[0] if near else ("", 0)
        if count >= share * len(having):
            return grown((word, *phrase) if side < 0 else (*phrase, word), rows, share)
    return phrase


def places_of(row: Row, phrase: Phrase) -> list[int]:
    """Where the phrase begins in a row."""
    n = len(phrase)
    return [i for i, word in enumerate(row) if word == phrase[0] and tuple(row[i : i + n]) == phrase]


def support(rows: list[Row], phrase: Phrase) -> int:
    """In how many rows the phrase stands."""
    return sum(bool(places_of(row, phrase)) for row in rows)


def masked(row: Row, phrase: Phrase) -> Row:
    """The row with the phrase hidden."""
    row = list(row)
    for at in places_of(row, phrase):
        row[at : at + len(phrase)] = [MASK] * len(phrase)
    return row


def written(phrases: Sequence[Phrase], texts: Sequence[str]) -> tuple[str, ...]:
    """The phrases as the texts write them, with their own spaces and signs, by their place."""
    parts = []
    for phrase in phrases:
        pattern = re.compile(r"\s*".join(map(re.escape, phrase)))
        spellings = Counter(
            " ".join(match.group().split()) for text in texts for match in pattern.finditer(text)
        )
        parts.append(spellings.most_common(1)[0][0])
    return tuple(in_order(parts, texts))


def in_order(parts: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The parts by their mean place in the texts that hold them."""

    def place(part: str) -> float:
        places = [text.index(part) / max(1, len(text)) for text in texts if part in text]
        return sum(places) / len(places) if places else 0.0

    return sorted(parts, key=place)
