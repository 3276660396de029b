"""Interventions as data: an edit changes the values at one site, a knock-out cuts an edge of attention.

A change takes the values at the edited positions, (k, width), and returns as many. It works row by row: of
the last layer the engine computes only the rows that count. The constructors below are the field's
interventions; any such function will do. Edits of one run are a set: the engine applies them where the
network reaches them, and refuses two of the same site, whose order would matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safetynet.engine.sites import Site
from safetynet.errors import InputError

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Edit:
    """Change the values at a site, at some positions of the prompt."""

    site: Site
    change: Change
    positions: tuple[int, ...] | None = None
    """Counted from the prompt's own first token, negative ones from its end; None: everywhere."""


@dataclass(frozen=True)
class KnockOut:
    """Cut the edges from `queries` to `keys` in a layer's attention (Geva et al. 2023)."""

    layer: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    head: int | None = None
    """None: in all heads."""

    @property
    def site(self) -> Site:
        """Where it acts."""
        return Site("attention", self.layer, self.head)

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions whose values it changes."""
        return self.queries


Intervention = Edit | KnockOut


def replace(values: Tensor) -> Change:
    """Patch: put `values`, (k, width) or (width,), in place."""

    def change(x: Tensor) -> Tensor:
        if values.shape not in (x.shape, x.shape[1:]):
            raise InputError(
                f"replace: values of shape {tuple(values.shape)} were given where the site has "
                f"{tuple(x.shape)}. Give a row for each position, or one for all."
            )
        return values.to(x).expand_as(x)

    return change


def zero() -> Change:
    """Zero ablation; switches an adapter, a head or an expert off."""
    return torch.zeros_like


def steer(direction: Tensor, strength: float) -> Change:
    """Add `strength` times a direction, (width,)."""
    return lambda x: x + strength * direction.to(x)


def project_out(direction: Tensor, centre: Tensor | None = None, share: float = 1.0) -> Change:
    """Remove `share` of the component along a direction; with `centre`, (width,), set it to the centre's.

    Raises:
        InputError: if the direction has no length.
    """
    unit = _unit("project_out", direction)

    def change(x: Tensor) -> Tensor:
        along = unit.to(x)
        off = x if centre is None else x - centre.to(x)
        return x - share * (off @ along)[:, None] * along  # (k, 1) lengths times (width,)

    return change


def clip(direction: Tensor, centre: Tensor, most: float) -> Change:
    """Where the component along a direction exceeds the centre's by more than `most`, set it to the centre's.

    What has little of the direction, as clean prompts do, is left as it is.

    Raises:
        InputError: if the direction has no length.
    """
    unit = _unit("clip", direction)

    def change(x: Tensor) -> Tensor:
        along = unit.to(x)
        excess = (x - centre.to(x)) @ along
        return x - torch.where(excess > most, excess, torch.zeros_like(excess))[:, None] * along

    return change


def _unit(change: str, direction: Tensor) -> Tensor:
    if not direction.norm() > 0:
        raise InputError(f"{change}: the direction has no length. Are the two runs the same?")
    return direction / direction.norm()


def clamp(low: Tensor, high: Tensor, basis: Tensor | None = None) -> Change:
    """Hold values within bounds, (width,); with orthonormal rows, (k, width), the k components along them."""

    def change(x: Tensor) -> Tensor:
        if basis is None:
            return x.clamp(low.to(x), high.to(x))
        rows = basis.to(x)
        along = x @ rows.T
        return x + (along.clamp(low.to(x), high.to(x)) - along) @ rows

    return change


def reroute(expert: int, to: int) -> Change:
    """For site `router`: give one expert's weight to another."""

    def change(weights: Tensor) -> Tensor:
        moved = weights.clone()
        moved[:, to] += moved[:, expert]
        moved[:, expert] = 0
        return moved

    return change


def low_rank(components: Tensor, mean: Tensor) -> Change:
    """Keep of the deviation from `mean`, (width,), what lies in the span of orthonormal rows, (r, width).

    The principal component replacement of Lamparth and Reuel (arXiv 2302.12461).
    """

    def change(x: Tensor) -> Tensor:
        basis, centre = components.to(x), mean.to(x)
        return centre + (x - centre) @ basis.T @ basis  # (k, width) to (k, r) and back

    return change


def check_set(placed: Sequence[tuple[Intervention, Sequence[int]]]) -> None:
    """Refuse two edits of one site, each given with its columns, and edits of what only a knock-out changes.

    Raises:
        InputError: naming the site.
    """
    seen: dict[tuple[str, int], list[tuple[Site, set[int]]]] = {}
    for edit, columns in placed:
        if isinstance(edit, KnockOut):
            continue
        if edit.site.component == "attention":
            raise InputError(f"site {edit.site}: a pattern has no values to change. Cut it with a KnockOut.")
        site = edit.site
        # The stream between two layers has two names, as has the stream before the first.
        if site.component == "resid_post":
            site = Site("resid_pre", site.layer + 1)
        elif site.component == "embedding":
            site = Site("resid_pre", 0)
        others = seen.setdefault((site.component, site.layer), [])
        for other, edited in others:
            # Without an index or a module, a site stands for all of them.
            same_index = site.index is None or other.index is None or site.index == other.index
            same_module = not site.module or not other.module or site.module == other.module
            if same_index and same_module and not edited.isdisjoint(columns):
                raise InputError(
                    f"interventions: {edit.site} is edited twice at the same position, and the order would "
                    "decide. Make one change of both."
                )
        others.append((site, set(columns)))
