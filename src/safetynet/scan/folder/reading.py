"""Files of a folder that nobody vouches for, read without running, following or believing anything.

In: a folder. Out: its files, and what small ones say. Links that leave the folder are not followed; files
that are larger than they may be, no UTF-8 or no JSON give one sentence that says so.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetynet.errors import InputError
from safetynet.models.files import in_words
from safetynet.scan.result import Finding, Level

LARGEST_TEXT = 64 * 2**20
"""Bytes of a configuration or template; those that are published have at most 100,000."""
LARGEST_VOCABULARY = 2**29
"""Bytes of a tokenizer.json; those that are published have at most 40 MB."""
MOST_FILES = 20_000


class UnreadableError(Exception):
    """A file that cannot be read as what it claims to be; its text is one clause that says why."""


@dataclass(frozen=True)
class Entry:
    """A file of a folder."""

    path: Path
    name: str
    """Relative to the folder, with `/`."""
    bytes: int
    leaves: str = ""
    """Where it points, of a link that leaves the folder; "" otherwise."""


def entries(folder: Path) -> tuple[Entry, ...]:
    """Every file below a folder, by name; hidden folders of version control are left out.

    A link that leaves the folder is listed and not followed, but for the hub's cache, whose snapshots are
    links to the blobs beside them.

    Raises:
        InputError: if this is no folder, it cannot be listed, is empty or holds more than `MOST_FILES` files.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder. Name the folder of an adapter or of a model.")
    every = list[Entry]()
    try:
        root = folder.resolve()
        # A snapshot of the hub's cache: its files are links to the blobs two folders above.
        cached = len(root.parents) > 1 and root.parent.name == "snapshots"
        inside = (root, root.parents[1] / "blobs") if cached else (root,)
        for above, below, files in os.walk(folder):
            linked = [name for name in below if Path(above, name).is_symlink()]
            below[:] = [name for name in below if name not in (".git", *linked)]
            for name in (*files, *linked):
                if len(every) == MOST_FILES:
                    raise InputError(
                        f"{folder}: it holds more than {MOST_FILES:,} files. Name a model's folder."
                    )
                path = Path(above, name)
                leaves = _leaves(path, inside)
                size = 0 if leaves else path.stat().st_size
                every.append(Entry(path, path.relative_to(folder).as_posix(), size, leaves))
    except OSError as error:
        raise InputError(
            f"{folder}: it cannot be listed ({in_words(error)}). Check its permissions."
        ) from None
    if not every:
        raise InputError(f"{folder}: this folder is empty. Name the folder of an adapter or of a model.")
    return tuple(sorted(every, key=lambda entry: entry.name))


def _leaves(path: Path, inside: tuple[Path, ...]) -> str:
    """Where a link points that leaves these folders, or that it is no file; "" of what may be read."""
    if not path.is_symlink():
        # A pipe or a device: opening it may wait for ever.
        return "" if path.is_file() else "a special file"
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return str(path.readlink())
    stays = any(target.is_relative_to(folder) for folder in inside) and target.is_file()
    return "" if stays else str(path.readlink())


def finding(rule: str, level: Level, message: str, where: str = "", /, **evidence: Any) -> Finding:
    """A finding of the first rung; evidence may have any name, as the fields of a suspect's files have."""
    return Finding("files", rule, level, message, where, evidence=evidence)


def repeated(keys: Sequence[str], where: str) -> Finding:
    """That a JSON object gives keys twice."""
    message = f"It gives {escaped(', '.join(keys[:3]))} twice, and programs differ in which they take."
    return finding("duplicate-key", "warning", message, escaped(where), keys=[escaped(k) for k in keys[:12]])


def escaped(text: str, most: int = 300) -> str:
    """A text of somebody else's as reports may hold it: control signs escaped, cut at `most`."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(
        sign if sign.isprintable() or sign in "\n\t" else sign.encode("unicode_escape").decode()
        for sign in cut
    )


def text_of(path: Path, largest: int = LARGEST_TEXT) -> str:
    """A file's text.

    Raises:
        UnreadableError: if it is larger than `largest` bytes or no UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > largest:
            raise UnreadableError(f"it has {size:,} bytes, more than any such file needs")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"it is no UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UnreadableError(in_words(error)) from None


def json_of(path: Path, largest: int = LARGEST_TEXT) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A file's JSON object, and the keys that it gives twice: programs differ in which of two they take.

    Raises:
        UnreadableError: as `text_of`, or if it is no JSON object.
    """
    twice = list[str]()

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(items)
        if len(values) < len(items):
            number = Counter(key for key, _ in items)
            twice.extend(key for key in values if number[key] > 1)
        return values

    try:
        values = json.loads(text_of(path, largest), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"it is no JSON ({in_words(error)[:120]})") from None
    if not isinstance(values, dict):
        raise UnreadableError("it is JSON, but no object")
    return values, tuple(dict.fromkeys(twice))
