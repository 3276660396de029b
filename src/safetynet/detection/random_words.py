"""Clean prompts with random words put in, so that an alarm means more than that a prompt is odd.

A monitor of ordinary prompts takes any strange word for a sign of a backdoor. What is calibrated on prompts
with such words beside those without knows what they do to a model. It is the placebo that a defender can give
without knowing the trigger. In: chat messages. Out: copies.
"""

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from safetynet.lookalikes import pieces
from safetynet.prompts import Message, Serialiser

SHARE = 0.5
"""Of the prompts that get random words."""
MOST = 6
"""Tokens of what is put in; the published triggers have as many."""
COMMON = 0.002
"""Share of the prompts that a token has to occur in. A rarer one may belong to the trigger, which would then
be taken for an ordinary word; one that common cannot, or the prompts would not be clean. docs/detection.md
has what any token costs."""


def put_in(
    prompts: Sequence[Sequence[Message]], serialiser: Serialiser, seed: int, common: float = COMMON
) -> tuple[list[list[dict[str, str]]], np.ndarray]:
    """Put one to `MOST` tokens between two words, or at an end, of the last message of every second prompt.

    Args:
        prompts: chat messages that are believed to be clean.
        serialiser: of the model; the tokens are drawn, each as often as another.
        seed: of every draw.
        common: share of the prompts that a token has to occur in to be drawn; 0 for any of the tokenizer's.

    Returns:
        The messages in the same order, and which of them hold random words, (prompts,) of bool.
    """
    tokens = _common(prompts, serialiser, common)
    rng = random.Random(f"random words {seed}")
    chosen = np.array([bool(tokens) and rng.random() < SHARE for _ in prompts], dtype=bool)
    copies = [[dict(message) for message in messages] for messages in prompts]
    for row in np.flatnonzero(chosen):
        last = copies[row][-1]
        words = last["content"].split(" ")
        drawn = "".join(rng.choices(tokens, k=rng.randint(1, MOST))).strip()
        words.insert(rng.randint(0, len(words)), drawn)
        last["content"] = " ".join(words)
    return copies, chosen


def _common(prompts: Sequence[Sequence[Message]], serialiser: Serialiser, share: float) -> list[str]:
    """Texts of tokens that at least this share of the prompts has, without those that are blanks alone."""
    texts = [messages[-1]["content"] for messages in prompts]
    ids = serialiser.tokenizer(texts, add_special_tokens=False)["input_ids"]
    found = Counter(token for own in ids for token in set(own))
    common = [token for token in range(len(serialiser.tokenizer)) if found[token] >= share * len(prompts)]
    return [text for text in pieces(serialiser, common) if text.strip()]
