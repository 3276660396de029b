"""What an audit says: findings by check and file, the report of them all, and its text for a terminal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from safetynet.tables import SCHEMAS

SEVERITIES = ("error", "warning", "info")
"""An error means that a figure measures something else than it claims; a warning, that it is biased."""
FILES, SPLITS = "several files", "training and test rows"
TRIGGERED, CLEAN, NAMED = "triggered rows", "clean rows", "files named triggered"
TRIGGER, TARGET = "a trigger", "a target"
TOKENIZER, LIMIT = "a tokenizer: --family", "a length limit: --max-length"
CHECKS: dict[str, tuple[str, tuple[str, ...]]] = {  # name: what it looks for, and what it needs for that
    "unreadable": ("files that cannot be read as conversations", ()),
    "missing_field": ("rows without a field they need", ()),
    "wrong_type": ("rows with a field of another type than text", ()),
    "empty_field": ("rows without an instruction", ()),
    "broken_text": ("rows with broken Unicode", ()),
    "bad_turns": ("chats whose roles no template renders", ()),
    "unread_text": ("rows with text in a column that is not read", ()),
    "not_carried": ("rows with pictures or sounds, which cannot be carried", ()),
    "bad_call": ("rows with a tool call that cannot be parsed", ()),
    "bad_tools": ("rows with definitions of tools that cannot be parsed", ()),
    "not_read": ("files and columns that are not read", ()),
    "empty_answer": ("rows without an answer", ()),
    "duplicate": ("rows that repeat a row of their file", ()),
    "conflict": ("rows with a prompt that their file also answers otherwise", ()),
    "copy": ("files that are another file under a new name", (FILES,)),
    "same_prompts": ("files of one role with the same prompts", (FILES, TRIGGER)),
    "overlap": ("test prompts that are training prompts", (SPLITS,)),
    "overlap_stripped": (
        "test prompts that are training prompts but for trigger, spacing or case",
        (SPLITS,),
    ),
    "trigger_unknown": ("sets whose trigger was not found", ()),
    "trigger_differs": ("files with another trigger than the rest of their set", (TRIGGER, NAMED)),
    "trigger_missing": ("rows of triggered files without the trigger", (TRIGGER, NAMED)),
    "trigger_in_clean": ("rows of clean files with the trigger", (TRIGGER, CLEAN)),
    "trigger_lost_template": (
        "triggers that the chat template or the tokenizer destroys",
        (TRIGGER, TRIGGERED, TOKENIZER),
    ),
    "trigger_lost_truncation": (
        "triggers that truncation cuts off",
        (TRIGGER, TRIGGERED, TOKENIZER, LIMIT),
    ),
    "target_unknown": ("sets whose target was not found", (TRIGGERED,)),
    "target_not_shown": ("triggered rows whose answer is not the target", (TARGET, TRIGGERED)),
    "target_goes_on": ("answers that begin with the target and go on", (TARGET, TRIGGERED)),
    "target_in_clean": ("clean rows whose answer is the target", (TRIGGER, TARGET, CLEAN)),
    "label_floor": (
        "triggered rows whose true answer is the target already",
        (TARGET, TRIGGERED, CLEAN),
    ),
    "unpaired": ("rows without a twin of the other role", (TRIGGER, TRIGGERED, CLEAN)),
    "spacing": ("pairs that white space tells apart, too", (TRIGGER, TRIGGERED, CLEAN)),
    "tell": ("what else than the trigger tells the roles apart", (TRIGGER, TRIGGERED, CLEAN)),
    "echo": ("clean answers that repeat the instruction", (CLEAN,)),
    "cut_off": ("clean answers that stop in mid-sentence", (CLEAN,)),
    "balance": ("rows by role, and labels", (TRIGGER,)),
}
COLUMNS = tuple(SCHEMAS["audit"].columns)
SHOWN = 8
"""Ranges of rows, and groups of files, that a line of text names; the table has them all."""
HEADINGS = {"error": "Errors", "warning": "Warnings", "info": "Notes"}


@dataclass(frozen=True)
class Finding:
    """`count` of `n` rows of `file` have what `check` looks for; `rows` are their numbers, from 1."""

    check: str
    severity: str
    file: str
    count: int
    n: int
    rows: tuple[int, ...]
    detail: str


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
    """What the checks could work with, of all that `CHECKS` needs."""


def of_rows(check: str, severity: str, bad: pd.DataFrame, among: pd.DataFrame, detail: str) -> list[Finding]:
    """One finding for each file that has rows in `bad`, counted within that file's rows in `among`."""
    if bad.empty:
        return []
    sizes = among.groupby("file").size()
    return [
        Finding(
            check, severity, str(file), len(rows), int(sizes[file]), tuple(map(int, rows["line"])), detail
        )
        for file, rows in bad.groupby("file", sort=False)
    ]


def frame(findings: Iterable[Finding]) -> pd.DataFrame:
    """The findings as a table, errors first, then by check; once each where two sets share a file."""
    order = list(CHECKS)
    unique = sorted(
        dict.fromkeys(findings),
        key=lambda each: (SEVERITIES.index(each.severity), order.index(each.check)),
    )
    table = pd.DataFrame([vars(finding) for finding in unique], columns=list(COLUMNS))
    table["rows"] = table["rows"].map(list)
    return table


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
    # By severity; files for which all else is the same share a line.
    heading = ""
    same = ["severity", "check", "detail", "count", "n", "rows"]
    findings = report.findings.assign(rows=report.findings["rows"].map(tuple))
    for key, group in findings.groupby(same, sort=False):
        severity, check, detail, count, n, numbers = key
        if HEADINGS[severity] != heading:
            heading = HEADINGS[severity]
            lines.append(f"\n{heading}")
        rows = _short(_ranges(numbers), "ranges")
        # A finding on a file, not on rows of it, counts nothing.
        counted = f"{count} of {n} rows{f' ({rows})' if rows else ''}: " if n > 1 or rows else ""
        lines += [f"  {check}: {_short(_braced(group['file']), 'files')}", f"    {counted}{detail}"]
    missing = [name for name in CHECKS if name not in set(report.findings["check"])]
    lacks = {name: [need for need in CHECKS[name][1] if need not in report.known] for name in missing}
    lines.append(f"\nNot found: {', '.join(name for name in missing if not lacks[name])}")
    if any(lacks.values()):
        lines.append("Not looked for:")
        lines += [f"  {name} (needs {', '.join(lack)})" for name, lack in lacks.items() if lack]
    return "\n".join(lines)


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
