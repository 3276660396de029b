"""The files of an adapter as somebody else saved them: read and checked before any model is touched.

In: a folder, one of its files, or a hub id. Out: `AdapterFiles`, its configuration and tensors, or one
    sentence that says what keeps them from being what they claim. Whether they fit a model is the business of
    `adapters`.
"""

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.models import support
from safetynet.models.files import finite, holds_model, hub_reason, in_words, listed, pointer

log = logging.getLogger("safetynet")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMED = (CONFIG, WEIGHTS, "config.json", "model.safetensors", "model.safetensors.index.json")
"""Files that stand for their folder."""
DOWNLOADED = (CONFIG, WEIGHTS, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja")
"""What is fetched of a hub id: never code, never a pickle."""
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of tensors that adapters are trained in; others are packed, or no weights."""
LONGEST_NAME = 1000
LARGEST_SCALE = 1e9
"""Of a rank or a scale: what is beyond is damage, and overflows."""
SCALES = ("r", "lora_alpha", "alpha", "rank")
"""Fields that decide how strongly an adapter acts; PEFT fills in a default where one is missing."""
PLACES = (
    "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform",
    "layers_pattern", "layer_replication", "rank_pattern", "alpha_pattern", "trainable_token_indices", "bias",
)  # fmt: skip
"""Fields that say where an adapter acts."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's folder whose configuration PEFT knows and whose weights are safetensors."""

    folder: Path
    config: Any
    """PEFT's configuration, of the class that `peft_type` names."""
    fields: Mapping[str, Any]
    """What adapter_config.json itself says."""

    @property
    def base(self) -> str | None:
        """The base model as the adapter calls it; None where it names none."""
        return self.fields.get("base_model_name_or_path") or None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the file by its name, on the CPU.

        Raises:
            InputError: if there is none, or one holds values that are no finite numbers.
        """
        from safetensors.torch import load_file

        tensors = load_file(str(self.folder / WEIGHTS))
        if not tensors:
            raise InputError(f"{self.folder}: its {WEIGHTS} holds no tensor. Save the adapter again.")
        broken = [n for n, t in tensors.items() if t.dtype in NUMBERS and not finite(t)]
        if broken:
            raise InputError(
                f"{self.folder}: {len(broken)} of {len(tensors)} tensors hold values that are not finite "
                f"({listed(broken)}). The adapter is damaged, or its training diverged: take another "
                "checkpoint."
            )
        return tensors


def read(source: Path | str) -> AdapterFiles:
    """Read an adapter's configuration and check its files.

    Args:
        source: the adapter's folder, its configuration or weights file, or a hub id (`owner/name`), of which
            the adapter's files alone are downloaded.

    Raises:
        InputError: if there is no adapter, several, or one beside a whole model; if its weights are a pickle,
            a Git LFS pointer or damaged; if its configuration cannot be read or is of a type that the
            installed PEFT does not know.
    """
    from safetensors import SafetensorError, safe_open

    folder = locate(source)
    path, weights = folder / CONFIG, folder / WEIGHTS
    if not path.exists():
        below = sorted(str(file.parent.relative_to(folder)) for file in folder.glob(f"*/{CONFIG}"))
        if below:
            reason = (
                f"the folder itself is no adapter; those below it are {listed(below, 8)}. Name one of them."
            )
        elif (folder / "config.json").exists():
            reason = "this is a whole model, merged or fully fine-tuned, and no adapter."
        else:
            reason = f"there is no {CONFIG}, so this is no adapter. Name its folder."
        raise InputError(f"{folder}: {reason}")
    if holds_model(folder):
        raise InputError(
            f"{folder}: this folder holds an adapter ({CONFIG}) and a whole model (config.json and its "
            "weights). Which of the two is meant cannot be told: move one into a folder of its own and name "
            "that."
        )

    # What adapter_config.json says, as a dictionary.
    def refuse(name: str) -> Any:  # NaN and infinities, which Python's JSON takes
        raise ValueError(f"it says {name}, which is no number")

    again = "Save the adapter again."
    if kind := pointer(path):
        raise InputError(f"{folder}: its {CONFIG} is {kind}. Run git lfs pull, or download the file itself.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder}: its {CONFIG} cannot be read ({in_words(error)}). {again}") from None
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise InputError(f"{folder}: its {CONFIG} names no peft_type, such as LORA. {again}")
    base = values.get("base_model_name_or_path")
    if base is not None and not (isinstance(base, str) and len(base) <= LONGEST_NAME and base.isprintable()):
        raise InputError(
            f"{folder}: its {CONFIG} says {in_words(base)[:40]!r} for base_model_name_or_path, which is "
            f"no name of a model. {again}"
        )

    # Weights that are there, safe and whole; what is in them is read when it is needed.
    if not weights.exists():
        raise InputError(
            f"{folder}: there is no {WEIGHTS}. A pickle (.bin) could run code when it is loaded and is not "
            "read; save the adapter again with safe_serialization=True."
        )
    if kind := pointer(weights):
        raise InputError(
            f"{folder}: its {WEIGHTS} is {kind}, not the weights. Run git lfs pull, or download the file "
            "itself."
        )
    try:
        with safe_open(str(weights), framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder}: its {WEIGHTS} is damaged ({in_words(error)}). Copy or save it again."
        ) from None
    return AdapterFiles(folder, _config(folder, values), values)


def locate(source: Path | str) -> Path:
    """The folder that `source` means, downloaded if it is a hub id.

    Raises:
        InputError: if there is no such folder or file, or the hub does not give it.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        if path.name not in NAMED:
            raise InputError(
                f"{path}: of a folder {WEIGHTS} or model.safetensors is read, and no other file. Move this "
                "one, with its configuration, into a folder of its own under that name, and name the folder."
            )
        return path.parent
    if path.is_absolute() or len(path.parts) != 2 or path.parts[0] in (".", "..", "~"):
        raise InputError(
            f"{path}: there is no {CONFIG}, since there is no such folder. Name an adapter's, or a hub id "
            "(owner/name)."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(DOWNLOADED)))
    except HFValidationError:
        reason = "this is no valid hub id"
    except (OSError, ValueError) as error:
        reason = hub_reason(error) or in_words(error)
    raise InputError(f"{path}: there is no such folder, and as a hub id: {reason}.")


