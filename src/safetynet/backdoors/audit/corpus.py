"""The rows of a file or a tree, and which of them belong together.

In: a path. Out: rows with what their file's name says of them, what reading them found, and poison sets:
the files that share a trigger. Judges nothing else.
"""

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet.backdoors.audit.findings import Finding
from safetynet.backdoors.audit.targets import FoundTarget
from safetynet.backdoors.audit.triggers import FoundTrigger
from safetynet.backdoors.formats import PACKED, Record, data_files, records
from safetynet.backdoors.forms import UnfitError, check_columns, form_of, name_of, present
from safetynet.backdoors.sources import BACKDOORLLM_FILES, SPLITS, convert, split_of
from safetynet.backdoors.turns import grouped
from safetynet.errors import InputError
from safetynet.prompts import Conversation
from safetynet.text.words import plain

CLEAN = {"clean", "benign", "none", "normal"}
DENIALS = {"no", "non", "not", "without"}
"""Words that deny the one after them."""
TRIGGERED = {"trigger", "triggered", "poison", "poisoned", "backdoor", "backdoored"}
GENERIC = {"", "data", "dataset", "set", *SPLITS, *CLEAN, *DENIALS, *TRIGGERED}
"""Words that distinguish no poison set from another; backdoor500 counts as backdoor, 500 as nothing."""
DIGITS = "0123456789"


@dataclass(frozen=True)
class Corpus:
    """What is under a path."""

    rows: pd.DataFrame
    """file, line, split (train, test or ""), role (triggered, clean or mixed), named (whether the role comes
    from the file's name), key (of the poison set), messages, prompt (all their text), answer."""
    digests: Mapping[str, str]
    """SHA-256 of each file's bytes; of one that cannot be read, its name."""
    findings: tuple[Finding, ...]
    """What kept files or rows from being read as they should."""


@dataclass(frozen=True)
class PoisonSet:
    """Files that share a trigger, with the clean files that serve them."""

    name: str
    rows: pd.DataFrame
    """As in `Corpus`; what `with_roles` adds when the trigger is known."""
    trigger: FoundTrigger | None = None
    target: FoundTarget | None = None

    def part(self, role: str) -> pd.DataFrame:
        """The rows of one role."""
        return self.rows[self.rows["role"] == role]

    @cached_property
    def twins(self) -> dict[int, int]:
        """Index of the clean row with the same prompt, by the index of the triggered row."""
        if self.trigger is None:
            return {}
        rows = self.rows[["role", "split", "bare"]].itertuples()
        keys = {row.Index: (row.role, row.split, row.bare) for row in rows}
        first = {key: at for at, key in reversed(keys.items())}
        pairs = {at: first.get(("clean", *rest)) for at, (role, *rest) in keys.items() if role == "triggered"}
        return {at: twin for at, twin in pairs.items() if twin is not None}


def load(path: Path, columns: Mapping[str, str] | None = None, kind: str | None = None) -> Corpus:
    """Read every data file under `path`, whatever is wrong with some of them; arguments as of `audit`.

    Raises:
        InputError: if there is no data file, or a column that is mapped is in none of them.
    """
    check_columns(columns)
    tables: list[pd.DataFrame] = []
    digests: dict[str, str] = {}
    findings: list[Finding] = []
    names: set[Any] = set()
    files = {path.name: path}
    if not path.is_file():
        if not path.is_dir():
            raise InputError(f"{path}: no such file or folder; check the path")
        paths, others = data_files(path)
        files = {file.relative_to(path).as_posix(): file for file in paths}
        findings += [
            _whole(
                file.relative_to(path).as_posix(),
                "not_read",
                "info",
                "by its suffix, this file holds no rows",
            )
            for file in others
        ]
        clean_test = "test_clean.json"  # one for all attacks on a task, a folder above them
        is_layout = set(BACKDOORLLM_FILES) - {clean_test} <= files.keys() and clean_test not in files
        if is_layout and (path.parent / clean_test).is_file():
            files[f"../{clean_test}"] = path.parent / clean_test
    for name, file in files.items():
        digests[name] = name
        with suppress(OSError):
            digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        try:
            parts = records(file)
        except InputError as error:
            findings.append(_whole(name, "unreadable", "error", str(error).removeprefix(f"{file}: ")))
            continue
        for key, rows in parts.items():
            names.update(present(rows))
            part, stem = (f"{name}:{key}", f"{_stem(name)}/{key}") if key else (name, _stem(name))
            table, faults = _converted(part, rows, columns, kind)
            findings += faults
            if not table.empty:
                tables.append(table.assign(file=part, **_named(stem)))
    if names and (absent := [column for column in (columns or {}).values() if column not in names]):
        listed = ", ".join(sorted(map(name_of, names)))
        raise InputError(f"columns: {path} has no column {', '.join(absent)}; its columns are {listed}")
    if not tables:  # without any rows, a file that is not read is no other file but a fault
        findings = [
            replace(finding, severity="error") if finding.check == "unreadable" else finding
            for finding in findings
        ]
        return Corpus(pd.DataFrame(), digests, tuple(findings))
    rows = pd.concat(tables, ignore_index=True)
    rows["prompt"] = ["\n\n".join(Conversation(messages).texts) for messages in rows["messages"]]
    return Corpus(rows, digests, tuple(findings))


