"""The run directory: where one experiment keeps its tables, figures, manifest and large artefacts.

    results/{model}/{task}/manifest.json    recipe, seeds, versions, hardware; digests and cost of each stage
    results/{model}/{task}/tables/          one Parquet file per table
    results/{model}/{task}/figures/         figures, and the data behind each
    results/{model}/{task}/earlier/         outputs of stages that were run again with other inputs
    {scratch}/{model}/{task}/               adapters and checkpoints (the run folder when no scratch is set)
    {scratch}/{model}/{task}/unfinished-{stage}/    what a stage that has not ended has done so far
    logs/{model}/{task}.log             what the run said

Stages read and write here only. Writes are atomic; a finished stage is repeated only when its inputs changed.
Where the parts of a run are, also of one that was copied or moved, `run.places` tells.
"""

import hashlib
import json
import math
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock
from pydantic import ValidationError

from safetynet import tables
from safetynet.errors import InputError, RunError
from safetynet.extras import need
from safetynet.recipe import Recipe
from safetynet.run import lock as locking
from safetynet.run import parallel, provenance
from safetynet.run import places as whereabouts
from safetynet.run.stage import command_for

LEAST_FREE_BYTES = 200 * 2**20
"""Room that a run wants before it starts; a miniature's run fills a tenth of it."""


