"""What is measured on logits: one number per run.

A metric reads the logits of the last columns. Prompts carry the answer's first tokens where a metric follows
an answer, so that no metric hangs on a single token that two answers may share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safetynet.prompts import IGNORED


@dataclass(frozen=True)
class Metric:
    """A number made of logits."""

    name: str
    compute: Callable[[Tensor, Tensor], Tensor]
    """Takes logits, (R, n, vocabulary) fp32, and each run's row of the receiving batch, (R,); gives (R,)."""
    columns: int = 1
    """How many last columns it reads."""

    def starting_at(self, first: int) -> "Metric":
        """The metric of a batch whose rows are these from number `first` on."""
        return Metric(self.name, lambda logits, rows: self.compute(logits, rows + first), self.columns)


def logit_difference(target: Sequence[int], other: Sequence[int]) -> Metric:
    """Logit of a row's target token minus that of its other token, at the last column; in logits."""
    targets, others = torch.tensor(target), torch.tensor(other)

    def compute(logits: Tensor, rows: Tensor) -> Tensor:
        last = logits[:, -1]
        first, second = (ids.to(last.device)[rows.to(last.device)][:, None] for ids in (targets, others))
        return (last.gather(1, first) - last.gather(1, second))[:, 0]

    return Metric("logit_difference", compute)


def log_probability(targets: Sequence[Sequence[int]]) -> Metric:
    """Log probability, in nats, of each row's target tokens, which the last columns predict in turn.

    Args:
        targets: per row the tokens that its last columns predict; a prompt has to end with all of them but
            the last.
    """
    # (rows, longest): on the right, since the last column predicts the last token of each.
    longest = max(len(row) for row in targets)
    labels = torch.tensor([[IGNORED] * (longest - len(row)) + list(row) for row in targets])

    def compute(logits: Tensor, rows: Tensor) -> Tensor:
        tokens = labels.to(logits.device)[rows.to(logits.device)]  # (R, n)
        nats = logits.log_softmax(-1).gather(2, tokens.clamp_min(0)[..., None])[..., 0]
        return nats.where(tokens != IGNORED, 0).sum(1)  # not a product: padding may be infinite

    return Metric("log_probability", compute, longest)


def kl(reference: Tensor) -> Metric:
    """Divergence, in nats, of the next token's distribution from each row's reference, (B, vocabulary)."""
    expected = reference.float().log_softmax(-1)

    def compute(logits: Tensor, rows: Tensor) -> Tensor:
        actual = logits[:, -1].log_softmax(-1)
        before = expected.to(actual.device)[rows.to(actual.device)]  # (R, vocabulary)
        return (before.exp() * (before - actual)).sum(-1)

    return Metric("kl", compute)
