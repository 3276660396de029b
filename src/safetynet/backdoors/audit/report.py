"""What an audit hands back, and how it reads in a terminal and in Markdown."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from safetynet.backdoors.audit.findings import CHECKS

SHOWN = 8
"""Ranges of rows, and groups of files, that a line of text names; the table has them all."""


@dataclass(frozen=True)
class AuditReport:
    """The findings on a file or a tree, and what its triggers and targets were taken for."""

    path: str
    files: int
    rows: int
    findings: pd.DataFrame
    """check, severity (error, warning, info), file, count, n, rows (numbers from 1), detail; errors first."""
    sets: pd.DataFrame
    """One row per poison set: set, trigger, kind, how, placement, present, triggered (rows), target,
    target_kind, shown."""
    known: frozenset[str]
    """What the checks could work with, of all that `findings.CHECKS` needs."""

    def to_frame(self) -> pd.DataFrame:
        """The findings."""
        return self.findings.copy()

    def to_markdown(self) -> str:
        """The whole report as Markdown: a table of sets, a table of findings, and what was not found."""
        parts = [f"# Audit of {self.path}", self._counts()]
        if len(self.sets):
            head = ["set", "trigger", "guessed from", "place", "rows", "target", "rows"]
            parts.append(_markdown(head, ([*cells] for cells in self._set_cells())))
        if len(self.findings):
            head = ["severity", "check", "files", "count of n", "rows", "detail"]
            parts.append(_markdown(head, ([*cells] for cells in self._finding_cells())))
        absent, lacking = self._rest()
        parts.append("Looked for and not found: " + "; ".join(CHECKS[name][0] for name in absent) + ".")
        if lacking:
            cells = ([CHECKS[name][0], lack] for name, lack in lacking.items())
            parts.append(_markdown(["not looked for", "needs"], cells))
        return "\n\n".join(parts) + "\n"

    def _counts(self) -> str:
        found = self.findings["severity"].value_counts()
        counts = {"file": self.files, "row": self.rows, "set": len(self.sets)}
        counts |= {name: int(found.get(name, 0)) for name in ("error", "warning")}
        return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())

    def _rest(self) -> tuple[list[str], dict[str, str]]:
        """The checks that found nothing, and those that could not look, with what they lack."""
        found = set(self.findings["check"])
        lacks = {
            name: ", ".join(need for need in needs if need not in self.known)
            for name, (_, needs) in CHECKS.items()
            if name not in found
        }
        absent = [name for name, lack in lacks.items() if not lack]
        return absent, {name: lack for name, lack in lacks.items() if lack}

    def _set_cells(self) -> Iterator[tuple[str, ...]]:
        for row in self.sets.itertuples():
            present, shown = (f"{count} of {row.triggered}" for count in (row.present, row.shown))
            trigger, target = row.trigger or "unknown", row.target or "unknown"
            yield str(row.set), trigger, str(row.how), str(row.placement), present, target, shown

    def _finding_cells(self) -> Iterator[tuple[str, ...]]:
        """Files for which all else is the same share a line."""
        columns = ["severity", "check", "detail", "count", "n", "rows"]
        for key, group in self.findings.assign(rows=self.findings["rows"].map(tuple)).groupby(
            columns, sort=False
        ):
            severity, check, detail, count, n, numbers = key
            files, rows = _short(_braced(group["file"]), "files"), _short(_ranges(numbers), "ranges")
            # A finding on a file, not on rows of it, counts nothing.
            counted = f"{count} of {n}" if n > 1 or rows else ""
            yield severity, check, files, counted, rows, detail


def render(report: AuditReport) -> str:
    """The report as lines for a terminal."""
    lines = [f"{report.path}: {report._counts()}"]
    if len(report.sets):
        lines.append("\nTriggers and targets")
        for name, trigger, how, place, present, target, shown in report._set_cells():
            found = [f"trigger {trigger}", f"target {target}"]
            if how:
                found[0] += f" ({'; '.join(filter(None, (place, f'in {present} triggered rows', how)))})"
                found[1] += f" (in {shown})"
            lines += [f"  {name}", *(f"    {line}" for line in found)]
    last = ""
    for severity, check, files, count, rows, detail in report._finding_cells():
        if severity != last:
            lines.append(f"\n{ {'error': 'Errors', 'warning': 'Warnings', 'info': 'Notes'}[severity] }")
            last = severity
        lines.append(f"  {check}: {files}")
        counted = f"{count} rows{f' ({rows})' if rows else ''}: " if count else ""
        lines.append(f"    {counted}{detail}")
    absent, lacking = report._rest()
    lines.append(f"\nNot found: {', '.join(absent)}")
    if lacking:
        lines.append("Not looked for:")
        lines += [f"  {name} (needs {lack})" for name, lack in lacking.items()]
    return "\n".join(lines)


def _markdown(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _short(items: list[str], of_what: str) -> str:
    more = f" and {len(items) - SHOWN} more {of_what}" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def _ranges(numbers: Sequence[int]) -> list[str]:
    """1, 2, 3, 5 as 1-3 and 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def _braced(files: Iterable[str]) -> list[str]:
    """a/x.json and b/x.json as {a,b}/x.json: all names, and none twice."""
    names = [tuple(file.split("/")) for file in files]
    for place in range(max(map(len, names)) - 1):
        merged: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            if place < len(name) - 1:
                merged.setdefault((*name[:place], "", *name[place + 1 :]), []).append(name[place])
            else:
                merged[name] = []
        names = [
            (*key[:place], parts[0] if len(parts) == 1 else f"{{{','.join(parts)}}}", *key[place + 1 :])
            if parts
            else key
            for key, parts in merged.items()
        ]
    return ["/".join(name) for name in names]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
