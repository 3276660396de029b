"""The first rung: what lies in a suspect's folder. No model is loaded, and nothing of it is run.

In: the folder of a suspect, and of its base where it is known. Out: findings, and how many of them speak
against the suspect. Neither torch nor transformers is imported. `docs/scan_files.md` lists the rules.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetynet.models.files import in_words, listed, pointer
from safetynet.scan.folder import adapter_claims, model_configs, pickles, tokenizer_files
from safetynet.scan.folder.headers import tensors
from safetynet.scan.folder.reading import (
    LARGEST_VOCABULARY,
    Entry,
    UnreadableError,
    entries,
    escaped,
    finding,
    json_of,
    repeated,
)
from safetynet.scan.result import Finding, RungResult
from safetynet.scan.templates import chat_template

LARGEST_HASHED = 4 * 2**30
"""Bytes; a file takes about a second for each gigabyte."""
LARGEST_POINTER = 1024
PYTHON = (".py", ".pyc", ".pyd", ".pyw", ".ipynb", ".pth.py")
PROGRAMS = (
    ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1", ".jar", ".js", ".wasm", ".msi", ".com",
)  # fmt: skip
STARTS = (
    b"\x7fELF", b"MZ", b"\xfe\xed\xfa", b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"#!",
)  # fmt: skip
"""How programs begin: Linux, Windows, macOS, Java, scripts."""
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst", ".whl", ".egg")
OTHER_WEIGHTS = (".h5", ".keras", ".onnx", ".msgpack", ".pb", ".tflite", ".npz", ".npy", ".ot", ".mar")
"""Formats of weights that nothing here reads."""
ORDINARY = tuple(
    ".safetensors .gguf .json .jsonl .jinja .jinja2 .j2 .txt .md .rst .model .tiktoken .spm .vocab "
    ".yaml .yml .toml .csv .tsv .parquet .png .jpg .jpeg .gif .svg .webp .pdf .lock .metadata .log .tag "
    ".sig .pem".split()
)
"""Ends of the names of files that belong to models."""
ORDINARY_NAMES = (
    "LICENSE", "LICENCE", "NOTICE", "README", "USE_POLICY", ".gitattributes", ".gitignore", "CACHEDIR",
)  # fmt: skip
LEFTOVERS = (
    "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "scaler.pt",
    "rng_state",
)  # fmt: skip
"""Pickles that a training leaves behind; no loader of models reads them."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "tekken.json")
SMALL_VOCABULARY = 4 * 2**20
"""Bytes up to which one is read whatever the base's is."""


