"""Rows of one file, by its suffix: JSON, JSON lines, CSV, Parquet, Arrow, logs of Inspect; packed or not.

In: a path. Out: row numbers and raw rows, unchecked; what they mean is the business of `forms` and `sources`.
Text stays text: nothing that looks like a number, a date or "no value" is taken for one.
"""

import csv
import io
import itertools
import json
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetynet.backdoors.forms import ASKED, is_blank, name_of, whole
from safetynet.errors import InputError
from safetynet.extras import need

log = logging.getLogger(__name__)
Record = tuple[int, Any]
"""Row number in the file, from 1, and the row as the file has it."""
Parts = dict[str, list[Record]]
"""Rows by the key that they lie below; "" where the file is one list."""
PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What the library datasets writes beside rows."""
MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
BEYOND = None
"""Key in a CSV row whose cells do not match the header: a list of cells too many, or how many are missing."""


def format_of(path: Path) -> str:
    """The suffix that says what a file holds: .csv of data.csv.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
        return suffixes[-1] if suffixes else path.suffix
    return path.suffix.lower()


def data_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files below a folder that hold rows, and all others; hidden ones are neither.

    Raises:
        InputError: if none holds rows.
    """
    every = sorted(file for file in folder.rglob("*") if not file.is_dir())
    visible = [f for f in every if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
    # What the library datasets keeps for itself: metadata, and results of a map or filter.
    caches = {f for f in visible if f.name.startswith("cache-") and (f.parent / "state.json").exists()}
    rows = [f for f in visible if format_of(f) in FORMATS and f.name not in METADATA and f not in caches]
    if not rows:
        common, others = ", ".join(list(FORMATS)[:4]), ", ".join(list(FORMATS)[4:])
        raise InputError(f"{folder}: no {common} file in this folder, nor {others}; name one that has some")
    return rows, [file for file in visible if file not in set(rows)]


def records(path: Path) -> Parts:
    """The rows of one file, unchecked and in order, by the file's suffix.

    A JSON file may also be an object with lists of rows in it, such as {"data": [...]} or one list for each
    split; a list that is alone there is the file's.

    Raises:
        InputError: if the file is missing, empty, of another format, malformed, or not UTF-8.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder, allowed is a file; name one of its files")
    if not path.exists():
        raise InputError(
            f"{path}: no such file; check the path (a data set of the hub needs data.source: hub)"
        )
    if format_of(path) not in FORMATS:
        allowed = f"{', '.join(FORMATS)}, each also packed as {', '.join(PACKED)}"
        raise InputError(f"{path}: the suffix is {path.suffix!r}, allowed are {allowed}; convert the file")
    try:
        data = path.read_bytes()
    except PermissionError:
        raise InputError(f"{path}: may not be read; change the file's permissions") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the disk") from None
    if packing := PACKED.get(path.suffix.lower()):
        need(str(path), "pyarrow")
        import pyarrow

        try:
            data = pyarrow.CompressedInputStream(pyarrow.BufferReader(data), packing).read()
        except OSError as error:
            raise InputError(f"{path}: not a readable {path.suffix} file ({error}); pack it again") from None
    rows = FORMATS[format_of(path)](path, data)
    if not any(rows.values()):
        raise InputError(f"{path}: holds no rows; name a file with at least one")
    return {part: listed for part, listed in rows.items() if listed}


def _text(path: Path, data: bytes) -> str:
    if encoding := next((name for mark, name in MARKS.items() if data.startswith(mark)), None):
        raise InputError(f"{path}: it is {encoding}; save the file as UTF-8")
    if (at := data.find(0)) >= 0:
        line = data.count(10, 0, at) + 1
        raise InputError(
            f"{path}: line {line} holds a NUL byte, as UTF-16 and damaged files do; save the file as UTF-8"
        )
    mark = len(b"\xef\xbb\xbf") if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        return data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = mark + error.start
        other = data[at : at + 1].decode("cp1252", "replace")
        raise InputError(
            f"{path}: byte {at} (line {data.count(10, 0, at) + 1}) is 0x{data[at]:02x}, which is not UTF-8 "
            f"(in Windows-1252 or Latin-1 it is {other!r}); save the file as UTF-8"
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; its reader would silently drop the first of two fields with one name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return fields


def _parsed(path: Path, text: str, line: int = 1) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        at = f"line {line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{path}: {at}: malformed JSON ({error.msg}); correct that line") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: line {line}: unreadable JSON ({error}); correct the file") from None


