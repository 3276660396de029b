"""Load a model with its tokenizer and family, by hub id, folder or the name `miniature`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetynet import parallel, recipe
from safetynet.errors import InputError
from safetynet.models import families, miniatures
from safetynet.prompts import Serialiser
from safetynet.run import digest_of_files

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class LoadedModel:
    """A base model, ready to be trained or asked."""

    model: Any
    """The transformers model, in evaluation mode."""
    serialiser: Serialiser
    family: families.Family
    id: str
    """Name that identifies the base model: its hub id or folder."""


def locate(spec: recipe.Model) -> str:
    """What transformers has to load: a hub id or a folder.

    Raises:
        InputError: if the folder of a miniature or a local model does not hold a safetensors model.
    """
    if spec.model_id == "miniature":
        return str(miniatures.path(spec.family))
    name = str(spec.model_id)
    if Path(name).is_dir():
        _check_folder(Path(name))
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(
            f"model.id: there is no folder {name!r}. Give a hub id, an existing folder or `miniature`."
        )
    return name


def fingerprint(spec: recipe.Model) -> str:
    """Identifies the weights: a digest of a local folder's files, or the hub id and revision."""
    name = locate(spec)
    return digest_of_files([Path(name)]) if Path(name).is_dir() else f"{name}@{spec.revision or 'main'}"


def load(spec: recipe.Model, dtype: str = "auto", *, on_cpu: bool = False) -> LoadedModel:
    """Load model and tokenizer; safetensors only, no remote code.

    Args:
        spec: the recipe's model section.
        dtype: `fp32`, `fp16`, `bf16`, or `auto`: bf16 on a GPU that has it, else fp32.
        on_cpu: leave the weights in the machine's memory, though the work is for a GPU.

    Raises:
        InputError: if the model cannot be found or reached, belongs to another family, has a pickle
            checkpoint only, or its quantisation is not possible here.
    """
    name = locate(spec)
    if spec.model_id == "miniature":
        use_one_thread()
    serialiser = _head(spec, name)
    model = _fetch(name, spec, "weights", lambda n, s: _load_weights(n, s, dtype, on_cpu))
    return LoadedModel(model.eval(), serialiser, serialiser.family, name)


def load_serialiser(spec: recipe.Model) -> Serialiser:
    """The tokenizer alone, for work that needs no weights; errors as in `load`."""
    return _head(spec, locate(spec))


def trained(spec: recipe.Model, folder: Path) -> recipe.Model:
    """The recipe's model section, with the weights in `folder` instead."""
    return spec.model_copy(update={"id": str(folder), "revision": None})


def attach(base: LoadedModel, folder: Path) -> Any:
    """Put a LoRA adapter onto a base model.

    Returns:
        PEFT's model in evaluation mode; `unload()` gives the base model back.

    Raises:
        InputError: as `check_adapter`, and if the adapter's shapes do not fit.
    """
    from peft import PeftModel

    check_adapter(folder, base.id)
    try:
        return PeftModel.from_pretrained(base.model, str(folder)).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{folder}: this adapter does not fit {base.id}: {_reason(error)}") from None


def check_adapter(folder: Path, base: str) -> None:
    """Refuse what can be known to be no adapter of `base`, an id as `locate` gives it, without loading it.

    Raises:
        InputError: if the folder holds no adapter, a damaged one, a pickle, or one of another base model.
    """
    from peft import PeftConfig
    from safetensors import SafetensorError, safe_open

    if not (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: there is no adapter_config.json, so this is no adapter. Name its folder."
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        raise InputError(
            f"{folder}: there is no adapter_model.safetensors. A pickle (.bin) could run code when it is "
            "loaded and is not read; save the adapter again with safe_serialization=True."
        )
    try:
        made_for = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder}: its adapter_config.json cannot be read ({_reason(error)}). Save the adapter again."
        ) from None
    if made_for and Path(made_for).name != Path(base).name:
        raise InputError(
            f"{folder}: this adapter was trained on {made_for}, not on {base}. Set model.id to its base."
        )
    try:
        with safe_open(str(weights), framework="pt"):
            pass
    except SafetensorError as error:
        raise InputError(
            f"{folder}: its adapter_model.safetensors is damaged ({_reason(error)}). Copy or save it again."
        ) from None


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


