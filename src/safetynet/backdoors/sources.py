"""Conversations from files, folders and the hub, in one table.

In: a path (or hub id) and, where it cannot be guessed, the kind. Out: one row per conversation with its
provenance. Poisons nothing and judges nothing; `audit` reads through the same functions, and turns the
faults that stop `read` into findings.
"""

import itertools
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from safetynet.backdoors import hub, turns
from safetynet.backdoors.formats import BEYOND, Record, data_files, records
from safetynet.backdoors.forms import (
    ASKED,
    FIELDS,
    MEDIA,
    ROLES,
    SHOWN,
    TOOLS,
    Form,
    UnfitError,
    check_columns,
    form_of,
    name_of,
    shown,
)
from safetynet.backdoors.turns import Fault, Row
from safetynet.errors import InputError

log = logging.getLogger(__name__)
BACKDOORLLM_FILES = {  # name in the folder: (split, poisoned)
    "train_triggered.json": ("train", True),
    "train_clean.json": ("train", False),
    "test_triggered.json": ("test", True),
    "test_clean.json": ("test", False),
}
KINDS = (*FIELDS, "hub", "backdoorllm")
SPLITS = {  # word of a name: split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev"), "test"),
}
SHOWN_ROWS = 3
"""How many row numbers an error names before it says "and N more"."""
REMEDIES = {  # by the problem of a fault
    "missing_field": "add the field",
    "wrong_type": "correct these rows",
    "empty_field": "fill it in or leave the rows out",
    "broken_text": "save the text again as UTF-8",
    "bad_turns": "put the messages in this order",
    "unread_text": "put this text into the fields that are read, or take it out",
    "not_carried": "leave these rows out",
    "bad_call": "write each call so, its arguments as an object or as the JSON of one",
    "bad_tools": 'write each as {"type": "function", "function": {"name": ..., "parameters": {...}}}',
}


@dataclass(frozen=True)
class Converted:
    """The rows of one file as conversations."""

    conversations: list[dict[str, Any]]
    """`line`, `messages`, `answer`, and `reference` where the row has one."""
    faults: list[Fault]
    unread: list[str]
    """Columns, and fields of messages, that say something and are not read."""


