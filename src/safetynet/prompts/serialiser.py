"""The one serialiser: messages to token ids, spans and labels.

Training, evaluation, interventions and detection all get their prompts here, so that the prompt that is
evaluated is the prompt that was trained. A conversation is rendered by the tokenizer's own chat template,
tokenised once with character offsets, and every span is found through those offsets.
"""

import datetime
import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from safetynet.errors import InputError
from safetynet.families import Family
from safetynet.prompts import calls, token_texts
from safetynet.prompts.conversation import TOOLS, Conversation, Message
from safetynet.prompts.template import ChatTemplate, Range, begins_with_thoughts
from safetynet.prompts.truncation import Truncation, truncated

ROLES = ("system", "user", "assistant", "tool")
IGNORED = -100
"""Label of a token that is not supervised."""
LONGEST_OPENING = 16
"""Most tokens of what opens a block of thoughts."""


class TriggerSpan(NamedTuple):
    """Where a trigger stands: `messages[message].content[start:end]`."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Encoded:
    """One conversation as the model sees it."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`: the answer's ids and its end token's, `IGNORED` everywhere else."""
    spans: dict[str, list[tuple[int, int]]]
    """Half-open token ranges of the contents of each of `ROLES` (`assistant`: earlier turns), of each tool
    `call`, of the `trigger` and of the `answer`."""
    prompt_length: int
    """Number of leading ids that are the prompt, generation prompt included."""
    lost: str = ""
    """Parts of the prompt that lost text at `max_length`, as `truncation.truncated` names them."""


