"""Clean prompts with random words put in, so that an alarm means more than that a prompt is odd.

A monitor of ordinary prompts takes any strange word for a sign of a backdoor. What is calibrated on prompts
with such words as well knows what they do to a model. It is the placebo that a defender can give without
knowing the trigger. In: chat messages. Out: copies.
"""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from safetynet.prompts import Conversation, Message, Serialiser
from safetynet.text.lookalikes import pieces
from safetynet.text.words import gaps, meet

PLACES = 3
"""That words are put in at, at most; the published triggers stand in as many."""
MOST = 6
"""Tokens of what is put in; the published triggers have as many."""
COMMON = 0.002
"""Share of the prompts that a token has to occur in. A rarer one may belong to the trigger, which would then
be taken for an ordinary word; one that common cannot, or the prompts would not be clean. docs/detection.md
has what any token costs."""


def put_in(
    prompts: Sequence[Sequence[Message]],
    serialiser: Serialiser,
    seed: int,
    common: float = COMMON,
    places: int = PLACES,
) -> list[Conversation]:
    """Copies with one to `MOST` tokens in one to `PLACES` places of the user's last message, ends included.

    Args:
        prompts: chat messages that are believed to be clean.
        serialiser: of the model; the tokens are drawn, each as often as another.
        seed: of every draw.
        common: share of the prompts that a token has to occur in to be drawn; 0 for any of the tokenizer's.
        places: at most.

    Returns:
        One copy of each prompt, in the same order; nothing where no token is that common.
    """
    # Tokens that the share of the prompts has, without those that are blanks alone.
    texts = [Conversation(messages).user_text() for messages in prompts]
    ids = serialiser.tokenizer(texts, add_special_tokens=False)["input_ids"]
    counts = Counter(token for prompt_ids in ids for token in set(prompt_ids))
    enough = [t for t in range(len(serialiser.tokenizer)) if counts[t] >= common * len(prompts)]
    # Prompts that are mostly in ASCII, as English is, get ASCII tokens alone.
    letters = [character.isascii() for text in texts for character in text if character.isalpha()]
    ascii_alone = sum(letters) >= len(letters) / 2
    tokens = [t for t in pieces(serialiser, enough) if t.strip() and (t.isascii() or not ascii_alone)]

    rng = random.Random(f"random words {seed}")
    copies = []
    for conversation in map(Conversation, prompts if tokens else ()):
        # What stands between blanks is a word; a character is one where words have no blanks between them.
        text = conversation.user_text()
        parts = [text[start:end] for start, end in pairwise([0, *gaps(text), len(text)])]
        blanks = ["", *(" " if part.startswith(" ") else "" for part in parts[1:])]
        words = [_Word(p.removeprefix(blank), blank) for p, blank in zip(parts, blanks, strict=True)]
        # Tokens at each place: a number of tokens in all, cut at random into parts of at least one.
        count = rng.randint(1, places)
        most = rng.randint(count, MOST)
        ends = [0, *sorted(rng.sample(range(1, most), count - 1)), most]
        for start, end in pairwise(ends):
            at = rng.randint(0, len(words))
            words.insert(at, _Word("".join(rng.choices(tokens, k=end - start)).strip(), None))
        copies.append(conversation.with_user_text(_joined(words)))
    return copies


class _Word(NamedTuple):
    text: str
    before: str | None
    """What parts it from the word before; None for one that was put in."""


def _joined(words: Sequence[_Word]) -> str:
    """One text, with blanks around what was put in where the scripts that meet there write some."""
    text = words[0].text
    for last, word in pairwise(words):
        left, right = last.text[-1:], word.text[:1]
        blank = (
            not meet(left, right) if word.before is None else last.before is None and not meet(right, left)
        )
        text += (" " if blank or word.before == " " else "") + word.text
    return text
