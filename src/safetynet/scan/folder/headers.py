"""What a file of weights says before its tensors, read without one of them and without any library.

In: a .safetensors or a .gguf file. Out: type and shape of each tensor, or the chat templates. Sources: the
formats' descriptions. safetensors (huggingface/safetensors, README) is 8 bytes that give the header's length,
a JSON object, the tensors' bytes; of GGUF (ggml-org/ggml, docs/gguf.md) versions 2 and 3 are read.
"""

import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetynet.models.files import in_words
from safetynet.scan.folder.reading import UnreadableError

LARGEST = 100_000_000
"""Bytes of a safetensors header; the library itself reads no longer one."""
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4,
}  # fmt: skip
"""Of a value in safetensors, by its type."""
KEY = "tokenizer.chat_template"
"""Of the default template; further ones are `KEY.name`."""
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value in GGUF, by its type."""
STRING, ARRAY = 8, 9
MOST_FIELDS, MOST_STRINGS, LONGEST = 10_000, 5_000_000, 2**24
"""Of GGUF: fields, strings of an array, and bytes of a string."""


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


def chat_templates(path: Path) -> dict[str, str]:
    """Templates by name; `default` is the one without a name.

    Raises:
        UnreadableError: if the file is no GGUF of version 2 or 3, or its metadata are damaged.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            return _Metadata(memory).templates()
    except (struct.error, IndexError, OverflowError):
        raise UnreadableError("its metadata end before they are whole") from None
    except (OSError, ValueError) as error:  # mmap says ValueError of an empty file
        raise UnreadableError(str(error)) from None


class _Metadata:
    """A place in the fields of a GGUF file."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        magic, version, _, self.fields = struct.unpack_from("<4sIQQ", memory, 0)
        self.at = 24
        if magic != b"GGUF" or version not in (2, 3):
            raise UnreadableError("it is no GGUF file of version 2 or 3")
        if self.fields > MOST_FIELDS:
            raise UnreadableError(f"it claims {self.fields:,} fields of metadata")

    def templates(self) -> dict[str, str]:
        """Every template among the fields."""
        templates = {}
        for _ in range(self.fields):
            key = self.string().decode("utf-8", "replace")
            kind = self.number("<I")
            if kind == STRING and (key == KEY or key.startswith(f"{KEY}.")):
                name = key.removeprefix(KEY).removeprefix(".") or "default"
                templates[name] = self.string().decode("utf-8", "replace")
            else:
                self.skip(kind)
        return templates

    def number(self, form: str) -> int:
        """An unsigned integer."""
        value: int = struct.unpack_from(form, self.memory, self.at)[0]
        self.at += struct.calcsize(form)
        return value

    def string(self) -> bytes:
        """Bytes of a string, which stand behind their number."""
        length = self.number("<Q")
        if length > min(LONGEST, len(self.memory) - self.at):
            raise UnreadableError(f"a string of its metadata claims {length:,} bytes")
        self.at += length
        return self.memory[self.at - length : self.at]

    def skip(self, kind: int) -> None:
        """Go past a value."""
        if kind in SIZES:
            self.at += SIZES[kind]
        elif kind == STRING:
            self.string()
        elif kind == ARRAY:
            of, length = self.number("<I"), self.number("<Q")
            if of in SIZES:
                self.at += SIZES[of] * length
            elif of == STRING and length <= MOST_STRINGS:
                # A vocabulary has 150,000 of them: no call for each.
                unpack, memory = struct.Struct("<Q").unpack_from, self.memory
                at = self.at
                for _ in range(length):
                    at += 8 + unpack(memory, at)[0]
                self.at = at
            else:
                raise UnreadableError(f"an array of its metadata holds {length:,} values of type {of}")
        else:
            raise UnreadableError(f"a field of its metadata is of the type {kind}, which GGUF does not have")
        if self.at > len(self.memory):
            raise UnreadableError("its metadata end before they are whole")