def _json(path: Path, data: bytes) -> Parts:
    text = _text(path, data)
    if not text.strip():
        return {}
    try:
        value = _parsed(path, text)
    except InputError as error:
        if "malformed JSON (Extra data)" in str(error) and _is_one_to_a_line(text):
            return _lines(path, text)  # under the name .json, as hub exports have it
        raise
    if isinstance(value, list):
        return {"": list(enumerate(value, start=1))}
    fields = value if isinstance(value, dict) else {}
    lists = {key: rows for key, rows in fields.items() if isinstance(rows, list)}
    parts = {key: rows for key, rows in lists.items() if any(isinstance(row, dict) for row in rows)}
    every = [row for rows in parts.values() for row in rows if isinstance(row, dict)]
    if any(row.keys() & {"role", "from"} and row.keys() & {"content", "value"} for row in every):
        return {"": [(1, value)]}  # messages: the file is one conversation
    beside = {key: field for key, field in fields.items() if key not in parts and not is_blank(field)}
    for key, field in beside.items():
        below = list(field.values()) if isinstance(field, dict) else field
        # More rows could lie in what is made of lists and objects.
        may_hold = isinstance(below, list) and below and all(isinstance(part, list | dict) for part in below)
        if parts and (key.casefold() in ASKED or may_hold):
            raise InputError(
                f"{path}: {key!r} beside the rows is text that is not read; put it into each row, or take it "
                "out"
            )
    if parts and beside:
        log.warning("%s: beside the rows is not read: %s", path, ", ".join(map(name_of, beside)))
    if parts:
        names = {key: whole(key) if len(parts) > 1 else "" for key in parts}
        return {names[key]: list(enumerate(rows, start=1)) for key, rows in parts.items()}
    alone = next(iter(lists)) if len(lists) == 1 else ""
    hint = f"save the list under {alone!r} alone" if alone.casefold() not in ("", *ASKED) else "save a list"
    raise InputError(f"{path}: the top level is {type(value).__name__}, allowed is a list of rows; {hint}")


