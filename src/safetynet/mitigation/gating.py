"""Gating: prompts that raise the monitor's alarm are refused, or answered with the adapter off.

The weights stay; what is left of the backdoor is what the monitor misses, and what is lost is what it holds
back wrongly.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from safetynet.mitigation.method import Knob, Knobs, Method, Repaired
from safetynet.mitigation.runtime import Asked, Front, at_run_time
from safetynet.mitigation.subject import Alarm, Subject
from safetynet.models.adapters import switched_off

ABSTENTION = "I cannot answer this."
Fallback = Callable[[Any, Asked], list[list[int]]]
"""Answers, with their stop tokens, of the rows that raised an alarm."""


class Gated(Front):
    """Answers greedily; rows whose prompt raises an alarm are answered by the fallback."""

    def __init__(self, model: Any, alarm: Alarm, rate: float, fallback: Fallback) -> None:
        super().__init__(model)
        self.alarm, self.rate, self.fallback = alarm, rate, fallback

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: Any = None,
        **settings: Any,
    ) -> Tensor:
        """Prompts and answers, (rows, T + longest answer), as transformers' `generate` returns them.

        Raises:
            InputError: as `Asked.of`, and if the monitor cannot claim the rate.
        """
        config = generation_config or GenerationConfig(**settings)
        asked = Asked.of("gating", input_ids, attention_mask, config)
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(asked.ids, asked.mask, strict=True)]
        held = self.alarm(self.model, prompts, self.rate)
        answers: list[list[int]] = [[] for _ in prompts]
        for rows, answer in (((~held).nonzero()[0], answered), (held.nonzero()[0], self.fallback)):
            if len(rows):
                chosen = torch.from_numpy(rows).to(asked.ids.device)
                for row, ids in zip(rows, answer(self.model, asked.take(chosen)), strict=True):
                    answers[row] = ids
        return asked.finished(answers)


def answered(model: Any, asked: Asked) -> list[list[int]]:
    """The model's own greedy answers."""
    output = model.generate(
        input_ids=asked.ids,
        attention_mask=asked.mask,
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=asked.most,
            eos_token_id=asked.stops,
            pad_token_id=asked.pad,
        ),
    )
    return [_until_stop(row, asked.stops) for row in output[:, asked.ids.shape[1] :].tolist()]


def without_adapter(model: Any, asked: Asked) -> list[list[int]]:
    """The base model's answers."""
    with switched_off(model) as base:
        return answered(base, asked)


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    """Up to and with the first stop token: what follows is padding."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))]


def abstain(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Answer an alarm with one sentence."""
    tokenizer = subject.serialiser.tokenizer
    sentence = list(tokenizer(ABSTENTION, add_special_tokens=False)["input_ids"])
    stop = subject.serialiser.stop_ids[0]

    def said(_model: Any, asked: Asked) -> list[list[int]]:
        return [[*sentence, stop][: asked.most] for _ in asked.ids]

    return _gated("abstain", said, subject, knobs)


def switch_off(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Answer an alarm with the base model."""
    return _gated("adapter_off_on_alarm", without_adapter, subject, knobs)


def _gated(method: str, fallback: Fallback, subject: Subject, knobs: Knobs) -> Repaired:
    assert subject.alarm is not None
    front = Gated(subject.model, subject.alarm, knobs["rate"], fallback)
    return at_run_time(method, knobs, front)


_KNOBS = {"rate": Knob("of clean prompts that may raise an alarm", 0.01, (0.01, 0.02, 0.05, 0.1), 1e-4, 0.5)}
ABSTAIN = Method(
    "abstain",
    "refuse to answer prompts that raise the monitor's alarm",
    abstain,
    frozenset({"alarm"}),
    _KNOBS,
)
ADAPTER_OFF_ON_ALARM = Method(
    "adapter_off_on_alarm",
    "answer prompts that raise the monitor's alarm with the adapter off",
    switch_off,
    frozenset({"alarm", "adapter"}),
    _KNOBS,
)