def check(suspect: Path, base: Path | None) -> RungResult:
    """What lies in a suspect's folder: files, configurations, tensors' names, tokenizer and chat template.

    Args:
        suspect: folder of an adapter, or of a merged or fully fine-tuned model.
        base: folder of its base; None where it is not known: nothing is compared, and there is no control.

    Returns:
        The score counts findings of the levels `error` and `warning` that the base's own folder does not
        show; a copy of the base has 0, which is the control.

    Raises:
        InputError: if one of them is no folder, is empty or cannot be listed.
    """
    start = time.perf_counter()
    every = entries(suspect)
    findings = [*_alone(suspect, every, base), *chat_template.check(suspect, base)]
    in_base = set[tuple[str, str, str]]()
    if base is not None:
        findings += [*tokenizer_files.check(suspect, base), *model_configs.compare(suspect, base)]
        of_base = [*_alone(base, entries(base), base), *chat_template.check(base)]
        in_base = {_key(each) for each in of_base}
    counted = [each for each in findings if each.level != "note" and _key(each) not in in_base]
    return RungResult(
        "files",
        score=float(len(counted)),
        unit="findings",
        control=None if base is None else 0.0,
        seconds=time.perf_counter() - start,
        details={
            "files": len(every),
            "bytes": sum(entry.bytes for entry in every),
            "of_base": sum(_key(each) in in_base for each in findings if each.level != "note"),
            "templates": [escaped(each.where) for each in chat_template.read(suspect)[0]],
        },
        findings=tuple(findings),
    )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder by its name; files above `LARGEST_HASHED` bytes are left out.

    Links that leave the folder are left out as well. About 1 s for each gigabyte, read from memory.

    Raises:
        InputError: as `reading.entries`.
    """
    sums = {}
    for entry in entries(folder):
        if entry.leaves or entry.bytes > LARGEST_HASHED:
            continue
        try:
            with entry.path.open("rb") as file:
                sums[escaped(entry.name)] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:  # said by `check`
            continue
    return sums


def _key(seen: Finding) -> tuple[str, str, str]:
    return seen.rule, seen.where, seen.message


def _alone(folder: Path, every: Iterable[Entry], base: Path | None) -> Iterator[Finding]:
    """What a folder shows by itself."""
    readable, unexpected, unhashed = list[Entry](), list[str](), list[str]()
    for entry in every:
        if entry.leaves:
            message = (
                f"It is a link to {escaped(entry.leaves, 100)}, outside of the folder or nowhere, and was "
                "not followed."
            )
            yield finding("symlink", "warning", message, escaped(entry.name))
            continue
        try:
            about = list(_file(entry))
        except OSError as error:
            message = f"It cannot be read ({escaped(in_words(error), 120)}), so nothing is known of it."
            about = [finding("unreadable", "warning", message, escaped(entry.name))]
        yield from about
        if not about:
            readable.append(entry)
            usual = entry.path.suffix.lower() in (*ORDINARY, *OTHER_WEIGHTS)
            if not usual and not entry.path.name.startswith(ORDINARY_NAMES):
                unexpected.append(entry.name)
        if entry.bytes > LARGEST_HASHED:
            unhashed.append(entry.name)
    if unexpected:
        message = f"Files that a model has no use for: {escaped(listed(unexpected, 5))}."
        yield finding("unexpected-file", "note", message, files=[escaped(name) for name in unexpected[:20]])
    if unhashed:
        message = f"Larger than {LARGEST_HASHED // 2**30} GB and not hashed: {escaped(listed(unhashed, 5))}."
        yield finding("not-hashed", "note", message, files=[escaped(name) for name in unhashed[:20]])
    configurations = [
        e.name for e in readable if e.name.endswith(".json") and e.path.name not in VOCABULARIES
    ]
    yield from model_configs.check(folder, configurations)
    for entry in readable:
        # Small ones alone, so that a scan of files stays within its seconds; `tokenizer_files` reads large
        # ones where they differ from the base's.
        if entry.path.name not in VOCABULARIES or entry.bytes > SMALL_VOCABULARY:
            continue
        try:
            _, twice = json_of(entry.path, LARGEST_VOCABULARY)
        except UnreadableError as error:
            message = f"It cannot be read: {escaped(str(error))}. Nothing is known of how texts are parted."
            yield finding("unreadable", "warning", message, escaped(entry.name))
            continue
        if twice:
            yield repeated(twice, entry.name)
    yield from adapter_claims.check(folder, base)


def _file(entry: Entry) -> Iterator[Finding]:
    """What one file is, where it is anything to speak of."""
    name, path = escaped(entry.name), entry.path
    suffix = path.suffix.lower()
    if entry.bytes <= LARGEST_POINTER and (kind := pointer(path)):
        message = f"It is {kind}: the file itself was not downloaded and cannot be scanned. Run git lfs pull."
        yield finding("pointer", "warning", message, name)
        return
    with path.open("rb") as file:
        start = file.read(8)
    if suffix in PYTHON:
        message = (
            "It is Python code. No adapter and no supported model needs any: do not run it, and read it."
        )
        yield finding("code", "warning", message, name)
    elif suffix in PROGRAMS or (start.startswith(STARTS) and suffix not in ORDINARY):
        yield finding("executable", "warning", "It is a program, and no model needs one. Delete it.", name)
    elif suffix in ARCHIVES:
        message = "It is an archive, and what it holds was not looked at. Unpack it by itself and scan that."
        yield finding("archive", "warning", message, name)
    elif suffix == ".safetensors":
        try:
            tensors(path)
        except UnreadableError as error:
            message = f"It is damaged: {escaped(str(error))}. Copy or download it again."
            yield finding("damaged", "warning", message, name)
    elif suffix in pickles.SUFFIXES or (start.startswith((b"\x80", b"PK")) and suffix not in ARCHIVES):
        yield from _pickle(entry)
    elif suffix in OTHER_WEIGHTS:
        yield finding("other-weights", "note", "It holds weights in a format that is not read here.", name)


def _pickle(entry: Entry) -> Iterator[Finding]:
    """What loading a pickle would run, as far as its instructions say."""
    name, suffix = escaped(entry.name), entry.path.suffix.lower()
    try:
        pickle = pickles.read(entry.path)
    except UnreadableError as error:
        message = f"It may be a pickle and cannot be read ({escaped(str(error))}). Do not load it."
        yield finding("pickle", "warning", message, name)
        return
    if pickle is None:
        if suffix in pickles.SUFFIXES:
            message = "It is called as a pickle is and cannot be read as one. Do not load it."
            yield finding("pickle", "warning", message, name)
        return
    imports = [escaped(each, 120) for each in pickle.imports[:20]]
    unusual = [escaped(each, 120) for each in pickle.unusual[:20]]
    if unusual:
        message = (
            f"It is a pickle that calls {listed(unusual)} when it is loaded, which tensors do not need. "
            "Do not load it."
        )
        yield finding("pickle-import", "error", message, name, imports=imports, unusual=unusual)
    elif entry.path.name.startswith(LEFTOVERS):
        message = "It is a pickle that a training left behind and no loader of models reads. Delete it."
        yield finding("pickle", "note", message, name, imports=imports)
    else:
        whole = "" if pickle.whole else " Its end could not be read."
        message = (
            "It is a pickle, which can run code when it is loaded; this one imports nothing but what "
            "tensors need. "
            f"It is not read here: save the weights as safetensors.{whole}"
        )
        yield finding("pickle", "warning", message, name, imports=imports)
