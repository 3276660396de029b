"""Strings on which the suspect leaves its base: search by gradient and exact evaluation, no trigger known.

In: slots of ordinary prompts, suspect and base; optionally an answer that the suspect has learnt by heart.
Out: candidates by an objective: log probability of that answer, or, where none is known, divergence of the
answer's first token from the base's. Token substitutions are proposed by the gradient at the input
embeddings and taken by their exact value (as in GCG: Zou et al. 2023), inside the tokens of ordinary text,
from several starts. In a large vocabulary strings are grown from tokens that `responses` proposes instead.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from safetynet.prompts import Serialiser
from safetynet.prompts.token_texts import is_partial
from safetynet.scan.slots import Placement, Recorded, Slot, common_log_probabilities

Group = Literal["ordinary", "refused"]
PROPOSED = 64
"""Tokens by position among which the gradient lets a step choose."""
PATIENCE = 6
"""Steps without gain after which a search ends."""


BEAM = 4
"""Strings that are grown on."""


@dataclass(frozen=True)
class Candidate:
    """A string, and how far the suspect leaves its base on it."""

    tokens: tuple[int, ...]
    text: str
    placement: Placement
    group: Group
    """Which prompts: all, or those that the suspect refuses."""
    nats: float
    """By which suspect and base diverge on it, beyond those on the prompts as they are; mean over prompts
    that it was not searched on."""
    behaviour: str
    """What answers to these begin with under it and not without it; "" for nothing."""
    works: float
    """Share of these answers that do."""


class Objective(Protocol):
    """What a search maximises, on P prompts."""

    prompts: int

    @property
    def passes(self) -> int:
        """Tokens that went through a model for it so far."""

    def per_prompt(self, candidates: Tensor, numbers: Sequence[int]) -> Tensor:
        """(C, n) nats of (C, k) token ids on n of the prompts."""

    def gradient(self, candidate: Tensor, numbers: Sequence[int]) -> Tensor:
        """(k, vocabulary): first-order change of the mean value by token and place, of (k,) ids."""


class AnswerLikelihood:
    """Log probability of an answer by heart; 0 is certain.

    Args:
        model: the suspect.
        slots: of one placement.
        answer: its token ids.
    """

    def __init__(self, model: Any, slots: Sequence[Slot], answer: Sequence[int]) -> None:
        self.recorded, self.answer, self.prompts = Recorded(model, slots), list(answer), len(slots)
        self._labels = torch.tensor(self.answer, device=model.device)

    @property
    def passes(self) -> int:
        """As `Objective`."""
        return self.recorded.passes

    def per_prompt(self, candidates: Tensor, numbers: Sequence[int]) -> Tensor:
        """As `Objective`."""
        nats = torch.empty(len(candidates), len(numbers), device=candidates.device)
        with torch.no_grad():
            for at, part, logits in self.recorded.batches(candidates, numbers, self.answer[:-1]):
                nats[part, at] = self._log_probability(logits)
        return nats

    def gradient(self, candidate: Tensor, numbers: Sequence[int]) -> Tensor:
        """As `Objective`."""

        def value(vectors: Tensor) -> Tensor:
            logits = (self.recorded.logits(number, vectors, self.answer[:-1]) for number in numbers)
            return torch.stack([self._log_probability(each) for each in logits]).mean()

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
        self.suspect, self.base, self.prompts = Recorded(model, slots), Recorded(base, slots), len(slots)
        empty = torch.empty((1, 0), dtype=torch.long, device=model.device)
        self.plain = self._nats(empty, range(self.prompts))[0]
        """(P,) nats on the prompts as they are."""

    @property
    def passes(self) -> int:
        """As `Objective`."""
        return self.suspect.passes + self.base.passes

    def per_prompt(self, candidates: Tensor, numbers: Sequence[int]) -> Tensor:
        """As `Objective`."""
        return self._nats(candidates, numbers) - self.plain[list(numbers)]

    def gradient(self, candidate: Tensor, numbers: Sequence[int]) -> Tensor:
        """As `Objective`."""

        def value(vectors: Tensor) -> Tensor:
            both = (
                (self.suspect.logits(n, vectors)[:, 0], self.base.logits(n, vectors)[:, 0]) for n in numbers
            )
            return torch.stack([_kl(ours, theirs) for ours, theirs in both]).mean()

        return _gradient(self.suspect.embed, candidate, value)

    def _nats(self, candidates: Tensor, numbers: Sequence[int]) -> Tensor:
        nats = torch.empty(len(candidates), len(numbers), device=candidates.device)
        with torch.no_grad():
            pairs = (each.batches(candidates, numbers) for each in (self.suspect, self.base))
            for (at, part, ours), (_, _, theirs) in zip(*pairs, strict=True):
                nats[part, at] = _kl(ours[:, 0], theirs[:, 0])
        return nats


@dataclass(frozen=True)
class Alphabet:
    """The tokens that a candidate may hold."""

    first: Tensor
    """(A,) ids that it may begin with: those that carry the blank before it, or those that do not."""
    further: Tensor
    """(B,) ids."""

    @classmethod
    def of(cls, serialiser: Serialiser, vocabulary: int, blank: bool, device: Any = "cpu") -> "Alphabet":
        """Of users' texts: no special tokens, none that is a part of a character.

        Args:
            serialiser: knows the tokens.
            vocabulary: rows of the model's embeddings.
            blank: whether the first token carries the blank before it, as `Slot` tells.
            device: of the ids.
        """
        tokenizer = serialiser.tokenizer
        excluded = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        pieces = {
            token: piece
            for token in range(min(vocabulary, len(tokenizer)))
            if token not in excluded
            and (piece := serialiser.piece(token)).strip()
            and piece.isprintable()
            and not is_partial(piece)
        }
        first = [token for token, piece in pieces.items() if piece.startswith(" ") == blank]
        return cls(torch.tensor(first, device=device), torch.tensor(list(pieces), device=device))

    def at(self, place: int) -> Tensor:
        """Ids that may stand at a place of a candidate, from 0."""
        return self.further if place else self.first

    def random(self, length: int, generator: torch.Generator) -> Tensor:
        """(length,) ids at random."""
        draws = [torch.randint(len(self.at(i)), (1,), generator=generator) for i in range(length)]
        return torch.cat([self.at(i)[draw] for i, draw in enumerate(draws)])


def search(  # noqa: PLR0913  # the budget of a search, each number stated
    objective: Objective,
    start: Tensor,
    alphabet: Alphabet,
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
        alphabet: of which substitutes are taken.
        steps: at most so many.
        width: substitutions that are evaluated in each.
        enough: value at which the search ends.
        survives: whether token ids are what the tokenizer makes of their text; others are passed over.
        generator: of the draws.

    Returns:
        The best candidate, (k,), and its value in nats.
    """
    best, value, current, idle = start, -float("inf"), start, 0
    for _ in range(steps):
        if value >= enough or idle >= PATIENCE:
            break
        # Two prompts propose and sort out; all of them decide about what is left.
        order = torch.randperm(objective.prompts, generator=generator).tolist()
        few, others = order[:2], order[2:]
        gains = objective.gradient(current, few).nan_to_num(0.0, 0.0, 0.0)  # (k, vocabulary)
        # One token of each row is another: the places take turns, the substitutes are drawn from the best.
        substituted = current.repeat(width, 1)  # (width, k)
        for place in range(len(current)):
            rows, ids = slice(place, width, len(current)), alphabet.at(place)
            proposed = ids[gains[place, ids].topk(min(PROPOSED, len(ids))).indices]
            substituted[rows, place] = proposed[
                torch.randint(len(proposed), (len(substituted[rows]),), generator=generator)
            ]
        substituted = torch.unique(substituted, dim=0)
        total = objective.per_prompt(substituted, few).sum(1)
        total = total.nan_to_num(-math.inf, -math.inf, -math.inf)
        leading = total.topk(max(1, len(substituted) // 4)).indices
        substituted, total = substituted[leading], total[leading]
        if others:
            total = total + objective.per_prompt(substituted, others).sum(1)
        values = (total / objective.prompts).nan_to_num(-math.inf, -math.inf, -math.inf)
        top = next(
            (i for i in values.argsort(descending=True).tolist() if survives(substituted[i].tolist())), None
        )
        idle += 1
        if top is None:
            continue
        current = substituted[top]  # also where it is worse: a way out of a local maximum
        if float(values[top]) > value:
            best, value, idle = current, float(values[top]), 0
    return best, value


def grow(
    objective: Objective,
    proposed: Tensor,
    alphabet: Alphabet,
    *,
    longest: int,
    width: int,
    enough: float,
    survives: Callable[[Sequence[int]], bool],
) -> Iterator[Tensor]:
    """The best string of each length as it is grown, a token at a time before or behind shorter ones.

    Args:
        objective: what is maximised; its first prompt sorts out, all of them decide.
        proposed: (T,) token ids, the most promising first.
        alphabet: what a string may begin with.
        longest: string, in tokens.
        width: four times as many proposed tokens are tried alone, and half as many again on either side of a
            string.
        enough: value at which growing ends.
        survives: as in `search`.

    Yields:
        The string, (k,); a length of which none survives is passed over.
    """
    begins = torch.isin(proposed, alphabet.first)
    joined, in_front = proposed[: 3 * width // 2], proposed[begins][: 3 * width // 2]
    strings = proposed[begins][: 4 * width, None]  # (C, k)
    for length in range(1, longest + 1):
        sorted_out = objective.per_prompt(strings, [0])[:, 0].nan_to_num(-math.inf, -math.inf, -math.inf)
        leading = strings[sorted_out.argsort(descending=True)[: 2 * BEAM]]
        values = objective.per_prompt(leading, range(objective.prompts)).mean(1)
        values = values.nan_to_num(-math.inf, -math.inf, -math.inf)
        order = values.argsort(descending=True)
        best = next((i for i in order.tolist() if survives(leading[i].tolist())), None)
        if best is not None:
            yield leading[best]
        if float(values.max()) >= enough or length == longest:
            return
        beam = leading[order[:BEAM]]
        before = torch.cat([in_front.repeat(len(beam))[:, None], beam.repeat_interleave(len(in_front), 0)], 1)
        behind = torch.cat([beam.repeat_interleave(len(joined), 0), joined.repeat(len(beam))[:, None]], 1)
        strings = torch.unique(torch.cat([before, behind]), dim=0)


def _kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """(R,) KL(ours || theirs) of (R, vocabulary) logits, in nats."""
    first, second = common_log_probabilities(ours, theirs)
    return (first.exp() * (first - second)).sum(-1)


def _gradient(embed: Any, candidate: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """(k, vocabulary): gradient at the embeddings of (k,) ids, along each token's embedding."""
    vectors = embed(candidate).detach().requires_grad_()
    with torch.enable_grad():
        [slope] = torch.autograd.grad(value(vectors[None]), vectors)
    return slope @ embed.weight.detach().T
