"""Rows of one file, by its suffix: JSON, JSONL, CSV, Parquet.

In: a path. Out: row numbers and raw rows, unchecked; what they mean is the business of `sources`.
"""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetynet.errors import InputError

Record = tuple[int, Any]
"""Row number in the file, from 1, and the row as the file has it."""


def records(path: Path) -> list[Record]:
    """The rows of one file, unchecked and in order, by the file's suffix.

    Raises:
        InputError: if the file is missing, empty, of another format, malformed, or not UTF-8.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder, allowed is a file; name one of its files")
    if not path.exists():
        raise InputError(
            f"{path}: no such file; check the path (a data set of the hub needs data.source: hub)"
        )
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"{path}: the suffix is {path.suffix!r}, allowed are {', '.join(FORMATS)}; convert the file"
        )
    try:
        rows = FORMATS[path.suffix.lower()](path)
    except PermissionError:
        raise InputError(f"{path}: may not be read; change the file's permissions") from None
    if not rows:
        raise InputError(f"{path}: holds no rows; name a file with at least one")
    return rows


def _text(path: Path) -> str:
    data = path.read_bytes()
    mark = len(b"\xef\xbb\xbf") if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        return data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = mark + error.start
        line = data.count(b"\n", 0, at) + 1
        raise InputError(
            f"{path}: byte {at} (line {line}) is 0x{data[at]:02x}, which is not UTF-8; save the file as UTF-8"
        ) from None


def _parsed(path: Path, text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{path}: {at}: malformed JSON ({error.msg}); correct that line") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: line {line}: unreadable JSON ({error}); correct the file") from None


def _json(path: Path) -> list[Record]:
    text = _text(path)
    if not text.strip():
        return []
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _jsonl(path)  # one object per line under the name .json, as hub exports have it
    except (ValueError, RecursionError):
        pass
    rows = _parsed(path, text)
    if not isinstance(rows, list):
        items = rows.items() if isinstance(rows, dict) else ()
        lists = [key for key, value in items if isinstance(value, list)]
        hint = f"save the list under {lists[0]!r} alone" if lists else "save a list of objects"
        raise InputError(f"{path}: the top level is {type(rows).__name__}, allowed is a list of rows; {hint}")
    return list(enumerate(rows, start=1))


def _jsonl(path: Path) -> list[Record]:
    # not splitlines(): it also breaks at U+2028, which JSON allows within a string
    lines = enumerate(_text(path).split("\n"), start=1)
    return [(number, _parsed(path, line, number)) for number, line in lines if line.strip()]


def _csv(path: Path) -> list[Record]:
    text = _text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # the default refuses long answers
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        return list(enumerate(table, start=1))  # cells beyond the header come under the key None
    except csv.Error as error:
        where = f"{path}: line {table.line_num}"
        raise InputError(f"{where}: malformed CSV ({error}); correct the quotes") from None


def _parquet(path: Path) -> list[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        return list(enumerate(parquet.read_table(path).to_pylist(), start=1))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a readable Parquet file ({reason}); write it again") from None


FORMATS: dict[str, Callable[[Path], list[Record]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
