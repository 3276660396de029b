"""The messages of one raw row: roles by our names, contents as text, and a fault for all that is neither.

In: lists of messages as chat files have them: role and content, from and value, content in parts, tool calls
and their results. Out: turns, as `prompts.Conversation` has them. What a message holds besides (pictures,
thoughts) is refused, never left out.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import regex

from safetynet.backdoors.forms import CALL_ROLES, MEDIA, ROLES, TOOLS, is_blank, name_of, shown, whole
from safetynet.prompts import calls
from safetynet.prompts.conversation import TOOLS as TOOLS_ROLE

Turn = dict[str, Any]
TEXT_PARTS = {None, "text", "input_text", "output_text"}
CALLS = ("tool_calls", "function_call")
"""Fields of a message that hold calls: a list, or the one call of older files."""
OF_RESULT = ("name", "tool_call_id")
"""Fields of a tool's message, besides its content, that templates may write."""
NOT_CARRIED = (TOOLS | MEDIA) - set(CALLS)
ORDER = regex.compile("D?S?(?:U(?:C?T+)*A)*U(?:C?T+)*[AC]")
"""Definitions of tools, system, then users and assistants in turn; what is looked up stands between them. A
result (T) may stand without a call (C), as a retrieved document does."""
LETTERS = {TOOLS_ROLE: "D", "system": "S", "user": "U", "tool": "T", "assistant": "A"}
"""Roles in `ORDER`; C is an assistant's message with calls, and ? any role that is none of these."""
THOUGHTS = {"reasoning_content", "reasoning", "thinking", "thoughts", "refusal"}
"""Fields of a message that hold text of the answer."""
USED = {"role", "from", "content", "value", *CALLS, *NOT_CARRIED, *THOUGHTS}


@dataclass(frozen=True)
class Fault:
    """What keeps one row from being a conversation."""

    line: int
    field: str
    problem: str
    """A key of `sources.REMEDIES`."""
    actual: str
    """What the row has, as a message shows it."""
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

    def note(self, name: str, problem: str, actual: str, allowed: str) -> None:
        """Add a fault."""
        self.faults.append(Fault(self.line, name, problem, actual, allowed))

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


