"""Sweeps: one kind of intervention at every spot of a model, on every pair.

In: pairs, spots (a site and a role of positions), a mode and a direction. Out: the metric at every spot for
every pair, beside its values without intervention and in the source run. Work is done batch by batch of
pairs; finished batches are kept in a file, so that an interrupted sweep goes on.
"""

import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from safetynet.engine import edits
from safetynet.engine.edits import Edit, Intervention, KnockOut
from safetynet.engine.metrics import Metric
from safetynet.engine.runs import EditedRun, Progress, run_interventions
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import Trace, trace
from safetynet.errors import InputError
from safetynet.interventions.pairs import PAIRS_AT_ONCE, Pairs
from safetynet.models.causal_lm import CausalLM
from safetynet.models.identity import identify
from safetynet.run import parallel
from safetynet.run.directory import digest, write_atomically
from safetynet.run.logs import ProgressLog
from safetynet.vocabulary import DIRECTIONS, MODES, POSITIONS, Direction, Mode

log = logging.getLogger(__name__)
RESIDUAL = ("embedding", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
SWITCHES = ("head", "expert", "adapter")
"""What can be switched off."""
SWEEP_SITES = {
    "layer": (*RESIDUAL, "attention"),
    "position": RESIDUAL,
    "component": RESIDUAL,
    "head": ("head", "query", "key", "value", "attention"),
    "expert": ("expert", "router"),
    "adapter": ("adapter",),
}
"""Components that each named sweep takes."""
DEFAULT_SITES = {"layer": ("resid_post",), "position": ("resid_pre",), "component": ("attn_out", "mlp_out")}
"""Those that a sweep takes where none are named; else the first of `SWEEP_SITES`."""
READING_ROLES = ("after", "template", "last")
"""Roles whose attention to the trigger a knock-out cuts."""


@dataclass(frozen=True)
class Spot:
    """Where a sweep intervenes: one site, at the positions of one role."""

    site: Site
    position: str = ""
    """A role of `vocabulary.POSITIONS`, `token N` for one position, "" for all from the trigger on."""
    elsewhere: bool = False
    """At as many positions drawn from the other roles instead: the control of a position."""
    update: bool = False
    """For `resid_post`: replace only what the layer adds to what it received."""


@dataclass(frozen=True)
class Measured:
    """A metric at S spots on B pairs."""

    spots: tuple[Spot, ...]
    values: np.ndarray
    """(S, B); NaN where it was not measured."""
    unpatched: np.ndarray
    """(B,) of the receiving run."""
    source: np.ndarray
    """(B,) of the source run."""

    @property
    def change(self) -> np.ndarray:
        """(S, B): what the intervention changed."""
        return self.values - self.unpatched

    @property
    def distance(self) -> np.ndarray:
        """(B,): what there is to change."""
        return self.source - self.unpatched


def sweep(  # noqa: PLR0913  # a sweep is made of this many choices, by keyword
    model: CausalLM,
    pairs: Pairs,
    spots: Sequence[Spot],
    *,
    receiving: str,
    source: str,
    mode: Mode = "patch",
    metric: Callable[[Pairs], Metric] = Pairs.metric,
    cells: np.ndarray | None = None,
    seed: int = 0,
    store: Path | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Intervene at every spot on every pair, exactly.

    Args:
        model: the model.
        pairs: aligned prompts.
        spots: where.
        receiving: the run of `pairs.RUNS` that is changed.
        source: the run that activations come from (patch), or that gives means and resamples.
        mode: `patch` puts the source's activations in place; `zero`, `mean` (over the source's prompts and
            positions) and `resample` (the source's activations of another pair) ablate; `off` switches an
            adapter, head or expert off; `knock_out` cuts attention to the trigger.
        metric: makes the metric of some pairs.
        cells: (S, B) bool, which spots are measured on which pairs; what is drawn does not depend on it.
            The others, and the runs of pairs without any, are NaN.
        seed: of drawn positions and resamples.
        store: a folder for finished batches; an interrupted sweep with the same inputs goes on from it.
        progress: called with pairs done and pairs in all.

    Raises:
        InputError: if a spot or mode does not exist here.
    """
    if mode not in MODES:
        raise InputError(f"mode: there is no {mode!r}; choose one of {', '.join(MODES)}.")
    architecture = Architecture.of(model)
    for spot in spots:
        _check(architecture, spot, mode)
    if mode == "resample" and len(pairs) < 2:
        raise InputError("mode: resample takes states of another pair. Give at least two.")
    # Parts of about the same size: in one of a single pair there would be no other to resample from.
    parts = np.array_split(np.arange(len(pairs)), -(-len(pairs) // PAIRS_AT_ONCE))
    inputs = [
        identify(model).as_dict(),
        [pairs.ids, pairs.roles, pairs.target, pairs.other],
        [asdict(spot) for spot in spots],
        (receiving, source, mode, seed, metric(pairs).name),
        *([] if cells is None else [np.packbits(cells).tolist()]),
    ]
    cells = np.ones((len(spots), len(pairs)), dtype=bool) if cells is None else cells
    finished = _SweepStore(store, digest(inputs))
    means = _source_means(model, pairs, spots, source) if mode == "mean" else {}
    counts = [int(cells[:, part].sum()) for part in parts]
    report = ProgressLog("sweep, interventions", sum(counts), sum(counts[: len(finished.arrays)]))

    def measure(number: int) -> np.ndarray:
        part = pairs.take(parts[number].tolist())
        donors = _Donors(part, mode, means, np.random.default_rng([seed, number]))
        before, part_cells = sum(counts[:number]), cells[:, parts[number]]
        return _measure_part(
            model,
            spots,
            (receiving, source),
            metric(part),
            donors,
            part_cells,
            lambda count, _: report.update(before + count),
        )

    while (first := len(finished.arrays)) < len(parts):
        # One part for each process, then all are kept.
        for array in parallel.in_turn(range(len(parts))[first : first + parallel.count()], measure):
            finished.add(array)
        if progress is not None:
            progress(int(parts[len(finished.arrays) - 1][-1]) + 1, len(pairs))
    whole = np.concatenate(finished.arrays[: len(parts)], axis=1)
    return Measured(tuple(spots), whole[2:], whole[0], whole[1])


def _check(architecture: Architecture, spot: Spot, mode: str) -> None:
    """Refuse a spot that does not exist, and a mode that means nothing there."""
    site = architecture.check(spot.site)
    kind, _, number = spot.position.partition(" ")
    if spot.position and spot.position not in POSITIONS and not (kind == "token" and number.isdigit()):
        raise InputError(
            f"position: there is no {spot.position!r}; choose one of {', '.join(POSITIONS)}, or token N."
        )
    wrong = ""
    if (mode == "knock_out") != (site.component == "attention"):
        wrong = "knock_out cuts attention and nothing else: use it by layer or head, at site attention"
    elif mode == "knock_out" and spot.position:
        wrong = "knock_out cuts what reads the trigger, wherever that is: use it by layer or head"
    elif mode == "off" and site.component not in SWITCHES:
        wrong = f"off switches {', '.join(SWITCHES)}. Use zero"
    elif site.component == "adapter" and not site.module and mode not in ("off", "zero"):
        wrong = "adapters have values module by module. Name the module, or switch all of them off"
    elif spot.update and site.component != "resid_post":
        wrong = "what a layer adds is told from what it received at resid_post"
    if wrong:
        raise InputError(f"mode {mode} at site {site}: {wrong}.")


@dataclass(frozen=True)
class _Donors:
    """What interventions on one part of the pairs are made from."""

    pairs: Pairs
    mode: Mode
    means: dict[Spot, torch.Tensor]
    rng: np.random.Generator

    def intervention(
        self, spot: Spot, row: int, traced: int, receiving: Trace, source: Trace
    ) -> Intervention | None:
        """The intervention at one spot of one pair; None where nothing can change.

        Args:
            spot: where.
            row: of the pairs.
            traced: the same pair's row of both traces.
            receiving: run that is changed.
            source: run that values come from.
        """
        pairs, mode, site = self.pairs, self.mode, spot.site
        where = positions(pairs, spot, row, self.rng)
        if mode == "patch":
            # Before the first token that differs both runs have the same activations.
            where = tuple(i for i in where if i >= pairs.roles[row].index("trigger"))
        if not where:
            return None
        if mode == "knock_out":
            queries = tuple(i for i, role in enumerate(pairs.roles[row]) if role in READING_ROLES)
            return KnockOut(site.layer, queries, pairs.positions(row, "trigger"), site.index)
        if mode == "off" or (mode == "zero" and not spot.update):
            return Edit(site, edits.zero(), where)
        columns = receiving.batch.columns(traced, where)
        if mode == "mean":
            values = self.means[spot]
        elif mode == "zero":
            values = torch.zeros(())
        elif mode == "resample":
            # From the end, where prompts of different lengths correspond.
            length = len(pairs.roles[row])
            others = [i for i in range(len(pairs)) if i != row]
            other = int(self.rng.choice(others)) if others else row
            first = -len(pairs.roles[other])
            drawn = source.batch.columns(other, [max(p - length, first) for p in where])
            values = _values(source, spot, other, drawn)
        else:
            values = _values(source, spot, traced, columns)
        # What a layer adds is replaced on top of what it received in the receiving run.
        received = receiving.inputs[site.layer][traced, columns] if spot.update else 0
        return Edit(site, edits.replace(values + received), where)


def _measure_part(
    model: CausalLM,
    spots: Sequence[Spot],
    runs: tuple[str, str],
    metric: Metric,
    donors: _Donors,
    cells: np.ndarray,
    progress: Progress,
) -> np.ndarray:
    """(2 + S, B): the metric unpatched, in the source run and at each spot; NaN outside `cells` (S, B)."""
    pairs, reads_source = donors.pairs, donors.mode in ("patch", "resample")
    # Other pairs give their states where states are drawn, and of a sweep without spots the runs are wanted.
    every = donors.mode == "resample" or not len(spots)
    rows = [b for b in range(len(pairs)) if every or cells[:, b].any()]
    measured = np.full((2 + len(spots), len(pairs)), np.nan, dtype=np.float32)
    if not rows:
        return measured
    part = pairs.take(rows)
    sites = sorted({spot.site for spot in spots if spot.site.component != "attention"}, key=str)
    read = [site for site in sites if site.module or site.component != "adapter"]
    source = trace(model, part.batch(runs[1], model.device), read if reads_source else ())
    receiving = trace(model, part.batch(runs[0], model.device), resume=True)
    receiving.batch.first_difference(source.batch)  # refuses pairs that do not correspond
    for i, recorded in enumerate((receiving, source)):
        assert recorded.logits is not None
        measured[i, rows] = metric.compute(recorded.logits, torch.tensor(rows)).cpu().numpy()
    interventions, places = [], []
    for s, spot in enumerate(spots):
        for b in range(len(pairs)):
            if not (cells[s, b] or every):
                positions(pairs, spot, b, donors.rng)  # draws as a whole sweep does
                continue
            traced = rows.index(b)
            intervention = donors.intervention(spot, b, traced, receiving, source)
            if intervention is not None and cells[s, b]:
                interventions.append(EditedRun(traced, (intervention,)))
                places.append((2 + s, b))
    measured[2:] = np.where(cells, measured[0], np.nan)
    if places:
        at_rows = Metric(metric.name, lambda x, i: metric.compute(x, torch.tensor(rows)[i]), metric.columns)
        values = run_interventions(receiving, interventions, at_rows, progress=progress)
        measured[tuple(np.array(places).T)] = values.numpy()
    return measured


def _values(recorded: Trace, spot: Spot, row: int, columns: list[int]) -> torch.Tensor:
    """(k, width) of a spot in a trace."""
    values = recorded.value(spot.site)[row, columns]
    return values - recorded.inputs[spot.site.layer][row, columns] if spot.update else values


def positions(pairs: Pairs, spot: Spot, row: int, rng: np.random.Generator | None = None) -> tuple[int, ...]:
    """Positions of a spot in one pair's prompts; `rng` is needed for spots elsewhere."""
    kind, _, number = spot.position.partition(" ")
    if kind == "token":
        return (int(number),) if int(number) < len(pairs.roles[row]) else ()
    inside = pairs.positions(row, spot.position)
    if not spot.elsewhere or not inside or rng is None:
        return inside
    others = [i for i in pairs.positions(row, "") if i not in inside]
    count = min(len(inside), len(others))
    return tuple(sorted(int(i) for i in rng.choice(others, count, replace=False))) if count else ()


def _source_means(
    model: CausalLM, pairs: Pairs, spots: Sequence[Spot], source: str
) -> dict[Spot, torch.Tensor]:
    """Mean over the source's prompts, from the trigger on, of each spot's values: (width,)."""
    sums: dict[Spot, torch.Tensor] = {}
    count = 0
    for _, part in pairs.parts():
        recorded = trace(model, part.batch(source, model.device), sorted({s.site for s in spots}, key=str))
        for row in range(len(part)):
            columns = recorded.batch.columns(row, part.positions(row, ""))
            count += len(columns)
            for spot in spots:
                total = _values(recorded, spot, row, columns).float().sum(0)
                sums[spot] = sums[spot] + total if spot in sums else total
    return {spot: total / count for spot, total in sums.items()}


class _SweepStore:
    """Results batch by batch, in memory and, where a folder is given, in a file that outlives the process."""

    def __init__(self, folder: Path | None, key: str) -> None:
        self.path = path = None if folder is None else folder / f"sweep-{key[:16]}.npz"

        def read() -> list[np.ndarray]:
            if path is None or not path.exists():
                return []
            try:
                with np.load(path) as file:
                    return [file[f"arr_{i}"] for i in range(len(file.files))]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                log.warning("%s: is damaged (%s) and is made anew.", path, error)
                return []

        self.arrays: list[np.ndarray] = parallel.from_first(read)

    def add(self, array: np.ndarray) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as handle:  # by its name, numpy would give it another ending
                np.savez(handle, *self.arrays)

        self.arrays.append(array)
        if self.path is not None:
            write_atomically(self.path, write)


def cost(architecture: Architecture, pairs: Pairs, spots: Sequence[Spot]) -> float:
    """About how many multiplications it takes to intervene at every spot on every pair.

    A run begins at the layer and position that it changes; what comes before is the recorded run's.
    """
    weights = [sum(p.numel() for p in parts.layer.parameters()) for parts in architecture.layers]
    left = np.cumsum(weights[::-1])[::-1]
    total = 0.0
    for spot in spots:
        first = [next(iter(positions(pairs, spot, row)), None) for row in range(len(pairs))]
        tokens = sum(len(pairs.roles[row]) - p for row, p in enumerate(first) if p is not None)
        total += float(left[spot.site.layer]) * tokens
    return total


def runs_of(direction: Direction) -> tuple[str, str]:
    """Receiving and source run: `remove` puts the placebo's activations into the triggered run."""
    if direction not in DIRECTIONS:
        raise InputError(f"direction: there is no {direction!r}; choose one of {', '.join(DIRECTIONS)}.")
    return ("triggered", "placebo") if direction == "remove" else ("placebo", "triggered")


def default_components(by: str, mode: str | None = "patch") -> tuple[str, ...]:
    """The components of a named sweep where none are named; a knock-out has one of its own, attention."""
    return ("attention",) if mode == "knock_out" else DEFAULT_SITES.get(by, SWEEP_SITES[by][:1])


def spots_by(
    architecture: Architecture, by: str, components: Sequence[str] = (), mode: str = "patch"
) -> Iterator[Spot]:
    """The spots of a named sweep.

    Args:
        architecture: of the model.
        by: `layer` (what a whole layer adds), `position` (each role by itself), `component` (what attention
            and MLP add), `head`, `expert` or `adapter`; all but `position` at every position from the
            trigger on.
        components: others than the sweep's own, of those in `SWEEP_SITES`.
        mode: `knock_out` has a component of its own, attention.

    Raises:
        InputError: if there is no such sweep or component, or the sweep does not take it.
    """
    if by not in SWEEP_SITES:
        raise InputError(f"--by: there is no sweep {by!r}; choose among {', '.join(SWEEP_SITES)}.")
    for component in components or default_components(by, mode):
        sites = architecture.sites(component)
        if component not in SWEEP_SITES[by]:
            raise InputError(f"--sites: by {by} takes {', '.join(SWEEP_SITES[by])}, not {component!r}.")
        if by == "layer":
            sites = [Site(component, layer) for layer in sorted({site.layer for site in sites})]
        for site in sites:
            if by == "position":
                yield from (Spot(site, role) for role in POSITIONS)
            else:
                yield Spot(site, update=by == "layer" and component == "resid_post")


def evenly_spaced(spots: Sequence[Spot], most: int) -> list[Spot]:
    """The spots at every n-th layer from the first on, so that at most `most` layers are left.

    The residual stream passes from layer to layer: what is not measured lies between two that are.
    """
    layers = sorted({spot.site.layer for spot in spots})
    measured = set(layers[:: -(-len(layers) // most)])
    return [spot for spot in spots if spot.site.layer in measured]
