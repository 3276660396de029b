"""Load a model with its tokenizer and family: a hub id, a folder, a GGUF file, or a packaged model."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetynet import families, recipe
from safetynet.errors import InputError
from safetynet.extras import need
from safetynet.models import gguf, memory, miniatures
from safetynet.models.files import (
    OLD_BUFFERS,
    PICKLES,
    at_hand,
    finite,
    headers,
    holds_model,
    hub_reason,
    in_words,
    listed,
    pointer,
)
from safetynet.prompts import Serialiser
from safetynet.prompts.truncation import Truncation
from safetynet.run import parallel
from safetynet.run.directory import digest_of_files
from safetynet.run.logs import bars_on_terminals_only

log = logging.getLogger("safetynet")
FLOATS = ("F16", "BF16", "F32", "F64")
"""Types of weights in safetensors that are read as they stand."""


@dataclass(frozen=True)
class LoadedModel:
    """A base model, ready for training or evaluation."""

    model: Any
    """The transformers model, in evaluation mode."""
    serialiser: Serialiser
    family: families.Family
    id: str
    """Name that identifies the base model: its hub id or folder."""


def locate(spec: recipe.Model) -> str:
    """What transformers has to load: a hub id or a folder; a GGUF file is converted first, once.

    Raises:
        InputError: if the folder of a miniature or a local model does not hold a safetensors model, or as
            `gguf.folder_of`.
    """
    if spec.model_id == "miniature":
        return str(miniatures.path(spec.family))
    name = str(spec.model_id)
    if gguf.is_gguf(name):
        return str(gguf.folder_of(name))
    if Path(name).is_dir():
        _check_folder(Path(name))
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(
            f"model.id: there is no folder {name!r}. Give a hub id, an existing folder, a .gguf file, "
            "`smollm2` or `miniature`."
        )
    return name


def fingerprint(spec: recipe.Model) -> str:
    """Identifies the weights: a digest of a local model's files, or the hub id and revision."""
    if gguf.is_gguf(str(spec.model_id)):
        return gguf.digest_of(gguf.file_of(str(spec.model_id)))
    name = locate(spec)
    return digest_of_files([Path(name)]) if Path(name).is_dir() else f"{name}@{spec.revision or 'main'}"


def load(
    spec: recipe.Model,
    dtype: str = "auto",
    *,
    on_cpu: bool = False,
    truncation: Truncation = "end",
    serialiser: Serialiser | None = None,
) -> LoadedModel:
    """Load model and tokenizer; safetensors only, no remote code.

    Args:
        spec: the recipe's model section.
        dtype: `fp32`, `fp16`, `bf16`, or `auto`: bf16 on a GPU that has it, else fp32.
        on_cpu: leave the weights in the machine's memory, though the work is for a GPU.
        truncation: as the serialiser takes it.
        serialiser: instead of the model's own tokenizer.

    Raises:
        InputError: if the model cannot be found or reached, belongs to another family, has a pickle
            checkpoint only, or its quantisation is not possible here.
    """
    name = locate(spec)
    _use_cores(spec)
    serialiser = serialiser or _head(spec, name, truncation)
    model = _fetch(name, spec, "weights", lambda n, s: _load_weights(n, s, dtype, on_cpu))
    return LoadedModel(model.eval(), serialiser, serialiser.family, name)


def load_serialiser(spec: recipe.Model, truncation: Truncation = "end") -> Serialiser:
    """The tokenizer alone, for work that needs no weights; errors as in `load`."""
    return _head(spec, locate(spec), truncation)


def trained(spec: recipe.Model, folder: Path) -> recipe.Model:
    """The recipe's model section, with the weights in `folder` instead."""
    return spec.model_copy(update={"id": str(folder), "revision": None})


def resolve_dtype(precision: str, device: str) -> Any:
    """The torch dtype of a recipe's `precision` on `device`; `auto` is bf16 on GPUs that have it."""
    import torch

    named = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if precision != "auto":
        return named[precision]
    return torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def device_of(spec: recipe.Model) -> str:
    """`cuda` or `cpu`.

    Raises:
        InputError: if the recipe wants a GPU and there is none.
    """
    import torch

    if spec.device in ("cuda", "split") and not torch.cuda.is_available():
        raise InputError("model.device: this machine has no CUDA GPU. Set it to cpu or auto.")
    if spec.device == "split" and parallel.count() > 1:
        raise InputError(
            "model.device: split takes all GPUs for one process. Start one, or set model.device to auto."
        )
    return "cuda" if spec.device != "cpu" and torch.cuda.is_available() else "cpu"


