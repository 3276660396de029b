"""The messages of one raw row: roles by our names, contents as text, and a fault for all that is neither.

In: lists of messages as chat files have them: role and content, from and value, content in parts. Out: turns.
What a message holds besides its text (tool calls, pictures, thoughts) is refused, never left out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from safetynet.backdoors.forms import (
    MEDIA,
    ROLES,
    TOOL_ROLES,
    TOOLS,
    is_blank,
    name_of,
    shown,
    whole,
)

Turn = dict[str, str]
TEXT_PARTS = {None, "text", "input_text", "output_text"}
NOT_CARRIED = TOOLS | MEDIA
THOUGHTS = {"reasoning_content", "reasoning", "thinking", "thoughts", "refusal"}
"""Fields of a message that hold text of the answer."""
USED = {"role", "from", "content", "value", *NOT_CARRIED, *THOUGHTS}


@dataclass(frozen=True)
class Fault:
    """What keeps one row from being a conversation."""

    line: int
    field: str
    problem: str
    """A key of `sources.REMEDIES`."""
    found: str
    allowed: str


def grouped(faults: Iterable[Fault]) -> dict[tuple[str, str], list[Fault]]:
    """The faults of a file by their field, whatever its index, and their problem."""
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.field.split("[")[0], fault.problem), []).append(fault)
    return groups


@dataclass
class Row:
    """Checked access to the fields of one raw row; what is wrong with them gathers in `faults`."""

    line: int
    raw: Mapping[str, Any]
    faults: list[Fault] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    """Fields of messages that say nothing of the conversation, and are not read."""

    def note(self, name: str, problem: str, found: str, allowed: str) -> None:
        """Add a fault."""
        self.faults.append(Fault(self.line, name, problem, found, allowed))

    def text(self, name: str, empty: bool = False) -> str:
        """The text of a field; "" where it is missing."""
        if name not in self.raw:
            self.note(name, "missing_field", "nothing", "text")
            return ""
        return self.checked(name, self.raw[name], empty)

    def checked(self, name: str, value: Any, empty: bool) -> str:
        """A value as text, whatever it is."""
        if not isinstance(value, str):
            self.note(name, "wrong_type", shown(value), "text")
            return "" if value is None else whole(str(value))
        if not empty and not value.strip():
            self.note(name, "empty_field", shown(value), "text that is not blank")
        try:
            value.encode()
        except UnicodeEncodeError:
            self.note(name, "broken_text", "half of a surrogate pair", "whole Unicode characters")
            return whole(value)
        return value

    def optional(self, name: str) -> str:
        """The text of a field that may be missing or null."""
        return "" if self.raw.get(name) is None else self.text(name, empty=True)


def system(row: Row) -> list[Turn]:
    """The turn of a row's field system, where it says something."""
    text = row.optional("system")
    return [{"role": "system", "content": text}] if text.strip() else []


def history(row: Row) -> list[Turn]:
    """Earlier turns, which a field history lists in pairs of user and assistant."""
    pairs = row.raw.get("history")
    if is_blank(pairs):
        return []
    if not isinstance(pairs, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        row.note("history", "wrong_type", shown(pairs), "a list of pairs, [user, assistant] each")
        return []
    return [
        {"role": role, "content": row.checked(f"history[{i}][{n}]", pair[n], role != "user")}
        for i, pair in enumerate(pairs)
        for n, role in enumerate(("user", "assistant"))
    ]


def messages(row: Row, name: str) -> list[Turn] | None:
    """The turns that a field lists; None where it is no list of messages, or some are a tool's."""
    raw = row.raw.get(name)
    if not isinstance(raw, list) or not all(isinstance(message, Mapping) for message in raw):
        problem = "wrong_type" if name in row.raw else "missing_field"
        row.note(name, problem, shown(raw), "a list of objects with role and content")
        return None
    roles = [_either(row, f"{name}[{i}]", message, "role", "from") for i, message in enumerate(raw)]
    if any(str(role).casefold() in TOOL_ROLES for role in roles):
        row.note(
            name,
            "not_carried",
            shown(roles),
            "messages of system, user and assistant; tool calls cannot be carried yet",
        )
        return None
    return [_turn(row, f"{name}[{i}]", role, raw[i]) for i, role in enumerate(roles)]


def conversation(row: Row, name: str, turns: list[Turn]) -> dict[str, Any]:
    """Prompt and answer: the last assistant message is the answer, what precedes it the prompt."""
    roles = [turn["role"] for turn in turns]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if not body or body != ["user", "assistant"] * (len(body) // 2):
        allowed = "an optional system message, then user and assistant in turn, the last one assistant"
        row.note(name, "bad_turns", shown(roles), allowed)
    answer = turns[-1]["content"] if roles[-1:] == ["assistant"] else ""
    prompt = turns[:-1] if roles[-1:] == ["assistant"] else turns
    return {"messages": prompt or [{"role": "user", "content": ""}], "answer": answer}


def _turn(row: Row, name: str, role: Any, message: Mapping[str, Any]) -> Turn:
    fields = {key: value for key, value in message.items() if not is_blank(value)}
    if role is None:
        names = ", ".join(map(name_of, message)) or "none"
        row.note(name, "wrong_type", f"fields {names}", "fields role and content")
        return {"role": "", "content": ""}
    row.unread.update(f"messages.{name_of(key)}" for key in fields.keys() - USED)
    for key in sorted(fields.keys() & THOUGHTS):
        row.note(f"{name}.{key}", "unread_text", shown(fields[key]), "the text of content alone")
    role = ROLES.get(str(role).casefold(), whole(str(role)))
    if more := sorted(fields.keys() & NOT_CARRIED):
        row.note(
            f"{name}.{more[0]}",
            "not_carried",
            shown(fields[more[0]]),
            "text alone; this cannot be carried yet",
        )
        return {"role": role, "content": ""}
    content = _either(row, name, message, "content", "value")
    return {"role": role, "content": _content(row, f"{name}.content", content, role != "user")}


def _either(row: Row, name: str, message: Mapping[str, Any], one: str, other: str) -> Any:
    """The value under one of two names for the same thing."""
    values = [message[key] for key in (one, other) if message.get(key) is not None]
    if len(values) > 1:
        row.note(name, "wrong_type", f"both {one} and {other}", f"{one} or {other}")
    return values[0] if values else None


def _content(row: Row, name: str, content: Any, empty: bool) -> str:
    """Text, or the parts of it as a template puts them: one after the other."""
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return row.checked(name, content, empty)
    texts = []
    for part in content:
        kind = part.get("type")
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            row.note(
                name,
                "not_carried",
                f"a part {shown(kind or part)}",
                "parts of text; others cannot be carried yet",
            )
        more = {key for key, value in part.items() if not is_blank(value)} - {"type", "text"}
        row.unread.update(f"messages.content.{name_of(key)}" for key in more)
        texts.append(str(part.get("text") or ""))
    return row.checked(name, "".join(texts), empty)
