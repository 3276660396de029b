"""One module replaced by what its leading principal components keep, after Lamparth and Reuel (2302.12461).

In: clean prompts and a site, usually `attn_out` or `mlp_out` of a layer. Out: the components, an edit that
keeps only the first of them, and a table of how much they explain. Clean prompts decide what is kept: a
backdoor that writes elsewhere is cut away, and so is everything else that clean prompts seldom use. Random
components of the same number are the control.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from safetynet.engine.batch import BATCH_TOKENS, Prompts, batches
from safetynet.engine.edits import Edit, low_rank
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError
from safetynet.interventions.estimates import estimates


@dataclass(frozen=True)
class Components:
    """Principal components of the values at a site, over all tokens of the prompts."""

    site: Site
    mean: Tensor
    """(width,) fp32."""
    basis: Tensor
    """(width, width) fp32, orthonormal rows in the order of the variance along them."""
    variance: Tensor
    """(width,) fp64, descending."""
    count: int
    """Tokens that they were found on."""

    def edit(self, rank: int, positions: tuple[int, ...] | None = None) -> Edit:
        """Keep of the deviation from the mean what lies along the first `rank` components.

        Raises:
            InputError: if there are not so many.
        """
        return Edit(self.site, low_rank(self.basis[: self._checked(rank)], self.mean), positions)

    def random_edit(self, rank: int, seed: int = 0, positions: tuple[int, ...] | None = None) -> Edit:
        """The control of `edit`: as many orthonormal directions, drawn evenly from all.

        Raises:
            InputError: if there are not so many.
        """
        drawn = random_basis(self.basis.shape[1], self._checked(rank), seed)
        return Edit(self.site, low_rank(drawn, self.mean), positions)

    def _checked(self, rank: int) -> int:
        if not 0 <= rank <= len(self.basis):
            raise InputError(f"rank {rank}: {self.site} has components 1 to {len(self.basis)}; 0 keeps none.")
        return rank


def principal_components(model: Any, rows: Prompts, site: Site, *, tokens: int = BATCH_TOKENS) -> Components:
    """Find the components of a site by a covariance that grows batch by batch.

    The first token of a prompt often has values far larger than all others, and then has a component of its
    own.

    Args:
        model: a causal LM of transformers in evaluation mode.
        rows: clean prompts.
        site: with values in the residual stream's width, or a head's.
        tokens: of one batch.

    Raises:
        InputError: if the site does not exist, or the prompts have fewer than 2 tokens in all.
    """
    count, mean, spread = 0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    for values, _ in _values(model, rows, site, tokens):
        own = values.mean(0)
        centred = values - own
        scatter = centred.T @ centred
        if count:
            # Chan, Golub and LeVeque 1983: scatters of two parts add up, and so does what parts their means.
            apart, both = own - mean, count + len(values)
            scatter += spread + torch.outer(apart, apart) * (count * len(values) / both)
            own = mean + apart * (len(values) / both)
        count, mean, spread = count + len(values), own, scatter
    if count < 2:
        raise InputError(f"principal components: {count} token is too few. Give more prompts.")
    variance, vectors = torch.linalg.eigh(spread / (count - 1))
    basis = vectors.flip(1).T.float().contiguous()
    return Components(site, mean.float(), basis, variance.flip(0).clamp_min(0), count)


def explained_variance(
    model: Any, components: Components, rows: Prompts, seed: int = 0, *, tokens: int = BATCH_TOKENS
) -> pd.DataFrame:
    """Share of the deviation from the mean that the first components keep, on other prompts.

    Args:
        model: as in `principal_components`.
        components: found on some prompts.
        rows: other prompts, each with at least one token whose value is not the mean.
        seed: of the random directions that are the control.
        tokens: of one batch.

    Returns:
        rank (1 to width), value (share of squared length, 0 to 1, mean over prompts), low, high (95 %
        bootstrap over prompts), n (prompts), control, control_low, control_high (as many random directions).
    """
    width = components.basis.shape[1]
    bases = [components.basis.double(), random_basis(width, width, seed).double()]
    shares: list[list[np.ndarray]] = [[], []]
    for values, counts in _values(model, rows, components.site, tokens):
        deviation = values - components.mean.double()
        for basis, found in zip(bases, shares, strict=True):
            along = (deviation @ basis.T).square()
            for own in along.split(counts):
                found.append((own.sum(0).cumsum(0) / own.sum()).numpy())
    kept, control = (np.stack(found) for found in shares)
    return estimates({"rank": list(range(1, width + 1))}, kept, control)


def random_basis(width: int, rank: int, seed: int) -> Tensor:
    """(rank, width) orthonormal rows, drawn evenly from all."""
    drawn = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.T.float().contiguous()


def _values(model: Any, rows: Prompts, site: Site, tokens: int) -> Any:
    """Batch by batch the values at all tokens, (tokens, width) fp64 on the CPU, and the tokens per prompt."""
    Architecture.of(model).check(site)
    for _, batch in batches(model, rows, tokens):
        found = trace(model, batch, [site], columns=0)
        yield found.value(site)[batch.mask.bool()].cpu().double(), batch.mask.sum(1).tolist()
