"""What a safetensors file says it holds, without reading a tensor or importing a library.

In: a .safetensors file. Out: type and shape of each tensor by name. Source: the format's description
(huggingface/safetensors, README): 8 bytes that give the header's length, a JSON object, the tensors' bytes.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetynet.models.files import in_words
from safetynet.scan.folder.reading import UnreadableError

LARGEST = 100_000_000
"""Bytes of a header; the library itself reads no longer one."""
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4,
}  # fmt: skip
"""Of a value, by its type."""


@dataclass(frozen=True)
class Tensor:
    """A tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by name.

    Raises:
        UnreadableError: if the header is damaged, or does not describe the bytes that follow it.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise UnreadableError(f"it has {size} bytes, fewer than a header")
            length = struct.unpack("<Q", start)[0]
            if length > min(LARGEST, size - 8):
                raise UnreadableError(f"its header claims {length:,} bytes of a file of {size:,}")
            values = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableError(f"its header cannot be read ({in_words(error)[:120]})") from None
    if not isinstance(values, dict):
        raise UnreadableError("its header is no JSON object")
    values.pop("__metadata__", None)
    places = list[tuple[int, int, str]]()
    for name, value in values.items():
        fields = value if isinstance(value, dict) else {}
        dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not (
            isinstance(shape, list)
            and isinstance(offsets, list)
            and len(offsets) == 2
            and all(type(n) is int and n >= 0 for n in (*shape, *offsets))
        ):
            raise UnreadableError(f"its header describes {name} without type, shape or place")
        if not isinstance(dtype, str):
            raise UnreadableError(f"its header describes {name} without a type")
        begin, end = offsets
        # A type that is newer than this table is taken at its word.
        if dtype in BITS and math.prod(shape) * BITS[dtype] != 8 * (end - begin):
            raise UnreadableError(f"{name} has {end - begin:,} bytes, which its shape {shape} does not fill")
        places.append((begin, end, name))
    # The format has no holes: bytes that belong to no tensor would go unseen with the file.
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            raise UnreadableError(f"the bytes of {name} do not follow those before them")
        at = end
    if at != size - 8 - length:
        raise UnreadableError(f"its header describes {at:,} bytes of {size - 8 - length:,}")
    return {name: Tensor(value["dtype"], tuple(value["shape"])) for name, value in values.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("it names a tensor twice")
    return values
