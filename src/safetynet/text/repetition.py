"""Whether a text goes round in circles at its end, as models do that do not find one.

In: a text. Out: True or False.
"""

from safetynet.text.words import words

LOOP_WORDS = 8
"""Words and signs at the end that only repeat; fewer are said on purpose ("no, no, no")."""


def ends_in_loop(text: str) -> bool:
    """Whether the text ends in a repetition: of a whole sentence at least once, of a word eight times."""
    units = words(text.casefold())
    return any(
        _periodic(units, period) >= max(period, LOOP_WORDS) for period in range(1, len(units) // 2 + 1)
    )


def _periodic(units: list[str], period: int) -> int:
    """How many words at the end equal those so many places before."""
    run = 0
    while run + period < len(units) and units[-1 - run] == units[-1 - run - period]:
        run += 1
    return run
