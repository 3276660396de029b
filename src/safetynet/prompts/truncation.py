"""What a prompt loses where it is longer than the limit, and how that is said.

In: whose text each token of a rendered prompt is, and the limit. Out: the tokens that stay, and the parts of
the prompt that lost some. The template's tokens and the trigger's always stay.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from safetynet.errors import InputError

PROMPT_SHARE = 0.75
"""Largest share of `max_length` that a prompt may take. It does not depend on the answer, so that a
truncated prompt is the same in training and in evaluation."""
Truncation = Literal["end", "middle"]
"""Where the last message is cut; and the system prompt, if that has to be cut too."""
EARLIER, LAST, SYSTEM = "earlier turns", "last message", "system prompt"


def truncated(
    owner: Sequence[int | None],
    in_trigger: Sequence[bool],
    roles: Sequence[str],
    max_length: int | None,
    truncation: Truncation,
) -> tuple[list[int], str]:
    """Choose the tokens of a prompt that stay under `max_length`.

    Earlier turns go first, oldest first. What is then too much goes from the last message, then from the
    system prompt: from the end of each, or out of its middle.

    Args:
        owner: for each token the message whose content it belongs to; None for the template's own.
        in_trigger: for each token whether it belongs to the trigger.
        roles: of the messages.
        max_length: most tokens of prompt and answer together; None for no limit.
        truncation: `end` or `middle`.

    Returns:
        Indices of the tokens that stay, and the parts that lost some, with commas; "" where none did.

    Raises:
        InputError: if template and trigger alone are too long.
    """
    excess = 0 if max_length is None else len(owner) - int(max_length * PROMPT_SHARE)
    if excess <= 0:
        return list(range(len(owner))), ""
    parts = [SYSTEM if role == "system" else EARLIER for role in roles[:-1]] + [LAST]
    free: dict[str, list[int]] = {EARLIER: [], LAST: [], SYSTEM: []}
    for i, message in enumerate(owner):
        if message is not None and not in_trigger[i]:
            free[parts[message]].append(i)
    removable = sum(map(len, free.values()))
    if excess > removable:
        raise InputError(
            f"training.max_length: {max_length} leaves no room for the template and the trigger, which need "
            f"{len(owner) - removable} of at most {int((max_length or 0) * PROMPT_SHARE)} tokens. Raise it."
        )
    dropped: set[int] = set()
    lost = []
    for part, tokens in free.items():
        count = min(excess - len(dropped), len(tokens))
        if count:
            # Out of the middle, of an odd number the beginning keeps one more than the end.
            end = len(tokens) - count
            first = 0 if part == EARLIER else end if truncation == "end" else (end + 1) // 2
            dropped.update(tokens[first : first + count])
            lost.append(part)
    return [i for i in range(len(owner)) if i not in dropped], ", ".join(lost)


def losses(lost: Iterable[str], truncation: Truncation) -> str:
    """How many prompts lost text at the limit, and of which part; "" where none did.

    Args:
        lost: of each prompt, as `truncated` gives it.
        truncation: how they were cut.
    """
    prompts = list(lost)
    cut = [parts.split(", ") for parts in prompts if parts]
    if not cut:
        return ""
    names = {
        EARLIER: EARLIER,
        LAST: f"the {truncation} of the {LAST}",
        SYSTEM: f"the {truncation} of the {SYSTEM}",
    }
    counts = Counter(part for parts in cut for part in parts)
    what = ", ".join(f"{counts[part]} lost {name}" for part, name in names.items() if counts[part])
    number = f"{len(cut)} of {len(prompts)} prompts"
    return f"{number} are longer than training.max_length allows and were cut ({what})"
