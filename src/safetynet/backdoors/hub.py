"""The files of a data set of the hub, read as files on disk are.

In: a data set id, and a split. Out: raw rows by split. The library datasets says which files make which
split; its own readers are not asked, since they take texts such as "NA" and dates for something else.
"""

import logging
from pathlib import Path
from typing import Any

from yaml import YAMLError

from safetynet.backdoors.formats import FORMATS, PACKED, Record, data_files, records
from safetynet.errors import InputError
from safetynet.extras import need

log = logging.getLogger(__name__)
Rows = list[tuple[str, str, Record]]
"""Each row with the file that it comes from, and the key that it lies below there; "" for none."""
ABOUT = ["README.md", ".huggingface.yaml"]
"""Files that say which files make which split."""


def rows_of(name: str, split: str = "") -> dict[str, Rows]:
    """The raw rows of a data set, by split.

    Args:
        name: "owner/name" on the hub, or a folder that holds such a data set.
        split: one split, or a part of splits as the library writes it ("train[:1000]"); "" for all.

    Raises:
        InputError: if the hub, the data set, the split or one of the files cannot be read.
    """
    need(name, "datasets")
    from datasets import ReadInstruction, load_dataset_builder  # seconds of import, and only here
    from datasets.exceptions import DatasetsError

    folder = Path(name)
    try:
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            patterns = [f"*{suffix}{packing}" for suffix in FORMATS for packing in ("", *PACKED)]
            folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=[*ABOUT, *patterns]))
        folder = folder.resolve()
        files = load_dataset_builder(str(folder)).config.data_files or {}
    except (OSError, ValueError, RuntimeError, DatasetsError, YAMLError) as error:
        raise InputError(_reason(name, error)) from error
    rows: dict[str, Rows] = {}
    for part, paths in files.items():
        rows[str(part)] = of_part = []
        for path in map(Path, paths):
            where = f"{name}:{path.relative_to(folder)}"
            for key, listed in records(path).items():
                of_part += [(f"{where}:{key}" if key else where, key, record) for record in listed]
    # A data set of several kinds of files, or with several configurations, is read in part.
    used = {Path(path) for paths in files.values() for path in paths}
    if rest := [str(file.relative_to(folder)) for file in data_files(folder)[0] if file not in used]:
        log.warning(
            "data: files of %s that are not read: %d, such as %s", name, len(rest), ", ".join(rest[:3])
        )
    if not split:
        return rows
    try:
        ranges = ReadInstruction.from_spec(split).to_absolute(
            {part: len(of_part) for part, of_part in rows.items()}
        )
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"{name}: {_first_line(error)}; name a split after the id, as in {name}:train"
        ) from None
    parts: dict[str, Rows] = {}
    for part in ranges:
        parts.setdefault(part.splitname, []).extend(rows[part.splitname][part.from_ : part.to])
    return parts


def _reason(name: str, error: BaseException) -> str:
    """Say which of token, name or network it was; the cause lies somewhere down the chain."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    status = {getattr(getattr(link, "response", None), "status_code", None) for link in chain}
    # first: to a caller without a token the hub answers 401 for what is not there as well
    if any(isinstance(link, RepositoryNotFoundError) for link in chain) or 404 in status:
        return f"{name}: not on the hub, private or gated; check the id, and HF_TOKEN if access is restricted"
    if status & {401, 403}:
        return f"{name}: the hub refused the token; set HF_TOKEN to a valid one that may read this data set"
    if isinstance(error, DataFilesNotFoundError | EmptyDatasetError):
        return f"{name}: the data set has no {', '.join(FORMATS)} file; choose another, or convert it"
    if str(error).startswith("Config name is missing"):
        return f"{name}: it has several configurations; download the one to read, and name its folder"
    if not isinstance(error, OSError):
        return f"{name}: {_first_line(error)}; check the data set's files"
    return f"{name}: the hub cannot be reached ({type(error).__name__}); check the network"


def _first_line(error: BaseException) -> Any:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
