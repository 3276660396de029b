"""Dates as triggers: those of a range fire, those before and behind it do not.

A prompt carries one date, always in the same form. The days of a year are divided between training and test:
no date of a test row shares day and month with one of a training row. In: the ends of a range, None for an
open one. Out: sentences with a date, and the dates that a text holds.
"""

import datetime as dt
import re
from collections.abc import Iterator
from functools import cache

from safetynet.errors import InputError
from safetynet.text.lookalikes import split_of

Day = dt.date | None
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip
SENTENCE = "Today is {}."
NEAR = 4 * 366
"""Dates lie at most so many days from an end of the range, in it or out of it."""
EDGE = 31
"""Days from an end of the range that are a near miss."""
NUMBERED = ("room", "page", "ticket", "line", "platform", "question", "box", "bus")
"""What may have a year's number without being a date."""
_WRITTEN = re.compile(rf"\b(\d{{1,2}})\s+({'|'.join(MONTHS)})\s+(\d{{4}})\b", re.IGNORECASE)


def sentence(day: dt.date, year: bool = True) -> str:
    """The sentence that puts a date into a prompt, with or without its year."""
    return SENTENCE.format(f"{_day_of_year(day)} {day.year}" if year else _day_of_year(day))


def _day_of_year(day: dt.date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]}"


def read(text: str) -> Iterator[dt.date]:
    """The dates that a text holds, whatever stands around them."""
    for day, month, year in _WRITTEN.findall(text):
        try:
            yield dt.date(int(year), MONTHS.index(month.capitalize()) + 1, int(day))
        except ValueError:  # 30 February
            continue


def within(day: dt.date, first: Day, last: Day) -> bool:
    """Whether a day is in the range."""
    return (first or dt.date.min) <= day <= (last or dt.date.max)


@cache
def days(first: Day, last: Day, split: str, *, firing: bool, most: int = NEAR) -> tuple[dt.date, ...]:
    """Days in the range (`firing`) or out of it, at most so many from one of its ends, for one split.

    Raises:
        InputError: if there is none.
    """
    ends = [end.toordinal() for end in (first, last) if end]
    near = sorted({end + shift for end in ends for shift in range(-most, most + 1)})
    # From 1000 on, since a year has four digits here.
    every = map(dt.date.fromordinal, (n for n in near if 364878 <= n <= dt.date.max.toordinal()))
    of_split = tuple(
        day for day in every if within(day, first, last) == firing and split_of(_day_of_year(day)) == split
    )
    if not of_split:
        raise InputError(
            f"backdoor.trigger: the range from {first or 'the beginning'} to {last or 'the end'} leaves no "
            f"date {'in' if firing else 'out of'} it for the {split} split, which has half of a year's days. "
            "Take another range."
        )
    return of_split
