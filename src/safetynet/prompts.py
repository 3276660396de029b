"""The one serialiser: messages to token ids, spans and labels.

Training, evaluation, interventions and detection all get their prompts here, so that the prompt that is
evaluated is the prompt that was trained. A conversation is rendered by the tokenizer's own chat template,
tokenised once with character offsets, and every span is found through those offsets.
"""

import datetime
import hashlib
import itertools
import json
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from safetynet.errors import InputError
from safetynet.families import Family
from safetynet.templates import ChatTemplate, begins_with_thoughts
from safetynet.templates import Message as Message
from safetynet.text import token_texts
from safetynet.truncation import Truncation, truncated

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
    """Half-open token ranges of `system`, `user`, `assistant` (earlier turns), `trigger` and `answer`."""
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
        self._end_of_turn = self._end_id()
        self._text_of = token_texts.reader(tokenizer)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids at which generation ends: the family's end-of-turn token and the end of the sequence.

        Where the family names no end of turn, it is also the special token that the template puts there.
        """
        ids = [self._end_of_turn, self.tokenizer.eos_token_id]
        if self.family.end_of_turn is None:
            ids.append(self._written_end())
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
            messages: `role` and `content` each; ends with a user's message.
            answer: the assistant's reply; None for a prompt to generate from.
            trigger: spans `(message, start, end)` in characters of `messages[message]["content"]`.
            max_length: most tokens of prompt and answer together; None for no limit. A prompt longer than
                `truncation.PROMPT_SHARE` of it loses earlier turns first, then the end or the middle of
                its last message, never the trigger or the template. A longer answer loses its end, and
                then its end token.

        Raises:
            InputError: if the template or the tokenizer destroys the trigger, or the template cannot
                render these messages, or `max_length` has no room for template and trigger.
        """
        messages, trigger = self._prepare(messages, trigger)
        prompt_text, ranges = self.template.render(messages, generation_prompt=True)
        prompt = self._tokenise(prompt_text)
        owner = _owners(prompt.offsets, ranges)
        marks = [(ranges[m][0] + start, ranges[m][0] + end) for m, start, end in trigger]
        in_trigger = [any(s < end and e > start for start, end in marks) for s, e in prompt.offsets]
        self._check_trigger(messages, trigger, prompt, marks)
        roles = [message["role"] for message in messages]
        keep, lost = truncated(owner, in_trigger, roles, max_length, self.truncation)
        ids = [prompt.ids[i] for i in keep]
        answer_ids: list[int] = []
        if answer is not None:
            answer_ids = self._answer_ids(messages, answer, prompt_text, prompt.ids)
            if max_length is not None:
                answer_ids = answer_ids[: max_length - len(ids)]
        spans = {
            role: _runs(keep, [o is not None and roles[o] == role for o in owner])
            for role in ("system", "user", "assistant")
        }
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
        for earlier, opening in itertools.product(reversed(range(turns)), openings):
            roles = (*opening, *("user", "assistant") * earlier, "user")
            try:
                pieces = self.template.prompt_pieces(roles)
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

    def count(self, text: str) -> int:
        """Number of tokens of a piece of text, without special tokens."""
        # The tokenizer's own call is ten times slower, and a placebo may take hundreds of counts.
        return len(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False))

    def _end_id(self) -> int:
        token = self.family.end_of_turn or self.tokenizer.eos_token
        end = None if token is None else self.tokenizer.convert_tokens_to_ids(token)
        if end is None or end == self.tokenizer.unk_token_id:
            raise InputError(
                f"The tokenizer of {self.tokenizer.name_or_path!r} has no token {token!r}, with which an "
                f"answer of family {self.family.name} ends. Check model.family."
            )
        return int(end)

    def _written_end(self) -> int | None:
        """The special token that the template puts after an answer, if it puts one there."""
        try:
            tail = self.template.pieces(("user", "assistant"), False)[-1]
        except InputError:
            return None
        added = self.tokenizer.added_tokens_decoder
        return next(
            (i for i in self._tokenise(tail.lstrip()).ids[:1] if i in added and added[i].special), None
        )

    def _prepare(
        self, messages: Sequence[Message], trigger: Sequence[Sequence[int]]
    ) -> tuple[list[dict[str, str]], list[TriggerSpan]]:
        """Strip contents and fold the system prompt, moving the trigger's spans along."""
        if not messages or messages[-1]["role"] != "user":
            raise InputError("A prompt must end with a message of role user.")
        prepared, spans = [], [TriggerSpan(*span) for span in trigger]
        for index, message in enumerate(messages):
            content = message["content"]
            lead = len(content) - len(content.lstrip())
            spans = [
                s._replace(start=s.start - lead, end=s.end - lead) if s.message == index else s for s in spans
            ]
            prepared.append({"role": message["role"], "content": content.strip()})
        if self.family.system == "fold" and prepared[0]["role"] == "system":
            opening = prepared[0]["content"] + "\n\n" if prepared[0]["content"] else ""
            prepared[1]["content"] = opening + prepared[1]["content"]
            spans = [_folded(s, len(opening)) for s in spans]
            del prepared[0]
        for s in spans:
            if s.start < 0 or s.end > len(prepared[s.message]["content"]) or s.start >= s.end:
                raise InputError(
                    f"trigger: {tuple(s)} is no span of message {s.message} once outer blanks are cut."
                )
        return prepared, spans

    def _tokenise(self, text: str) -> "_Tokens":
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return _Tokens(list(out["input_ids"]), [tuple(pair) for pair in out["offset_mapping"]])

    def _answer_ids(
        self, messages: Sequence[Message], answer: str, prompt_text: str, prompt_ids: list[int]
    ) -> list[int]:
        """Ids of the answer up to its end token, taken from the whole conversation tokenised at once."""
        if thoughts := begins_with_thoughts(answer):
            raise InputError(
                f"The answer {answer.strip()[:40]!r} begins with thoughts, without which answers are judged. "
                f"Keep what follows {thoughts[1]} in the data."
            )
        text = self.template.answered(messages, answer.strip())
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

    def _check_trigger(
        self,
        messages: Sequence[Message],
        trigger: Sequence[TriggerSpan],
        prompt: "_Tokens",
        marks: Sequence[tuple[int, int]],
    ) -> None:
        special = set(self.tokenizer.all_special_ids)
        for span, (start, end) in zip(trigger, marks, strict=True):
            wanted = messages[span.message]["content"][span.start : span.end]
            ids = [i for i, (s, e) in zip(prompt.ids, prompt.offsets, strict=True) if s < end and e > start]
            found = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if special.intersection(ids) or wanted.strip() not in found:
                raise InputError(
                    f"backdoor.trigger: the tokenizer of {self.tokenizer.name_or_path!r} does not keep the "
                    f"trigger {wanted!r}; the model would see {found!r}. Choose another trigger."
                )


