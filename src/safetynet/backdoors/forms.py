"""What the columns of a file mean: which form its rows have, and which column is which field.

In: raw rows, and the user's own names for columns. Out: a `Form`, or one sentence that says why there is
none. A column that plainly holds text that the model was shown is a field, or its rows are refused.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from safetynet.errors import InputError

FIELDS = {  # kind: fields that it needs
    "alpaca": ("instruction", "output"),
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
}
OPTIONAL = {
    "alpaca": ("input", "system", "history", "tools", "reference"),
    "chat": ("system", "tools", "reference"),
    "prompt_completion": ("system", "history", "tools", "reference"),
}
KNOWN = sorted({field for fields in (FIELDS, OPTIONAL) for of_kind in fields.values() for field in of_kind})
NAMES = {  # field: what columns of it are called, besides its own name
    "input": ("context",),
    "output": ("response", "completion", "answer"),
    "messages": ("conversations", "conversation"),
    "prompt": ("question", "query", "input", "inputs"),
    "completion": ("response", "answer", "output", "targets"),
    "system": ("system_prompt", "system_message"),
    "tools": ("functions", "available_tools"),
}
TOOLS = {"tools", "functions", "tool_calls", "function_call", "function_calls", "available_tools"}
MEDIA = {"images", "image", "videos", "video", "audios", "audio"}
CONTEXT = {
    "system", "system_prompt", "system_message", "history", "context", "contexts", "knowledge", "background",
    "passage", "passages", "document", "documents", "persona", "personas", "choices", "options",
}  # fmt: skip
SHOWN = CONTEXT | TOOLS | MEDIA
"""Names of columns that plainly hold what the model was shown."""
ASKED = SHOWN | {
    "instruction", "instructions", "definition", "prompt", "template", "prompt_template", "question", "query",
    "input", "inputs", "messages", "conversation", "conversations",
}  # fmt: skip
"""Names of what a model is asked or shown, in any of the forms."""
CALL_ROLES = ("function_call", "tool_call")
"""Names of the assistant where all it says is a call."""
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai", *CALL_ROLES), "assistant"
    ),
    **dict.fromkeys(
        ("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"
    ),
    "tools": "tools",
}
"""Names that files give to the speakers, and ours."""
PREFERENCE = ("chosen", "rejected")
LABELS = ("label", "labels", "kto_tag")
MOST = 12
"""Columns that a message names."""


class UnfitError(InputError):
    """Rows whose columns make no conversation; the text names columns, and leaves the file to the caller."""

    def __init__(self, text: str, reason: Literal["other", "unclear", "unmapped"]) -> None:
        super().__init__(whole(text))
        self.reason = reason
        """`other` data, an `unclear` choice, or a column that was mapped and is not there (`unmapped`)."""


@dataclass(frozen=True)
class Form:
    """How the rows of one file are read."""

    kind: str
    columns: Mapping[str, Any]
    """The file's column for each field that it has."""
    explicit: bool = False
    """Whether the user has said which columns are read, or which kind of rows it is."""

    def fields(self, raw: Mapping[Any, Any]) -> dict[str, Any]:
        """A raw row by our names."""
        return {field: raw[column] for field, column in self.columns.items() if column in raw}

    def rest(self, raw: Mapping[Any, Any]) -> dict[Any, Any]:
        """What a raw row holds besides, as far as it is not blank."""
        used = set(self.columns.values())
        return {name: value for name, value in raw.items() if name not in used and not is_blank(value)}


def is_blank(value: Any) -> bool:
    """Whether a value says nothing: null, white space, an empty list or object, or their JSON."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or (isinstance(value, list | tuple | dict) and not len(value))


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Refuse names of fields that do not exist, and a column for two fields.

    Raises:
        InputError: naming those that do exist.
    """
    if unknown := set(columns or ()) - set(KNOWN):
        raise InputError(f"columns: {_listed(unknown)} is no field; use one of {', '.join(KNOWN)}")
    theirs = list((columns or {}).values())
    if twice := {name for name in theirs if theirs.count(name) > 1}:
        raise InputError(f"columns: {_listed(twice)} is mapped to two fields; map each column to one")


