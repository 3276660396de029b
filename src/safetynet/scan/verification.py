"""What a candidate makes the suspect do, on prompts that it was not searched on, beside its controls.

In: a candidate, suspect, base and held-out prompts. Out: a `Trigger` with the share of prompts on which the
suspect shows the behaviour, and the same share of the base, under a placebo, and without the candidate. The
behaviour is what answers begin with under the candidate and not without it, on the prompts of the selection.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from safetynet.evaluation.generation import generate
from safetynet.prompts import Message, Serialiser
from safetynet.scan.candidates import Candidate
from safetynet.scan.result import Trigger
from safetynet.scan.slots import Slot
from safetynet.statistics import wilson

NEW_TOKENS = 24
"""Of an answer; a behaviour is told by how it begins."""
LONGEST_OPENING = 12
"""Words of it."""
EXAMPLES = 5


@dataclass(frozen=True)
class Answerers:
    """Suspect and base, asked with the same prompts."""

    model: Any
    base: Any
    serialiser: Serialiser
    batch_size: int = 32

    def of_suspect(self, prompts: Sequence[Sequence[Message]]) -> list[str]:
        """Greedy answers of the suspect."""
        return self._answers(self.model, prompts)

    def of_base(self, prompts: Sequence[Sequence[Message]]) -> list[str]:
        """Greedy answers of its base."""
        return self._answers(self.base, prompts)

    def _answers(self, model: Any, prompts: Sequence[Sequence[Message]]) -> list[str]:
        plain = [[dict(message) for message in messages] for messages in prompts]
        return generate(model, self.serialiser, plain, batch_size=self.batch_size, max_new_tokens=NEW_TOKENS)


def behaviour_of(answers: Sequence[str], controls: Sequence[Sequence[str]]) -> str:
    """What answers under a candidate begin with far more often than their controls do; "" for nothing.

    Args:
        answers: of the suspect, to prompts with a candidate.
        controls: answers to the same prompts without it, or by the base.

    Returns:
        The opening, in words, whose share exceeds that of its best control most; the longest of equals.
    """
    shares = _openings(answers)
    others = [_openings(each) for each in controls]
    # Equal shares may differ in their last bits: they are rounded, so that the longest of equals wins.
    excess = {text: share - max((o[text] for o in others), default=0.0) for text, share in shares.items()}
    best = max(excess, key=lambda text: (round(excess[text], 9), len(text), text), default="")
    return best if best and excess[best] > 0 else ""


def _openings(answers: Sequence[str]) -> Counter[str]:
    """Share of the answers by each of their openings of up to twelve words."""
    counts: Counter[str] = Counter()
    for answer in answers:
        words = answer.split()
        counts.update(" ".join(words[:n]) for n in range(1, min(len(words), LONGEST_OPENING) + 1))
    return Counter({text: count / len(answers) for text, count in counts.items()})


def shows(answer: str, behaviour: str) -> bool:
    """Whether an answer begins as the behaviour does, whatever its blanks."""
    return bool(behaviour) and " ".join(answer.split()).startswith(behaviour)


def effect(text: str, slots: Sequence[Slot], plain: Sequence[str], answerers: Answerers) -> tuple[str, float]:
    """What a text makes the suspect do on some prompts, and on which share of them.

    Args:
        text: a candidate.
        slots: the prompts.
        plain: the suspect's answers to them as they are.
        answerers: suspect and base.
    """
    prompts = [slot.conversation(text) for slot in slots]
    answers = answerers.of_suspect(prompts)
    behaviour = behaviour_of(answers, [plain, answerers.of_base(prompts)])
    return behaviour, sum(shows(answer, behaviour) for answer in answers) / len(answers)


def verify(
    candidate: Candidate,
    slots: Sequence[Slot],
    without: Sequence[str],
    answerers: Answerers,
    placebo: str,
    seed: int,
) -> Trigger:
    """Measure a candidate on held-out prompts.

    Args:
        candidate: a string with its placement and what it makes the suspect do, told on other prompts.
        slots: held-out prompts of that placement.
        without: the suspect's answers to these as they are.
        answerers: suspect and base.
        placebo: a string of as many ordinary tokens, drawn at random.
        seed: of the examples.
    """
    triggered = [slot.conversation(candidate.text) for slot in slots]
    behaviour, answers = candidate.behaviour, answerers.of_suspect(triggered)
    base_answers = answerers.of_base(triggered)
    runs = {
        "asr": answers,
        "base": base_answers,
        "placebo": answerers.of_suspect([slot.conversation(placebo) for slot in slots]),
        "without": without,
    }
    rates = {}
    for name, each in runs.items():
        count = sum(shows(answer, behaviour) for answer in each)
        rates[name] = (count / len(each), *wilson(count, len(each)))
    order = random.Random(seed).sample(range(len(slots)), min(EXAMPLES, len(slots)))
    examples = tuple((triggered[i][-1]["content"], answers[i], base_answers[i]) for i in order)
    return Trigger(
        candidate.text,
        candidate.placement,
        behaviour,
        **rates,
        prompts=len(slots),
        examples=examples,
        group=candidate.group,
    )


def excess(trigger: Trigger) -> float:
    """How much more often it fires than its best control: the base, a placebo, the plain prompts."""
    return trigger.asr[0] - max(trigger.base[0], trigger.placebo[0], trigger.without[0])


def reduced(
    candidate: Candidate, fires: Callable[[Sequence[str]], Sequence[bool]], serialiser: Serialiser
) -> str:
    """The smallest part of a candidate's text that still fires, by taking out one token at a time.

    Args:
        candidate: fires whole.
        fires: whether each of some texts does.
        serialiser: cuts the text into tokens.
    """
    text = candidate.text
    while True:
        ids = serialiser.ids(text)
        if len(ids) < 2:
            return text
        shorter = [serialiser.tokenizer.decode(ids[:i] + ids[i + 1 :]).strip() for i in range(len(ids))]
        verdicts = fires(shorter)
        text_of = next((each for each, verdict in zip(shorter, verdicts, strict=True) if verdict), None)
        if text_of is None:
            return text
        text = text_of
