"""A sweep: every point of a grid through Parsl, as a graph, to one table.

In: points, where workers run, a folder. Out: what became of each point. The graph: all points are prepared;
then the base models answer, once for all points that ask them the same; then the models are trained, a clean
twin once for all points that have the same; then each point is measured, dissected and drawn. What has ended
is known from the run directories alone, so that a sweep that was stopped in any way goes on.
"""

import fcntl
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetynet.cluster import sweep_place, sweep_points
from safetynet.cluster.sweep_grid import Point
from safetynet.cluster.sweep_place import Place
from safetynet.cluster.sweep_points import Done, Task
from safetynet.errors import InputError, SafetyNetError
from safetynet.run.directory import create, write_text

log = logging.getLogger("safetynet")
Keys = Sequence[str | None]


@dataclass(frozen=True)
class Outcome:
    """What became of one point."""

    point: Point
    folder: Path
    """Its run directory."""
    log: Path
    computed: int = 0
    """Stages that this sweep computed; the others had ended before."""
    failed: str = ""
    """The step that failed; "" where all ended."""
    reason: str = ""


def sweep(
    points: Sequence[Point],
    name: str,
    folder: Path,
    place: Place,
    *,
    retries: int,
    progress: Callable[[Outcome, int], None],
) -> list[Outcome]:
    """Compute what is missing of all points.

    Args:
        points: validated.
        name: of the sweep.
        folder: of the sweep; what Parsl says goes there.
        place: where workers run.
        retries: how often a step that failed is tried again; one that refuses its input is not.
        progress: called with each outcome and the number of outcomes so far.

    Returns:
        One outcome for each point, in order.

    Raises:
        InputError: if another process works on this sweep.
    """
    import parsl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: this sweep is running already. Wait for it.") from None
        listed = [{"point": point.name, **point.varied} for point in points]
        about = json.dumps({"name": name, "points": listed}, indent=2, default=str)
        write_text(folder / "sweep.json", about + "\n")
        config = sweep_place.config(place, folder / "parsl", retries, retry_cost)
        with parsl.load(config) as kernel:
            graph = _Graph(kernel, points, name)
            return list(graph.outcomes(progress))


def retry_cost(error: Exception, _: Any) -> float:
    """What refuses its input will refuse it again; everything else may have been the place's fault."""
    return float("inf") if isinstance(error, InputError) else 1.0


class _Graph:
    """The steps of all points, as Parsl's futures."""

    def __init__(self, kernel: Any, points: Sequence[Point], name: str) -> None:
        import parsl

        self.points = points
        self.app = parsl.python_app(sweep_points.perform, data_flow_kernel=kernel)
        self.runs = [create(point.recipe) for point in points]
        self.tasks = [Task("prepare", point.recipe, name, Path.cwd()) for point in points]
        self.steps: list[dict[str, Future[Done]]] = [{} for _ in points]

    def outcomes(self, progress: Callable[[Outcome, int], None]) -> Iterator[Outcome]:
        """Build the graph and tell each point's outcome when it is known; gives all of them, in order."""
        for number in range(len(self.points)):
            self._add(number, "prepare")
        log.info("sweep: %d points, preparing their rows", len(self.points))
        prepared = {
            n: step["prepare"].result() for n, step in enumerate(self.steps) if _ended(step["prepare"])
        }
        self._build(prepared)
        last = {list(step.values())[-1]: number for number, step in enumerate(self.steps)}
        outcomes: dict[int, Outcome] = {}
        for future in as_completed(last):
            number = last[future]
            run, steps = self.runs[number], self.steps[number]
            computed = sum(len(step.result().computed) for step in steps.values() if _ended(step))
            outcome = Outcome(self.points[number], run.folder, run.log, computed)
            for step, ended in steps.items():
                if (error := ended.exception()) is not None:
                    outcome = replace(outcome, failed=step, reason=_reason(error))
                    break
            outcomes[number] = outcome
            progress(outcomes[number], len(outcomes))
        yield from (outcomes[number] for number in range(len(self.points)))

    def _build(self, prepared: dict[int, Done]) -> None:
        """Base models before adapters, training before measuring, lenders before those that they lend to."""
        bases = _lenders({n: digests.base for n, digests in prepared.items()})
        twins = _lenders({n: digests.twin for n, digests in prepared.items()})
        for number in sorted(set(bases.values())):
            self._add(number, "base")
        for number in sorted({lender for n, lender in twins.items() if n != lender}):
            self._add(number, "twin", self.steps[bases[number]]["base"])
        for number in prepared:
            base, twin = bases[number], twins.get(number, number)
            self.tasks[number] = replace(
                self.tasks[number],
                base=None if base == number else self.runs[base].folder,
                twin=None if twin == number else self.runs[twin].folder,
            )
            self._add(number, "train", self.steps[base]["base"])
        for number in prepared:
            twin = twins.get(number, number)
            self._add(number, "measure", *([self.steps[twin]["twin"]] if twin != number else []))

    def _add(self, number: int, step: str, *after: Future[Done]) -> None:
        """One more step, after the point's own steps so far and `after`."""
        before = [*self.steps[number].values(), *after]
        self.steps[number][step] = self.app(replace(self.tasks[number], step=step), *before)


def _ended(future: Future[Done]) -> bool:
    """Wait for a step; whether it ended without error."""
    return future.exception() is None


def _lenders(keys: dict[int, str | None]) -> dict[int, int]:
    """For each point the first one that has the same key."""
    first: dict[str, int] = {}
    return {number: first.setdefault(key, number) for number, key in keys.items() if key is not None}


def _reason(error: BaseException) -> str:
    """One sentence; of a step whose forerunner failed, what that one failed of."""
    causes = getattr(error, "dependent_exceptions_tids", None)
    if causes:
        return _reason(causes[0][0])
    text = " ".join(str(error).split())
    return text if isinstance(error, SafetyNetError) else f"{type(error).__name__}: {text}"