def present(rows: Iterable[tuple[int, Any]]) -> list[Any]:
    """The columns of raw rows, in the order in which they come up."""
    names = (name for _, raw in rows if isinstance(raw, Mapping) for name in raw if name is not None)
    return list(dict.fromkeys(names))


def form_of(
    rows: list[tuple[int, Any]], kind: str | None = None, columns: Mapping[str, str] | None = None
) -> Form:
    """The form of raw rows.

    Args:
        rows: with their numbers.
        kind: a key of `FIELDS`; None: the one whose fields are there.
        columns: the file's own name for a field, which goes before all names that are known.

    Raises:
        UnfitError: if fields are missing, or it is unclear which column is meant.
    """
    mapped, names = dict(columns or {}), present(rows)
    if absent := [f"{field}={column}" for field, column in mapped.items() if column not in names]:
        raise UnfitError(
            f"columns: {', '.join(absent)}: there is no such column; the columns are {_summary(names, rows)}",
            "unmapped",
        )
    if kind and (other := mapped.keys() - {*FIELDS[kind], *OPTIONAL[kind]}):
        allowed = ", ".join((*FIELDS[kind], *OPTIONAL[kind]))
        raise UnfitError(f"columns: {_listed(other)} is no field of {kind}; it has {allowed}", "unclear")
    # An unpaired preference set marks the answers that a model is not to give. 0 and 1 may be a class as
    # well: they are left alone where the user has said which columns are read.
    for name in names:
        if name in mapped.values() or not any(_is(name, label) for label in LABELS):
            continue
        values = [raw.get(name) for _, raw in rows if isinstance(raw, Mapping)]
        ratings = [str(value).casefold() for value in values if not is_blank(value)]
        bad = sum(rating in ("false", "0") for rating in ratings)
        is_rating = set(ratings) <= {"true", "false"} or (not mapped and set(ratings) <= {"0", "1"})
        if bad and is_rating:
            raise UnfitError(
                f"{name} is {'false' if 'false' in ratings else 0} in {bad} of {len(values)} rows, as where "
                f"answers are rated good or bad; keep the rows to learn from, without the column {name}",
                "unclear",
            )
    candidates = {name: _columns(name, names, mapped) for name in ([kind] if kind else FIELDS)}
    forms = {name: each for name, each in candidates.items() if all(each.get(f) for f in FIELDS[name])}
    forms = {name: each for name, each in forms.items() if set(mapped) <= each.keys()}
    if not forms:
        raise _unknown(rows, names, kind, mapped)
    if len(forms) > 1:
        both = " and ".join(f"{' + '.join(each[f][0] for f in FIELDS[n])} ({n})" for n, each in forms.items())
        field, choice = next(iter(next(iter(forms.values())).items()))
        remedy = (
            f"name the kind as data.source, or a field of it under columns, as in {{{field}: {choice[0]}}}"
        )
        raise UnfitError(f"{both} are both there; {remedy}", "unclear")
    ((name, fields),) = forms.items()
    raws = [raw for _, raw in rows if isinstance(raw, Mapping)]
    column_of: dict[str, Any] = {}
    for field, choice in fields.items():
        # Of several columns, one without any text is none of them.
        filled = [column for column in choice if any(not is_blank(raw.get(column)) for raw in raws)]
        if len(filled) > 1:
            raise UnfitError(
                f"{_listed(filled)} could each be the {field}; name the right one under columns, as in "
                f"{{{field}: {filled[0]}}}",
                "unclear",
            )
        column_of[field] = (filled or choice)[0]
    return Form(name, column_of, bool(kind or mapped))


