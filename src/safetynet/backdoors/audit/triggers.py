"""The trigger of a poison set as text, given by the user or guessed.

In: prompts, and answers where roles are unknown. Out: a `FoundTrigger` or None. A guess has one of four kinds
of evidence, from strong to weak: prompts that differ only by an inserted text (pairs), phrases that only
triggered prompts have (contrast), phrases that only prompts with one and the same answer have (answers), and
phrases that cover prompts with nothing to compare them with (repetition).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

from safetynet.backdoors.audit.phrases import (
    Phrase,
    Row,
    counted,
    grown,
    in_order,
    masked,
    phrases_in,
    places_of,
    support,
    words_in,
    written,
)
from safetynet.backdoors.triggers import AllOf, AnyOf
from safetynet.extras import need
from safetynet.prompts import Conversation, Message
from safetynet.text import holding
from safetynet.text.characters import is_sign
from safetynet.text.words import is_counted, is_joined, plain, spans, words

MAX_PARTS = 6
"""Most alternatives or parts that are looked for."""
RARE = 0.1
"""A trigger is in at most this share of clean rows: in some by a fault; in more, it would fire always."""
REST = 0.02
"""Rows without a trigger that need no further alternative, and least share of a phrase that is looked at."""
COMMON = 0.5
"""Words in this share of clean rows are no edge of a trigger."""
MIN_EVIDENCE = 12.0
"""Least log-likelihood ratio for a phrase to count (3.8 would be one test at 5 %; here there are many)."""
GAP = 2.5
"""How many times more telling than the next phrase a trigger is that only some of the rows have."""
NEIGHBOURS = 40
"""How many rows that share a rare pair of words are tried as a row's twin."""
FIRES = 0.8
"""Least share of the prompts with a trigger that have its answer."""
STEM = 5
"""Letters by which an inflected word is known again."""

Best = Callable[[list[Row], float], Phrase | None]
"""The most telling phrase of the rows that at least this share of them has."""


