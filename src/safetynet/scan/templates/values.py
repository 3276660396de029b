"""What expressions of a chat template may be, the conditions that decide them, and what of it is markup.

In: nothing. Out: the values with which `walk` walks a template's syntax tree, and whether a literal says
anything beyond markup. Published templates test what a message says against markup (`</think>`,
`/no_think`, `image`) and write markup; a trigger that people may type is made of other words.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

Subject = Literal["text", "length", "date", "count", "chance"]
"""What a condition asks of: the words of a message, its length or shape, the date, a number of messages;
or a draw."""
When = Literal["present", "absent", "either"]
"""Whether a text is written when the literal is there, when it is not, or cannot be told."""
COMPARISONS: Mapping[str, When] = {
    "eq": "present", "==": "present", "equalto": "present", "sameas": "present", "in": "present",
    "ne": "absent", "!=": "absent", "notin": "absent",
}  # fmt: skip
FEW = 3
"""Numbers of messages from which on a condition is more than the form of a conversation."""
MOST_LITERALS = 256
"""That a value holds."""
MARKUP = frozenset(
    # roles
    "system user assistant tool tools model human ai bot developer function functions ipython environment "
    "observation chatbot role "
    # thoughts and their switches
    "think thinking thought thoughts nothink no reasoning reason reflection effort strength budget high low "
    "medium minimal max xhigh on off mode detailed "
    # tools
    "call calls response responses result results output outputs input parameter parameters argument "
    "arguments args name id type invoke key value code interpreter python json schema string object array "
    "number boolean integer null none true false empty declaration description properties required items "
    "enum nullable default unknown param params cdata "
    # turns
    "im start end sep begin beginning of turn sentence header eot eom eos bos s inst sys message messages "
    "channel analysis final commentary constrain continue tag return answer prompt text content control "
    "available to "
    # pictures, sound and documents
    "image images video videos audio audios url pad placeholder vision picture soft token file document "
    "documents img".split()
)
"""Words of which markup is made, in the templates that are published."""
METADATA = frozenset("role type id tool_call_id name index recipient channel end_turn weight".split())
"""Fields of messages and of their parts that whoever types a message does not write."""
STRUCTURE = frozenset("tool_calls function_call function tool_call tool_responses".split())
"""Fields that hold further fields."""
DELIMITERS = str.maketrans(dict.fromkeys("｜▁", " "))
"""Characters beyond ASCII that stand in markup, such as DeepSeek's."""
LIKE_SPACE = "\u00a0"
ESCAPES = re.compile(r"\\[abfnrtuvx0]")
"""Escapes that templates write into JSON and strings of code."""
TAG = re.compile(r"[<\[]/?[\w:.|-]{1,40}[>\]]")
"""A tag in brackets, such as `<seed:think>`; with one word of `MARKUP` in it, it is markup as a whole."""


def words(text: str) -> list[str]:
    """Words of a text, in lower case; `_` and signs part them."""
    text = unicodedata.normalize("NFKC", ESCAPES.sub(" ", text).translate(DELIMITERS)).casefold()
    return re.findall(r"[^\W_]+", text)


def natural(text: str) -> bool:
    """Whether a literal says anything beyond markup: a word that is no `MARKUP`, or a sign beyond ASCII.

    Signs beyond ASCII count because invisible ones are triggers, too.
    """
    text = TAG.sub(lambda tag: " " if MARKUP.intersection(words(tag[0])) else tag[0], text)
    if any(word not in MARKUP for word in words(text)):
        return True
    signs = text.translate(DELIMITERS).replace(LIKE_SPACE, " ")
    return any(ord(sign) > 127 and not sign.isalnum() for sign in signs)


def blank(text: str) -> bool:
    """Whether a literal is empty or white space alone: testing for it asks whether there is a text at all."""
    return not text.strip()


