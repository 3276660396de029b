"""The files of features and monitors: arrays in safetensors, all else as JSON in its header.

Reading never runs code. A digest over header and arrays shows damage and careless edits; it is no signature,
since whoever can write the file can compute it anew.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from safetynet.errors import InputError
from safetynet.run.directory import write_atomically

VERSIONS = {"features": 8, "monitor": 8}
"""Of each kind of file. A change after which an earlier file would be read wrongly raises it. That of
features also rises when a view reads other numbers than before: a cache must not serve the old ones."""


def write(path: Path, kind: str, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays and their description, atomically.

    Args:
        path: the file.
        kind: what it is, one of `VERSIONS`; `read` asks for the same.
        about: JSON values.
        arrays: by name.
    """
    from safetensors.numpy import save_file

    solid = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    head = json.dumps({"kind": kind, "version": VERSIONS[kind], "about": about}, sort_keys=True)
    metadata = {"safetynet": head, "sha256": _digest(head, solid)}
    write_atomically(path, lambda temporary: save_file(solid, temporary, metadata=metadata))


def read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what `write` wrote.

    Raises:
        InputError: if the file is missing, damaged, edited, of another kind or another version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path}: there is no such file. Fit and save a {kind} first.")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            head, stated = metadata["safetynet"], metadata["sha256"]
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise InputError(f"{path}: this is no {kind} of SafetyNet, or it is damaged ({error}).") from None
    content = json.loads(head)
    if content["kind"] != kind:
        raise InputError(f"{path}: this file is of kind {content['kind']}, not {kind}. Name the right file.")
    if content["version"] != VERSIONS[kind]:
        raise InputError(
            f"{path}: this {kind} was saved in format {content['version']}, this SafetyNet reads "
            f"{VERSIONS[kind]}. Fit it again."
        )
    if stated != _digest(head, arrays):
        raise InputError(
            f"{path}: the {kind} is not what was saved (its digest differs), so its scores cannot be "
            "trusted. Fit it again or restore the file."
        )
    return content["about"], arrays


def below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Arrays whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _digest(head: str, arrays: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256(head.encode())
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"{name} {array.shape} {array.dtype}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
