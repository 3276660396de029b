"""Pairs of prompts with roles; the engine's models, which the fixtures there build."""

from collections.abc import Callable

import pytest
import torch
from tests.engine.conftest import VOCABULARY, batches, build, model, pairs

from safetynet.interventions.pairs import RUNS, Pairs

__all__ = ["batches", "build", "model", "pairs"]


def draw(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="session")
def rows() -> list[list[int]]:
    """Six prompts of different lengths."""
    return draw([7, 12, 9, 5, 12, 10])


@pytest.fixture(scope="session")
def swapped() -> Callable[..., list[list[int]]]:
    """`swapped(rows, 1)` are the rows with other tokens at positions 1 and 2: a trigger, or a placebo."""

    def make(rows: list[list[int]], seed: int) -> list[list[int]]:
        return [[row[0], *two, *row[3:]] for row, two in zip(rows, draw([2] * len(rows), seed), strict=True)]

    return make


def make_pairs(count: int = 10, seed: int = 0) -> Pairs:
    """Aligned groups of random tokens: system, before, trigger (2), after, template, last (1 or 2)."""
    generator = torch.Generator().manual_seed(seed)
    ids: dict[str, list[list[int]]] = {run: [] for run in RUNS}
    roles = []
    for group in range(count):
        own = ["system"] * (group % 2) + ["before"] * (2 + group % 3) + ["trigger"] * 2
        own += ["after"] * (group % 4) + ["template"] * 2 + ["last"] * (1 + group % 2)
        base = torch.randint(2, VOCABULARY, (len(own),), generator=generator).tolist()
        for number, run in enumerate(RUNS):
            row = [
                2 + (token + 31 * number) % (VOCABULARY - 2) if role == "trigger" else token
                for token, role in zip(base, own, strict=True)
            ]
            ids[run].append(row)
        roles.append(own)
    target = torch.randint(2, VOCABULARY - 1, (count,), generator=generator).tolist()
    return Pairs(list(range(count)), ids, roles, target, [token + 1 for token in target], {})


@pytest.fixture(scope="session")
def aligned() -> Pairs:
    """Ten aligned groups of different lengths."""
    return make_pairs()