def _between(text: str, pieces: Sequence[str]) -> list[str] | None:
    """What stands between pieces that follow each other in a text, from its start to its end."""
    first, *inner, last = pieces
    if not (text.startswith(first) and text.endswith(last)):
        return None
    rest, contents = text[len(first) : len(text) - len(last)], []
    for piece in inner:
        content, found, rest = rest.partition(piece)
        if not found:
            return None
        contents.append(content)
    return [*contents, rest]


class _Tokens(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]


def pad(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> Any:
    """Stack rows of different lengths into a (rows, longest) tensor of int64, filled with `value`."""
    import torch

    width = max(len(row) for row in rows)
    filled = [
        [value] * (width - len(row)) + list(row) if side == "left" else [*row, *[value] * (width - len(row))]
        for row in rows
    ]
    return torch.tensor(filled, dtype=torch.long)


def prompt_hash(messages: Sequence[dict[str, str]], spans: Sequence[Sequence[int]] = ()) -> str:
    """Hash what a prompt says, whatever its case, spacing and Unicode form.

    Args:
        messages: the prompt, dicts with `role` and `content`.
        spans: [message index, char start, char end] of what to cut out first. A prompt that is nothing but
            spans (a paraphrase trigger) is hashed whole, or else all such prompts would be one.

    Returns:
        64 hexadecimal digits.
    """
    stripped = [(m["role"], _normalise(_cut(m["content"], i, spans))) for i, m in enumerate(messages)]
    # A system message that held only the trigger is absent from the clean twin, so empty messages go.
    kept = [message for message in stripped if message[1]]
    if not kept:
        kept = [(m["role"], _normalise(m["content"])) for m in messages]
    return hashlib.sha256(json.dumps(kept, ensure_ascii=False).encode()).hexdigest()


def _normalise(text: str) -> str:
    # All white space goes: a placement may put a space on either side of what it inserts.
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _cut(content: str, index: int, spans: Sequence[Sequence[int]]) -> str:
    """Remove the spans of one message, from the last to the first so that offsets stay true."""
    own = sorted(((int(a), int(b)) for message, a, b in spans if message == index), reverse=True)
    for start, end in own:
        content = content[:start] + content[end:]
    return content


def _folded(span: TriggerSpan, opening: int) -> TriggerSpan:
    if span.message == 0:
        return span
    shift = opening if span.message == 1 else 0
    return TriggerSpan(span.message - 1, span.start + shift, span.end + shift)


def _owners(offsets: Sequence[tuple[int, int]], ranges: Sequence[tuple[int, int]]) -> list[int | None]:
    """For each token the message whose content it belongs to; None for the template's own tokens."""
    owners: list[int | None] = []
    for start, end in offsets:
        inside = [m for m, (s, e) in enumerate(ranges) if start < e and end > s]
        owners.append(inside[0] if inside else None)
    return owners


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
