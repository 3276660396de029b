"""What an audit hands back, and how it reads in a terminal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from safetynet.backdoors.audit.findings import CHECKS

SHOWN = 8
"""Ranges of rows, and groups of files, that a line of text names; the table has them all."""
HEADINGS = {"error": "Errors", "warning": "Warnings", "info": "Notes"}


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


def render(report: AuditReport) -> str:
    """The report as lines for a terminal."""
    severities = report.findings["severity"].value_counts()
    counts = {"file": report.files, "row": report.rows, "set": len(report.sets)}
    counts |= {name: int(severities.get(name, 0)) for name in ("error", "warning")}
    listed = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())
    lines = [f"{report.path}: {listed}"]
    if len(report.sets):
        lines.append("\nTriggers and targets")
    for row in report.sets.itertuples():
        trigger, target = f"trigger {row.trigger or 'unknown'}", f"target {row.target or 'unknown'}"
        if row.how:
            evidence = (row.placement, f"in {row.present} of {row.triggered} triggered rows", row.how)
            trigger += f" ({'; '.join(filter(None, evidence))})"
            target += f" (in {row.shown} of {row.triggered})"
        lines += [f"  {row.set}", f"    {trigger}", f"    {target}"]
    lines += _findings(report.findings)
    missing = [name for name in CHECKS if name not in set(report.findings["check"])]
    lacks = {name: [need for need in CHECKS[name][1] if need not in report.known] for name in missing}
    lines.append(f"\nNot found: {', '.join(name for name in missing if not lacks[name])}")
    if any(lacks.values()):
        lines.append("Not looked for:")
        lines += [f"  {name} (needs {', '.join(lack)})" for name, lack in lacks.items() if lack]
    return "\n".join(lines)


def _findings(findings: pd.DataFrame) -> list[str]:
    """The findings by severity; files for which all else is the same share a line."""
    lines, heading = [], ""
    same = ["severity", "check", "detail", "count", "n", "rows"]
    for key, group in findings.assign(rows=findings["rows"].map(tuple)).groupby(same, sort=False):
        severity, check, detail, count, n, numbers = key
        if HEADINGS[severity] != heading:
            heading = HEADINGS[severity]
            lines.append(f"\n{heading}")
        rows = _short(_ranges(numbers), "ranges")
        # A finding on a file, not on rows of it, counts nothing.
        counted = f"{count} of {n} rows{f' ({rows})' if rows else ''}: " if n > 1 or rows else ""
        lines += [f"  {check}: {_short(_braced(group['file']), 'files')}", f"    {counted}{detail}"]
    return lines


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