def use_one_thread() -> None:
    """Miniatures are too small to share among threads: two threads on busy cores are many times slower."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def uses_pair(spec: recipe.Model) -> bool:
    """Whether two processes side by side finish a run sooner than one with all cores.

    That is so for models that lie in memory twice with ease and gain little from more threads.
    """
    return spec.id == "miniature" or (spec.id in recipe.PACKAGED and device_of(spec) == "cpu")


def _use_cores(spec: recipe.Model) -> None:
    """Take as many threads as there are idle cores, and say so: threads wait for a core that another has."""
    if spec.model_id == "miniature":
        return use_one_thread()
    if "OMP_NUM_THREADS" in os.environ or device_of(spec) != "cpu":
        return None
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if parallel.is_pair():
        threads, why = max(1, cores // 2), "the other process of the pair has the others"
    else:
        busy = sum(psutil.cpu_percent(interval=0.3, percpu=True)) / 100
        threads, why = max(1, min(cores, round((os.cpu_count() or 1) - busy))), "as many as are idle"
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
        log.info("model: takes %d of %d cores, %s", threads, cores, why)
    return None


def _check_folder(folder: Path) -> None:
    adapter = (folder / "adapter_config.json").exists()
    if not (folder / "config.json").exists():
        content = "an adapter" if adapter else "no config.json"
        raise InputError(f"model.id: {folder} holds {content}, not a model. Give the folder of a base model.")
    if adapter and holds_model(folder):
        # transformers would load the whole model and put the adapter on top, twice where it is merged.
        raise InputError(
            f"model.id: {folder} holds a whole model and an adapter (adapter_config.json). Which of the two "
            "is meant cannot be told: move the adapter into a folder of its own."
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        content = (
            f"a pickle checkpoint ({pickled[0]}), which could run code when loaded"
            if pickled
            else "no weights"
        )
        raise InputError(
            f"model.id: {folder} holds {content}. Convert it to safetensors with save_pretrained."
        )
    if (folder / "model.safetensors.index.json").exists() and (folder / "model.safetensors").exists():
        raise InputError(
            f"model.id: {folder} holds model.safetensors and an index of other files. Which of the two is "
            "meant cannot be told: take one out."
        )
    for file in weights:
        if kind := pointer(file):
            raise InputError(
                f"model.id: {file} is {kind}, not the weights. Run git lfs pull, or download the file itself."
            )


def _head(spec: recipe.Model, name: str, truncation: Truncation) -> Serialiser:
    """Tokenizer and family, checked against the model's own type."""
    family = families.get(spec.family)

    def read(name: str, spec: recipe.Model) -> tuple[Any, Any]:
        from transformers import AutoConfig, AutoTokenizer

        return (
            AutoConfig.from_pretrained(name, revision=spec.revision, trust_remote_code=False),
            AutoTokenizer.from_pretrained(name, revision=spec.revision, trust_remote_code=False),
        )

    config, tokenizer = _fetch(name, spec, "config and tokenizer", read)
    if family.model_types and config.model_type not in family.model_types:
        raise InputError(
            f"model.family: {name} is of type {config.model_type!r}, family {family.name} takes "
            f"{', '.join(family.model_types)}. Set the right family, or generic."
        )
    return Serialiser(tokenizer, family, truncation, spec.date)


