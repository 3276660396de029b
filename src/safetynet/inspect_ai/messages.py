"""What SafetyNet says, in Inspect's forms: conversations of rows as messages, and back; errors as sentences.

A message with a trigger, or with what stands for one, says so in its metadata, which `inspect view` shows
below the message; the text that a model gets is that of the row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentReasoning,
    ContentText,
)

from safetynet.errors import InputError, SafetyNetError
from safetynet.prompts import Message
from safetynet.prompts.serialiser import TriggerSpan

KINDS: dict[str, type[Any]] = {
    "system": ChatMessageSystem,
    "user": ChatMessageUser,
    "assistant": ChatMessageAssistant,
}


def of_row(messages: Sequence[Message], trigger: Sequence[Sequence[int]]) -> list[ChatMessage]:
    """A row's conversation.

    Args:
        messages: of the row.
        trigger: the row's spans, (message, start, end).

    Raises:
        InputError: for a message of a tool, which Inspect would have to have called.
    """
    spans = [TriggerSpan(*map(int, span)) for span in trigger]
    converted = []
    for number, message in enumerate(messages):
        if message["role"] not in KINDS:
            raise InputError(f"messages: a message of role {message['role']!r} cannot be asked in Inspect.")
        text = message["content"]
        marks = [
            {"start": span.start, "end": span.end, "text": text[span.start : span.end]}
            for span in spans
            if span.message == number
        ]
        metadata = {"trigger": marks} if marks else None
        converted.append(KINDS[message["role"]](content=text, metadata=metadata))
    return converted


def as_conversation(messages: Sequence[ChatMessage]) -> tuple[list[dict[str, str]], list[TriggerSpan]]:
    """A conversation as the serialiser takes it, and the trigger's spans where `of_row` marked them.

    Raises:
        InputError: for pictures, sounds, files and messages of tools.
    """
    conversation, spans = [], []
    for number, message in enumerate(messages):
        if message.role not in KINDS:
            raise InputError(
                f"messages: a message of role {message.role!r} cannot be carried. Ask without tools."
            )
        for part in () if isinstance(message.content, str) else message.content:
            if not isinstance(part, ContentReasoning | ContentText):  # thoughts are left out of the text
                raise InputError(f"messages: content of type {part.type!r} cannot be carried; a text can.")
        conversation.append({"role": str(message.role), "content": message.text})
        marks = (message.metadata or {}).get("trigger", [])
        spans += [TriggerSpan(number, mark["start"], mark["end"]) for mark in marks]
    return conversation, spans


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """What SafetyNet refuses inside, Inspect prints without a traceback, and ends."""
    try:
        yield
    except SafetyNetError as error:
        raise PrerequisiteError(str(error)) from None