def _is_one_to_a_line(text: str) -> bool:
    """Whether a text begins with an object, or its first line is a whole value."""
    if text.lstrip().startswith("{"):
        return True
    try:
        json.loads(text.lstrip().partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    return True


def _jsonl(path: Path, data: bytes) -> Parts:
    text = _text(path, data)
    return _json(path, data) if text.lstrip().startswith("[") else _lines(path, text)


def _lines(path: Path, text: str) -> Parts:
    # not splitlines(): it also breaks at U+2028, which JSON allows within a string
    lines = enumerate(text.split("\n"), start=1)
    return {"": [(number, _parsed(path, line, number)) for number, line in lines if line.strip()]}


def _csv(path: Path, data: bytes) -> Parts:
    text = _text(path, data)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # the default refuses long answers
    delimiter = "\t"
    if format_of(path) != ".tsv":
        # The header alone says what separates columns, since rows hold any sign.
        first = next((line for line in text.splitlines() if line.strip()), "")
        separators = [sign for sign in ",;\t|" if sign in re.sub(r'"[^"]*"', "", first)]
        if len(separators) > 1:
            signs = " and ".join(map(repr, separators))
            raise InputError(f"{path}: the header has {signs} between its columns; save it with one of them")
        delimiter = separators[0] if separators else ","
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        filled = (cells for cells in table if cells)
        header = next(filled, [])
        if twice := {name for name in header if header.count(name) > 1}:
            raise InputError(f"{path}: the header has {_names(twice)} twice; give each column its own name")
        rows: list[dict[str | None, Any]] = []
        for cells in filled:
            row: dict[str | None, Any] = dict(itertools.zip_longest(header, cells[: len(header)]))
            if len(cells) > len(header):
                row[BEYOND] = cells[len(header) :]
            elif len(cells) < len(header):
                row[BEYOND] = len(header) - len(cells)
            rows.append(row)
        return {"": list(enumerate(rows, start=1))}
    except csv.Error as error:
        where = f"{path}: line {table.line_num}"
        raise InputError(f"{where}: malformed CSV ({error}); correct the quotes") from None


def _of_table(path: Path, data: bytes) -> Parts:
    need(str(path), "pyarrow")
    import pyarrow
    from pyarrow import ipc, parquet

    is_arrow, source = format_of(path) == ".arrow", pyarrow.BufferReader(data)
    try:
        if is_arrow:
            open_table = ipc.open_file if data.startswith(b"ARROW1") else ipc.open_stream
            table = open_table(source).read_all()
        else:
            table = parquet.read_table(source, page_checksum_verification=True)
        table.validate(full=True)  # rows of a damaged file may lie anywhere in memory
        if twice := {name for name in table.column_names if table.column_names.count(name) > 1}:
            raise InputError(f"{path}: the column {_names(twice)} is there twice; give each its own name")
        rows = _listed(table)
        # Where the library datasets has written the file, it says there which texts numbers stand for.
        about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        if not isinstance(about, dict):
            raise TypeError("its metadata of the library datasets are no object")
        features = (about.get("info") or {}).get("features") or {}
        labels = {
            name: list(feature["names"])
            for name, feature in features.items()
            if isinstance(feature, dict)
            and feature.get("_type") == "ClassLabel"
            and name in table.schema.names
        }
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, OverflowError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        form = "Arrow" if is_arrow else "Parquet"
        raise InputError(f"{path}: not a readable {form} file ({reason}); write it again") from None
    for row in rows:
        for name, texts in labels.items():
            row[name] = texts[row[name]] if row[name] in range(len(texts)) else None
    return {"": list(enumerate(rows, start=1))}


def _listed(table: Any) -> list[dict[str, Any]]:
    """The rows of a table; one with dates that Python's own cannot hold has its dates as text."""
    import pyarrow

    try:
        return list(table.to_pylist())
    except (ValueError, OverflowError):
        schema = table.schema
        for place, column in enumerate(schema):
            if pyarrow.types.is_temporal(column.type):
                schema = schema.set(place, column.with_type(pyarrow.string()))
        return list(table.cast(schema).to_pylist())


def _names(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _inspect_log(path: Path, _data: bytes) -> Parts:
    """The samples of a log (https://inspect.aisi.org.uk) in their order, each a row with `messages`.

    Inspect's own reader reads it, whatever version wrote it. An answer's thoughts are left out. Tool calls
    stay; the reader of rows refuses what is no text.
    """
    need(str(path), "inspect_ai")
    from inspect_ai.log import EvalLog, read_eval_log

    try:
        # In a thread: the reader starts an event loop, and in a notebook one runs already.
        with ThreadPoolExecutor(1) as pool:
            # Long texts are stored apart from their messages.
            record = pool.submit(read_eval_log, str(path), resolve_attachments=True).result()
    except Exception as error:  # noqa: BLE001 - of many kinds, of zip files, JSON and fields
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: inspect-ai cannot read this log ({type(error).__name__}: {reason}); copy it "
            "again, or upgrade inspect-ai if a newer version wrote it"
        ) from None
    newest = EvalLog.model_fields["version"].default
    if record.version > newest:  # Inspect itself would leave out in silence what it does not know
        raise InputError(
            f"{path}: the log has format {record.version}, and the installed inspect-ai knows {newest}; "
            "upgrade inspect-ai"
        )
    rows = []
    for sample in record.samples or []:
        # A sample that failed before the model was asked has its input alone.
        said = sample.messages or sample.input
        asked = [{"role": "user", "content": said}] if isinstance(said, str) else map(_message, said)
        rows.append({"messages": list(asked)})
    return {"": list(enumerate(rows, start=1))}


def _message(message: Any) -> dict[str, Any]:
    """One message of an Inspect log as chat files write it."""
    fields = {"role": message.role, "content": message.text}
    if not isinstance(message.content, str):
        others = [part for part in message.content if part.type not in ("text", "reasoning")]
        if others:
            fields["content"] = [part.model_dump(exclude_none=True) for part in message.content]
    if getattr(message, "tool_calls", None):
        fields["tool_calls"] = [{"name": c.function, "arguments": c.arguments} for c in message.tool_calls]
    return fields


FORMATS: dict[str, Callable[[Path, bytes], Parts]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _of_table,
    ".tsv": _csv,
    ".ndjson": _jsonl,
    ".arrow": _of_table,
    ".eval": _inspect_log,
}