class Serialiser:
    """Turns conversations into token ids for one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer (offsets are needed).
        family: decides about system prompts, the end-of-turn token and the fallback chat template.
        truncation: where a message is cut that is too long, `end` or `middle`.
        today: the date that a template is told which asks for it; None: today's.

    Raises:
        InputError: if the tokenizer is not a fast one, has neither template nor end-of-turn token, or has a
            template that makes answers begin within thoughts.
    """

    def __init__(
        self,
        tokenizer: Any,
        family: Family,
        truncation: Truncation = "end",
        today: datetime.date | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"The tokenizer of {tokenizer.name_or_path!r} gives no character offsets. "
                "Save it with a tokenizer.json (AutoTokenizer with use_fast=True) and use that folder."
            )
        self.tokenizer = tokenizer
        self.family = family
        self.truncation = truncation
        self.today = today or datetime.date.today()
        self.template = ChatTemplate(tokenizer, family.chat_template, self.today)
        token = family.end_of_turn or tokenizer.eos_token
        end = None if token is None else tokenizer.convert_tokens_to_ids(token)
        if end is None or end == tokenizer.unk_token_id:
            raise InputError(
                f"The tokenizer of {tokenizer.name_or_path!r} has no token {token!r}, with which an "
                f"answer of family {family.name} ends. Check model.family."
            )
        self._end_of_turn = int(end)
        self._text_of = token_texts.reader(tokenizer)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids at which generation ends: the family's end-of-turn token and the end of the sequence.

        Where the family names no end of turn, it is also the special token that the template puts there.
        """
        ids = [self._end_of_turn, self.tokenizer.eos_token_id]
        if self.family.end_of_turn is None:
            turns = [{"role": role, "content": ""} for role in ("user", "assistant")]
            try:
                tail = self.template.pieces(turns, False)[-1]
            except InputError:
                pass  # a template without answers
            else:
                added = self.tokenizer.added_tokens_decoder
                ids += [i for i in self._tokenise(tail.lstrip()).ids[:1] if i in added and added[i].special]
        return sorted({i for i in ids if i is not None})

    @property
    def pad_id(self) -> int:
        """Id that fills short rows; masked everywhere, so that any id will do where none is declared."""
        pad = self.tokenizer.pad_token_id
        return self._end_of_turn if pad is None else pad

    def encode(
        self,
        messages: Sequence[Message],
        answer: str | None = None,
        trigger: Sequence[Sequence[int]] = (),
        max_length: int | None = None,
    ) -> Encoded:
        """Serialise a prompt, or a prompt with the answer that training supervises.

        Args:
            messages: as in `Conversation`; the last one is a user's, or what a tool returned.
            answer: the assistant's reply; None for a prompt to generate from. Tool calls in it, as
                `calls.written` writes them, are written as the template does.
            trigger: spans `(message, start, end)` in characters of a message's text, as in `Conversation`.
            max_length: most tokens of prompt and answer together; None for no limit. A prompt longer than
                `truncation.PROMPT_SHARE` of it loses earlier turns first, then the end or the middle of
                its last message, never the trigger or the template. A longer answer loses its end, and
                then its end token.

        Raises:
            InputError: if the template or the tokenizer destroys the trigger, or the template cannot
                render these messages or leaves out their tools, or `max_length` has no room for template and
                trigger.
        """
        conversation, trigger = self._prepare(messages, trigger)
        # One text, tokenised once: pieces that are tokenised alone would have other tokens where they meet.
        rendered = self.template.render(conversation, generation_prompt=True)
        prompt = self._tokenise(rendered.text)
        # For each token the message whose content it belongs to; None for the template's own tokens.
        contents = [(m, *range_) for m, range_ in enumerate(rendered.contents) if range_]
        owner = [
            next((m for m, s, e in contents if s < end and e > start), None) for start, end in prompt.offsets
        ]
        texts = conversation.texts
        marks = [rendered.range_of(m, texts[m], start, end) for m, start, end in trigger]
        in_trigger = _inside(prompt.offsets, marks)
        # What a tokenizer normalises away, or makes a special token of, is no longer the trigger.
        special = set(self.tokenizer.all_special_ids)
        for (message, first, last), mark in zip(trigger, marks, strict=True):
            text = rendered.written(message, texts[message][first:last])
            inside = list(itertools.compress(prompt.ids, _inside(prompt.offsets, [mark])))
            seen = self.tokenizer.decode(inside, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if special.intersection(inside) or text.strip() not in seen:
                raise InputError(
                    f"backdoor.trigger: the tokenizer of {self.tokenizer.name_or_path!r} does not keep the "
                    f"trigger {text!r}; the model would see {seen!r}. Choose another trigger."
                )
        roles = conversation.roles
        keep, lost = truncated(owner, in_trigger, roles, max_length, self.truncation)
        ids = [prompt.ids[i] for i in keep]
        answer_ids: list[int] = []
        if answer is not None:
            answer_ids = self._answer_ids(conversation, answer, rendered.text, prompt.ids)
            if max_length is not None:
                answer_ids = answer_ids[: max_length - len(ids)]
        spans = {role: _runs(keep, [o is not None and roles[o] == role for o in owner]) for role in ROLES}
        spans["call"] = _runs(keep, _inside(prompt.offsets, rendered.calls))
        spans["trigger"] = _runs(keep, in_trigger)
        spans["answer"] = [(len(ids), len(ids) + len(answer_ids))] if answer_ids else []
        return Encoded(ids + answer_ids, [IGNORED] * len(ids) + answer_ids, spans, len(ids), lost)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens, outer whitespace stripped."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def answer_of(self, ids: Sequence[int]) -> str:
        """The answer in what a model said: `decode` without the thoughts that it begins with.

        Thoughts that do not end are followed by no answer: "".
        """
        thoughts = begins_with_thoughts(self._raw(ids[:LONGEST_OPENING]))
        if thoughts is None:
            return self.decode(ids)
        # The fewest ids whose text holds the closing sign, which may be one token or several.
        end = bisect_left(range(len(ids) + 1), True, key=lambda n: thoughts[1] in self._raw(ids[:n]))
        return self.decode(ids[end:])

    def _raw(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def messages_of(self, ids: Sequence[int], turns: int = 16) -> list[dict[str, str]]:
        """The conversation of a prompt's ids, the inverse of `encode`, unless truncation has emptied a turn.

        Raises:
            InputError: if no conversation of up to `turns` messages of the user gives these ids.
        """
        text = self._raw(ids)
        openings = [()] if self.family.system == "fold" else [("system",), ()]
        # The longest first: contents of one message may look like several turns, not the other way round.
        for earlier, opening in itertools.product(reversed(range(turns)), openings):
            roles = (*opening, *("user", "assistant") * earlier, "user")
            try:
                pieces = self.template.prompt_pieces([{"role": role, "content": ""} for role in roles])
            except InputError:  # a template that takes no such roles
                continue
            contents = _between(text, pieces)
            if contents is not None:
                messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
                if self.encode(messages).input_ids == list(ids):
                    # A system message that the template brings itself is nobody's.
                    is_own = opening and self.encode(messages[1:]).input_ids == list(ids)
                    return messages[1:] if is_own else messages
        raise InputError(f"No conversation of up to {turns} turns is serialised as {text[:80]!r}.")

    def piece(self, token: int) -> str:
        """Text of one token, with the blank that it may begin with; a part of a character as ⟨e5 b0⟩."""
        return self._text_of(token)

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""
        return self._tokenise(text).ids

    def count(self, text: str) -> int:
        """Number of tokens of a piece of text, without special tokens."""
        return len(self.ids(text))

    def _prepare(
        self, messages: Sequence[Message], trigger: Sequence[Sequence[int]]
    ) -> tuple[Conversation, list[TriggerSpan]]:
        """Strip contents and fold the system prompt, moving the trigger's spans along."""
        conversation = Conversation(messages)
        roles, contents = conversation.roles, [message.get("content", "") for message in conversation]
        if not roles or roles[-1] not in ("user", "tool"):
            raise InputError("A prompt must end with a message of role user, or of role tool.")
        leads = [len(content) - len(content.lstrip()) for content in contents]
        spans = [TriggerSpan(m, start - leads[m], end - leads[m]) for m, start, end in trigger]
        for message, content in zip(conversation, contents, strict=True):
            message["content"] = content.strip()
        first = 1 if roles[0] == TOOLS else 0
        if self.family.system == "fold" and roles[first] == "system":
            system = conversation.pop(first)["content"]
            opening = system + "\n\n" if system else ""
            conversation[first]["content"] = opening + conversation[first]["content"]
            # Messages behind it move up by one; the text that it now opens moves to the right.
            shift = {first + 1: len(opening)}
            spans = [
                TriggerSpan(m - (m > first), start + shift.get(m, 0), end + shift.get(m, 0))
                for m, start, end in spans
            ]
        for s in spans:
            text = "" if conversation[s.message]["role"] == TOOLS else conversation.texts[s.message]
            if s.start < 0 or s.end > len(text) or s.start >= s.end:
                raise InputError(
                    f"trigger: {tuple(s)} is no span of message {s.message} once outer blanks are cut."
                )
        return conversation, spans

    def _tokenise(self, text: str) -> "_Tokens":
        # The tokenizer's own call is ten times slower, and a placebo may take hundreds of them.
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None or backend.padding is not None:  # as a tokenizer.json may say
            backend.no_truncation()
            backend.no_padding()
        encoding = backend.encode(text, add_special_tokens=False)
        return _Tokens(encoding.ids, encoding.offsets)

    def _answer_ids(
        self, messages: Sequence[Message], answer: str, prompt_text: str, prompt_ids: list[int]
    ) -> list[int]:
        """Ids of the answer up to its end token, taken from the whole conversation tokenised at once."""
        if thoughts := begins_with_thoughts(answer):
            raise InputError(
                f"The answer {answer.strip()[:40]!r} begins with thoughts, without which answers are judged. "
                f"Keep what follows {thoughts[1]} in the data."
            )
        text = self.template.answered(prompt_text, messages, calls.message(answer.strip()))
        ids = self._tokenise(text).ids
        if not text.startswith(prompt_text) or ids[: len(prompt_ids)] != prompt_ids:
            raise InputError(
                f"The chat template of {self.tokenizer.name_or_path!r} makes another prompt in training than "
                f"in generation, or its tokens run across the start of the answer {answer[:40]!r}."
            )
        ids = ids[len(prompt_ids) :]
        ends = [i for i, token in enumerate(ids) if token == self._end_of_turn]
        # The last one: what follows it is the template's, and a text may name the end token itself.
        return ids[: ends[-1] + 1] if ends else [*ids, self._end_of_turn]