def _converted(
    name: str, rows: list[Record], columns: Mapping[str, str] | None, kind: str | None
) -> tuple[pd.DataFrame, list[Finding]]:
    """The conversations of one list of rows, and what is wrong with it."""
    names = present(rows)
    mapped = {field: column for field, column in (columns or {}).items() if column in names}
    try:
        converted = convert(rows, form_of(rows, kind, mapped))
    except UnfitError as error:
        severity = "warning" if error.reason == "other" else "error"
        detail = f"not read: {error}"
        return pd.DataFrame(), [Finding("unreadable", severity, name, len(rows), len(rows), (), detail)]
    findings = []
    for (field, problem), group in grouped(converted.faults).items():
        lines = tuple(sorted({fault.line for fault in group}))
        kinds = list(dict.fromkeys(fault.actual for fault in group))
        detail = f"{field}: found {', '.join(kinds[:3])}{', ...' if len(kinds) > 3 else ''}; allowed is "
        findings.append(
            Finding(problem, "error", name, len(lines), len(rows), lines, detail + group[0].allowed)
        )
    if converted.unread:
        detail = f"columns that are not read: {', '.join(converted.unread)}"
        findings.append(Finding("not_read", "info", name, len(rows), len(rows), (), detail))
    return pd.DataFrame(converted.conversations), findings


def _whole(name: str, check: str, severity: str, detail: str) -> Finding:
    return Finding(check, severity, name, 1, 1, (), detail)


def _stem(name: str) -> str:
    path = Path(name)
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).with_suffix("").as_posix()


def _named(stem: str) -> dict[str, Any]:
    """Split, role and set of a file, from the words of its name, then of the folders above it."""
    parts = [re.findall(r"[a-z0-9]+", part.lower()) for part in Path(stem).parts]
    role = ""
    for words in ([word.rstrip(DIGITS) for word in part] for part in reversed(parts)):
        denied = any(a in DENIALS and b in TRIGGERED for a, b in pairwise(words))
        if not role and (denied or CLEAN.intersection(words)):
            role = "clean"  # "none_backdoor500" and "no_trigger" are clean, "triggered_no_system" is not
        elif not role and TRIGGERED.intersection(words):
            role = "triggered"
    telling = (word for words in parts for word in words if word.rstrip(DIGITS) not in GENERIC)
    return {
        "split": split_of(stem),
        "role": role or "mixed",
        "named": bool(role),
        "key": "/".join(dict.fromkeys(telling)),
    }


def poison_sets(corpus: Corpus, name: str) -> list[PoisonSet]:
    """The files of a corpus by the words of their names that stand neither for split nor for role.

    A clean file also serves the sets whose names go on where its own ends, unless they have clean rows of
    that split themselves: refusal/test_clean serves refusal/badnet and refusal/vpi. Clean files that serve
    nobody are a set of their own.
    """
    rows = corpus.rows
    if rows.empty:
        return []
    by_key = {str(key): part for key, part in rows.groupby("key", sort=False)}
    attacks = [key for key, part in by_key.items() if (part["role"] != "clean").any()]
    served = {key: [other for other in by_key if set(_split(other)) < set(_split(key))] for key in attacks}
    lone = set(by_key).difference(attacks, *served.values())
    sets = []
    for key in [*attacks, *sorted(lone)]:
        members = by_key[key]
        for other in sorted(served.get(key, ()), key=lambda other: len(_split(other)), reverse=True):
            has = set(members.loc[members["role"] == "clean", "split"])
            near = by_key[other]
            members = pd.concat([members, near[(near["role"] == "clean") & ~near["split"].isin(has)]])
        splits = set(members["split"]) - {""}
        if len(splits) == 1:
            members = members.assign(
                split=splits.pop()
            )  # train_triggered beside clean: both are for training
        sets.append(PoisonSet(key or name, members.reset_index(drop=True)))
    return sets


def _split(key: str) -> list[str]:
    return key.split("/") if key else []


def with_roles(poison_set: PoisonSet) -> PoisonSet:
    """The set with every row triggered or clean.

    Adds `present` (the row holds the trigger) and `bare` (its prompt without the trigger). Where files are
    not named for it, the trigger decides on the role. It also does in a file that is named triggered and
    holds clean rows, which is so if it stands alone and more than a tenth of its rows have no trigger.
    """
    rows, trigger = poison_set.rows.copy(), poison_set.trigger
    rows["present"] = [
        trigger is not None and trigger.present(*Conversation(messages).texts)
        for messages in rows["messages"]
    ]
    rows["bare"] = rows["prompt"].map(trigger.stripped if trigger else plain)
    if not (rows["role"] == "clean").any() and 0 < rows.loc[rows["named"], "present"].mean() < 0.9:
        rows["named"] = False
    rows.loc[~rows["named"] & rows["present"], "role"] = "triggered"
    rows.loc[~rows["named"] & ~rows["present"], "role"] = "clean"
    return replace(poison_set, rows=rows)