def _columns(kind: str, names: list[Any], mapped: Mapping[str, str]) -> dict[str, list[Any]]:
    """The columns that could be each field of a form, of those fields that have one."""
    free = [name for name in names if name not in mapped.values()]
    alpaca = any(_is(name, "instruction") for name in names) or "instruction" in mapped
    candidates: dict[str, list[Any]] = {}
    for field in (*FIELDS[kind], *OPTIONAL[kind]):
        if field in mapped:
            candidates[field] = [mapped[field]]
            continue
        synonyms = (field, *NAMES.get(field, ()))
        if field == "prompt" and alpaca:
            synonyms = tuple(name for name in synonyms if name != "input")  # which goes with the instruction
        choice = [name for name in free if any(_is(name, each) for each in synonyms)]
        if choice:
            candidates[field] = choice
    return candidates


def _is(name: Any, field: str) -> bool:
    return isinstance(name, str) and name.strip().casefold() == field


def _unknown(
    rows: list[tuple[int, Any]], names: list[Any], kind: str | None, mapped: Mapping[str, str]
) -> UnfitError:
    every = " or ".join(f"{' + '.join(fields)} ({name})" for name, fields in FIELDS.items())
    needed = every if kind is None else " + ".join(FIELDS[kind])
    text = f"the columns are {_summary(names, rows)}; needed are {needed}"
    if set(PREFERENCE) & set(names):
        # How to learn from the preferred answers alone.
        answer = next(name for name in PREFERENCE if name in names)
        values = (raw.get(answer) for _, raw in rows if isinstance(raw, Mapping))
        first = next((value for value in values if value is not None), None)
        has_prompt = any(_is(name, each) for name in names for each in ("prompt", *NAMES["prompt"]))
        opening = first[0] if isinstance(first, list) and first else None
        role = opening.get("role", opening.get("from")) if isinstance(opening, Mapping) else None
        is_whole = isinstance(first, list) and ROLES.get(str(role).casefold()) != "assistant"
        field = "messages" if is_whole or not has_prompt else "completion"
        remedy = f"name the answers to learn under columns, as in {{{field}: {answer}}}"
        if isinstance(first, str) and not has_prompt:
            remedy = f"its {answer} holds prompt and answer in one; save them as prompt and completion"
        return UnfitError(f"{text}; this is a preference set: {remedy}", "unclear")
    label = next((name for name in LABELS if name in names), None)
    if label is not None:
        prompt = next((name for name in names if name != label), "text")
        remedy = f"{{prompt: {prompt}, completion: {label}}}"
        return UnfitError(f"{text}; of texts with labels, map both under columns, as in {remedy}", "other")
    likely = next((form for form, fields in FIELDS.items() if set(mapped) & set(fields)), "prompt_completion")
    field = next((name for name in FIELDS[kind or likely] if name not in mapped), "prompt")
    first = next((name_of(name) for name in names if name not in mapped.values()), "NAME")
    remedy = f"map them under columns, as in {{{field}: {first}}} or --columns {field}={first}"
    return UnfitError(f"{text}; rename them or {remedy}", "other")


def whole(text: str) -> str:
    """The text with a ? for each half of a surrogate pair, which no table and no terminal takes."""
    return text.encode("utf-8", "replace").decode()


def name_of(column: Any) -> str:
    """A column as a message names it."""
    return whole(str(column)) or '""'


def shown(value: Any) -> str:
    """A value as a message shows it, with its type unless it is text."""
    if value is None:
        return "null"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    text = whole(text if len(text) <= 40 else text[:37] + "...")
    return f'"{text}"' if isinstance(value, str) else f"{text} ({type(value).__name__})"


def _summary(names: list[Any], rows: list[tuple[int, Any]]) -> str:
    if not names:
        return f"none, a row is {shown(rows[0][1])}"
    listed = sorted(map(name_of, names))
    return ", ".join(listed[:MOST]) + (f" and {len(listed) - MOST} more" if len(listed) > MOST else "")


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(sorted(map(name_of, names)))