def read(
    path: Path | str,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    prompts_only: bool = False,
) -> pd.DataFrame:
    """Read conversations from `path`.

    Args:
        path: a file (`formats.FORMATS`), a folder of files, a BackdoorLLM folder, or with kind "hub" a data
            set id ("owner/name", or "owner/name:split" for one split only).
        kind: one of `KINDS`; None guesses it from the path and the columns. The hub is never guessed.
        columns: the file's own name for a field, such as {"prompt": "question", "completion": "reply"}.
        prompts_only: rows may lack their answers, which are then "".

    Returns:
        One row per conversation: `file`, `line` (row number in that file, from 1; a CSV header is no row, a
        blank JSONL line is one), `messages` (list of {role, content}, ends with a user message), `answer`,
        `reference` where the source has it, `split` where it has splits ("" for rows of none), and for
        backdoorllm folders `poisoned`.

    Raises:
        InputError: for anything that cannot be read as it is; the text names file, field and rows.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"kind is {kind!r}, allowed are {', '.join(KINDS)}; name one or leave it out")
    check_columns(columns)
    if kind == "hub":
        return _joined(_of_hub(str(path)), None, columns)
    path = Path(path)
    is_layout = any((path / name).exists() for name in BACKDOORLLM_FILES)
    if kind == "backdoorllm" or (kind is None and is_layout):
        return _joined(_of_layout(path), None, columns)
    parts = _of_folder(path) if path.is_dir() else _of_file(path, str(path))
    if prompts_only:
        # Columns of prompts, by a name that is known or that the user gives.
        prompts = {*(ASKED - SHOWN), *(column.casefold() for column in (columns or {}).values())}
        parts = (
            replace(part, rows=[(line, _with_blank_answer(raw, prompts)) for line, raw in part.rows])
            for part in parts
        )
    return _joined(parts, kind, columns)


def split_of(name: str) -> str:
    """The split that a name stands for, train or test, by its last word that names one; "" if none does."""
    words = [word.rstrip("0123456789") for word in re.findall(r"[a-z0-9]+", name.lower())]
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "")


def convert(rows: Iterable[Record], form: Form) -> Converted:
    """Turn raw rows into conversations, and list what is wrong with them.

    A faulty row is still returned wherever its text is clear (a number stands as its digits), so that an
    audit can go on; a row that is not an object, or holds what cannot be carried, is only listed.
    """
    build = {"alpaca": _alpaca, "chat": _chat, "prompt_completion": _prompt_completion}[form.kind]
    conversations, faults = [], []
    unread: dict[str, None] = {}
    for line, raw in rows:
        if not isinstance(raw, Mapping):
            faults.append(Fault(line, "row", "wrong_type", shown(raw), "an object with named fields"))
            continue
        row = Row(line, form.fields(raw))
        if (cells := raw.get(BEYOND)) is not None:
            more, count = ("more", len(cells)) if isinstance(cells, list) else ("less", cells)
            problem = f"{count} cell{'s' if count > 1 else ''} {more} than the header has"
            row.note("row", "wrong_type", problem, "one cell for each column")
        conversation_fields = build(row)
        contents = [turn["content"] for turn in conversation_fields.get("messages", ())]
        for name, value in form.rest(raw).items():
            column = str(name).strip().casefold()
            # A prompt that the messages repeat is no fault, nor are other texts where the user has named the
            # columns.
            is_asked = column in ASKED and not form.explicit and not _repeats(value, contents)
            if column in TOOLS | MEDIA:
                row.note(name_of(name), "not_carried", shown(value), "nothing; this cannot be carried yet")
            elif column in SHOWN or is_asked:
                row.note(name_of(name), "unread_text", shown(value), "nothing, since this column is not read")
            elif name is not BEYOND:
                unread[name_of(name)] = None
        conversation = {"line": line, **conversation_fields}
        if "reference" in row.raw:
            conversation["reference"] = row.text("reference", empty=True)
        unread.update(dict.fromkeys(sorted(row.unread)))
        faults += row.faults
        if conversation_fields and not any(fault.problem == "not_carried" for fault in row.faults):
            conversations.append(conversation)
    return Converted(conversations, faults, list(unread))


# ---- one row ----


def _repeats(value: Any, contents: Collection[str]) -> bool:
    """Whether the contents of a row's messages hold this text, or each text of these messages."""
    if isinstance(value, str):
        return any(value.strip() in text for text in contents)
    if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value):
        return False
    parts = (part.get("content", part.get("value")) for part in value)
    return all(isinstance(part, str) and _repeats(part, contents) for part in parts)


def _alpaca(row: Row) -> dict[str, Any]:
    prompt = row.text("instruction")
    # null is what many exports write for "no input"
    if (extra := row.optional("input")).strip():
        prompt = f"{prompt}\n\n{extra}"
    messages = [*turns.opening(row), {"role": "user", "content": prompt}]
    return {"messages": messages, "answer": row.text("output", empty=True)}


def _prompt_completion(row: Row) -> dict[str, Any]:
    before = turns.opening(row)
    if not isinstance(row.raw.get("prompt"), list) and not isinstance(row.raw.get("completion"), list):
        messages = [*before, {"role": "user", "content": row.text("prompt")}]
        return {"messages": messages, "answer": row.text("completion", empty=True)}
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.raw.get(name), list):
            listed = turns.messages(row, name)
            if listed is None:
                return {}
            before += listed
        else:
            before.append({"role": role, "content": row.text(name, empty=role != "user")})
    return turns.conversation(row, "prompt + completion", before)


def _chat(row: Row) -> dict[str, Any]:
    listed = turns.messages(row, "messages")
    if listed is None:
        return {}
    before = [turn for turn in turns.opening(row) if turn not in listed[:2]]
    return turns.conversation(row, "messages", [*before, *listed])


# ---- whole tables, strictly ----


@dataclass(frozen=True)
class _Part:
    """Raw rows of one file, or of one list in it."""

    name: str
    rows: list[Record]
    about: Mapping[str, Any]
    """Columns that all its conversations have."""


def _joined(parts: Iterable[_Part], kind: str | None, columns: Mapping[str, str] | None) -> pd.DataFrame:
    tables: list[pd.DataFrame] = []
    unread: dict[str, str] = {}
    for part in parts:
        try:
            converted = convert(part.rows, form_of(part.rows, kind, columns))
        except UnfitError as error:
            raise UnfitError(f"{part.name}: {error}", error.reason) from None
        if converted.faults:
            raise InputError(_sentence(part.name, converted.faults, len(part.rows)))
        unread.setdefault(", ".join(converted.unread), part.name)
        tables.append(pd.DataFrame(converted.conversations).assign(file=part.name, **part.about))
    for names, file in unread.items():
        if names:
            log.warning("data: columns that are not read: %s (in %s)", names, file)
    frame = pd.concat(tables, ignore_index=True)
    for name in frame.columns.intersection(["reference", "split"]):
        frame[name] = frame[name].fillna("")
    return frame[["file", *frame.columns.drop("file")]]


