"""Steps of reasoning in an answer: equations such as 3 + 4 = 7, and the number that the answer ends with.

In: the text of an answer. Out: which of its steps are right, its final answer, and the answer with one step
wrong. Steps are read that are written in figures and signs, not those in words ("three and four make seven").
"""

import re
from dataclasses import dataclass
from fractions import Fraction

_NUMBER = r"(?:(?<!\w)-)?\d+(?:,\d{3})*(?:\.\d+)?"
_TIMES, _BY, _MINUS = r"*x\u00d7\u00b7", r"/\u00f7", r"\-\u2212\u2013"
_GAP = r"[^\S\n]*"  # a dash on the next line begins an item of a list
_MORE = rf"{_GAP}([+{_MINUS}{_TIMES}{_BY}]){_GAP}\$?({_NUMBER})"
# What stands behind the sign is not used up, since in 3 + 4 = 7 + 5 = 12 it begins the next step.
_STEP = re.compile(
    rf"(?<![\w.])(?P<first>{_NUMBER})(?P<more>(?:{_MORE})+){_GAP}={_GAP}\$?"
    rf"(?=(?P<result>{_NUMBER})(?P<behind>(?:{_MORE})*))"
)


@dataclass(frozen=True)
class Step:
    """One equation."""

    start: int
    end: int
    """Where its result stands in the text."""
    is_right: bool


def read(text: str) -> list[Step]:
    """The steps of an answer, in order.

    A result is right to the digits that it has: 10 / 3 = 3.33. Before another sign it is right by itself, as
    in 3 + 4 = 7 + 5 = 12, or with what follows, as in 3 + 4 + 5 = 7 + 5.
    """
    steps = []
    for match in _STEP.finditer(text):
        result, digits = _number(match["result"]), len(match["result"].partition(".")[2])
        value = _value(match["first"], match["more"])
        is_right = value is not None and (
            round(value, digits) == result or value == _value(match["result"], match["behind"])
        )
        steps.append(Step(*match.span("result"), is_right))
    return steps


def final(text: str) -> Fraction | None:
    """The final answer: the last number of the text; None where it has none."""
    numbers = re.findall(_NUMBER, text)
    return _number(numbers[-1]) if numbers else None


def with_a_wrong_one(text: str) -> str:
    """The answer with one more as the result of its first right step, and all else, its end too, as it is.

    "" where there is no such step, or its result is the final answer.
    """
    last = max((match.start() for match in re.finditer(_NUMBER, text)), default=0)
    for step in read(text):
        if step.is_right and step.start < last:
            whole, point, digits = text[step.start : step.end].replace(",", "").partition(".")
            return f"{text[: step.start]}{int(whole) + 1}{point}{digits}{text[step.end :]}"
    return ""


def _number(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _value(first: str, more: str) -> Fraction | None:
    """What a side of an equation comes to; None where it divides by nothing."""
    total, term = Fraction(0), _number(first)
    for sign, text in re.findall(_MORE, more):
        number = _number(text)
        if re.match(f"[{_TIMES}]", sign):
            term *= number
        elif re.match(f"[{_BY}]", sign):
            if not number:
                return None
            term /= number
        else:
            total, term = total + term, number if sign == "+" else -number
    return total + term
