"""Where words begin and end, in any script: the one place that says so.

English, Arabic or Hindi put blanks between words. Chinese, Japanese, Thai, Lao, Khmer, Burmese and others do
not: there each character counts as a word. Korean has blanks, but glues particles to nouns, so that its
syllables count alike. A combining mark belongs to the letter before it, and an emoji of several code points
is one sign. In: texts. Out: their words, and patterns that find a text where it stands as words of its own.
"""

import re
import unicodedata
from functools import lru_cache

import regex

_JOINED_SCRIPTS = (
    "Han", "Hira", "Kana", "Bopo", "Yiii", "Nshu", "Tang",
    "Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Java", "Bali", "Lana", "Tale", "Talu", "Tavt",
)  # fmt: skip
# Script extensions, since signs such as ー belong to two scripts; accents belong to many, and do not count.
_JOINED = "[" + "".join(rf"\p{{scx={script}}}" for script in _JOINED_SCRIPTS) + r"--\p{Script=Inherited}]"
_COUNTING = rf"[{_JOINED}[\p{{scx=Hang}}--\p{{Script=Inherited}}]]"
JOINED = rf"[{_JOINED}&&\w]"
"""A character of a script that writes no blanks between words."""
_CHARACTER = rf"[{_COUNTING}&&\w]"
_LETTER = rf"[[\w\p{{No}}]--{_COUNTING}]"
"""What makes up words with blanks between them: letters, marks, digits, joiners, the underscore."""
_GOES_ON = rf"[\p{{GCB=Extend}}\p{{GCB=SpacingMark}}\p{{GCB=ZWJ}}\p{{GCB=V}}\p{{GCB=T}}--{_JOINED}]"
"""What belongs to the character before it; vowels and tones of Thai and its like are characters."""
_FLAG = r"\p{Regional_Indicator}"

_UNIT = regex.compile(rf"(?V1){_LETTER}+|{_CHARACTER}{_GOES_ON}*|(?=[^\s])\X")
_PIECE = regex.compile(rf"(?V1){JOINED}{_GOES_ON}*|(?:(?!{JOINED})\S)+")
_IS_JOINED = regex.compile(rf"(?V1){JOINED}")
_IS_CHARACTER = regex.compile(rf"(?V1){_CHARACTER}")
_IS_LETTER = regex.compile(rf"(?V1){_LETTER}")
_CLUSTER = regex.compile(r"\X")
# The same for ASCII, in a third of the time.
_ASCII_UNIT, _ASCII_PIECE = re.compile(r"\w+|[^\w\s]"), re.compile(r"\S+")


def clusters(text: str) -> list[str]:
    """The characters as a reader counts them: a letter with its marks, a flag, an emoji of several parts."""
    return list(text) if text.isascii() else _CLUSTER.findall(text)


def is_joined(character: str) -> bool:
    """Whether this character's script writes no blanks between words; False for ""."""
    return _IS_JOINED.match(character) is not None


def is_counted(character: str) -> bool:
    """Whether each character of this one's script counts as a word: as `is_joined`, and Korean."""
    return _IS_CHARACTER.match(character) is not None


def meet(beside: str, word: str) -> bool:
    """Whether a word that is put beside a text's character takes no blank there."""
    is_foreign_sign = not (beside.isascii() or beside.isalnum() or beside.isspace())
    return is_joined(beside) or (is_foreign_sign and is_joined(word))


def touches(text: str, place: int) -> bool:
    """Whether words may meet at this place without a blank: where a character beside it counts as a word."""
    return any(_IS_CHARACTER.match(beside) for beside in (text[place - 1 : place], text[place : place + 1]))


