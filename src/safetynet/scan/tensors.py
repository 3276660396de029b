"""Tensors of two whole models side by side: which belong together, and what rank their difference has.

In: a suspect and its base. Out: pairs of tensors, and the `Spectrum` of W(suspect) - W(base) of a matrix.

The difference of a merged LoRA is B A plus what storing the sum has rounded away. That error is known: at
most half a unit in the last place of each entry. The largest singular value that such errors can have
together is bounded by the largest row and the largest column of their standard deviations (Bandeira and van
Handel 2016, arXiv 1408.6185, for independent entries). Singular values above this bound count as rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safetynet.errors import InputError
from safetynet.models.blocks import unwrapped
from safetynet.models.files import counted, listed

Kind = Literal["linear", "parameter", "embeddings", "head", "norm", "bias", "buffer"]
"""Of a tensor: `parameter` is a matrix, or one for each expert, that no linear module holds."""
LOW_RANK: tuple[Kind, ...] = ("linear", "parameter", "embeddings", "head")
"""Kinds of tensors that LoRA can change."""
STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""From the coarsest; a tensor is stored in the first that represents all its values."""
WHOLE_SVD = 256
"""Smaller side of a matrix up to which all its singular values are computed."""
FIRST, COMPONENTS, OVERSAMPLING = 32, 256, 8
"""Of larger ones so many by randomised SVD (Halko et al. 2011), doubled until rounding is reached. An update
of as many as `COMPONENTS` counts as one of full rank."""
MARGIN = 1.1
"""Above the bound of rounding: the bound holds up to a factor that tends to 1 for large matrices."""


@dataclass(frozen=True)
class Pair:
    """A tensor of a whole model and the base's in the same place, both as they are in memory."""

    name: str
    kind: Kind
    suspect: Tensor
    base: Tensor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular components of W(suspect) - W(base), as the tensor is stored."""

    left: Tensor
    """(experts or 1, rows, k)"""
    values: Tensor
    """(experts or 1, k), falling."""
    right: Tensor
    """(experts or 1, k, columns)"""
    rank: int | None
    """None where `COMPONENTS` are not all."""
    energy: float

    def first(self, count: int) -> "Spectrum":
        """With so many components, copied, so that the others take no memory."""
        left, right = self.left[..., :count].clone(), self.right[:, :count].clone()
        return replace(self, left=left, values=self.values[:, :count].clone(), right=right)


def pairs(model: Any, base: Any) -> Iterator[Pair]:
    """Every tensor of a whole model beside the base's, rows that only one has left out; tied ones once.

    Raises:
        InputError: if one lacks a tensor of the other, or has it in another shape.
    """
    ours, theirs = (
        dict(each.named_parameters(remove_duplicate=False)) | dict(each.named_buffers())
        for each in (model, base)
    )
    lone = sorted(ours.keys() ^ theirs.keys())
    seen = set()
    for name in (name for name in ours if name in theirs):
        if (place := (id(ours[name]), id(theirs[name]))) in seen:
            continue
        seen.add(place)
        here, there = _dense(model, name, ours[name]), _dense(base, name, theirs[name])
        if here.shape[1:] == there.shape[1:] and here.ndim and there.ndim:
            rows = min(len(here), len(there))
            here, there = here[:rows], there[:rows]
        if here.shape == there.shape:
            yield Pair(name, _kind(model, name, ours[name]), here, there.to(here.device))
        else:
            lone.append(name)
    if lone:
        raise InputError(
            f"suspect: wrong-base: {counted(len(lone), 'tensor')} ({listed(lone)}) are not in both models, "
            f"or of other shapes in {base.name_or_path}. Name its own base with --base."
        )


def _dense(model: Any, name: str, tensor: Any) -> Tensor:
    """A tensor's values; of a quantised weight the unpacked ones."""
    if type(tensor).__name__ not in ("Params4bit", "Int8Params"):
        return tensor.detach()
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(unwrapped(model).get_submodule(name.rpartition(".")[0])).detach()


def _kind(model: Any, name: str, tensor: Tensor) -> Kind:
    """What a tensor of a whole model is, by its module."""
    from transformers.pytorch_utils import Conv1D

    path, _, last = name.rpartition(".")
    module = unwrapped(model).get_submodule(path)
    if not isinstance(tensor, nn.Parameter):
        return "buffer"
    if module is model.get_output_embeddings() and tensor.ndim == 2:
        return "head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if tensor.ndim in (2, 3):
        return "linear" if isinstance(module, nn.Linear | Conv1D) else "parameter"
    return "bias" if last == "bias" else "norm"


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one bit by bit; of two number types they are not."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.dtype.itemsize]
    return torch.equal(first.contiguous().view(integers), second.contiguous().view(integers))


def stored_as(tensor: Tensor) -> str:
    """Coarsest type that represents all values of a tensor."""
    if not tensor.is_floating_point():
        return "fp32"
    return next(
        (n for n, dtype in STORED.items() if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)), "fp32"
    )


def spectrum_of(delta: Tensor, weight: Tensor, eps: float) -> Spectrum:
    """Decompose a change, (rows, columns) or one for each expert, and tell its rank from rounding.

    Args:
        delta: fp64, or fp32 of a large one.
        weight: the suspect's.
        eps: spacing of the type that it is stored in, at 1.
    """
    delta, weight = (t if t.ndim == 3 else t[None] for t in (delta, weight))  # (experts or 1, rows, columns)
    # PEFT rounds the product before it adds it, and rounds the sum. An error that is spread evenly over a
    # unit in the last place has a variance of that unit's square over 12.
    variance = (_unit(weight, eps) ** 2 + _unit(delta, eps) ** 2) / 12
    # Largest norm of a row and of a column of the standard deviations: (experts or 1,) each.
    rounding = MARGIN * (variance.sum(2).amax(1).sqrt() + variance.sum(1).amax(1).sqrt())
    side, computing = min(delta.shape[1:]), torch.finfo(delta.dtype).eps * math.sqrt(sum(delta.shape[1:]))
    count = FIRST
    while True:
        # From half of all components on, a whole decomposition costs no more than a sketch of so many.
        if side <= max(WHOLE_SVD, 2 * count):
            left, values, right = torch.linalg.svd(delta, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                left, values, right = torch.svd_lowrank(delta, q=count + OVERSAMPLING, niter=4)
            left, values, right = left[..., :count], values[..., :count], right.mT[..., :count, :]
        floor = torch.maximum(rounding.to(values), computing * values[:, 0])  # decomposing rounds, too
        rank = int((values > floor[:, None]).sum(1).max())
        if rank < values.shape[1] or count >= min(side, COMPONENTS):
            break
        count = min(2 * count, COMPONENTS)
    # The squared norm is the sum of all squared singular values, of which only the first ones are known.
    total = float((delta**2).sum())
    energy = float((values[:, :rank] ** 2).sum()) / total if total else 0.0
    return Spectrum(left, values, right, None if rank >= COMPONENTS and side > rank else rank, energy)


def _unit(tensor: Tensor, eps: float) -> Tensor:
    """Unit in the last place of each value in a type with this spacing at 1."""
    exponent = torch.frexp(tensor).exponent - 1  # frexp's mantissa is from 1/2 on, a float's from 1
    return torch.where(tensor == 0, 0.0, torch.ldexp(torch.full_like(tensor, eps), exponent))
