"""Where a run lies, and what belongs to it: its scratch, its log, the files that its recipe names.

A run is where its folder lies, also after it was copied or moved. It writes into that folder, and into a
scratch folder that is its own. In: folders, and what a manifest says of them. Out: paths. Writes nothing but
the mark by which a scratch folder names its run.
"""

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetynet.recipe import PACKAGED, Recipe, is_task_file
from safetynet.run import parallel

MARK = ".run"
"""File in a scratch folder that names the run it belongs to."""
PATHS = (
    ("model", "id"),
    ("suspect", "source"),
    ("data", "path"),
    ("evaluation", "labelled"),
    ("mitigation", "clean"),
)
"""Fields of a recipe that may name a file or a folder."""


@dataclass(frozen=True)
class Places:
    """Where the large artefacts and the log of a run are."""

    scratch: Path
    """Where it writes large artefacts; the run folder itself where it has no scratch of its own."""
    read_only: tuple[Path, ...]
    """Scratch folders of before, or of the run that this one was copied from: read and never written."""
    log: Path


def opened(folder: Path, manifest: Mapping[str, Any]) -> Places:
    """Where the parts of the run in `folder` are.

    Args:
        folder: absolute.
        manifest: of the run. `folder`, `scratch` and `log` are as they were where it was described last.
    """
    recorded = _recorded(folder, manifest)
    is_own = _scratch(manifest) is not None and bool(recorded) and _belongs(recorded[0], folder, manifest)
    return Places(
        scratch=recorded[0] if is_own else folder,
        read_only=tuple(recorded[1:] if is_own else recorded),
        log=_log(folder, manifest),
    )


def made(folder: Path, manifest: Mapping[str, Any], scratch: Path | None, log: Path) -> Places:
    """Where the parts of a run will be whose recipe is at hand.

    Args:
        folder: absolute.
        manifest: of what lies there already, or nothing.
        scratch: the one that the recipe or the environment asks for; None: the run folder. Where it is
            another run's, this one gets a folder of its own beside it.
        log: as the recipe says.
    """
    place, recorded = folder if scratch is None else scratch, _recorded(folder, manifest)
    if not _belongs(place, folder, manifest):
        place = place.with_name(f"{place.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}")
    return Places(place, tuple(path for path in recorded if not same(path, place)), log)


def claim(scratch: Path, folder: Path) -> None:
    """Write into a scratch folder that it belongs to the run in `folder`; one that is not there stays so."""
    fields = {"folder": str(folder), "scratch": str(scratch), "host": socket.gethostname()}
    path, mark = scratch / MARK, json.dumps(fields) + "\n"
    if same(scratch, folder) or not scratch.is_dir() or not parallel.is_first():
        return
    with suppress(OSError):  # who cannot write there is told by what wants to
        if not path.exists() or path.read_text(encoding="utf-8") != mark:
            path.write_text(mark, encoding="utf-8")


def described(folder: Path, places: Places, recipe: Recipe) -> dict[str, Any]:
    """What the manifest says of where a run is; None for what there is not."""
    local = [
        f"{section}.{field}" for section, field in PATHS if _relative(recipe, section, field, Path.cwd(), [])
    ]
    return {
        "folder": str(folder),
        "scratch": None if same(places.scratch, folder) else str(places.scratch),
        "read_only": [str(path) for path in places.read_only] or None,
        "log": str(places.log),
        "paths": {"begin": os.path.relpath(Path.cwd(), folder), "local": local},
    }


def located(recipe: Recipe, folder: Path, manifest: Mapping[str, Any]) -> Recipe:
    """A recipe whose relative paths begin where the run was made, from wherever it is opened.

    Args:
        recipe: as the manifest holds it.
        folder: of the run.
        manifest: of the run; one without `paths` leaves the recipe as it is.
    """
    paths = manifest.get("paths")
    if not paths:
        return recipe
    begin = Path(os.path.normpath(folder / paths["begin"]))
    if same(begin, Path.cwd()):
        return recipe
    for section, field in PATHS:
        if (path := _relative(recipe, section, field, begin, paths["local"])) is not None:
            part = getattr(recipe, section)
            kind = type(getattr(part, field))
            recipe = recipe.model_copy(update={section: part.model_copy(update={field: kind(path)})})
    utility = tuple(
        str(begin / task) if is_task_file(task) and (begin / task).exists() else task
        for task in recipe.evaluation.utility
    )
    evaluation = recipe.evaluation.model_copy(update={"utility": utility})
    return recipe.model_copy(update={"evaluation": evaluation})