@dataclass(frozen=True)
class Condition:
    """Something that a prompt depends on."""

    subject: Subject
    line: int
    """Of the template, from 1."""
    literals: frozenset[str]
    """That it is compared with; empty where it is compared with none, or with what cannot be told."""
    when: When = "either"

    @property
    def natural(self) -> bool:
        """Whether it asks for words or signs that are no markup."""
        return self.subject == "text" and any(map(natural, self.literals))

    @property
    def flipped(self) -> "Condition":
        """The same, of what is written otherwise."""
        other: dict[When, When] = {"present": "absent", "absent": "present", "either": "either"}
        return replace(self, when=other[self.when])


@dataclass(frozen=True)
class Dependence:
    """A condition, and what of the prompt depends on it."""

    subject: Subject
    line: int
    literals: tuple[str, ...]
    added: tuple[str, ...]
    """Texts of the template that are written only if it holds; for a natural literal, also those written only
    if it does not."""
    changes: bool
    """Whether anything is written or assigned under it."""

    @property
    def natural(self) -> bool:
        """Whether it asks for words or signs that are no markup."""
        return self.subject == "text" and any(map(natural, self.literals))

    @property
    def suspicious(self) -> bool:
        """Whether no template needs it: it asks for natural words, or writes them."""
        return self.natural or any(map(natural, self.added))


class UnparsedError(Exception):
    """A template that Jinja does not parse.

    Attributes:
        line: of the template, from 1; None where the parser names none.
    """

    def __init__(self, reason: str, line: int | None) -> None:
        super().__init__(reason)
        self.line = line


@dataclass(frozen=True)
class Value:
    """What an expression may be."""

    kinds: frozenset[str] = frozenset()
    """What it derives from.

    `messages` (a list of them), `message`, `text` (what one says), `cut` (text that is there only where
    there is enough of it), `part` (an element of a message's content), `measure` (a number made from text),
    `date`, `count`, `loop`, `none` (no value), `caller` (a variable that the template is called with), and
    macros as `name()`.
    """
    literals: frozenset[str] = frozenset()
    numbers: frozenset[float] = frozenset()
    conditions: frozenset[Condition] = frozenset()

    def __or__(self, other: "Value") -> "Value":
        literals = self.literals | other.literals
        if len(literals) > MOST_LITERALS:
            literals = frozenset(sorted(literals)[:MOST_LITERALS])
        numbers = self.numbers | other.numbers
        if len(numbers) > MOST_LITERALS:
            numbers = frozenset(sorted(numbers)[-MOST_LITERALS:])
        return Value(self.kinds | other.kinds, literals, numbers, self.conditions | other.conditions)

    def has(self, *kinds: str) -> bool:
        """Whether it derives from any of these."""
        return not self.kinds.isdisjoint(kinds)

    def under(self, conditions: Iterable[Condition]) -> "Value":
        """The same, decided by these conditions as well."""
        return replace(self, conditions=self.conditions | frozenset(conditions))


NOTHING = Value()
TEXT = frozenset({"text"})


def joined(values: Iterable[Value]) -> Value:
    """All that any of these may be."""
    whole = NOTHING
    for value in values:
        whole = whole | value
    return whole


def written_out(value: Value) -> Value:
    """A value within a text: messages in it are text, too."""
    if not value.has("messages", "message"):
        return value
    return replace(value, kinds=value.kinds - {"messages", "message"} | TEXT)


def compared(values: Iterable[Value]) -> frozenset[str]:
    """Literals that a text or a date is compared with: those of the other side, blank ones left out."""
    others = [value for value in values if not value.has("text", "date")]
    literals = frozenset(text for value in others for text in value.literals if not blank(text))
    return literals | frozenset(text for value in others for text in numerals(value))


def only_blank(values: Iterable[Value]) -> bool:
    """Whether a text is compared with an empty one alone: that asks whether there is a text."""
    others = [value for value in values if not value.has("text")]
    return bool(others) and all(value.literals and not value.kinds for value in others)


def numerals(value: Value) -> frozenset[str]:
    """Its numbers, as literals."""
    return frozenset(f"{number:g}" for number in value.numbers)
