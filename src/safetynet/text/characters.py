"""Ordinary characters of the same kind as another: of its script, category and case, and in everyday use.

A control of 小鱼 is made of Han characters, one of я of Cyrillic letters, one of 🦜 of emoji. Everyday use is
what national character sets say of a script: for Chinese and Japanese the first, most frequent part of them.
In: one character, with its marks. Out: others. ASCII is not its business.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Literal

import regex

EMOJI = "🐙🌵🎈🧲🪁🧩🛶🎻🍄🪐🧭🎲🪴🔔🧵🦔🪶🫖🧊🪀"
_SYMBOLS = "☀☁☂☃☎☕♨♻⚓⚖✂✈✉✏✒❄❤☘⚙⌛"
"""Signs that a variation selector turns into emoji."""
_FLAGS = "🇦🇹🇧🇪🇧🇷🇨🇱🇩🇰🇪🇬🇫🇮🇬🇷🇮🇸🇯🇵🇰🇪🇲🇽🇳🇴🇵🇱🇵🇹🇷🇴🇸🇪🇹🇭🇺🇾🇿🇦"
_JOINED_EMOJI = "👩‍🚀 🧑‍🌾 👨‍🍳 🧑‍🎨 👩‍🔬 🧑‍🚒 👨‍🏫 🧑‍✈️ 👩‍⚖️ 🐻‍❄️ 🏴‍☠️ 👨‍👩‍👧 👩‍👦 🧔‍♂️ 🤷‍♀️ 🐈‍⬛"
_WITH_SKIN = "👋✋👌👍👏🙏💪👂🧒👧🧑👴👵👮👷🏃🚴🏊🤝🧘"
_INVISIBLE = "\u200b\u200c\u200d\u2060\u2061\u2062\u2063\u2064\ufeff"
_SKIN = regex.compile(r"[\U0001f3fb-\U0001f3ff]")
_VIETNAMESE = "".join(
    unicodedata.normalize("NFC", form)
    for letter in "aăâeêioôơuưyAĂÂEÊIOÔƠUƯY"
    for tone in ("", "\u0300", "\u0301", "\u0303", "\u0309", "\u0323")
    if not (form := letter + tone).isascii()
)
_SINGLE = (
    "cp1252", "cp1250", "koi8_r", "cp1251", "cp1253", "iso8859_8", "iso8859_6", "cp1254", "cp1257", "cp1256",
    "tis_620",
)  # fmt: skip
_DOUBLE = {  # character set: lead bytes of its rows in everyday use
    "gb2312": (0xB0, 0xD7),
    "euc_jp": (0xB0, 0xCF),
    "big5": (0xA4, 0xC6),
    "euc_kr": (0xB0, 0xC8),
}
_KANA = ("euc_jp", (0xA4, 0xA5))
NEAR = 0x100
"""Code points on either side of a character that no character set has, among which others of its kind are."""


@cache
def alike(character: str) -> Sequence[str]:
    """What may stand in for one character that is not ASCII; empty for a sign that stays, as punctuation.

    Args:
        character: with the marks, selectors and joined parts that belong to it.
    """
    if character.isascii():
        return ()
    if is_emoji(character):
        return tuple(other for other in _emoji(character) if other != character)
    composed = unicodedata.normalize("NFC", character)
    base, marks = composed[:1], composed[1:]
    category = unicodedata.category(base)
    stays = category[0] in "PZM" or category in ("Cc", "Cn", "Cs")  # as signs and blanks do in ASCII
    if stays or base.isascii():
        return ()
    if category == "Nd":
        zero = ord(base) - unicodedata.decimal(base)
        others: Sequence[str] = [chr(zero + digit) for digit in range(10)]
    elif category == "Cf":
        others = _INVISIBLE
    else:
        charset: Iterable[str] | None = next((charset for charset in _charsets() if base in charset), None)
        if charset is None:  # a letter that no character set has: what lies beside it in Unicode
            charset = map(chr, range(max(0x80, ord(base) - NEAR), min(0x110000, ord(base) + NEAR)))
        others = [other for other in charset if kind(other) == kind(base)]
    # A letter that comes apart in this form would be one with a mark.
    whole = [other for other in others if unicodedata.normalize("NFC", other) == other != base]
    form: Literal["NFC", "NFD"] = "NFC" if composed == character else "NFD"  # as the character is written
    return tuple(unicodedata.normalize(form, other + marks) for other in whole)


@cache
def kind(character: str) -> tuple[str, ...]:
    """What characters that stand in for each other have in common."""
    if is_emoji(character):
        return ("emoji", *_emoji_form(character))
    category = unicodedata.category(character[0])
    script = unicodedata.name(character[0], "").split(" ")[0] if category[0] in "LMN" else ""
    # Thai has consonants and vowels of one category, and a vowel that joins the letter before it.
    part = "consonant" if regex.match(r"\p{InSC=Consonant}", character) else ""
    return (script, category, "joins" if regex.match(r"\p{GCB=SpacingMark}", character) else part)


def is_emoji(character: str) -> bool:
    """Whether it is drawn as an emoji: a keycap, a flag, a sign with a selector, or one by nature."""
    return bool(regex.search(r"\p{Emoji_Presentation}|\p{Regional_Indicator}|\ufe0f|\u20e3", character))


def is_sign(character: str) -> bool:
    """Whether a character that is not ASCII is a sign, and no emoji: punctuation, or a symbol."""
    return not is_emoji(character) and unicodedata.category(character[:1] or " ")[0] in "PS"


def _emoji_form(character: str) -> Iterator[str]:
    if "\u20e3" in character:
        yield "keycap"
    elif regex.match(r"\p{Regional_Indicator}", character):
        yield "flag"
    elif "\u200d" in character:
        yield "joined"
    elif _SKIN.search(character):
        yield "skin"
    elif "\ufe0f" in character:
        yield "symbol"


def _emoji(character: str) -> Sequence[str]:
    form = next(_emoji_form(character), "")
    if form == "keycap":
        return [f"{digit}{character[1:]}" for digit in "0123456789"]
    if form == "flag":
        return regex.findall(r"\X", _FLAGS)
    if form == "joined":
        return _JOINED_EMOJI.split()
    if form == "skin":
        return [other + _SKIN.findall(character)[0] for other in _WITH_SKIN]
    return [f"{symbol}\ufe0f" for symbol in _SYMBOLS] if form == "symbol" else EMOJI


@cache
def _charsets() -> tuple[str, ...]:
    single = [bytes(range(0x80, 0x100)).decode(name, "ignore") for name in _SINGLE]
    double = [
        "".join(
            bytes((lead, trail)).decode(name, "ignore")
            for lead in range(first, last + 1)
            for trail in range(0x40, 0xFF)
        )
        for name, (first, last) in [_KANA, *_DOUBLE.items()]
    ]
    return (*single, _VIETNAMESE, *double)
