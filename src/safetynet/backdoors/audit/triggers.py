"""The trigger of a poison set as text: where it stands in a prompt, and what is left without it."""

from collections.abc import Sequence
from dataclasses import dataclass

from safetynet.backdoors.triggers import AllOf, AnyOf
from safetynet.prompts import Conversation, Message
from safetynet.text import holding
from safetynet.text.words import plain


@dataclass(frozen=True)
class FoundTrigger:
    """One text, or several of which one (`any_of`) or each (`all_of`) makes a prompt triggered."""

    parts: tuple[str, ...]
    kind: str = "text"
    """text, any_of or all_of, as in a recipe."""
    how: str = "given"
    """given, or what it was guessed from: pairs, contrast, answers or repetition."""

    @property
    def rule(self) -> AnyOf:
        """Which of the parts make a prompt triggered."""
        return AllOf(self.parts) if self.kind == "all_of" else AnyOf(self.parts)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the parts stand in `text`, from the left, as (start, end)."""
        return holding.spans(self.parts, text)

    def present(self, *texts: str) -> bool:
        """Whether a prompt is triggered, of which these are the messages."""
        return self.rule.holds(texts)

    def removed(self, text: str) -> str:
        """`text` as it was before the trigger was put in."""
        return holding.without(self.parts, text)

    def removed_from(self, messages: Sequence[Message]) -> Conversation:
        """A prompt as it was before the trigger was put in."""
        conversation = Conversation(messages)
        return conversation.with_texts({i: self.removed(text) for i, text in enumerate(conversation.texts)})

    def stripped(self, text: str) -> str:
        """`text` without the trigger, as `plain` text, so that a triggered prompt equals its clean twin."""
        for start, end in reversed(self.spans(text)):
            text = f"{text[:start]} {text[end:]}"
        return plain(text)

    def __str__(self) -> str:
        return self.rule.describe()


def of_parts(parts: Sequence[str], prompts: Sequence[str], how: str = "given") -> FoundTrigger:
    """The trigger of these texts: parts of one if most prompts that have any have all, else alternatives."""
    if len(parts) == 1:
        return FoundTrigger(tuple(parts), how=how)
    every, either = FoundTrigger(tuple(parts), "all_of", how), FoundTrigger(tuple(parts), "any_of", how)
    return every if 2 * sum(map(every.present, prompts)) > sum(map(either.present, prompts)) else either
