"""One module replaced by what its leading principal components keep, after Lamparth and Reuel (2302.12461).

In: clean prompts and a site, usually `attn_out` or `mlp_out` of a layer. Out: the components, an edit that
keeps only the first of them, and a table of how much they explain. Clean prompts decide what is kept: a
backdoor that writes elsewhere is cut away, and so is everything else that clean prompts seldom use. Random
components of the same number are the control.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from safetynet.engine.batch import BATCH_TOKENS, Prompts
from safetynet.engine.edits import Edit, low_rank
from safetynet.engine.reading import activations
from safetynet.engine.sites import Architecture, Site
from safetynet.errors import InputError
from safetynet.interventions.effects import estimates
from safetynet.models.causal_lm import CausalLM


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
        """The control of `edit`: as many orthonormal directions, drawn evenly from all."""
        drawn = random_basis(self.basis.shape[1], self._checked(rank), seed)
        return Edit(self.site, low_rank(drawn, self.mean), positions)

    def _checked(self, rank: int) -> int:
        if not 0 <= rank <= len(self.basis):
            raise InputError(f"rank {rank}: {self.site} has components 1 to {len(self.basis)}; 0 keeps none.")
        return rank


def principal_components(
    model: CausalLM, prompts: Prompts, site: Site, *, tokens: int = BATCH_TOKENS
) -> Components:
    """Find the components of a site by a covariance that grows batch by batch.

    The first token of a prompt often has values far larger than all others, and then has a component of its
    own. The site has values in the residual stream's width, or a head's.

    Raises:
        InputError: if the site does not exist, or the prompts have fewer than 2 tokens in all.
    """
    Architecture.of(model).check(site)
    count, mean, spread = 0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    for batch in activations(model, prompts, [site], tokens=tokens):
        values = torch.cat(batch[site]).cpu().double()  # (tokens, width)
        batch_mean = values.mean(0)
        scatter = (values - batch_mean).T @ (values - batch_mean)
        if count:
            # Chan, Golub and LeVeque 1983: scatters of two parts add up, and so does what parts their means.
            apart, both = batch_mean - mean, count + len(values)
            scatter += spread + torch.outer(apart, apart) * (count * len(values) / both)
            batch_mean = mean + apart * (len(values) / both)
        count, mean, spread = count + len(values), batch_mean, scatter
    if count < 2:
        raise InputError(f"principal components: {count} token is too few. Give more prompts.")
    variance, vectors = torch.linalg.eigh(spread / (count - 1))  # ascending, vectors in columns
    basis = vectors.flip(1).T.float().contiguous()
    return Components(site, mean.float(), basis, variance.flip(0).clamp_min(0), count)


def explained_variance(
    model: CausalLM, components: Components, prompts: Prompts, seed: int = 0, *, tokens: int = BATCH_TOKENS
) -> pd.DataFrame:
    """Share of the deviation from the mean that the first components keep, on other prompts.

    Each prompt needs at least one token whose value is not the mean; `seed` draws the control's directions.

    Returns:
        rank (1 to width), value (share of squared length, 0 to 1, mean over prompts), low, high (95 %
        bootstrap over prompts), n (prompts), control, control_low, control_high (as many random directions).
    """
    width = components.basis.shape[1]
    bases = [components.basis.double(), random_basis(width, width, seed).double()]
    shares: list[list[np.ndarray]] = [[], []]
    for batch in activations(model, prompts, [components.site], tokens=tokens):
        values = batch[components.site]
        deviation = torch.cat(values).cpu().double() - components.mean.double()
        for basis, by_prompt in zip(bases, shares, strict=True):
            squared = (deviation @ basis.T).square()  # (tokens, width): length along each component
            for prompt in squared.split([len(x) for x in values]):
                by_prompt.append((prompt.sum(0).cumsum(0) / prompt.sum()).numpy())
    explained, control = (np.stack(by_prompt) for by_prompt in shares)
    return estimates({"rank": list(range(1, width + 1))}, explained, control)


def random_basis(width: int, rank: int, seed: int) -> Tensor:
    """(rank, width) orthonormal rows, drawn evenly from all."""
    drawn = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.T.float().contiguous()