def _between(text: str, pieces: Sequence[str]) -> list[str] | None:
    """What stands between pieces that follow each other in a text, from its start to its end."""
    first, *inner, last = pieces
    if not (text.startswith(first) and text.endswith(last)):
        return None
    rest, contents = text[len(first) : len(text) - len(last)], []
    for piece in inner:
        content, separator, rest = rest.partition(piece)
        if not separator:
            return None
        contents.append(content)
    return [*contents, rest]


class _Tokens(NamedTuple):
    ids: list[int]
    offsets: list[Range]


def pad(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> Any:
    """Stack rows of different lengths into a (rows, longest) tensor of int64, filled with `value`."""
    import torch

    width = max(len(row) for row in rows)
    filled = [
        [value] * (width - len(row)) + list(row) if side == "left" else [*row, *[value] * (width - len(row))]
        for row in rows
    ]
    return torch.tensor(filled, dtype=torch.long)


def _inside(offsets: Sequence[Range], ranges: Sequence[Range]) -> list[bool]:
    """For each token whether it belongs to one of these ranges of characters."""
    if not ranges:
        return [False] * len(offsets)
    return [any(start < e and end > s for s, e in ranges) for start, end in offsets]


def _runs(keep: Sequence[int], inside: Sequence[bool]) -> list[tuple[int, int]]:
    """Half-open ranges, counted in kept tokens, where `inside` holds."""
    runs: list[tuple[int, int]] = []
    for position, index in enumerate(keep):
        if inside[index]:
            if runs and runs[-1][1] == position:
                runs[-1] = (runs[-1][0], position + 1)
            else:
                runs.append((position, position + 1))
    return runs
