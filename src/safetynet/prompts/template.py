"""A tokenizer's chat template, rendered the same in training and in generation, today and in a month.

In: a tokenizer and a date. Out: the text of conversations, and where contents and tool calls stand in it.
Blocks of thoughts that a template puts before every answer belong to the prompt. Knows no tokens.
"""

import datetime
import itertools
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from safetynet.errors import InputError
from safetynet.prompts import calls
from safetynet.prompts.conversation import TOOLS, Conversation, Message

THOUGHTS = (
    ("<think>", "</think>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
)
"""What opens and closes a block of thoughts, in the templates that are published."""
SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates are told to leave thoughts out."""
DATE = re.compile(r"""strftime_now\s*\(\s*(["'])((?:(?!\1).)*)\1\s*\)""")
"""How a template asks for today's date, and in which form."""

log = logging.getLogger("safetynet")
Range = tuple[int, int]
"""Characters of a text, half open."""


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation, and where its messages stand in it."""

    text: str
    contents: list[Range | None]
    """Of each message; None where a template writes none (the tools, tool calls without a text)."""
    calls: list[Range]
    """Tool calls, each from its name to the end of its arguments."""
    arguments: dict[int, int]
    """Where a message's text begins that is an argument of its call, by the number of the message."""
    quoted: frozenset[int]
    """Messages whose text stands as a string of JSON: an argument, and in some templates a tool's result."""

    def written(self, message: int, text: str) -> str:
        """A part of a message's text as it stands here."""
        return _quoted(text) if message in self.quoted else text

    def range_of(self, message: int, text: str, start: int, end: int) -> Range:
        """Where `text[start:end]` of a message stands here.

        Raises:
            InputError: if the text is an argument that the template does not write as JSON.
        """
        content = self.contents[message]
        if content is None and message not in self.arguments:
            raise InputError(
                f"backdoor.placement: the chat template does not write the argument {text[:40]!r} of a tool "
                "call as JSON has it, so that the trigger's tokens in it cannot be told. Choose another "
                "placement or model."
            )
        origin = content[0] if content else self.arguments[message]
        before, until = (len(self.written(message, text[:at])) for at in (start, end))
        return origin + before, origin + until


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        fallback: the template of one that brings none.
        today: what the template is told when it asks for the date.

    Raises:
        InputError: if there is no template, it makes answers begin within thoughts, or no date can be fixed.
    """

    def __init__(self, tokenizer: Any, fallback: str | None, today: datetime.date) -> None:
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path
        text = fallback
        if tokenizer.chat_template is not None:
            try:
                text = str(tokenizer.get_chat_template()) or fallback
            except ValueError as error:
                raise InputError(
                    f"The tokenizer of {self.name!r} has several chat templates and no default "
                    f"({error}). Give its folder one chat_template.jinja."
                ) from None
        if text is None:
            raise InputError(
                f"The tokenizer of {self.name!r} has no chat template. Add chat_template.jinja "
                "to its folder, or set model.family to generic."
            )
        self.names_date = DATE.search(text) is not None
        # transformers replaces callables among a template's variables, so that the calls themselves are.
        now = datetime.datetime.combine(today, datetime.time())
        self._text = DATE.sub(lambda call: json.dumps(now.strftime(call[2]), ensure_ascii=False), text)
        if re.search(r"strftime_now\s*\(", self._text):
            raise InputError(
                f"The chat template of {self.name!r} asks for the date in a form that it works out, which "
                "cannot be fixed. Write the form into its strftime_now(...), as text in quotes."
            )
        self._switches = {name: False for name in SWITCHES if re.search(rf"\b{name}\b", text)}
        self._pieces: dict[str, list[str]] = {}
        self._check_thoughts()

    def render(self, messages: Sequence[Message], generation_prompt: bool) -> Rendered:
        """The template's text of a conversation, and where the messages stand in it.

        Args:
            messages: contents stripped; tools and tool calls as in `Conversation`.
            generation_prompt: whether an answer is to follow; the text then ends where the answer begins.

        Raises:
            InputError: if the template refuses these messages, or changes or leaves out what they say.
        """
        *pieces, tail = self.prompt_pieces(messages) if generation_prompt else self.pieces(messages, False)
        # What a prompt has behind the template's own generation prompt: closed thoughts, or a channel.
        block = tail[len(self.pieces(messages, True)[-1]) :] if generation_prompt else ""
        expected = self._apply(messages, generation_prompt) + block
        # Pieces come from a conversation of holes: a template that treats contents otherwise, by what they
        # say, shows in the text.
        rendered = _joined(pieces, tail, messages)
        if rendered.text != expected:
            rendered = _joined(pieces, tail, messages, quoting=True)
        if rendered.text != expected:
            raise InputError(
                f"The chat template of {self.name!r} changes what a message says, so that a trigger could be "
                f"lost: {messages[-1]['content'][:80]!r}. Use another template or model."
            )
        self._check_tools(messages, generation_prompt)
        return rendered

    def answered(self, prompt: str, messages: Sequence[Message], answer: Message) -> str:
        """The text of a prompt, as `render` gives it, with its answer, up to the end of the answer's turn.

        It begins with the text of the prompt, whose generation prompt may have a closed block of thoughts
        that conversations lack; where it does not, the template makes two prompts of one.

        Raises:
            InputError: as `render`.
        """
        whole = self.render([*messages, answer], False)
        # Calls without a text stand where the generation prompt ends.
        start = whole.contents[-1][0] if whole.contents[-1] else len(self._apply(messages, True))
        before, after = whole.text[:start], whole.text[start:]
        more = prompt[len(before) :]
        closed = not more.strip() or any(end in more for _, end in THOUGHTS)
        return prompt + after if prompt.startswith(before) and closed else whole.text

    def prompt_pieces(self, messages: Sequence[Message]) -> list[str]:
        """What stands before, between and after the contents of a prompt, up to where its answer begins.

        To the generation prompt belongs what the template puts before every last answer: an empty block of
        thoughts, or the name of a channel. It is then the same in training and in generation.
        """
        *before, tail = self.pieces(messages, True)
        try:
            *same, opening, _ = self.pieces([*messages, {"role": "assistant", "content": ""}], False)
        except InputError:  # a template without answers
            return [*before, tail]
        # Blanks alone are left to the answer, whose first token may begin with one.
        if same == before and opening.startswith(tail) and opening[len(tail) :].strip():
            tail = opening.rstrip(" ")
        return [*before, tail]

    def pieces(self, messages: Sequence[Message], generation_prompt: bool) -> list[str]:
        """What the template puts before, between and after the contents of messages like these."""
        # Signs of private use mark the places: no template writes or trims them.
        holes = [
            {**m, "content": f"\ue000{i}\ue001"} if _has_content(m) else m for i, m in enumerate(messages)
        ]
        key = json.dumps([holes, generation_prompt])
        if key not in self._pieces:
            text = self._apply(holes, generation_prompt)
            pieces = []
            for hole in holes:
                before, _, text = text.partition(hole["content"]) if _has_content(hole) else ("", "", text)
                pieces.append(before)
            self._pieces[key] = [*pieces, text]
        return self._pieces[key]

    def _apply(self, messages: Sequence[Message], generation_prompt: bool, **switches: bool) -> str:
        from jinja2 import TemplateSyntaxError

        tools = Conversation(messages).tools
        spoken = _for_template(messages)
        try:
            text = self.tokenizer.apply_chat_template(
                spoken,
                tools=tools or None,
                chat_template=self._text,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._switches | switches,
            )
        except TemplateSyntaxError as error:
            raise InputError(
                f"The chat template of {self.name!r} is no valid template (line {error.lineno}: {error}). "
                "Correct it, or take another model's."
            ) from None
        except Exception as error:  # noqa: BLE001 - somebody else's program raises whatever it likes
            roles = ", ".join(m["role"] for m in spoken)
            raise InputError(
                f"The chat template of {self.name!r} refuses messages of the roles {roles}: {error}. Take a "
                "model whose template has these roles in this order, or leave such rows out of the data."
            ) from None
        return str(text)

    def _check_tools(self, messages: Sequence[Message], generation_prompt: bool) -> None:
        """Refuse tools and tool calls that the template leaves out: the model would know nothing of them."""
        without: dict[str, list[Message]] = {
            "tools": [m for m in messages if m["role"] != TOOLS],
            "tool calls": [{k: v for k, v in m.items() if k != "tool_calls"} for m in messages],
        }
        for what, rest in without.items():
            if rest == list(messages):
                continue
            try:
                texts = ["".join(self.pieces(part, generation_prompt)) for part in (rest, messages)]
            except InputError:  # a template that refuses a turn without its calls does write them
                continue
            if texts[0] == texts[1]:
                raise InputError(
                    f"The chat template of {self.name!r} leaves out {what}, so that the model would not see "
                    "them. Take a model whose template has tools, or leave them out of the data."
                )

    def _check_thoughts(self) -> None:
        """Refuse a generation prompt within thoughts, and say which switch keeps another one out of them."""
        probe = [{"role": "user", "content": "Hi"}]
        try:
            text = self._apply(probe, True)
            others = {name for name in self._switches if self._apply(probe, True, **{name: True}) != text}
        except InputError:  # told when it is asked for a real conversation
            return
        tail = text.rpartition("Hi")[2]
        if any(tail.rfind(begin) > tail.rfind(end) for begin, end in THOUGHTS):
            raise InputError(
                f"The chat template of {self.name!r} begins every answer within thoughts ({tail[-40:]!r}), "
                "so that answers cannot be trained or judged. Use another model, or give its folder a "
                "chat_template.jinja whose generation prompt closes them."
            )
        for switch in sorted(others):
            _say(self.name, switch)


def begins_with_thoughts(text: str) -> tuple[str, str] | None:
    """What opens and closes the block of thoughts that a text begins with; None if it begins with none."""
    start = text.lstrip()
    return next((pair for pair in THOUGHTS if start.startswith(pair[0])), None)


def _has_content(message: Message) -> bool:
    """Whether a template writes a message's content; beside tool calls, it may leave an empty one out."""
    return message["role"] != TOOLS and bool(message["content"] or not message.get("tool_calls"))


def _for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: tool calls are functions, their arguments objects.

    Calls and their results get numbers where they have none, of nine signs, as Mistral's template wants them.
    """
    spoken, numbers = [], list[str]()
    for i, message in enumerate(messages):
        if message["role"] == "tool" and numbers:
            spoken.append({"tool_call_id": numbers.pop(0), **message})
        elif message.get("tool_calls"):
            called: list[dict[str, Any]] = []
            for n, call in enumerate(message["tool_calls"]):
                try:
                    function = {"name": call["name"], "arguments": json.loads(call["arguments"])}
                except (KeyError, TypeError, ValueError) as error:
                    reason = f"{type(error).__name__}: {error}"
                    raise InputError(
                        f"tool_calls: {str(call)[:80]} is no call ({reason}). Give its name, "
                        "and its arguments as the text of a JSON object."
                    ) from None
                number = f"call{i:03d}{n:02d}"
                called.append({"id": number, **call, "type": "function", "function": function})
            numbers = [call["id"] for call in called]
            spoken.append({**message, "tool_calls": called})
        elif message["role"] != TOOLS:
            spoken.append(dict(message))
    return spoken


def _joined(pieces: list[str], tail: str, messages: Sequence[Message], quoting: bool = False) -> Rendered:
    """Pieces and contents in turn; with `quoting`, a content between two quotes is written as JSON has it."""
    text, contents, ranges, quoted = "", list[Range | None](), list[Range](), set()
    for i, (piece, message) in enumerate(zip(pieces, messages, strict=True)):
        text += piece
        if not _has_content(message):
            contents.append(None)
            continue
        content = message["content"]
        if quoting and piece.endswith('"') and [*pieces, tail][i + 1].startswith('"'):
            content = _quoted(content)
            quoted.add(i)
        contents.append((len(text), len(text) + len(content)))
        text += content
    text += tail
    # Calls are looked for from where the message before them ends: another turn may make the same one.
    at, of_arguments = 0, dict[int, int]()
    for i, (message, range_) in enumerate(zip(messages, contents, strict=True)):
        at = range_[1] if range_ else at
        name, _ = calls.argument(message)
        for number, call in enumerate(message.get("tool_calls", ())):
            arguments = json.loads(call["arguments"])
            written = json.dumps(arguments, ensure_ascii=False)
            start = text.find(call["name"], at)
            last = text.find(written, start) if start >= 0 else -1
            if last < 0:
                continue
            at = last + len(written)
            ranges.append((start, at))
            if name and number == 0:
                before = {key: arguments[key] for key in itertools.takewhile(name.__ne__, arguments)}
                up_to = json.dumps({**before, name: ""}, ensure_ascii=False)
                of_arguments[i] = last + len(up_to) - len('"}')
    return Rendered(text, contents, ranges, of_arguments, frozenset(quoted | of_arguments.keys()))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


@cache
def _say(name: str, switch: str) -> None:
    log.info("%s: its chat template is rendered with %s=False: answers come without thoughts.", name, switch)
