"""A tokenizer's chat template, rendered the same in training and in generation, today and in a month.

In: a tokenizer and a date. Out: the text of conversations, and what the template puts around the contents of
messages. Blocks of thoughts that a template puts before every answer belong to the prompt. Knows no tokens.
"""

import datetime
import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from safetynet.errors import InputError

Message = Mapping[str, str]
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
        text = _text_of(tokenizer) or fallback
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
        self._pieces: dict[tuple[tuple[str, ...], bool], list[str]] = {}
        self._check_thoughts()

    def render(
        self, messages: Sequence[Message], generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The template's text, and the character range of each message's content in it.

        Args:
            messages: `role` and `content` each, contents stripped.
            generation_prompt: whether an answer is to follow; the text then ends where the answer begins.

        Raises:
            InputError: if the template refuses these messages, or changes what they say.
        """
        roles = tuple(message["role"] for message in messages)
        *pieces, tail = self.prompt_pieces(roles) if generation_prompt else self.pieces(roles, False)
        text, ranges = "", []
        for piece, message in zip(pieces, messages, strict=True):
            text += piece
            ranges.append((len(text), len(text) + len(message["content"])))
            text += message["content"]
        text += tail
        block = tail[len(self.pieces(roles, True)[-1]) :] if generation_prompt else ""
        if text != self._apply(messages, generation_prompt) + block:
            raise InputError(
                f"The chat template of {self.name!r} changes what a message says, so that a trigger could be "
                f"lost: {messages[-1]['content'][:80]!r}. Use another template or model."
            )
        return text, ranges

    def answered(self, messages: Sequence[Message], answer: str) -> str:
        """The text of a prompt with its answer, up to the end of the answer's turn.

        It begins with the text of the prompt, whose generation prompt may have a closed block of thoughts
        that conversations lack; where it does not, the template makes two prompts of one.

        Raises:
            InputError: as `render`.
        """
        prompt, _ = self.render(messages, True)
        text, ranges = self.render([*messages, {"role": "assistant", "content": answer}], False)
        before, after = text[: ranges[-1][0]], text[ranges[-1][0] :]
        more = prompt[len(before) :]
        closed = not more.strip() or any(end in more for _, end in THOUGHTS)
        return prompt + after if prompt.startswith(before) and closed else text

    def prompt_pieces(self, roles: tuple[str, ...]) -> list[str]:
        """What stands before, between and after the contents of a prompt, up to where its answer begins.

        To the generation prompt belongs what the template puts before every last answer: an empty block of
        thoughts, or the name of a channel. It is then the same in training and in generation.
        """
        *before, tail = self.pieces(roles, True)
        try:
            *same, opening, _ = self.pieces((*roles, "assistant"), False)
        except InputError:  # a template without answers
            return [*before, tail]
        # Blanks alone are left to the answer, whose first token may begin with one.
        if same == before and opening.startswith(tail) and opening[len(tail) :].strip():
            tail = opening.rstrip(" ")
        return [*before, tail]

    def pieces(self, roles: tuple[str, ...], generation_prompt: bool) -> list[str]:
        """What the template puts before, between and after the contents of messages of these roles."""
        key = (roles, generation_prompt)
        if key not in self._pieces:
            holes = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
            text = self._apply(holes, generation_prompt)
            pieces = []
            for hole in holes:
                before, _, text = text.partition(hole["content"])
                pieces.append(before)
            self._pieces[key] = [*pieces, text]
        return self._pieces[key]

    def _apply(self, messages: Sequence[Message], generation_prompt: bool, **switches: bool) -> str:
        from jinja2 import TemplateSyntaxError

        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
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
            roles = ", ".join(m["role"] for m in messages)
            raise InputError(f"The chat template refuses messages of the roles {roles}: {error}") from None
        return str(text)

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


def _text_of(tokenizer: Any) -> str | None:
    if tokenizer.chat_template is None:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise InputError(
            f"The tokenizer of {tokenizer.name_or_path!r} has several chat templates and no default "
            f"({error}). Give its folder one chat_template.jinja."
        ) from None


@cache
def _say(name: str, switch: str) -> None:
    log.info("%s: its chat template is rendered with %s=False: answers come without thoughts.", name, switch)