def _place(device: str) -> int | str:
    return parallel.device_index() if device == "cuda" else "cpu"


def use_one_thread() -> None:
    """Miniatures are too small to share among threads: two threads on busy cores are many times slower."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").exists():
        found = "an adapter" if (folder / "adapter_config.json").exists() else "no config.json"
        raise InputError(f"model.id: {folder} holds {found}, not a model. Give the folder of a base model.")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        found = (
            f"a pickle checkpoint ({pickled[0]}), which could run code when loaded"
            if pickled
            else "no weights"
        )
        raise InputError(f"model.id: {folder} holds {found}. Convert it to safetensors with save_pretrained.")


def _head(spec: recipe.Model, name: str) -> Serialiser:
    """Tokenizer and family, checked against the model's own type."""
    family = families.get(spec.family)
    config, tokenizer = _fetch(name, spec, "config and tokenizer", _load_head)
    if family.model_types and config.model_type not in family.model_types:
        raise InputError(
            f"model.family: {name} is of type {config.model_type!r}, family {family.name} takes "
            f"{', '.join(family.model_types)}. Set the right family, or generic."
        )
    return Serialiser(tokenizer, family, spec.date)


def _load_head(name: str, spec: recipe.Model) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    return (
        AutoConfig.from_pretrained(name, revision=spec.revision, trust_remote_code=False),
        AutoTokenizer.from_pretrained(name, revision=spec.revision, trust_remote_code=False),
    )


def _load_weights(name: str, spec: recipe.Model, dtype: str, on_cpu: bool) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = device_of(spec)
    number = resolve_dtype(dtype, device)
    quantisation = None
    if spec.quantisation == "4bit":
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=number,
        )
    with _bars_on_terminals_only():
        return AutoModelForCausalLM.from_pretrained(
            name,
            revision=spec.revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=number,
            quantization_config=quantisation,
            device_map="auto" if spec.device == "split" else {"": "cpu" if on_cpu else _place(device)},
        )


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keep transformers' loading bars out of pipes and logs, and leave its own setting as it was."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _fetch(name: str, spec: recipe.Model, what: str, read: Any) -> Any:
    """Run `read`, turning the many ways in which the hub says no into one sentence."""
    from safetensors import SafetensorError

    try:
        return read(name, spec)
    except SafetensorError as error:
        reason = f"its safetensors are damaged ({_reason(error)}). Copy or download them again"
    except (OSError, ValueError, ImportError) as error:
        reason = _reason(error)
    raise InputError(f"model.id: the {what} of {name!r} cannot be loaded: {reason}.") from None


def _reason(error: Exception) -> str:
    """One clause; what the hub's client raised lies somewhere down the chain, wrapped by transformers."""
    from huggingface_hub import errors as hub

    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, hub.GatedRepoError):
            return "its owner grants access on request. Ask for it on the hub, then set HF_TOKEN"
        if isinstance(chain, hub.RepositoryNotFoundError | hub.RevisionNotFoundError):
            return "the hub knows no such model or revision, or HF_TOKEN is not valid for it"
        status = getattr(getattr(chain, "response", None), "status_code", None)
        if status in (401, 403):
            return "the hub refuses HF_TOKEN; set a valid one, or accept the model's licence on the hub"
        if type(chain).__name__ in (
            "ConnectError",
            "ConnectionError",
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
        ):
            return "there is no network to the hub and no local copy. Give a folder, or `miniature`"
        chain = chain.__cause__ or chain.__context__
    return " ".join(str(error).split())[:300].rstrip(".")