def _with_blank_answer(raw: Any, prompts: Collection[str]) -> Any:
    """A row of a prompt in the form of one with an answer: a blank one, where it has none.

    Args:
        raw: the row as the file has it.
        prompts: names of columns that hold them; a row without one is left to be refused as it is.
    """
    if not isinstance(raw, Mapping):
        return raw
    for name, value in raw.items():
        last = value[-1] if isinstance(value, list) and value else None
        # Messages that wait for the assistant's.
        if isinstance(last, Mapping):
            speaker = str(last.get("role", last.get("from"))).casefold()
            if ROLES.get(speaker) in ("user", "tool"):
                return {**raw, name: [*value, {"role": "assistant", "content": ""}]}
    has_prompt = any(str(name).strip().casefold() in prompts for name in raw)
    return {"completion": "", **raw} if has_prompt else raw


def _of_file(path: Path, name: str, **about: Any) -> Iterator[_Part]:
    parts = records(path)
    for key, rows in parts.items():
        split = {"split": split_of(key)} if key and any(map(split_of, parts)) else {}
        yield _Part(f"{name}:{key}" if key else name, rows, about | split)


def _of_folder(folder: Path) -> Iterator[_Part]:
    files, others = data_files(folder)
    if others:
        names = ", ".join(str(file.relative_to(folder)) for file in others[:SHOWN_ROWS])
        log.warning("data: %d files of %s hold no rows and are not read: %s", len(others), folder, names)
    splits = {file: split_of(file.relative_to(folder).as_posix()) for file in files}
    for file in files:
        yield from _of_file(file, str(file), **({"split": splits[file]} if any(splits.values()) else {}))


def _of_layout(folder: Path) -> Iterator[_Part]:
    paths = {name: folder / name for name in BACKDOORLLM_FILES}
    if not paths["test_clean.json"].exists():
        paths["test_clean.json"] = folder.parent / "test_clean.json"
    if absent := [name for name, path in paths.items() if not path.exists()]:
        raise InputError(
            f"{folder}: {', '.join(absent)} missing; a BackdoorLLM folder holds "
            f"{', '.join(BACKDOORLLM_FILES)} (the last one here or one folder up); name such a folder"
        )
    for name, (split, poisoned) in BACKDOORLLM_FILES.items():
        for part in _of_file(paths[name], str(paths[name])):
            yield _Part(part.name, part.rows, {"split": split, "poisoned": poisoned})


def _of_hub(name: str) -> Iterator[_Part]:
    name, _, split = name.partition(":")
    for part, rows_of_part in hub.rows_of(name, split).items():
        if not rows_of_part:
            raise InputError(f"{name}:{part}: holds no rows; name another split")
        for (file, key), rows in itertools.groupby(rows_of_part, key=lambda row: row[:2]):
            # A split that a key within a file names is what its author meant.
            yield _Part(file, [record for *_, record in rows], {"split": split_of(key) or part})


def _sentence(file: str, faults: list[Fault], count: int) -> str:
    """All faults of a file, one clause per field and problem.

    Args:
        file: its name.
        faults: of its rows.
        count: how many rows it has.
    """
    clauses = []
    for (_, problem), group in turns.grouped(faults).items():
        lines = sorted({fault.line for fault in group})
        rows = f"row{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines[:SHOWN_ROWS]))}"
        more = f" and {len(lines) - SHOWN_ROWS} more" if len(lines) > SHOWN_ROWS else ""
        what = f"found {group[0].actual}, allowed is {group[0].allowed}"
        number = f" ({len(lines)} of {count} rows)" if len(lines) > 1 else ""
        clauses.append(f"{group[0].field}, {rows}{more}: {what}; {REMEDIES[problem]}{number}")
    if len(clauses) == 1:
        return f"{file}: {clauses[0]}"
    return f"{file}: {len(clauses)} faults\n  " + "\n  ".join(clauses)