@dataclass(frozen=True)
class Run:
    """One experiment's folders. Make it with `create` or `find`."""

    folder: Path
    scratch: Path
    log: Path
    read_only: tuple[Path, ...] = ()
    """Scratch folders of before, or of the run that this one was copied from."""

    @property
    def figures(self) -> Path:
        """Folder of the figures."""
        return self.folder / "figures"

    def unfinished(self, stage: str) -> Path:
        """Folder for what a stage has done so far; it goes when the stage ends."""
        return self.scratch / f"unfinished-{stage}"

    @property
    def manifest(self) -> dict[str, Any]:
        """What is known of this run; stages under `stages`."""
        path = self.folder / "manifest.json"
        if not path.exists():
            return {"stages": {}}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: the manifest is damaged ({error}). Restore or delete it.") from None
        if not isinstance(manifest, dict) or not isinstance(manifest.setdefault("stages", {}), dict):
            raise InputError(f"{path}: the manifest is damaged (it holds no stages). Restore or delete it.")
        return manifest

    @property
    def recipe(self) -> Recipe:
        """The recipe that this run was made from; its relative paths begin where that was.

        Raises:
            InputError: as `recorded_recipe`.
        """
        return whereabouts.located(self.recorded_recipe, self.folder, self.manifest)

    @property
    def recorded_recipe(self) -> Recipe:
        """The recipe that this run was made from, as its manifest holds it.

        Raises:
            InputError: if it holds none, or one that this version of SafetyNet does not know.
        """
        try:
            return Recipe.model_validate(self.manifest.get("recipe"))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, ("recipe", *first["loc"])))
            raise InputError(
                f"{self.folder / 'manifest.json'}: {field}: {first['msg']}. The manifest is damaged, or of "
                "another version of SafetyNet: make the run again with safetynet run."
            ) from None

    def table(self, name: str) -> pd.DataFrame:
        """Read a table.

        Raises:
            InputError: if no stage has written it, the file is damaged, or it lacks what `tables` declares.
        """
        path = self._table_path(name)
        if not path.exists():
            there = ", ".join(sorted(p.stem for p in path.parent.glob("*.parquet"))) or "none yet"
            raise InputError(
                f"{path}: there is no such table (there are: {there}). Run the stage that makes it."
            )
        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: the table is damaged ({error}). Delete it and run again.") from None
        try:
            tables.check(name, table, extra=True)
        except InputError as error:
            raise InputError(
                f"{path}: the table is damaged or of another version ({error}). Delete it and make it again: "
                f"{command_for(name, self.folder)}."
            ) from None
        # Parquet gives lists back as arrays, whose truth value is an error.
        nested = [name for name in table if table[name].map(lambda cell: isinstance(cell, np.ndarray)).any()]
        return table.assign(**{name: table[name].map(_lists) for name in nested})

    def write_table(self, name: str, table: pd.DataFrame) -> Path:
        """Write a table as Parquet, atomically.

        Raises:
            InputError: if it is not as `tables` declares it.
        """
        tables.check(name, table)
        path = self._table_path(name)
        write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False))
        return path

    def has_table(self, name: str) -> bool:
        """Whether some stage has written this table."""
        return self._table_path(name).exists()

    def _table_path(self, name: str) -> Path:
        return self.folder / "tables" / f"{name}.parquet"

    def finished(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Whether this stage ended with these inputs and its outputs are still what it wrote."""

        def compute() -> bool:
            record = self.manifest["stages"].get(stage)
            if record is None or record["inputs"] != digest(inputs):
                return False
            return all(self._output_digest(path) == value for path, value in record["outputs"].items())

        return parallel.from_first(compute)

    @contextmanager
    def stage(self, name: str, inputs: Mapping[str, Any]) -> Iterator["Outputs"]:
        """Record a stage: the body notes what it wrote, which counts when the body ends without error.

        Outputs of an earlier run of this stage with other inputs are moved to `earlier/` first, and back
        again when the body fails before it has written any. Of several processes the first one records, and
        all go on together.
        """
        parallel.wait()
        earlier = self.manifest["stages"].get(name) if parallel.is_first() else None
        if earlier is not None and earlier["inputs"] == digest(inputs):
            earlier = None  # the same inputs: what is there is written over, not set aside
        if earlier:
            aside = self.folder / "earlier" / f"{name}-{earlier['inputs'][:8]}"
            for relative in earlier["outputs"]:
                source = self.path_of(relative)
                if source.exists() and not any(source.is_relative_to(place) for place in self.read_only):
                    _move(source, aside / Path(relative).name)
            write_text(aside / "stage.json", json.dumps(earlier, indent=2))
            with self._changed_manifest() as manifest:
                del manifest["stages"][name]

        started = time.time()
        outputs = Outputs(self)
        try:
            yield outputs
        except BaseException:
            if earlier and not outputs.paths:  # nothing new: what was there before counts again
                for relative in earlier["outputs"]:
                    if (source := aside / Path(relative).name).exists():
                        _move(source, self.path_of(relative))
                shutil.rmtree(aside)
                with self._changed_manifest() as manifest:
                    manifest["stages"][name] = earlier
            raise

        if parallel.is_first():
            record = {
                "inputs": digest(inputs),
                "recipe": self.manifest.get("recipe"),
                "outputs": {path: self._output_digest(path) for path in map(self.name_of, outputs.paths)},
                "names": {key: self.name_of(path) for key, path in outputs.names.items()},
                "seconds": round(time.time() - started, 2),
                "peak_memory_mb": round(peak_memory_mb(), 1),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            with self._changed_manifest() as manifest:
                manifest["stages"][name] = record
            shutil.rmtree(self.unfinished(name), ignore_errors=True)
        parallel.wait()

    def describe(self, recipe: Recipe) -> None:
        """Write recipe, versions and hardware into the manifest, keeping the stages that are there."""
        places = whereabouts.Places(self.scratch, self.read_only, self.log)
        about = {
            "recipe": recipe.model_dump(mode="json"),
            "seeds": {"recipe": recipe.seed},
            "versions": provenance.versions(),
            "hardware": provenance.hardware(),
            **whereabouts.described(self.folder, places, recipe),
        }
        with self._changed_manifest() as manifest:
            manifest |= about
            for name in [name for name, value in manifest.items() if value is None]:
                del manifest[name]

    @contextmanager
    def lock(self, *, wait: bool = False) -> Iterator[None]:
        """Hold this run for one process; a second one waits, or is refused instead of mixing its writes in.

        In a job of a cluster it waits a while first (`locking.JOB_WAIT_S`).

        Raises:
            InputError: if another process works on this run.
        """
        if not parallel.is_first():  # the first one holds it for all
            yield
            return
        with locking.hold(self.folder, wait_s=math.inf if wait else None):
            whereabouts.claim(self.scratch, self.folder)
            yield

    def output(self, stage: str, name: str) -> Path | None:
        """Where a file or folder lies that a finished stage has recorded under `name`; None for none."""
        recorded = self.manifest["stages"].get(stage, {}).get("names", {})
        return self.path_of(recorded[name]) if name in recorded else None

    @contextmanager
    def _changed_manifest(self) -> Iterator[dict[str, Any]]:
        """The manifest, to be changed and then written; two processes that train side by side take turns."""
        with FileLock(self.folder / ".manifest.lock") if parallel.is_pair() else nullcontext():
            manifest = self.manifest
            yield manifest
            text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
            write_text(self.folder / "manifest.json", text)

    def name_of(self, path: Path) -> str:
        """Path as the manifest names it: below the run folder, or `scratch:` and below the scratch folder."""
        if path.is_relative_to(self.folder):
            return str(path.relative_to(self.folder))
        return "scratch:" + str(path.relative_to(self.scratch))

    def path_of(self, relative: str) -> Path:
        """The path that the manifest calls `relative`.

        What is not in the scratch folder is looked for in the run folder, and then in the scratch folders
        that this run reads only: there it counts if it is still what this run's stage recorded.
        """
        place, colon, rest = relative.partition("scratch:")
        if not colon:
            return self.folder / place
        path = next((p for p in (self.scratch / rest, self.folder / rest) if p.exists()), None)
        if path is not None or not self.read_only:
            return path or self.scratch / rest
        outputs = [record.get("outputs", {}) for record in self.manifest["stages"].values()]
        digests = {written[relative] for written in outputs if relative in written}
        # A folder of another run may have changed: the digest says whether the file is still this one's.
        others = (place / rest for place in self.read_only)
        same = (p for p in others if p.exists() and digest_of_files([p]) in digests)
        return next(same, self.scratch / rest)

    def _output_digest(self, relative: str) -> str | None:
        path = self.path_of(relative)
        return digest_of_files([path]) if path.exists() else None


@dataclass
class Outputs:
    """What a stage has written so far; the manifest records it when the stage ends."""

    run: Run
    paths: list[Path] = field(default_factory=list)
    names: dict[str, Path] = field(default_factory=dict)
    """Files and folders that later stages ask for."""

    def table(self, name: str, table: pd.DataFrame) -> None:
        """Write a table of the run."""
        self.paths.append(self.run.write_table(name, table))

    def file(self, path: Path, name: str = "") -> None:
        """Note a file or folder that the stage has written, by a name if later stages ask for it."""
        self.paths.append(path)
        if name:
            self.names[name] = path


def create(recipe: Recipe) -> Run:
    """Make (or reopen) the run directory of a recipe and check that it can be written.

    Raises:
        InputError: if a folder cannot be written, the disk has too little room, or the extra `runs` is not
            installed.
    """
    _need_packages()
    run = place(recipe)
    check(run)
    whereabouts.claim(run.scratch, run.folder)
    return run


def check(run: Run) -> None:
    """Make the folders of a run and check that they can be written; errors as in `create`."""
    for path, option in ((run.folder, "output.results"), (run.scratch, "output.scratch")):
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                free = shutil.disk_usage(path).free
        except OSError as error:
            raise InputError(
                f"{option}: {path} cannot be written ({error.strerror}). Set {option} elsewhere."
            ) from None
        if free < LEAST_FREE_BYTES:
            raise InputError(
                f"{option}: {path} has {free // 2**20} MB free, a run wants {LEAST_FREE_BYTES // 2**20}. "
                f"Make room or set {option} elsewhere."
            )


def place(recipe: Recipe) -> Run:
    """The run directory of a recipe, which need not be there; nothing is written.

    Raises:
        InputError: if what is there has a damaged manifest.
    """
    out = recipe.output
    name = Path(recipe.model_name) / recipe.task
    folder = (out.results / name).absolute()
    root = out.scratch or os.environ.get("SAFETYNET_SCRATCH")
    scratch = (Path(root) / name).absolute() if root else None
    log = (out.logs / name).absolute()
    manifest = Run(folder, folder, folder / "run.log").manifest
    return _run(folder, whereabouts.made(folder, manifest, scratch, log.with_name(f"{log.name}.log")))


def find(path: Path | str) -> Run:
    """Open the run directory at `path`, wherever it was copied or moved from.

    Raises:
        InputError: if it holds no manifest or a damaged one, or the extra `runs` is not installed.
    """
    _need_packages()
    folder = Path(os.path.normpath(Path(path).absolute()))  # without `..`, which `absolute` leaves
    if not (folder / "manifest.json").exists():
        raise InputError(
            f"{path}: this is no run directory (it has no manifest.json). Make one with safetynet run."
        )
    manifest = Run(folder, folder, folder / "run.log").manifest
    return _run(folder, whereabouts.opened(folder, manifest))


def _need_packages() -> None:
    """Tables are Parquet, and most stages fit estimators: better refused here than after the training."""
    need("a run", "pyarrow", "sklearn")


def _run(folder: Path, places: whereabouts.Places) -> Run:
    return Run(folder, places.scratch, places.log, places.read_only)


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents and relative names of files, or of all files below folders."""
    total = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                total.update(str(file.relative_to(path)).encode() + b"\0")
                with file.open("rb") as handle:
                    total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write_file` by the first of several processes that work on one run; the others write nothing."""
    if parallel.is_first():
        write_file(path, write)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside `path`, then put it in place in one step.

    Raises:
        RunError: if the disk is full or refuses the write; what was at `path` is untouched.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror}). What was there before is untouched."
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux begins `ru_maxrss` with the size of the process that started this one
        lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
        if largest := [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]:
            return largest[0] / 1024
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes of `ru_maxrss`
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _move(source: Path, target: Path) -> None:
    """Put `source` in the place of `target`, whatever was there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    shutil.move(source, target)


def _lists(cell: Any) -> Any:
    return [_lists(item) for item in cell] if isinstance(cell, np.ndarray | list) else cell