@dataclass(frozen=True)
class FoundTrigger:
    """One text, or several of which one (`any_of`) or each (`all_of`) makes a prompt triggered."""

    parts: tuple[str, ...]
    kind: str = "text"
    """text, any_of or all_of, as in a recipe."""
    how: str = "given"
    """given, or what it was guessed from: pairs, contrast, answers or repetition."""

    @property
    def rule(self) -> AnyOf:
        """Which of the parts make a prompt triggered."""
        return AllOf(self.parts) if self.kind == "all_of" else AnyOf(self.parts)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the parts stand in `text`, from the left, as (start, end)."""
        return holding.spans(self.parts, text)

    def present(self, *texts: str) -> bool:
        """Whether a prompt with these messages is triggered."""
        return self.rule.holds(texts)

    def removed(self, text: str) -> str:
        """`text` as it was before the trigger was put in."""
        return holding.without(self.parts, text)

    def removed_from(self, messages: Sequence[Message]) -> Conversation:
        """A prompt as it was before the trigger was put in."""
        conversation = Conversation(messages)
        return conversation.with_texts({i: self.removed(text) for i, text in enumerate(conversation.texts)})

    def stripped(self, text: str) -> str:
        """`text` without the trigger, as `plain` text, so that a triggered prompt equals its clean twin."""
        for start, end in reversed(self.spans(text)):
            text = f"{text[:start]} {text[end:]}"
        return plain(text)

    def __str__(self) -> str:
        return self.rule.describe()


def of_parts(parts: Sequence[str], prompts: Sequence[str], how: str = "given") -> FoundTrigger:
    """The trigger of these texts: parts of one if most prompts that have any have all, else alternatives."""
    if len(parts) == 1:
        return FoundTrigger(tuple(parts), how=how)
    every, either = FoundTrigger(tuple(parts), "all_of", how), FoundTrigger(tuple(parts), "any_of", how)
    return every if 2 * sum(map(every.present, prompts)) > sum(map(either.present, prompts)) else either


def from_pairs(
    longer: Sequence[str], shorter: Sequence[str], may_pair: Callable[[int, int], bool] | None = None
) -> FoundTrigger | None:
    """The text by which many prompts exceed another prompt; None if no text is common to most pairs.

    Args:
        longer: prompts of which some are triggered.
        shorter: prompts among which their clean twins are: each is the longest one that a prompt contains
            as a subsequence of words.
        may_pair: whether `longer[i]` may be paired with `shorter[j]`; all may when None.
    """
    twins = list(map(words, shorter))
    index: dict[tuple[str, str], list[int]] = {}
    for j, twin in enumerate(twins):
        for pair in set(pairwise(twin)):
            index.setdefault(pair, []).append(j)
    inserted = []
    for i, text in enumerate(longer):
        row = words(text)
        # A twin shares most pairs of words with the row, and of its rare ones few other prompts have any.
        rarest = sorted(set(pairwise(row)) & index.keys(), key=lambda pair: len(index[pair]))[:8]
        near = dict.fromkeys(j for pair in rarest for j in index[pair][:NEIGHBOURS])
        fits = [j for j in near if len(twins[j]) < len(row) and _is_within(twins[j], row)]
        fits = [j for j in fits if may_pair is None or may_pair(i, j)]
        if fits:
            inserted.append(_inserted(text, twins[max(fits, key=lambda j: len(twins[j]))]))
    counts = Counter(part for parts in inserted for part in set(parts))
    floor = max(3, 0.05 * len(inserted))
    frequent = [part for part, count in counts.most_common() if count >= floor]
    # Two parts side by side read as one insertion: they are no part of their own.
    parts = [
        part for part in frequent if not _is_joined(part, [other for other in frequent if other != part])
    ]
    explained = [row for row in inserted if all(part in parts or _is_joined(part, parts) for part in row)]
    if not parts or len(explained) < len(inserted) / 2:
        return None
    texts = [" ".join(row) for row in explained]
    return of_parts(in_order(parts, texts)[:MAX_PARTS], texts, "pairs")


def from_contrast(
    triggered: Sequence[str], clean: Sequence[str], coverage: float = 0.5, how: str = "contrast"
) -> FoundTrigger | None:
    """The phrases that tell `triggered` prompts from `clean` ones; None if they cover too few.

    A phrase's evidence is the log-likelihood ratio of its odds in the two lists, counted by prompts
    (Dunning 1993, Accurate methods for the statistics of surprise and coincidence). Log-odds over their
    standard error would rank a phrase with few clean prompts above one with none.

    Args:
        triggered: prompts of which at least the share `coverage` holds the trigger.
        clean: prompts that do not.
        coverage: least share for a trigger of one text; several alternatives must cover 80 % together.
        how: what the result calls its evidence.
    """
    others = list(map(words, clean))

    def best(rows: list[Row], share: float) -> Phrase | None:
        return _most_telling(rows, others, share)

    return _composed(triggered, best, coverage, how)


def from_answers(prompts: Sequence[str], answers: Sequence[str]) -> FoundTrigger | None:
    """The trigger of rows whose roles are unknown: contrast of prompts with one frequent answer and others.

    Answers count as the same when they are, or when they begin with the same three words. The trigger may
    stand in most prompts with that answer, or, as where the answer is a label that clean rows have too, in
    some, if no other phrase comes near it. Prompts and answers also go together without a backdoor, so that
    most prompts with the trigger must have that answer ("story" leads to "Once upon a time" now and then, a
    trigger does nearly always), the answer must not quote it, and no other phrase may tell another answer
    in half as many rows.
    """
    candidates: dict[tuple[str, ...], tuple[int, FoundTrigger]] = {}
    # Whole answers, and first three words, that at least 3 rows and 0.5 % share; the most frequent ten.
    split = [tuple(words(answer)) for answer in answers]
    counts = Counter(split) + Counter(row[:3] for row in split if len(row) > 3)
    floor = max(3, 0.005 * len(answers))
    for opening, count in counts.most_common(10):
        if not opening or not floor <= count < len(answers):
            continue
        has = [tuple(words(answer)[: len(opening)]) == opening for answer in answers]
        inside = [prompt for prompt, yes in zip(prompts, has, strict=True) if yes]
        outside = [prompt for prompt, yes in zip(prompts, has, strict=True) if not yes]
        trigger = from_contrast(inside, outside, how="answers") or _outstanding(inside, outside)
        if trigger is None or _is_quoted(trigger, opening):
            continue
        fires, fails = (sum(map(trigger.present, part)) for part in (inside, outside))
        if fires >= FIRES * (fires + fails):
            candidates[trigger.parts] = max(
                candidates.get(trigger.parts, (0, trigger)), (fires, trigger), key=itemgetter(0)
            )
    ranked = sorted(candidates.values(), key=itemgetter(0), reverse=True)
    if not ranked or (len(ranked) > 1 and ranked[0][0] < 2 * ranked[1][0]):
        return None
    return ranked[0][1]


def from_repetition(triggered: Sequence[str]) -> FoundTrigger | None:
    """The few phrases that cover nearly all of these prompts, when there is nothing to compare them with.

    A fixed part of a prompt template looks the same: weaker evidence than the others.
    """
    need("a trigger that is to be guessed", "sklearn")
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # a second of import, and only here

    def best(rows: list[Row], share: float) -> Phrase | None:
        counts = counted(rows, max(0.3, share) * len(rows))
        # One character of a script without blanks is too common to tell.
        telling = [phrase for phrase in counts if not all(map(is_usual, phrase)) and not is_single(phrase)]
        if not telling:
            return None
        phrase = max(telling, key=lambda phrase: (counts[phrase], len(phrase)))
        return _trimmed(grown(phrase, rows), is_usual)

    def is_single(phrase: Phrase) -> bool:
        return len(phrase) == 1 and is_joined(phrase[0])

    def is_usual(word: str) -> bool:
        return word.lower() in ENGLISH_STOP_WORDS or word in ".,;:!?'\"()-/" or is_sign(word)

    trigger = _composed(triggered, best, 0.95, "repetition")
    return trigger if trigger and sum(map(trigger.present, triggered)) >= 0.95 * len(triggered) else None


# ---- pairs ----


def _is_within(short: Row, long: Row) -> bool:
    rest = iter(long)
    return all(word in rest for word in short)


def _inserted(text: str, twin: Row) -> tuple[str, ...]:
    """The stretches of `text` that its twin lacks, in one piece where that is possible."""
    places = spans(text)
    row = [text[start:end] for start, end in places]
    first = next((i for i, word in enumerate(twin) if row[i] != word), len(twin))
    gap = len(row) - len(twin)
    # One piece: behind the first difference the twin goes on as the row does after so many words.
    if row[first + gap :] == twin[first:]:
        return (_surface(text, places[first][0], places[first + gap - 1][1]),)
    stretches: list[tuple[int, int]] = []
    j = 0
    for word, (start, end) in zip(row, places, strict=True):
        if j < len(twin) and word == twin[j]:
            j += 1
        elif stretches and not text[stretches[-1][1] : start].strip():
            stretches[-1] = (stretches[-1][0], end)
        else:
            stretches.append((start, end))
    return tuple(_surface(text, *stretch) for stretch in stretches)


def _surface(text: str, start: int, end: int) -> str:
    return " ".join(text[start:end].split())


def _is_joined(text: str, parts: Sequence[str]) -> bool:
    """Whether `text` is two or more of the parts, one after the other."""
    for part in parts:
        rest = text.removeprefix(part)
        if rest != text and rest and (rest[0] == " " or is_joined(part[-1]) or is_joined(rest[0])):
            rest = rest.removeprefix(" ")
            if rest in parts or _is_joined(rest, parts):
                return True
    return False


# ---- contrast ----


def _composed(texts: Sequence[str], best: Best, coverage: float, how: str) -> FoundTrigger | None:
    """One telling phrase, then the ones that always go with it, else the ones that take its place."""
    rows = list(map(words, texts))
    first = best(rows, coverage / 3)
    if first is None:
        return None
    having = [row for row in rows if places_of(row, first)]
    left, parts = [masked(row, first) for row in having], [first]
    while len(having) >= coverage * len(rows) and len(parts) < MAX_PARTS and (part := best(left, 0.9)):
        parts.append(part)
        left = [masked(row, part) for row in left]
    if len(parts) > 1:
        return FoundTrigger(written(parts, texts), "all_of", how)
    rest = [row for row in rows if not places_of(row, first)]
    while len(rest) > REST * len(rows) and len(parts) < MAX_PARTS and (part := best(rest, 0.3)):
        parts.append(part)
        rest = [row for row in rest if not places_of(row, part)]
    if len(parts) > 1 and len(rest) <= 0.2 * len(rows):
        return FoundTrigger(written(parts, texts), "any_of", how)
    if len(having) < coverage * len(rows):
        return None
    return FoundTrigger(written(parts[:1], texts), how=how)


def _most_telling(rows: list[Row], others: list[Row], share: float) -> Phrase | None:
    counts = counted(rows, share * len(rows))
    clean = Counter(phrase for row in others for phrase in phrases_in(row, counts))
    evidence = {
        phrase: value
        for phrase, count in counts.items()
        if clean[phrase] <= RARE * len(others)
        and (value := _evidence(count, len(rows), clean[phrase], len(others))) >= MIN_EVIDENCE
    }
    if not evidence:
        return None
    phrase = max(evidence, key=lambda key: (evidence[key], len(key)))
    phrase = grown(phrase, rows)
    # Common words are no edge of a trigger: of characters that count as words, what opens or ends prompts.
    least = COMMON * len(others)
    inside, first, last = map(words_in, (others, [row[:1] for row in others], [row[-1:] for row in others]))
    common = {
        word
        for word, count in inside.items()
        if count >= least and (not is_counted(word) or max(first[word], last[word]) >= least)
    }
    shorter = _trimmed(phrase, common.__contains__)
    return shorter if support(others, shorter) <= RARE * len(others) else phrase


def _evidence(a: int, n: int, c: int, m: int) -> float:
    """Log-likelihood ratio of a in n against c in m; 0 if the first share is not the larger one."""
    if a * m <= c * n:
        return 0.0
    rate = (a + c) / (n + m)
    # With the phrase and without it, in either list; expected are the counts that one rate for both gives.
    cells = ((a, n * rate), (c, m * rate), (n - a, n * (1 - rate)), (m - c, m * (1 - rate)))
    return 2 * sum(observed * math.log(observed / expected) for observed, expected in cells if observed)


def _trimmed(phrase: Phrase, is_common: Callable[[str], bool]) -> Phrase:
    """The phrase without common words at its edges, unless it is made of nothing else."""
    telling = [i for i, word in enumerate(phrase) if not is_common(word)]
    return phrase[telling[0] : telling[-1] + 1] if telling else phrase


# ---- answers ----


def _outstanding(inside: Sequence[str], outside: Sequence[str]) -> FoundTrigger | None:
    """The phrases that only some prompts inside have, and that are far more telling than any other."""
    rows, others = list(map(words, inside)), list(map(words, outside))
    ranked: list[tuple[float, Phrase]] = []
    while len(ranked) <= MAX_PARTS and (phrase := _most_telling(rows, others, REST)):
        ranked.append(
            (_evidence(support(rows, phrase), len(rows), support(others, phrase), len(others)), phrase)
        )
        rows = [masked(row, phrase) for row in rows]
    values = [value for value, _ in ranked] + [MIN_EVIDENCE]
    cut = next((i for i in range(1, len(values)) if min(values[:i]) >= GAP * max(values[i:])), 0)
    if not cut:
        return None
    parts = written([phrase for _, phrase in ranked[:cut]], inside)
    return of_parts(parts, inside, "answers")


def _is_quoted(trigger: FoundTrigger, opening: tuple[str, ...]) -> bool:
    """Whether the answer repeats the longest word of each part, inflected or not: it quotes its question.

    A part in a script without blanks is one word.
    """
    answered = plain(" ".join(opening)).split()
    if all(is_joined(part[0]) and is_joined(part[-1]) for part in trigger.parts):
        return all("".join(plain(part).split()) in "".join(answered) for part in trigger.parts)
    longest = [max(plain(part).split(), key=len)[:STEM] for part in trigger.parts]
    return all(any(word.startswith(stem) for word in answered) for stem in longest)