def opening(row: Row) -> list[Turn]:
    """Turns that a row has in fields of their own: tools, a system message, a history in pairs."""
    turns: list[Turn] = []
    if not is_blank(tools := row.raw.get("tools")):
        turns.append({"role": TOOLS_ROLE, "content": _definitions(row, "tools", tools)})
    if (system := row.optional("system")).strip():
        turns.append({"role": "system", "content": system})
    pairs = row.raw.get("history")
    if is_blank(pairs):
        return turns
    if not isinstance(pairs, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        row.note("history", "wrong_type", shown(pairs), "a list of pairs, [user, assistant] each")
        return turns
    return turns + [
        {"role": role, "content": row.checked(f"history[{i}][{n}]", pair[n], role != "user")}
        for i, pair in enumerate(pairs)
        for n, role in enumerate(("user", "assistant"))
    ]


def messages(row: Row, name: str) -> list[Turn] | None:
    """The turns that a field lists; None where it is no list of messages."""
    raw = row.raw.get(name)
    if not isinstance(raw, list) or not all(isinstance(message, Mapping) for message in raw):
        problem = "wrong_type" if name in row.raw else "missing_field"
        row.note(name, problem, shown(raw), "a list of objects with role and content")
        return None
    return [_turn(row, f"{name}[{i}]", message) for i, message in enumerate(raw)]


def conversation(row: Row, name: str, turns: list[Turn]) -> dict[str, Any]:
    """Prompt and answer: the last assistant message is the answer, what precedes it the prompt."""
    order = "".join(
        "C" if "tool_calls" in turn and turn["role"] == "assistant" else LETTERS.get(turn["role"], "?")
        for turn in turns
    )
    if not ORDER.fullmatch(order):
        fits = next(n for n in range(len(order), -1, -1) if ORDER.fullmatch(order[:n], partial=True))
        where = "the answer is missing" if fits == len(order) else f"message {fits + 1} is out of order"
        row.note(
            name,
            "bad_turns",
            f"{shown([turn['role'] for turn in turns])}, where {where}",
            "an optional system message, then user and assistant in turn, the last one assistant; before an "
            "assistant's, calls of tools, each followed by its results",
        )
    answer = turns[-1] if order[-1:] in ("A", "C") else None
    prompt = turns if answer is None else turns[:-1]
    return {
        "messages": prompt or [{"role": "user", "content": ""}],
        "answer": "" if answer is None else calls.written(answer.get("tool_calls", ()), answer["content"]),
    }


def _turn(row: Row, name: str, message: Mapping[str, Any]) -> Turn:
    speaker = _either(row, name, message, "role", "from")
    fields = {key: value for key, value in message.items() if not is_blank(value)}
    if speaker is None:
        names = ", ".join(map(name_of, message)) or "none"
        row.note(name, "wrong_type", f"fields {names}", "fields role and content")
        return {"role": "", "content": ""}
    role = ROLES.get(str(speaker).casefold(), whole(str(speaker)))
    used = USED | set(OF_RESULT if role == "tool" else ())
    row.unread.update(f"messages.{name_of(key)}" for key in fields.keys() - used)
    for key in sorted(fields.keys() & THOUGHTS):
        row.note(f"{name}.{key}", "unread_text", shown(fields[key]), "the text of content alone")
    for key in sorted(fields.keys() & NOT_CARRIED):
        row.note(f"{name}.{key}", "not_carried", shown(fields[key]), "text alone; this cannot be carried yet")
    content = _either(row, name, message, "content", "value")
    if role == TOOLS_ROLE:
        return {"role": role, "content": _definitions(row, f"{name}.content", content)}
    if str(speaker).casefold() in CALL_ROLES:
        return {"role": role, "content": "", "tool_calls": _calls(row, f"{name}.value", content)}
    of_message = [
        call
        for key in CALLS
        if key in fields
        for call in _calls(row, f"{name}.{key}", fields[key], role == "assistant")
    ]
    if content is None and fields.keys() & set(CALLS):
        return {"role": role, "content": "", "tool_calls": of_message}
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        texts = []
        for part in content:
            kind = part.get("type")
            if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
                row.note(
                    f"{name}.content",
                    "not_carried",
                    f"a part {shown(kind or part)}",
                    "parts of text; others cannot be carried yet",
                )
            more = {key for key, value in part.items() if not is_blank(value)} - {"type", "text"}
            row.unread.update(f"messages.content.{name_of(key)}" for key in more)
            texts.append(str(part.get("text") or ""))
        content = "".join(texts)  # as a template puts the parts: one after the other
    text = {"role": role, "content": row.checked(f"{name}.content", content, role != "user")}
    of_result = {key: row.checked(f"{name}.{key}", fields[key], True) for key in OF_RESULT if key in fields}
    return text | (of_result if role == "tool" else {}) | ({"tool_calls": of_message} if of_message else {})


def _calls(row: Row, name: str, value: Any, is_assistants: bool = True) -> list[calls.Call]:
    """Tool calls by our names: of a list, of one object, or of the JSON of either."""
    try:
        if not is_assistants:
            raise ValueError("the message is not the assistant's")
        listed = json.loads(value) if isinstance(value, str) else value
        every = [calls.normal(call) for call in (listed if isinstance(listed, list) else [listed])]
    except (ValueError, RecursionError) as error:
        row.note(name, "bad_call", f"{shown(value)}: {error}", f"calls of the assistant, each {calls.FORM}")
        return []
    for call in every:
        row.checked(name, call["name"] + call["arguments"], empty=False)
    return every


def _definitions(row: Row, name: str, value: Any) -> str:
    """Definitions of tools as a JSON list: of a list, or of its JSON; each a function with a name."""
    try:
        listed = json.loads(value) if isinstance(value, str) else calls.without_nulls(value)
        definitions = [json.loads(each) if isinstance(each, str) else each for each in listed]
        functions = [each.get("function", each) for each in definitions]
        if any(not isinstance(each["name"], str) for each in functions):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        allowed = "a list of functions, each with a name, or its JSON"
        row.note(name, "bad_tools", shown(value), allowed)
        return "[]"
    # As most templates want them; those that write what they get write this.
    text = json.dumps([{"type": "function", "function": each} for each in functions], ensure_ascii=False)
    return row.checked(name, text, empty=False)


def _either(row: Row, name: str, message: Mapping[str, Any], one: str, other: str) -> Any:
    """The value under one of two names for the same thing."""
    values = [message[key] for key in (one, other) if message.get(key) is not None]
    if len(values) > 1:
        row.note(name, "wrong_type", f"both {one} and {other}", f"{one} or {other}")
    return values[0] if values else None