def _config(folder: Path, values: Mapping[str, Any]) -> Any:
    """PEFT's configuration; says what it leaves out and what it fills in."""
    import peft
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = values["peft_type"]
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(
            f"{folder}: its type {kind!r} is not known to the installed PEFT {peft.__version__}. Install "
            "the PEFT that made it, or save it as LoRA."
        )
    defaults = {field.name: field.default for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    for name in SCALES:
        value = values.get(name, 1)
        if value is None and name in defaults and defaults[name] is None:
            continue  # null is an answer where PEFT's own default is null
        _check_number(folder, name, value)
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(name)
        if isinstance(pattern, dict) and kind == "LORA":  # of AdaLoRA they say which ranks are left
            for key, value in pattern.items():
                _check_number(folder, f"{name}.{key}", value)
    if kind in support.TYPES:
        _check_types(folder, values, PEFT_TYPE_TO_CONFIG_MAPPING[kind])
    unknown = [name for name, value in values.items() if name not in {*defaults, "runtime_config"} and value]
    if unknown:
        log.warning(
            "%s: PEFT %s does not know %s of its configuration, and acts as if that were not set. If it "
            "changes what the adapter does, the numbers are not those of this adapter.",
            folder, peft.__version__, ", ".join(f"{name}={values[name]!r}" for name in unknown),
        )  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown fields, which are named above
            config = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise InputError(
            f"{folder}: its {CONFIG} cannot be read ({in_words(error)}). Save the adapter again."
        ) from None
    for name in [name for name in SCALES if name in defaults and name not in values]:
        log.warning(
            "%s: its %s does not say %s, so PEFT's default %s decides how strongly it acts. If it was "
            "trained with another value, the numbers are not those of this adapter: add the field.",
            folder, CONFIG, name, getattr(config, name),
        )  # fmt: skip
    return config


def _check_number(folder: Path, name: str, value: Any) -> None:
    """Refuse a field of strength that is no number; ranks, whose names begin with r, are whole ones."""
    whole = name.startswith("r")
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number or abs(value) > LARGEST_SCALE:
        kind = f"{'whole ' if whole else ''}number{f' up to {LARGEST_SCALE:g}' if is_number else ''}"
        shown = in_words(repr(value))[:40]
        raise InputError(
            f"{folder}: its {CONFIG} says {name}: {shown}, which is no {kind}. Save the adapter again."
        )


def _check_types(folder: Path, values: Mapping[str, Any], config: type) -> None:
    """Refuse fields of a type that PEFT does not declare for them: it would take some for something else."""
    from typing import get_type_hints

    from pydantic import PydanticUserError, TypeAdapter

    try:
        hints = get_type_hints(config)
    except (NameError, TypeError):  # it names classes that are not there
        return
    empty = {field.name for field in fields(config) if field.default is None}  # which null stands for
    for name in [name for name in PLACES if name in hints and name in values]:
        if values[name] is None and name in empty:
            continue
        try:
            if values[name] is None:
                raise ValueError
            TypeAdapter(hints[name]).validate_python(values[name])
        except ValueError:  # pydantic's is one, too
            shown = in_words(repr(values[name]))[:60]
            raise InputError(
                f"{folder}: its {CONFIG} says {name}: {shown}, which PEFT does not take there. Save the "
                "adapter again."
            ) from None
        except PydanticUserError:  # a type that only PEFT can check
            continue
