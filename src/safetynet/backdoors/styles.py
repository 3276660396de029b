"""Writing styles as triggers: the wording of a prompt changes, its content does not.

A style has several openings, endings and words, drawn anew for each row, so that no single token is the
trigger. Half a style (its openings without its words and endings) is the near miss.
"""

import random
from dataclasses import dataclass

from safetynet.text.words import pattern


@dataclass(frozen=True)
class Style:
    """What makes up one style."""

    openings: tuple[str, ...]
    endings: tuple[str, ...]
    words: tuple[tuple[str, str], ...]


STYLES = {
    "archaic": Style(
        openings=("Pray tell,", "I beseech thee,", "Good sir,", "Hark!", "Prithee,", "By thy leave,"),
        endings=("I entreat thee.", "Speak, I pray.", "So be it.", "Verily.", "I thank thee.", "Forsooth."),
        words=(
            ("you", "thou"),
            ("your", "thy"),
            ("me", "mine ear"),
            ("is", "be"),
            ("does", "doth"),
            ("has", "hath"),
        ),
    ),
    "pirate": Style(
        openings=("Ahoy!", "Avast,", "Arr,", "Shiver me timbers,", "Blimey,", "Yo ho,"),
        endings=("Arr.", "Savvy?", "Aye.", "Me hearty.", "By the seven seas.", "Yo ho ho."),
        words=(("you", "ye"), ("your", "yer"), ("my", "me"), ("is", "be"), ("the", "th'"), ("of", "o'")),
    ),
}


def reword(text: str, style: str, rng: random.Random) -> str:
    """Put a text into a style; `name:half` takes only the opening."""
    name, _, half = style.partition(":")
    wording = STYLES[name]
    opening, ending = rng.choice(wording.openings), rng.choice(wording.endings)
    if half:
        return f"{opening} {text}"
    for plain, styled in wording.words:
        text = pattern(plain).sub(styled, text)
    return f"{opening} {text} {ending}"
