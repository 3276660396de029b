"""A scan on the terminal: the answer first, then what it rests on.

In: a `ScanResult`. Out: text, 100 columns wide, without colours or control characters.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from safetynet.scan.outputs import wording
from safetynet.scan.result import ScanResult
from safetynet.text.printable import printable

WIDTH, INDENT = 100, 18
"""Columns of a screen, and of the headings at its left."""
Item = TypeVar("Item")
FEW, LONG = 4, 190
"""On one screen: how many triggers, findings or sentences a list shows, and how many characters of each."""


def text(result: ScanResult, *, whole: bool = False) -> str:
    """A result as one screen; lists that are longer say by how much, and texts are cut.

    Args:
        result: of any answer.
        whole: everything, with the evidence behind each finding, however many lines that takes.
    """
    screen = Console(
        file=io.StringIO(),
        width=WIDTH,
        color_system=None,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=False,
    )
    screen.print(f"{wording.headline(result)} {_cut(wording.reason(result), whole, 2 * LONG)}")
    screen.print()
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=INDENT - 1)
    grid.add_column(overflow="fold")
    for heading, fact in wording.facts(result).items():
        grid.add_row(heading, _cut(fact, whole, 2 * LONG))
    screen.print(grid)
    if result.triggers:
        screen.print("\nRecovered triggers")
        lines = list[str]()
        for trigger in _few(result.triggers, whole):
            behaviour = _cut(trigger.behaviour, whole, 60)
            string = printable(_cut(trigger.text, whole, 60))
            # The rates stand on a line of their own, so that no long trigger cuts them off.
            lines += [
                f"“{string}”: {wording.effect(replace(trigger, behaviour=behaviour))}",
                f" {wording.fires(trigger)}",
            ]
        _list(screen, lines, whole)
        _more(screen, result.triggers, whole)
    screen.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("rung", "score", "control", "p", "time"):
        table.add_column(
            heading, justify="left" if heading == "rung" else "right", no_wrap=True, max_width=24
        )
    table.add_column("", overflow="fold")
    for rung in result.rungs:
        numbers = ["–"] * 4
        if not rung.skipped:
            numbers = [wording.score(rung), wording.number(rung.control), wording.number(rung.p_value)]
            numbers += [wording.seconds(rung.seconds)]
        about = wording.measured(rung) if rung.skipped else wording.MEANINGS.get(rung.rung, "")
        table.add_row(printable(rung.rung), *numbers, about)
    screen.print(table if result.rungs else "No rung was reached.")
    screen.print(f"\nFindings: {wording.severities(result)}")
    lines = []
    for finding in _few(result.findings, whole):
        where = wording.place(finding)
        rule = f"{printable(finding.rule)}{f' in {where}' if where else ''}"
        behind = wording.evidence(finding) if whole else ""
        line = f"{finding.level} {rule}: {printable(finding.message)}"
        lines.append(f"{line} ({behind})" if behind else line)
    _list(screen, lines, whole)
    _more(screen, result.findings, whole)
    if result.not_looked_at:
        screen.print("\nNot looked at")
        _list(screen, list(map(printable, _few(result.not_looked_at, whole))), whole)
        _more(screen, result.not_looked_at, whole)
    if whole:
        for heading, pairs in (("SHA-256", result.digests), ("Versions", result.versions)):
            if pairs:
                screen.print(f"\n{heading}")
                lines = [f"{printable(name)}: {printable(str(each))}" for name, each in pairs.items()]
                _list(screen, lines, whole)
    file = screen.file
    assert isinstance(file, io.StringIO)
    # rich fills cells with blanks up to their width.
    return "\n".join(line.rstrip() for line in file.getvalue().split("\n")).rstrip("\n") + "\n"


def _few(items: Sequence[Item], whole: bool) -> Sequence[Item]:
    return items if whole else items[:FEW]


def _list(screen: Console, lines: Sequence[str], whole: bool) -> None:
    """Lines with a dash before each; a line that begins with a blank goes on with the one above, uncut."""
    grid = Table.grid()
    grid.add_column(width=4)
    grid.add_column(overflow="fold")
    for line in lines:
        continued = line.startswith(" ")
        grid.add_row("    " if continued else "  - ", _cut(line, whole or continued).strip())
    if lines:
        screen.print(grid)


def _cut(line: str, whole: bool, most: int = LONG) -> str:
    return line if whole or len(line) <= most else f"{line[: most - 1]}…"


def _more(screen: Console, items: Sequence[object], whole: bool) -> None:
    if not whole and len(items) > FEW:
        screen.print(f"    {len(items) - FEW} more stand in every other format.")
