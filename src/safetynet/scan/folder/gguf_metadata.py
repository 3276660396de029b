"""Chat templates in the metadata of a GGUF file, read without the tensors or any library.

In: a .gguf file. Out: its templates by name. Source: the format's specification (ggml-org/ggml,
docs/gguf.md), versions 2 and 3.
"""

import mmap
import struct
from pathlib import Path

from safetynet.scan.folder.reading import UnreadableError

KEY = "tokenizer.chat_template"
"""Of the default template; further ones are `KEY.name`."""
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by its type."""
STRING, ARRAY = 8, 9
MOST_FIELDS, MOST_STRINGS, LONGEST = 10_000, 5_000_000, 2**24


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
