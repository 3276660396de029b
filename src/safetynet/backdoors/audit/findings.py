"""What an audit says: one finding per check and file."""

from collections.abc import Iterable
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
        key=lambda found: (SEVERITIES.index(found.severity), order.index(found.check)),
    )
    table = pd.DataFrame([vars(finding) for finding in unique], columns=list(COLUMNS))
    table["rows"] = table["rows"].map(list)
    return table
