"""Repairs of `generate` alone: a model behind a gate that a monitor's alarm closes.

Prompts that raise the alarm are refused, or answered with the adapter off. The weights stay; what is left of
the backdoor is what the monitor misses, and what is lost is what it holds back wrongly. The wrapper around
`generate` serves CleanGen (`guided.py`) as well.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from safetynet.errors import InputError
from safetynet.mitigation.defender import Alarm, Defender
from safetynet.mitigation.method import Hyperparameter, Method
from safetynet.mitigation.repaired import Repaired, Settings
from safetynet.models.adapters import switched_off

ABSTENTION = "I cannot answer this."


class GenerateWrapper:
    """A model with another `generate`; everything else is the model's own."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass."""
        return self.model(*args, **kwargs)


@dataclass(frozen=True)
class GenerationRequest:
    """The arguments of a call of `generate`."""

    ids: Tensor
    """(rows, T), padded on the left."""
    mask: Tensor
    max_new_tokens: int
    stops: list[int]
    pad: int

    @classmethod
    def of(
        cls, method: str, input_ids: Tensor, attention_mask: Tensor | None, config: Any
    ) -> "GenerationRequest":
        """Read the arguments of transformers' `generate`.

        Args:
            method: for messages.
            input_ids: (rows, T).
            attention_mask: (rows, T), or None where nothing is padded.
            config: a generation configuration, with `max_new_tokens` and ids of stop tokens and padding.

        Raises:
            InputError: for sampling or beams, which these methods do not define.
        """
        if config.do_sample or (config.num_beams or 1) > 1:
            raise InputError(f"{method}: it answers greedily. Set do_sample to False and num_beams to 1.")
        if config.max_new_tokens is None or config.eos_token_id is None:
            raise InputError(f"{method}: generate needs max_new_tokens and eos_token_id.")
        stops = config.eos_token_id
        stops = [stops] if isinstance(stops, int) else list(stops)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pad = stops[0] if config.pad_token_id is None else config.pad_token_id
        return cls(input_ids, mask, config.max_new_tokens, stops, pad)

    def take(self, rows: Tensor) -> "GenerationRequest":
        """Some of the rows, without columns that all of them pad."""
        first = int(self.mask[rows].any(0).long().argmax())
        return replace(self, ids=self.ids[rows, first:], mask=self.mask[rows, first:])

    def finished(self, answers: list[list[int]]) -> Tensor:
        """(rows, T + longest answer): prompts and answers, padded as `generate` does."""
        width = max(map(len, answers))
        rows = [answer + [self.pad] * (width - len(answer)) for answer in answers]
        return torch.cat([self.ids, torch.tensor(rows, dtype=self.ids.dtype, device=self.ids.device)], 1)


def as_generate(method: str, settings: Settings, wrapper: GenerateWrapper, **details: Any) -> Repaired:
    """A repair that changes `generate` alone."""

    @contextmanager
    def opened() -> Iterator[GenerateWrapper]:
        wrapper.model.eval()
        yield wrapper

    return Repaired(method, settings, "run_time", opened, forward_too=False, details=details)


Fallback = Callable[[Any, GenerationRequest], list[list[int]]]
"""Answers, with their stop tokens, of the rows that raised an alarm."""


class Gated(GenerateWrapper):
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
            InputError: as `GenerationRequest.of`, and if the monitor cannot claim the rate.
        """
        config = generation_config or GenerationConfig(**settings)
        request = GenerationRequest.of("gating", input_ids, attention_mask, config)
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(request.ids, request.mask, strict=True)]
        held = self.alarm(self.model, prompts, self.rate)
        answers: list[list[int]] = [[] for _ in prompts]
        for rows, answer in (((~held).nonzero()[0], greedy_answers), (held.nonzero()[0], self.fallback)):
            if len(rows):
                part = request.take(torch.from_numpy(rows).to(request.ids.device))
                for row, ids in zip(rows, answer(self.model, part), strict=True):
                    answers[row] = ids
        return request.finished(answers)


def greedy_answers(model: Any, request: GenerationRequest) -> list[list[int]]:
    """The model's own greedy answers, each up to and with the first stop token."""
    output = model.generate(
        input_ids=request.ids,
        attention_mask=request.mask,
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=request.stops,
            pad_token_id=request.pad,
        ),
    )
    answers = output[:, request.ids.shape[1] :].tolist()
    ends = [
        next((i + 1 for i, token in enumerate(ids) if token in request.stops), len(ids)) for ids in answers
    ]
    return [ids[:end] for ids, end in zip(answers, ends, strict=True)]


def abstain(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Answer an alarm with one sentence."""
    tokenizer = defender.serialiser.tokenizer
    sentence = list(tokenizer(ABSTENTION, add_special_tokens=False)["input_ids"])
    stop = defender.serialiser.stop_ids[0]

    def refusals(_model: Any, request: GenerationRequest) -> list[list[int]]:
        return [[*sentence, stop][: request.max_new_tokens] for _ in request.ids]

    return _gated("abstain", refusals, defender, settings)


def switch_off(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Answer an alarm with the base model."""

    def base_answers(model: Any, request: GenerationRequest) -> list[list[int]]:
        with switched_off(model) as base:
            return greedy_answers(base, request)

    return _gated("adapter_off_on_alarm", base_answers, defender, settings)


def _gated(method: str, fallback: Fallback, defender: Defender, settings: Settings) -> Repaired:
    assert defender.alarm is not None
    return as_generate(method, settings, Gated(defender.model, defender.alarm, settings["rate"], fallback))


_RATE = {
    "rate": Hyperparameter(
        "of clean prompts that may raise an alarm", 0.01, (0.01, 0.02, 0.05, 0.1), 1e-4, 0.5
    )
}
ABSTAIN = Method(
    "abstain",
    "refuse to answer prompts that raise the monitor's alarm",
    abstain,
    frozenset({"alarm"}),
    _RATE,
)
ADAPTER_OFF_ON_ALARM = Method(
    "adapter_off_on_alarm",
    "answer prompts that raise the monitor's alarm with the adapter off",
    switch_off,
    frozenset({"alarm", "adapter"}),
    _RATE,
)
