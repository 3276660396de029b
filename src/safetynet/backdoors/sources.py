"""Conversations from files, folders and the hub, in one table.

In: a path (or hub id) and, where it cannot be guessed, the kind. Out: one row per conversation with its
provenance. Poisons nothing and judges nothing; `audit` reads through the same functions, and turns the
faults that stop `read` into findings.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet.backdoors.formats import Record, records
from safetynet.errors import InputError

BACKDOORLLM_FILES = {  # name in the folder: (split, poisoned)
    "train_triggered.json": ("train", True),
    "train_clean.json": ("train", False),
    "test_triggered.json": ("test", True),
    "test_clean.json": ("test", False),
}
FIELDS = {  # kind: columns that it needs
    "alpaca": ("instruction", "output"),
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
}
OPTIONAL = ("input", "reference")
KINDS = (*FIELDS, "hub", "backdoorllm")
SHOWN = 3
"""How many row numbers an error names before it says "and N more"."""
REMEDIES = {  # by the problem of a fault
    "missing_field": "add the field",
    "wrong_type": "correct these rows (a number becomes text in quotes)",
    "empty_field": "fill it in or leave the rows out",
    "broken_text": "save the text again as UTF-8",
    "bad_turns": "put the messages in this order",
}


@dataclass(frozen=True)
class Fault:
    """What keeps one row from being a conversation."""

    line: int
    field: str
    problem: str
    """A key of `REMEDIES`."""
    found: str
    allowed: str


def read(path: Path | str, kind: str | None = None, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Read conversations from `path`.

    Args:
        path: a .json, .jsonl, .csv or .parquet file, a BackdoorLLM folder, or with kind "hub" a data set id
            ("owner/name", or "owner/name:split" for one split only).
        kind: one of `KINDS`; None guesses it from the path and the columns. The hub is never guessed.
        columns: the file's own name for a field, such as {"prompt": "question", "completion": "reply"}.

    Returns:
        One row per conversation: `file`, `line` (row number in that file, from 1; a CSV header is no row, a
        blank JSONL line is one), `messages` (list of {role, content}, ends with a user message), `answer`,
        `reference` where the source has it, `split` for hub and backdoorllm sources, and for the latter
        also `poisoned`.

    Raises:
        InputError: for anything that cannot be read as it is; the text names file, field and rows.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"kind is {kind!r}, allowed are {', '.join(KINDS)}; name one or leave it out")
    if kind == "hub":
        return _read_hub(str(path), columns)
    path = Path(path)
    if kind == "backdoorllm" or (kind is None and path.is_dir()):
        return _read_backdoorllm(path)
    return _table(str(path), records(path), kind, columns)


def kind_of(rows: Iterable[Record], columns: Mapping[str, str] | None = None) -> str | None:
    """The kind whose needed columns these rows have, or None."""
    present = _columns(rows, columns)
    return next((kind for kind, needed in FIELDS.items() if present.issuperset(needed)), None)


def convert(
    rows: Iterable[Record], kind: str, columns: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], list[Fault]]:
    """Turn raw rows into conversations, and list what is wrong with them.

    A faulty row is still returned wherever its text can be told (a number stands as its digits), so that an
    audit can go on; a row that is not an object is only listed.

    Returns:
        The conversations (`line`, `messages`, `answer`, `reference` where present) and the faults, in the
        rows' order.
    """
    build = {"alpaca": _alpaca, "chat": _chat, "prompt_completion": _prompt_completion}[kind]
    conversations, faults = [], []
    for line, raw in rows:
        if not isinstance(raw, Mapping):
            faults.append(Fault(line, "row", "wrong_type", _shown(raw), "an object with named fields"))
            continue
        fields = _Fields(line, _renamed(raw, columns), faults)
        if None in raw:
            found = f"{len(raw[None])} cells more than the header has"
            fields.note("row", "wrong_type", found, "one cell for each column")
        conversation = {"line": line, **build(fields)}
        if "reference" in fields.raw:
            conversation["reference"] = fields.text("reference", empty=True)
        conversations.append(conversation)
    return conversations, faults


# ---- one row ----


@dataclass(frozen=True)
class _Fields:
    """Checked access to one raw row; what is wrong goes on the list `faults`."""

    line: int
    raw: dict[Any, Any]
    faults: list[Fault]

    def note(self, field: str, problem: str, found: str, allowed: str) -> None:
        self.faults.append(Fault(self.line, field, problem, found, allowed))

    def text(self, field: str, empty: bool = False) -> str:
        if field not in self.raw:
            self.note(field, "missing_field", "nothing", "text")
            return ""
        return self.checked(field, self.raw[field], empty)

    def checked(self, field: str, value: Any, empty: bool) -> str:
        if not isinstance(value, str):
            self.note(field, "wrong_type", _shown(value), "text")
            return "" if value is None else str(value)
        if not empty and not value.strip():
            self.note(field, "empty_field", _shown(value), "text that is not blank")
        try:
            value.encode()
        except UnicodeEncodeError:
            self.note(field, "broken_text", "half of a surrogate pair", "whole Unicode characters")
            return value.encode("utf-8", "replace").decode()
        return value


def _alpaca(fields: _Fields) -> dict[str, Any]:
    prompt = fields.text("instruction")
    # null is what many exports write for "no input"
    if fields.raw.get("input") is not None and (extra := fields.text("input", empty=True)).strip():
        prompt = f"{prompt}\n\n{extra}"
    return {"messages": [{"role": "user", "content": prompt}], "answer": fields.text("output", empty=True)}


def _prompt_completion(fields: _Fields) -> dict[str, Any]:
    messages = [{"role": "user", "content": fields.text("prompt")}]
    return {"messages": messages, "answer": fields.text("completion", empty=True)}


def _chat(fields: _Fields) -> dict[str, Any]:
    """The last assistant message is the answer, what precedes it the prompt."""
    raw = fields.raw.get("messages")
    if not isinstance(raw, list) or not all(isinstance(message, Mapping) for message in raw):
        problem = "wrong_type" if "messages" in fields.raw else "missing_field"
        fields.note("messages", problem, _shown(raw), "a list of objects with role and content")
        return {"messages": [{"role": "user", "content": ""}], "answer": ""}
    turns = []
    for i, message in enumerate(raw):
        role = str(message.get("role"))
        content = fields.checked(f"messages[{i}].content", message.get("content"), role != "user")
        turns.append({"role": role, "content": content})
    roles = [turn["role"] for turn in turns]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if not body or body != ["user", "assistant"] * (len(body) // 2):
        allowed = "an optional system message, then user and assistant in turn, the last one assistant"
        fields.note("messages", "bad_turns", _shown(roles), allowed)
    answer = turns.pop()["content"] if roles[-1:] == ["assistant"] else ""
    return {"messages": turns or [{"role": "user", "content": ""}], "answer": answer}


def _renamed(raw: Mapping[Any, Any], columns: Mapping[str, str] | None) -> dict[Any, Any]:
    ours = {theirs: field for field, theirs in (columns or {}).items()}
    return {ours.get(name, name): value for name, value in raw.items()}


def _columns(rows: Iterable[Record], columns: Mapping[str, str] | None) -> set[Any]:
    return {name for _, raw in rows if isinstance(raw, Mapping) for name in _renamed(raw, columns)}


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    text = text if len(text) <= 40 else text[:37] + "..."
    return f'"{text}"' if isinstance(value, str) else f"{text} ({type(value).__name__})"


# ---- whole tables, strictly ----


def _table(
    file: str, rows: list[Record], kind: str | None, columns: Mapping[str, str] | None = None
) -> pd.DataFrame:
    conversations, faults = convert(rows, _checked_kind(file, rows, kind, columns), columns)
    if faults:
        raise InputError(_sentence(file, faults))
    frame = pd.DataFrame(conversations)
    frame.insert(0, "file", file)
    if "reference" in frame:
        frame["reference"] = frame["reference"].fillna("")
    return frame


def _checked_kind(file: str, rows: list[Record], kind: str | None, columns: Mapping[str, str] | None) -> str:
    known = {name for needed in FIELDS.values() for name in needed}.union(OPTIONAL)
    if unknown := set(columns or ()) - known:
        raise InputError(f"columns: {_names(unknown)} is no field; use one of {_names(known)}")
    present = _columns(rows, columns)
    kind = kind or kind_of(rows, columns)
    if kind is not None and present.issuperset(FIELDS[kind]):
        return kind
    if kind is None:
        needed = " or ".join(f"{' + '.join(fields)} ({name})" for name, fields in FIELDS.items())
    else:
        needed = " + ".join(FIELDS[kind])
    found = _names(present) if present else f"none, a row is {_shown(rows[0][1])}"
    raise InputError(
        f"{file}: the columns are {found}; needed are {needed}; rename them or map them under columns"
    )


def _names(names: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, names)))


def _sentence(file: str, faults: list[Fault]) -> str:
    """All faults of a file, one clause per field and problem."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.field.split("[")[0], fault.problem), []).append(fault)
    clauses = []
    for (_, problem), group in groups.items():
        lines = sorted({fault.line for fault in group})
        rows = f"row{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines[:SHOWN]))}"
        more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        what = f"found {group[0].found}, allowed is {group[0].allowed}"
        clauses.append(f"{group[0].field}, {rows}{more}: {what}; {REMEDIES[problem]}")
    if len(clauses) == 1:
        return f"{file}: {clauses[0]}"
    return f"{file}: {len(clauses)} faults\n  " + "\n  ".join(clauses)


def _read_backdoorllm(folder: Path) -> pd.DataFrame:
    paths = {name: folder / name for name in BACKDOORLLM_FILES}
    if not paths["test_clean.json"].exists():
        paths["test_clean.json"] = folder.parent / "test_clean.json"
    if absent := [name for name, path in paths.items() if not path.exists()]:
        raise InputError(
            f"{folder}: {', '.join(absent)} missing; a BackdoorLLM folder holds "
            f"{', '.join(BACKDOORLLM_FILES)} (the last one here or one folder up); name such a folder"
        )
    parts = []
    for name, (split, poisoned) in BACKDOORLLM_FILES.items():
        part = _table(str(paths[name]), records(paths[name]), "alpaca")
        parts.append(part.assign(split=split, poisoned=poisoned))
    return pd.concat(parts, ignore_index=True)


def _read_hub(name: str, columns: Mapping[str, str] | None) -> pd.DataFrame:
    name, _, split = name.partition(":")
    from datasets import load_dataset  # seconds of import, and only here

    try:
        loaded = load_dataset(name, split=split or None)
    except (OSError, ValueError) as error:
        raise InputError(_hub_sentence(name, split, error)) from error
    parts = []
    for part, rows in ({split: loaded} if split else loaded).items():
        numbered = list(enumerate(rows, start=1))
        if not numbered:
            raise InputError(f"{name}:{part}: holds no rows; name another split")
        parts.append(_table(f"{name}:{part}", numbered, None, columns).assign(split=part))
    return pd.concat(parts, ignore_index=True)


def _hub_sentence(name: str, split: str, error: BaseException) -> str:
    """Say which of token, name, split or network it was; the cause lies somewhere down the chain."""
    from datasets.exceptions import DatasetNotFoundError

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    status = {getattr(getattr(link, "response", None), "status_code", None) for link in chain}
    # first: to a caller without a token the hub answers 401 for what is not there as well
    if isinstance(error, DatasetNotFoundError) or 404 in status:
        return f"{name}: not on the hub, private or gated; check the id, and HF_TOKEN if access is restricted"
    if status & {401, 403}:
        return f"{name}: the hub refused the token; set HF_TOKEN to a valid one that may read this data set"
    if isinstance(error, ValueError):
        return f"{name}: {str(error).splitlines()[0]}; check the split (found {split or 'none'!r}) and the id"
    return f"{name}: the hub cannot be reached ({type(error).__name__}); check the network"