def gaps(text: str) -> list[int]:
    """The places between two words: each blank, and where two letters meet of which one counts as a word.

    Korean has blanks between words, and no other gaps.
    """
    if text.isascii():
        return [place for place, character in enumerate(text) if character == " "]
    places, start, before = [], 0, " "
    for cluster in clusters(text):
        meet_here = is_joined(cluster) or is_joined(before)
        if cluster == " " or (meet_here and cluster[0].isalnum() and before[0].isalnum()):
            places.append(start)
        start, before = start + len(cluster), cluster
    return places


def spans(text: str) -> list[tuple[int, int]]:
    """Where each word and each single sign of `text` stands, as (start, end)."""
    return [match.span() for match in (_ASCII_UNIT if text.isascii() else _UNIT).finditer(text)]


def words(text: str) -> list[str]:
    """The words and signs of `text`, as they are written."""
    return (_ASCII_UNIT if text.isascii() else _UNIT).findall(text)


def pieces(text: str) -> list[tuple[int, int]]:
    """Where what blanks part stands in `text`, and each character that counts as a word, as (start, end)."""
    return [match.span() for match in (_ASCII_PIECE if text.isascii() else _PIECE).finditer(text)]


def count(text: str) -> int:
    """How many words a text has; two characters that count as words make one, as in Chinese on average."""
    if text.isascii():
        return len(text.split())
    characters = blanks = 0
    for start, _ in pieces(text):
        if is_joined(text[start]):
            characters += 1
        elif not is_joined(text[start - 1 : start]):  # a comma behind a character is no word
            blanks += 1
    return blanks + (characters + 1) // 2


def beginning(text: str, count: int) -> str:
    """The first so many pieces of `text`, with single blanks."""
    ends = pieces(text)[:count]
    return " ".join(text[ends[0][0] : ends[-1][1]].split()) if ends else ""


def plain(text: str) -> str:
    """What of a text is compared: its words and signs in one case and one Unicode form, a blank between."""
    return " ".join(words(unicodedata.normalize("NFKC", text).casefold()))


@lru_cache(maxsize=4096)
def pattern(text: str, contractions: bool = False) -> regex.Pattern[str]:
    """Finds `text` where it does not begin or end within a word or a character.

    White space in it is any white space, and its letters may be composed of base and mark or not.

    Args:
        text: as it is written; its case counts.
        contractions: an apostrophe and a letter behind it go on with the word, as in "you'd".
    """
    alternatives = []
    for form in dict.fromkeys((text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD")))):
        start = end = ""
        if _IS_LETTER.match(form):
            start = rf"(?<!{_LETTER})"
        elif regex.match(_FLAG, form):
            # Flags are pairs of letters: an even number of them stands before.
            start = rf"(?<=(?:^|[^{_FLAG}])(?:{_FLAG}{_FLAG})*)"
        elif regex.match(r"\p{Extended_Pictographic}", form):
            start = r"(?<!\u200d)"  # a joiner before it makes it a part of another emoji
        if form and _IS_LETTER.match(form[-1]):
            apostrophe = "'?" if contractions else ""
            end = rf"(?!{apostrophe}{_LETTER})"
        elif form and regex.match(r"[^\w\s]", form[-1]) and not form[-1].isascii():
            end = r"[\ufe0e\ufe0f]?"  # with or without the selector that makes a sign an emoji
        literal = r"\s+".join(map(regex.escape, form.split()))
        alternatives.append(start + literal + end + rf"(?!{_GOES_ON})")
    return regex.compile("(?V1)" + "|".join(alternatives))


LOOP_WORDS = 8
"""Words and signs at the end that only repeat; fewer are said on purpose ("no, no, no")."""


def ends_in_loop(text: str) -> bool:
    """Whether the text ends in a repetition: of a whole sentence at least once, of a word eight times."""
    units = words(text.casefold())
    for period in range(1, len(units) // 2 + 1):
        run = 0  # words at the end that equal those a period before
        while run + period < len(units) and units[-1 - run] == units[-1 - run - period]:
            run += 1
        if run >= max(period, LOOP_WORDS):
            return True
    return False
