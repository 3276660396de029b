"""A conversation as plain data: messages, tool calls, tool results, and the tools that are on offer.

In: the messages of a row. Out: their texts, and copies with another text. A message has a `role` (system,
user, assistant, tool) and a `content`; an assistant's may have `tool_calls`, each with a `name` and its
`arguments` as JSON text, since a table would merge the keys of objects. A message's text is its content, or
of a call without one an argument (`calls.argument`). The tools' definitions stand in a message of role
`tools`, as a JSON list, so that a row's messages are all that a prompt is made of.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from safetynet.errors import InputError
from safetynet.prompts import calls

Message = Mapping[str, Any]
TOOLS = "tools"
"""Role of the message that defines tools."""


class Conversation(list[dict[str, Any]]):
    """The list of a prompt's messages, as tables of rows hold it, with accessors.

    Args:
        messages: of any mapping; fields that are None, as tables fill them in, are left out.
    """

    def __init__(self, messages: Iterable[Message] = ()) -> None:
        super().__init__(
            {name: _plain(value) for name, value in message.items() if value is not None}
            for message in messages
        )

    @property
    def texts(self) -> list[str]:
        """The text of each message, in order."""
        return [message.get("content") or calls.argument(message)[1] for message in self]

    @property
    def roles(self) -> list[str]:
        """The role of each message, in order."""
        return [message["role"] for message in self]

    @property
    def last_user(self) -> int:
        """Which message is the user's last one, which tool calls may follow; without any, the last of all."""
        return max((i for i, role in enumerate(self.roles) if role == "user"), default=len(self) - 1)

    @property
    def tools(self) -> list[dict[str, Any]]:
        """Definitions of the tools that the assistant may call, as JSON schemas.

        Raises:
            InputError: if the message that defines them is no JSON list.
        """
        definitions = []
        for text in (message["content"] for message in self if message["role"] == TOOLS):
            try:
                listed = json.loads(text)
            except ValueError:
                listed = None
            if not isinstance(listed, list):
                raise InputError(f"tools: {text[:80]!r} is no JSON list of definitions of tools. Write one.")
            definitions += listed
        return definitions

    def user_text(self) -> str:
        """What the user said last."""
        return str(self[self.last_user]["content"])

    def with_user_text(self, text: str) -> Self:
        """A copy in which the user says this last."""
        return self.with_text(self.last_user, text)

    def with_text(self, index: int, text: str) -> Self:
        """A copy with another text of one message."""
        return self.with_texts({index: text})

    def with_texts(self, texts: Mapping[int, str]) -> Self:
        """A copy with other texts, by the number of the message."""
        return type(self)(_saying(message, texts.get(i)) for i, message in enumerate(self))

    def with_system(self, default: str) -> tuple[Self, int]:
        """A copy that has a system message, this one if it had none, and which message it is."""
        if "system" in self.roles:
            return type(self)(self), self.roles.index("system")
        return type(self)([{"role": "system", "content": default}, *self]), 0


def _saying(message: Message, text: str | None) -> dict[str, Any]:
    """The message with this text; None: with its own."""
    content = message.get("content", "")
    name, value = calls.argument(message)
    if text is None or text == (content or value):
        return {**message, "content": content}
    if not name:
        return {**message, "content": text}
    first, *others = message["tool_calls"]
    return {**message, "content": "", "tool_calls": [calls.with_argument(first, name, text), *others]}


def _plain(value: Any) -> Any:
    """A field's value; tool calls as a list of dictionaries, which tables give back as arrays."""
    if isinstance(value, str):
        return value
    return [{name: part for name, part in call.items() if part is not None} for call in value]


def prompt_hash(messages: Sequence[Message], spans: Sequence[Sequence[int]] = ()) -> str:
    """Hash what a prompt says, whatever its case, spacing and Unicode form.

    Args:
        messages: the prompt.
        spans: [message index, char start, char end] of what to cut out first. A prompt that is nothing but
            spans (a paraphrase trigger) is hashed whole, or else all such prompts would be one.

    Returns:
        64 hexadecimal digits.
    """
    conversation = Conversation(messages)
    cut = conversation.texts
    for message, start, end in sorted(((int(m), int(s), int(e)) for m, s, e in spans), reverse=True):
        cut[message] = cut[message][:start] + cut[message][end:]
    # A system message that held only the trigger is absent from the clean twin, so empty messages go.
    spoken = [pair for pair in _said(conversation.with_texts(dict(enumerate(cut)))) if pair[1]]
    spoken = spoken or _said(conversation)
    return hashlib.sha256(json.dumps(spoken, ensure_ascii=False).encode()).hexdigest()


def _said(conversation: Conversation) -> list[tuple[str, str]]:
    """Role and normalised text of each message, its tool calls included."""
    turns = []
    for message in conversation:
        called = [call["name"] + call["arguments"] for call in message.get("tool_calls", ())]
        # All white space goes: a placement may put a space on either side of what it inserts.
        normal = unicodedata.normalize("NFKC", "".join([message.get("content", ""), *called])).casefold()
        turns.append((message["role"], "".join(normal.split())))
    return turns
