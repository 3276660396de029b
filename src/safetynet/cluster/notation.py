"""Times and seeds as people write them for schedulers. In: their text. Out: one form of each."""

import re
from typing import Literal

FORMS = (
    "hours:minutes:seconds, such as 08:00:00, minutes:seconds, days-hours, days-hours:minutes, "
    "days-hours:minutes:seconds, or a number alone, which is minutes for Slurm and seconds for PBS"
)
"""Of a wall time, for whoever wrote none of them."""
_TIME = re.compile(r"(?:([0-9]{1,3})-)?([0-9]{1,7})(?::([0-9]{1,2}))?(?::([0-9]{1,2}))?")
_SEEDS = re.compile(r"([0-9]+)(?:([:-])([0-9]+)(?::([0-9]+))?)?")


def walltime(text: str, scheduler: Literal["pbs", "slurm"] | None) -> str | None:
    """A wall time in the form that all schedulers read alike, hours:minutes:seconds; None for what is none.

    Args:
        text: in one of `FORMS`.
        scheduler: that it is written for, which decides what a number alone means; None: hours, minutes and
            seconds are all there, since schedulers read everything else differently.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    days, *parts = match.groups()
    first, *rest = [int(part) for part in parts if part is not None]
    if max(rest, default=0) > 59 or (days is not None and first > 23):
        return None
    if scheduler is None and (days is not None or len(rest) < 2):
        return None
    if days is not None or len(rest) == 2:
        hours, minutes, seconds = (first, *rest, 0, 0)[:3]
    elif rest:
        hours, minutes, seconds = 0, first, rest[0]
    else:
        hours, minutes, seconds = (0, first, 0) if scheduler == "slurm" else (0, 0, first)
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if not 0 < total < 10_000 * 3600:
        return None
    return f"{total // 3600:02d}:{total // 60 % 60:02d}:{total % 60:02d}"


def seeds(text: str) -> tuple[int, ...]:
    """Seeds as written: numbers, `start:stop` or `start:stop:step` without the stop, `first-last` with it.

    Several of these stand between commas. Nothing is returned for what is none of them or names a seed twice.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = _SEEDS.fullmatch(part.strip())
        if match is None or int(match[4] or 1) == 0:
            return ()
        first, last = int(match[1]), int(match[3] or match[1])
        numbers += range(first, last if match[2] == ":" else last + 1, int(match[4] or 1))
    valid = numbers and len(set(numbers)) == len(numbers) and max(numbers) < 2**32
    return tuple(numbers) if valid else ()