def same(first: Path, second: Path) -> bool:
    """Whether two paths are one place."""
    if first == second:
        return True
    try:
        return first.samefile(second)
    except OSError:
        return False


def is_copied(recorded: str, folder: Path) -> bool:
    """Whether a file in `folder` that names the run folder `recorded` came there as a copy of that run's."""
    return bool(recorded) and Path(recorded).is_dir() and not same(Path(recorded), folder)


def _relative(recipe: Recipe, section: str, field: str, begin: Path, local: list[str]) -> Path | None:
    """Where a relative path of a recipe leads from `begin`; None for what is no such path.

    What was a file when the run was made (`local`) and is neither there nor here is looked for there, so that
    nobody takes it for a name on the hub.
    """
    value = getattr(getattr(recipe, section), field, None)  # an experiment may have no suspect
    if value is None or str(value) in PACKAGED or str(value).startswith(("/", "~")):
        return None
    path = Path(os.path.normpath(begin / value))
    lost = f"{section}.{field}" in local and not Path(value).exists()
    return path if path.exists() or lost else None


def _scratch(manifest: Mapping[str, Any]) -> str | None:
    """The scratch folder that a manifest names, if the run had one."""
    scratch: str | None = manifest.get("scratch")
    if "folder" in manifest:
        return scratch
    # Before `folder` was recorded, a run without a scratch had its own folder written down as one.
    outputs = [path for record in manifest["stages"].values() for path in record.get("outputs", {})]
    return scratch if any(path.startswith("scratch:") for path in outputs) else None


def _recorded(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Scratch folders that a manifest names, the last one first; not the run folder itself."""
    home = _home(manifest)
    paths = []
    for name in (_scratch(manifest), *manifest.get("read_only", ())):
        if not name:
            continue
        path = Path(name)
        if home is not None and not same(home, folder):
            # The run was moved: where the path leads from the new place, if the scratch moved along with it.
            along = Path(os.path.normpath(folder / os.path.relpath(path, home)))
            path = along if along.is_dir() else path
        paths.append(path)
    return [path for path in dict.fromkeys(paths) if not same(path, folder)]


def _belongs(scratch: Path, folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a scratch folder, as asked for or recorded, is that of the run in `folder`.

    It is if it says so, and if its run is gone from this machine: then the run was moved. Nobody can tell
    whether a run of another machine is gone.
    """
    if same(scratch, folder):
        return True
    try:
        mark = json.loads((scratch / MARK).read_text(encoding="utf-8"))
        owner, place, host = Path(mark["folder"]), Path(mark["scratch"]), mark["host"]
    except (OSError, ValueError, KeyError, TypeError):
        place = None
    if place is not None and same(place, scratch):
        return same(owner, folder) or (host == socket.gethostname() and not owner.is_dir())
    # It names no run, or came along with a copy: another's is the one that a copied run's manifest names.
    named = (manifest.get("scratch"), *manifest.get("read_only", ()))
    return str(scratch) not in named or not _moved(folder, manifest)


def _home(manifest: Mapping[str, Any]) -> Path | None:
    """Where a run lay when it was described; None where an old manifest does not tell."""
    home = manifest.get("folder", None if _scratch(manifest) else manifest.get("scratch"))
    return None if home is None else Path(home)


def _moved(folder: Path, manifest: Mapping[str, Any]) -> bool:
    home = _home(manifest)
    return home is None or not same(home, folder)


def _log(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """The log of a run: where it was, as seen from the run folder, unless that is another's or not there."""
    inside, home = folder / "run.log", _home(manifest)
    log = Path(manifest.get("log", inside))
    if log.is_relative_to(folder) or not _moved(folder, manifest):
        return log
    if home is None or home.parts[-2:] != folder.parts[-2:]:
        return inside
    along = Path(os.path.normpath(folder / os.path.relpath(log, home)))
    is_others = along == log and home.is_dir()
    return along if along.parent.is_dir() and not is_others else inside