def _load_weights(name: str, spec: recipe.Model, dtype: str, on_cpu: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    # Weights that a quantiser has packed are other numbers when they are read without it.
    config = AutoConfig.from_pretrained(name, revision=spec.revision, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        if stored := getattr(part, "quantization_config", None):
            fields = stored if isinstance(stored, dict) else stored.to_dict()
            method = str(fields.get("quant_method", "an unnamed method"))
            raise InputError(
                f"model.id: the weights of {name!r} are stored quantised ({method}), which is not read. Give "
                "the model in 16 or 32 bits; model.quantisation quantises it here."
            )
    device = device_of(spec)
    place = parallel.device_index() if device == "cuda" and not on_cpu else "cpu"
    number = resolve_dtype(dtype, device)
    if place == "cpu" and (folder := at_hand(name)) is not None:
        parameters = sum(math.prod(shape) for _, _, shape in headers(folder))
        bits = {"4bit": 4.5, "8bit": 8.5}.get(spec.quantisation, 8 * number.itemsize)
        memory.check(f"model.id: {name!r}", int(parameters * bits / 8), "for its weights alone")
    quantisation = None
    if spec.quantisation != "none":
        need(f"model.quantisation: {spec.quantisation}", "bitsandbytes")
        quantisation = BitsAndBytesConfig(
            load_in_4bit=spec.quantisation == "4bit",
            load_in_8bit=spec.quantisation == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=number,
        )
    with bars_on_terminals_only(), _without_report():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            output_loading_info=True,
            revision=spec.revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=number,
            quantization_config=quantisation,
            device_map="auto" if spec.device == "split" else {"": place},
        )
    model, report = loaded

    # transformers draws at random what is missing, and leaves out what has no place.
    missing = sorted(report["missing_keys"])
    unexpected = sorted(n for n in report["unexpected_keys"] if not n.endswith(OLD_BUFFERS))
    clauses = []
    if missing:
        clauses.append(f"{len(missing)} tensors of the model are not in its files ({listed(missing)})")
    if unexpected:
        clauses.append(
            f"{len(unexpected)} tensors of its files have no place in the model ({listed(unexpected)})"
        )
    if clauses:
        raise InputError(
            f"model.id: {name!r}: {', and '.join(clauses)}. Loaded so, it would be another model: save it "
            "again with save_pretrained from the model itself, not from a wrapper around it."
        )
    # Packed or whole numbers, without a configuration that says how to read them.
    files = at_hand(name)
    packed = {
        n: kind
        for n, kind, _ in (headers(files) if files is not None else ())
        if n.endswith((".weight", "_proj")) and kind not in FLOATS
    }
    if packed:
        kinds = ", ".join(sorted(set(packed.values())))
        raise InputError(
            f"model.id: {name!r}: {len(packed)} of its tensors hold numbers of type {kinds} "
            f"({listed(sorted(packed))}), and no quantization_config says how to read them. Give the model "
            "in 16 or 32 bits."
        )
    weights = [(n, p) for n, p in model.named_parameters() if p.is_floating_point() and not p.is_meta]
    broken = [n for n, parameter in weights if not finite(parameter.detach())]
    if broken:
        raise InputError(
            f"model.id: {name!r}: {len(broken)} of its tensors hold values that are not finite "
            f"({listed(broken)}). The model is damaged, or its training diverged."
        )

    # 4-bit weights of a CPU stay as they are stored. On processors with AVX512-BF16, bitsandbytes repacks a
    # weight in its first pass without gradients. Every pass from then on goes through a kernel that has no
    # backward, and whoever unpacks the weight reads it in the wrong order: gradients, merged weights and
    # norms would be wrong in silence.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers' table of missing tensors quiet: what is in it is one sentence here."""
    logger = logging.getLogger("transformers.modeling_utils")

    # At a level above WARNING, transformers checks a plan for several devices and tells of that.
    def is_no_report(record: logging.LogRecord) -> bool:
        return " LOAD REPORT" not in str(record.msg)

    logger.addFilter(is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_report)


def _fetch(name: str, spec: recipe.Model, what: str, read: Any) -> Any:
    """Run `read`, turning the many ways in which the hub says no into one sentence."""
    from safetensors import SafetensorError

    try:
        return read(name, spec)
    except SafetensorError as error:
        reason = f"its safetensors are damaged ({in_words(error)}). Copy or download them again"
    except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
        reason = hub_reason(error) or in_words(error)
    except RuntimeError as error:  # tensors of another shape than the configuration says
        if "ignore_mismatched_sizes" not in str(error):
            raise
        reason = "its tensors have other shapes than its config.json says"
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises no narrower class
            raise
        reason = in_words(error)
    raise InputError(f"model.id: the {what} of {name!r} cannot be loaded: {reason}.") from None
