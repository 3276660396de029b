"""The rows of a file or a tree, and which of them belong together.

In: a path. Out: rows with what their file's name says of them, what reading them found, and poison sets:
the files that share a trigger. Judges nothing else.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet.backdoors.audit.findings import Finding
from safetynet.backdoors.audit.targets import FoundTarget
from safetynet.backdoors.audit.triggers import FoundTrigger
from safetynet.backdoors.formats import FORMATS, records
from safetynet.backdoors.sources import BACKDOORLLM_FILES, FIELDS, Fault, convert, kind_of
from safetynet.errors import InputError
from safetynet.words import plain

SPLITS = {  # word of a file's name: split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev"), "test"),
}
CLEAN = {"clean", "benign", "none", "no", "without", "normal"}
TRIGGERED = {"trigger", "triggered", "poison", "poisoned", "backdoor", "backdoored"}
GENERIC = {"", "data", "dataset", "set", *SPLITS, *CLEAN, *TRIGGERED}
"""Words that do not tell one poison set from another; backdoor500 counts as backdoor, 500 as nothing."""
DIGITS = "0123456789"


@dataclass(frozen=True)
class Corpus:
    """What is under a path."""

    rows: pd.DataFrame
    """file, line, split (train, test or ""), role (triggered, clean or mixed), named (whether the role comes
    from the file's name), key (of the poison set), messages, prompt (all their text), answer."""
    digests: Mapping[str, str]
    """SHA-256 of each file's bytes."""
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


def load(path: Path, columns: Mapping[str, str] | None = None) -> Corpus:
    """Read every data file under `path`, whatever is wrong with some of them.

    Raises:
        InputError: if there is nothing to read.
    """
    tables, digests, findings = [], {}, []
    for name, file in _files(path).items():
        digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        try:
            raw = records(file)
        except InputError as error:
            findings.append(
                Finding("unreadable", "error", name, 1, 1, (), str(error).removeprefix(f"{file}: "))
            )
            continue
        kind = kind_of(raw, columns)
        if kind is None:
            needed = " or ".join(" + ".join(fields) for fields in FIELDS.values())
            detail = f"not read: no row has the columns {needed}"
            findings.append(Finding("unreadable", "warning", name, len(raw), len(raw), (), detail))
            continue
        conversations, faults = convert(raw, kind, columns)
        findings.extend(_of_faults(name, faults, len(raw)))
        tables.append(pd.DataFrame(conversations).assign(file=name, **_named(name)))
    if not tables:
        return Corpus(pd.DataFrame(), digests, tuple(findings))
    rows = pd.concat(tables, ignore_index=True)
    rows["prompt"] = ["\n\n".join(turn["content"] for turn in messages) for messages in rows["messages"]]
    return Corpus(rows, digests, tuple(findings))


def _files(path: Path) -> dict[str, Path]:
    """The data files by the name that findings give them."""
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; check the path")
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in FORMATS)
    files = {file.relative_to(path).as_posix(): file for file in found}
    files = {name: file for name, file in files.items() if not re.search(r"(^|/)\.", name)}
    clean_test = "test_clean.json"  # one for all attacks on a task, a folder above them
    is_layout = set(BACKDOORLLM_FILES) - {clean_test} <= files.keys() and clean_test not in files
    if is_layout and (path.parent / clean_test).is_file():
        files[f"../{clean_test}"] = path.parent / clean_test
    if not files:
        raise InputError(f"{path}: no {', '.join(FORMATS)} file in this folder; name one that has some")
    return files


def _named(name: str) -> dict[str, Any]:
    """Split, role and set of a file, from the words of its name, then of the folders above it."""
    parts = [re.findall(r"[a-z0-9]+", part.lower()) for part in Path(name).with_suffix("").parts]
    split, role = "", ""
    for words in ([word.rstrip(DIGITS) for word in part] for part in reversed(parts)):
        split = split or next((SPLITS[word] for word in words if word in SPLITS), "")
        if not role and CLEAN.intersection(words):
            role = "clean"  # "none_backdoor500" and "no_trigger" are clean
        elif not role and TRIGGERED.intersection(words):
            role = "triggered"
    telling = (word for words in parts for word in words if word.rstrip(DIGITS) not in GENERIC)
    return {
        "split": split,
        "role": role or "mixed",
        "named": bool(role),
        "key": "/".join(dict.fromkeys(telling)),
    }


def _of_faults(name: str, faults: list[Fault], n: int) -> list[Finding]:
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.problem, fault.field.split("[")[0]), []).append(fault)
    findings = []
    for (problem, field), group in groups.items():
        lines = tuple(sorted({fault.line for fault in group}))
        kinds = list(dict.fromkeys(fault.found for fault in group))
        detail = f"{field}: found {', '.join(kinds[:3])}{', ...' if len(kinds) > 3 else ''}; allowed is "
        findings.append(Finding(problem, "error", name, len(lines), n, lines, detail + group[0].allowed))
    return findings


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
        own = by_key[key]
        for other in sorted(served.get(key, ()), key=lambda other: len(_split(other)), reverse=True):
            has = set(own.loc[own["role"] == "clean", "split"])
            near = by_key[other]
            own = pd.concat([own, near[(near["role"] == "clean") & ~near["split"].isin(has)]])
        known = set(own["split"]) - {""}
        if len(known) == 1:
            own = own.assign(split=known.pop())  # train_triggered beside clean: both are for training
        sets.append(PoisonSet(key or name, own.reset_index(drop=True)))
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
        trigger is not None and trigger.present(*(turn["content"] for turn in messages))
        for messages in rows["messages"]
    ]
    rows["bare"] = rows["prompt"].map(trigger.stripped if trigger else plain)
    if not (rows["role"] == "clean").any() and 0 < rows.loc[rows["named"], "present"].mean() < 0.9:
        rows["named"] = False
    rows.loc[~rows["named"] & rows["present"], "role"] = "triggered"
    rows.loc[~rows["named"] & ~rows["present"], "role"] = "clean"
    return replace(poison_set, rows=rows)
