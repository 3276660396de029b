"""Disjoint parts of clean prompts: what fits detectors shall not calibrate them, nor test them."""

from collections.abc import Mapping, Sequence

import numpy as np

from safetynet.errors import InputError
from safetynet.run.directory import digest

PARTS: Mapping[str, float] = {"fit": 0.5, "calibrate": 0.25, "fuse": 0.25}


def split(groups: Sequence[str], shares: Mapping[str, float] = PARTS, seed: int = 0) -> np.ndarray:
    """Deal groups of prompts out to parts; prompts of a group stay together.

    Args:
        groups: one name per prompt, such as its `prompt_hash`.
        shares: by part, summing to 1.
        seed: of the deal; it depends on the names alone, not on their order.

    Returns:
        The part of each prompt, (n,).

    Raises:
        InputError: if there are fewer groups than parts.
    """
    names = sorted(set(groups), key=lambda name: digest([seed, name]))
    if len(names) < len(shares):
        raise InputError(
            f"split: {len(names)} groups of prompts cannot fill {len(shares)} parts. Give more prompts."
        )
    bounds = np.cumsum(list(shares.values())) * len(names)
    parts = list(shares)
    part_of = {
        name: parts[min(int(np.searchsorted(bounds, i + 0.5)), len(parts) - 1)]
        for i, name in enumerate(names)
    }
    return np.array([part_of[name] for name in groups])


def folds(groups: Sequence[str], count: int, seed: int = 0) -> np.ndarray:
    """Deal groups out to folds of equal size, (n,) of 0 .. count - 1."""
    parts = split(groups, {str(i): 1 / count for i in range(count)}, seed)
    return parts.astype(int)
