"""Many suspects, each scanned by itself: through Parsl, here or on a cluster, to one table.

In: suspects, what a scan takes, where workers run. Out: a folder and a `ScanResult` for each suspect. A scan
that was interrupted goes on with the rung that it was in; one suspect's failure stops no other.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from scipy.stats import false_discovery_control

from safetynet.cluster import sweep_place
from safetynet.cluster.sweep import retry_cost
from safetynet.cluster.sweep_place import Place
from safetynet.errors import InputError, RunError
from safetynet.scan.result import ScanResult
from safetynet.scan.stage import Options

log = logging.getLogger("safetynet")
ORDER = ("backdoored", "suspicious", "not_scannable", "nothing_found", "identical")
"""Answers as the table lists them: what somebody has to look at comes first."""


@dataclass(frozen=True)
class Task:
    """One suspect."""

    suspect: str
    folder: Path
    """Of its scan, absolute."""
    base: str | None
    options: Options
    begun_in: Path
    """Where the command was given; relative paths begin there."""


def folders_of(suspects: Sequence[str], out: Path) -> list[Path]:
    """A folder for each suspect below `out`, named by what tells the suspects apart.

    Raises:
        InputError: if a suspect is named twice.
    """
    paths = [Path(suspect) for suspect in suspects]
    local = [path.resolve() for path in paths if path.exists()]
    above = Path(os.path.commonpath([path.parent for path in local])) if local else Path()
    names = [
        "-".join(path.resolve().relative_to(above).parts) if path.exists() else suspect.replace("/", "-")
        for path, suspect in zip(paths, suspects, strict=True)
    ]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"suspect: {min(twice)} is named twice. Name each suspect once.")
    return [out / name for name in names]


def scan_each(
    suspects: Sequence[str], base: str | None, options: Options, out: Path, place: Place
) -> Iterator[tuple[Task, ScanResult]]:
    """Scan suspects side by side; what fails in a worker is an answer as well.

    Args:
        suspects: folders or hub ids.
        base: of all of them; None: the one that each adapter names.
        options: as for one scan.
        out: a folder of each scan is made there, and `parsl` for what Parsl says.
        place: where workers run.

    Yields:
        What was scanned and its result, in the order in which scans end.

    Raises:
        InputError: if a suspect is named twice, or a folder cannot be written.
    """
    import parsl

    from safetynet.scan.outputs import saving

    here, out = Path.cwd(), out.absolute()
    tasks = [
        Task(suspect, folder, base, options, here)
        for suspect, folder in zip(suspects, folders_of(suspects, out), strict=True)
    ]
    for task in tasks:
        saving.prepare(task.folder, [task.suspect])
    with parsl.load(sweep_place.config(place, out / "parsl", 1, retry_cost)) as kernel:
        app = parsl.python_app(perform, data_flow_kernel=kernel)
        futures = {app(task): task for task in tasks}
        for future in as_completed(futures):
            task = futures[future]
            error = future.exception()
            if error is None:
                yield task, future.result()
                continue
            # A scan whose worker was lost, or that its input refused.
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            result = ScanResult(
                answer="not_scannable", reason=reason, suspect=task.suspect, base=task.base or "",
                depth=task.options.depth, rate=None, p_value=None, rungs=(), seed=task.options.seed,
            )  # fmt: skip
            _save(result, task)
            yield task, result


def perform(task: Task) -> ScanResult:
    """Scan one suspect into its folder; what a worker does."""
    from safetynet.models import loading
    from safetynet.run.logs import logging_to
    from safetynet.scan import stage
    from safetynet.stages import planted_control

    os.chdir(task.begun_in)
    loading.use_one_thread()  # as many workers run as there are cores

    # One positive control of a base serves all scans.
    control = partial(planted_control, task.folder.parent)
    with logging_to(task.folder / "scan.log"):
        result = stage.scan(task.suspect, task.base, task.options, folder=task.folder, control=control)
        _save(result, task)
    return result


def _save(result: ScanResult, task: Task) -> None:
    from safetynet.scan.outputs import saving

    try:
        saving.save(result, task.folder)
    except RunError as error:  # the answer goes into the table
        log.warning("scan: %s", error)


def table(results: Sequence[tuple[Task, ScanResult]]) -> pd.DataFrame:
    """One line for each suspect, those to look at first.

    `q` is the p-value corrected for the number of suspects after Benjamini and Hochberg, which holds for
    conformal p-values of one bank (Bates et al. 2023): of the suspects with q below 0.1, at most a tenth are
    expected to be clean.

    Args:
        results: as `scan_each` gives them.
    """
    lines = [
        {
            "suspect": task.suspect,
            "answer": result.answer,
            "p_value": result.p_value,
            "rate": result.rate,
            "trigger": result.triggers[0].text if result.triggers else "",
            "behaviour": result.triggers[0].behaviour if result.triggers else "",
            "asr": result.triggers[0].asr[0] if result.triggers else None,
            "base": result.base,
            "seconds": result.seconds,
            "folder": str(task.folder),
            "reason": result.reason,
        }
        for task, result in results
    ]
    every = pd.DataFrame(lines)
    tested = every["p_value"].notna()
    every.insert(3, "q", pd.Series(float("nan"), every.index))
    if tested.any():
        every.loc[tested, "q"] = false_discovery_control(every.loc[tested, "p_value"].astype(float))
    rank = every["answer"].map(ORDER.index)
    return every.assign(rank=rank).sort_values(["rank", "p_value"]).drop(columns="rank")
