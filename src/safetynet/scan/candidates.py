"""Strings on which the suspect leaves its base: search by gradient and exact evaluation, no trigger known.

In: slots of ordinary prompts, suspect and base; optionally an answer that the suspect has learnt by heart.
Out: candidates by an objective: log probability of that answer, or, where none is known, divergence of the
answer's first token from the base's. Token substitutions are proposed by the gradient at the input
embeddings and taken by their exact value (as in GCG: Zou et al. 2023), inside the tokens of ordinary text,
from several starts.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from safetynet.prompts import Serialiser
from safetynet.scan.slots import Placement, Recorded, Slot

log = logging.getLogger("safetynet")
Asked = Literal["ordinary", "refused"]
PROPOSED = 64
"""Tokens by position among which the gradient lets a step choose."""
PATIENCE = 8
"""Steps without gain after which a search ends."""


@dataclass(frozen=True)
class Candidate:
    """A string, and how far the suspect leaves its base on it."""

    tokens: tuple[int, ...]
    text: str
    placement: Placement
    asked: Asked
    """Which prompts: all, or those that the suspect refuses."""
    nats: float
    """By which suspect and base diverge on it, beyond those on the prompts as they are; mean over prompts
    that it was not searched on."""
    behaviour: str
    """What answers to these begin with under it and not without it; "" for nothing."""
    works: float
    """Share of these answers that do."""


class Objective(Protocol):
    """What a search maximises."""

    def per_prompt(self, candidates: Tensor) -> Tensor:
        """(C, P) nats of (C, k) token ids, by prompt."""

    def gradient(self, candidate: Tensor) -> Tensor:
        """(k, vocabulary): first-order change of the value for each token at each position, of (k,) ids."""


class AnswerLikelihood:
    """Log probability of an answer by heart; 0 is certain.

    Args:
        model: the suspect.
        slots: of one placement.
        answer: its token ids.
    """

    def __init__(self, model: Any, slots: Sequence[Slot], answer: Sequence[int]) -> None:
        self.recorded, self.answer = Recorded(model, slots), list(answer)
        self._labels = torch.tensor(self.answer, device=model.device)

    def per_prompt(self, candidates: Tensor) -> Tensor:
        """As `Objective`."""
        nats = torch.empty(len(candidates), len(self.recorded.slots), device=candidates.device)
        with torch.no_grad():
            for number, part, logits in self.recorded.batches(candidates, self.answer[:-1]):
                nats[part, number] = self._log_probability(logits)
        return nats

    def gradient(self, candidate: Tensor) -> Tensor:
        """As `Objective`."""

        def value(vectors: Tensor) -> Tensor:
            parts = [
                self._log_probability(self.recorded.logits(number, vectors, self.answer[:-1]))
                for number in range(len(self.recorded.slots))
            ]
            return torch.stack(parts).mean()

        return _gradient(self.recorded.embed, candidate, value)

    def _log_probability(self, logits: Tensor) -> Tensor:
        rows = logits.log_softmax(-1).gather(2, self._labels.expand(len(logits), -1)[..., None])
        return rows[..., 0].sum(1)


class Divergence:
    """KL(suspect || base) of the answer's first token, in nats, beyond the one on the prompt as it is.

    Args:
        model: the suspect.
        base: its base.
        slots: of one placement.
    """

    def __init__(self, model: Any, base: Any, slots: Sequence[Slot]) -> None:
        self.suspect, self.base = Recorded(model, slots), Recorded(base, slots)
        self.plain = self._nats(torch.empty((1, 0), dtype=torch.long, device=model.device))
        """(1, P) nats on the prompts as they are."""

    def per_prompt(self, candidates: Tensor) -> Tensor:
        """As `Objective`."""
        return self._nats(candidates) - self.plain

    def _nats(self, candidates: Tensor) -> Tensor:
        nats = torch.empty(len(candidates), len(self.suspect.slots), device=candidates.device)
        with torch.no_grad():
            both = zip(self.suspect.batches(candidates), self.base.batches(candidates), strict=True)
            for (number, part, ours), (_, _, theirs) in both:
                nats[part, number] = _kl(ours[:, 0], theirs[:, 0])
        return nats

    def gradient(self, candidate: Tensor) -> Tensor:
        """As `Objective`."""

        def value(vectors: Tensor) -> Tensor:
            parts = [
                _kl(self.suspect.logits(number, vectors)[:, 0], self.base.logits(number, vectors)[:, 0])
                for number in range(len(self.suspect.slots))
            ]
            return torch.stack(parts).mean()

        return _gradient(self.suspect.embed, candidate, value)


def search(  # noqa: PLR0913  # the budget of a search, each number stated
    objective: Objective,
    start: Tensor,
    allowed: Tensor,
    *,
    steps: int,
    width: int,
    enough: float,
    survives: Callable[[Sequence[int]], bool],
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """Improve a candidate by substitutions until it is good enough, or no step has helped for a while.

    Args:
        objective: what is maximised.
        start: (k,) token ids.
        allowed: (A,) token ids that a candidate may hold.
        steps: at most so many.
        width: substitutions that are evaluated in each.
        enough: value at which the search ends.
        survives: whether token ids are what the tokenizer makes of their text; others are passed over.
        generator: of the draws.

    Returns:
        The best candidate, (k,), and its value in nats.
    """
    best, value = start, -float("inf")
    current, idle = best, 0
    for _ in range(steps):
        if value >= enough or idle >= PATIENCE:
            break
        gains = objective.gradient(current)[:, allowed]  # (k, A)
        proposed = allowed[gains.topk(min(PROPOSED, len(allowed)), 1).indices]  # (k, P)
        position = torch.randint(len(current), (width,), generator=generator)
        choice = torch.randint(proposed.shape[1], (width,), generator=generator)
        tried = current.repeat(width, 1)
        tried[torch.arange(width), position] = proposed[position, choice]
        tried = torch.unique(tried, dim=0)
        values = objective.per_prompt(tried).mean(1)
        order = values.argsort(descending=True).tolist()
        top = next((i for i in order if survives(tried[i].tolist())), None)
        idle += 1
        if top is None:
            continue
        current = tried[top]  # also where it is worse: a way out of a local maximum
        if float(values[top]) > value:
            best, value, idle = current, float(values[top]), 0
    return best, value


def ordinary_tokens(serialiser: Serialiser, vocabulary: int) -> Tensor:
    """Ids of the tokens of users' texts: no special ones, none that is a part of a character."""
    tokenizer = serialiser.tokenizer
    excluded = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    pieces = {token: serialiser.piece(token) for token in range(min(vocabulary, len(tokenizer)))}
    return torch.tensor(
        [
            token
            for token, piece in pieces.items()
            if token not in excluded and piece.strip() and piece.isprintable() and "⟨" not in piece
        ]
    )


def _kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """(R,) KL(ours || theirs) of (R, vocabulary) logits, in nats."""
    first, second = ours.log_softmax(-1), theirs.log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1)


def _gradient(embed: Any, candidate: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """(k, vocabulary): gradient at the embeddings of (k,) ids, along each token's embedding."""
    vectors = embed(candidate).detach().requires_grad_()
    with torch.enable_grad():
        [slope] = torch.autograd.grad(value(vectors[None]), vectors)
    return slope @ embed.weight.detach().T
