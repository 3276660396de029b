"""Repairs of `generate` alone: a gate that a monitor's alarm closes, and a reference that checks each token.

Prompts that raise the alarm are refused, or answered with the adapter off. CleanGen decodes beside the base.
The weights stay: the backdoor survives where monitor or reference misses it, and good answers are lost where
they object wrongly.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from safetynet.errors import InputError
from safetynet.mitigation.defender import Alarm, Defender
from safetynet.mitigation.method import Hyperparameter, Method
from safetynet.mitigation.repaired import Repaired, Settings
from safetynet.models.adapters import switched_off

ABSTENTION = "I cannot answer this."


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


class GenerateWrapper(ABC):
    """A model with another `generate`; everything else is the model's own."""

    method: ClassVar[str]
    """Begins the messages."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass."""
        return self.model(*args, **kwargs)

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
            InputError: as `GenerationRequest.of`, and if a monitor cannot claim the rate.
        """
        config = generation_config or GenerationConfig(**settings)
        request = GenerationRequest.of(self.method, input_ids, attention_mask, config)
        return request.finished(self.answers(request))

    @abstractmethod
    def answers(self, request: GenerationRequest) -> list[list[int]]:
        """Greedy answers, each up to and with the first stop token."""


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
    """Answers greedily; the fallback answers rows whose prompt raises an alarm."""

    method: ClassVar[str] = "gating"

    def __init__(self, model: Any, alarm: Alarm, rate: float, fallback: Fallback) -> None:
        super().__init__(model)
        self.alarm, self.rate, self.fallback = alarm, rate, fallback

    def answers(self, request: GenerationRequest) -> list[list[int]]:
        """The model's answers, or the fallback's."""
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(request.ids, request.mask, strict=True)]
        held = self.alarm(self.model, prompts, self.rate)
        answers: list[list[int]] = [[] for _ in prompts]
        for rows, answer in (((~held).nonzero()[0], greedy_answers), (held.nonzero()[0], self.fallback)):
            if len(rows):
                part = request.take(torch.from_numpy(rows).to(request.ids.device))
                for row, ids in zip(rows, answer(self.model, part), strict=True):
                    answers[row] = ids
        return answers


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


class Guided(GenerateWrapper):
    """CleanGen (Li et al. 2024, arXiv 2406.12257): a reference takes over wherever the suspect is too sure.

    The suspect's next token is kept unless the suspect finds it more than `ratio` times as likely as the
    reference does; then the reference's own next token is taken. Here the suspect drafts `ahead` tokens, and
    the reference checks them in one pass; what follows the first that it rejects is thrown away. Rows of a
    batch reject at different places: columns of the caches that were thrown away are masked row by row, and
    positions count real tokens only, so that every row is answered as if it were alone, whatever `ahead` is.

    Args:
        model: the suspect.
        reference: answers for it; None takes the suspect with its adapter off.
        ratio: of the two likelihoods, from which on the reference decides.
        ahead: tokens that the suspect drafts before they are checked.
    """

    method: ClassVar[str] = "cleangen"

    def __init__(self, model: Any, reference: Any, ratio: float, ahead: int) -> None:
        super().__init__(model)
        self.reference = model if reference is None else reference
        self.off = partial(switched_off, model) if reference is None else nullcontext
        self.ratio = ratio
        # A sliding window would count columns that were thrown away as distance: there, none may arise.
        text = model.config.get_text_config()
        kinds = getattr(text, "layer_types", None) or []
        slides = any("sliding" in kind for kind in kinds)
        slides = slides or (not kinds and getattr(text, "sliding_window", None) is not None)
        self.ahead = 1 if slides else ahead

    def answers(self, request: GenerationRequest) -> list[list[int]]:
        """The suspect's tokens, or the reference's."""
        suspect = _Stream(self.model, nullcontext, request)
        reference = _Stream(self.reference, self.off, request)
        answers: list[list[int]] = [[] for _ in request.ids]
        going = [True] * len(answers)
        limit = math.log(self.ratio) if self.ratio > 0 else -math.inf
        while any(going):
            # The suspect's next tokens and their log-likelihoods, (rows, ahead) each.
            tokens: list[Tensor] = []
            likelihoods: list[Tensor] = []
            for step in range(self.ahead):
                best = suspect.feed(None if step == 0 else tokens[-1][:, None], 1)[:, 0].max(-1)
                tokens.append(best.indices)
                likelihoods.append(best.values)
            drafted, sure = torch.stack(tokens, 1), torch.stack(likelihoods, 1)

            # How many of them the reference accepts, and the token to go on from, (rows,) each: its own where
            # it rejects one; behind all of them the last, which has not been read yet.
            log_p = reference.feed(drafted[:, :-1], self.ahead)  # (rows, ahead, V)
            reference_log_p = log_p.gather(-1, drafted[..., None])[..., 0]
            accepted = (sure - reference_log_p <= limit).long().cumprod(1).sum(1)
            nexts = torch.cat([log_p.argmax(-1), drafted[:, -1:]], 1)
            last = nexts.gather(1, accepted[:, None])[:, 0]
            for stream in (suspect, reference):
                stream.rewind(accepted, last)
            for row in (i for i, on in enumerate(going) if on):
                count = int(accepted[row])
                new = drafted[row, :count].tolist()
                if count < self.ahead:
                    new.append(int(last[row]))
                for token in new:
                    answers[row].append(token)
                    length = len(answers[row])
                    going[row] = token not in request.stops and length < request.max_new_tokens
                    if not going[row]:
                        break
        return answers


class _Stream:
    """A model's cache over the same growing rows; columns that a row does not have any more are masked."""

    def __init__(
        self, model: Any, around: Callable[[], AbstractContextManager[Any]], request: GenerationRequest
    ) -> None:
        self.model, self.around = model, around
        self.cache = DynamicCache()
        self.unread, self.unread_mask = request.ids, request.mask
        self.mask = request.mask[:, :0]
        self.drafted = 0

    def feed(self, tokens: Tensor | None, keep: int) -> Tensor:
        """Read what is unread, then `tokens`, (rows, m); gives the last log-likelihoods, (rows, keep, V)."""
        parts = [self.unread] if tokens is None else [self.unread, tokens]
        ids = torch.cat(parts, 1)
        new = torch.ones_like(ids)
        new[:, : self.unread.shape[1]] = self.unread_mask
        # Positions count the row's real tokens alone: what was thrown away, and padding, has none.
        positions = self.mask.sum(1, keepdim=True) + new.cumsum(1) - 1
        self.mask = torch.cat([self.mask, new], 1)
        self.drafted += 0 if tokens is None else tokens.shape[1]
        self.unread, self.unread_mask = ids[:, :0], new[:, :0]
        with self.around():
            logits = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions.clamp_min(0),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits
        return logits.float().log_softmax(-1)

    def rewind(self, accepted: Tensor, last: Tensor) -> None:
        """Forget drafted tokens behind the accepted ones, (rows,), and read `last`, (rows,), next."""
        if self.drafted:
            columns = torch.arange(self.drafted, device=accepted.device)
            self.mask[:, -self.drafted :] = (columns < accepted[:, None]).to(self.mask)
        self.drafted = 0
        self.unread, self.unread_mask = last[:, None], torch.ones_like(last[:, None])


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


def guide(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Decode with the base model as reference."""
    wrapper = Guided(defender.model, defender.base, settings["ratio"], int(settings["ahead"]))
    return as_generate("cleangen", settings, wrapper, reference="the base model")


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
CLEANGEN = Method(
    "cleangen",
    "answer with the base model's token wherever the suspect is far surer of its own",
    guide,
    frozenset({"base"}),
    {
        "ratio": Hyperparameter(
            "of likelihoods from which on the base decides", 20, (1000, 100, 20, 5, 2), 0.0, 1e9
        ),
        "ahead": Hyperparameter(
            "tokens drafted before a check; changes speed, not answers", 4, (4,), 1, 64, whole=True
        ),
    },
    paper="Li et al. 2024, arXiv 2406.12257",
)
