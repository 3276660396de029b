"""How an adapter gets into a model: PEFT's modules around the base, then every tensor into its place.

In: a base model and an adapter's files. Out: PEFT's model, and what of the base has been changed on the way.
Names that another wrapper has changed are mapped where they tell how; all else is refused with a count.
"""

import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.models import support
from safetynet.models.adapter_files import NUMBERS, AdapterFiles
from safetynet.models.blocks import unwrapped
from safetynet.models.files import counted, in_words, listed

log = logging.getLogger("safetynet")
NAME = "default"
"""Of an attached adapter in its model."""
WRAPPERS = frozenset(
    ("base_model", "model", "module", "language_model", "text_model", "_orig_mod", "_fsdp_wrapped_module",
     "_checkpoint_wrapped_module")
)  # fmt: skip
"""Parts of a tensor's name that say what the model was wrapped in when the adapter was saved."""


FOREIGN = (
    RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError, AssertionError,
    ArithmeticError, re.error,
)  # fmt: skip
"""What PEFT and models raise when an adapter's configuration and the base do not go together."""


@dataclass(frozen=True)
class BaseValue:
    """What attaching has changed in the base model: there, `owner.name` is `value`."""

    owner: Any
    name: str
    value: Any


def restore(values: Iterable[BaseValue]) -> None:
    """Put the base's own values back, the last one first."""
    for value in reversed(list(values)):
        setattr(value.owner, value.name, value.value)


def unwrap(base: Any) -> None:
    """Take PEFT's modules out of a base, whichever of them are in it: half an adapter as well as a whole.

    PEFT's own `unload` leaves saved modules, and token rows that have an update around them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    while wrapped := [(n, m) for n, m in base.named_modules() if isinstance(m, wrappers)]:
        for name, wrapper in wrapped:
            inside = (
                wrapper.get_base_layer() if isinstance(wrapper, BaseTunerLayer) else wrapper.original_module
            )
            if not any(name.startswith(f"{outer}.") for outer, _ in wrapped):
                base.set_submodule(name, inside)
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        if mark in vars(base):
            delattr(base, mark)


def resize(base: Any, files: AdapterFiles) -> list[BaseValue]:
    """Give the base as many rows of embeddings as the adapter was saved with.

    Returns:
        What that has changed; nothing where the number is the base's own.

    Raises:
        InputError: if the file lacks rows of added tokens.
    """
    tensors = files.tensors
    modules = [m for m in (base.get_input_embeddings(), base.get_output_embeddings()) if m is not None]
    embeddings = {id(module.weight) for module in modules}
    places = base.named_parameters(remove_duplicate=False)
    rows = {_canonical(name): len(p) for name, p in places if id(p) in embeddings}
    # The weight that each tensor is, or changes, and how many rows it has there.
    counts = []
    for name, tensor in tensors.items():
        weight, is_whole = _place_of(name)
        if weight.endswith("lora_embedding_A"):  # (r, rows)
            counts.append((weight.removesuffix("lora_embedding_A") + "weight", tensor.shape[-1]))
        else:  # lora_B is (rows, r)
            weight = weight if is_whole else weight.replace("lora_B.weight", "weight")
            counts.append((weight, len(tensor) if tensor.ndim else 0))
    other_counts = [count for weight, count in counts if count != rows.get(weight, count)]
    if not other_counts:
        return []
    config, size = base.config.get_text_config(), max(other_counts)
    saved = {weight for weight, is_whole in map(_place_of, tensors) if is_whole}
    lacking = [name for name, count in rows.items() if count < size and name not in saved]
    is_tied = len(embeddings) == 1  # then the rows of one name are those of all
    if lacking and not (is_tied and saved & rows.keys()):
        raise InputError(
            f"{files.folder}: it was trained on a base with {size} tokens, this one has "
            f"{min(rows.values())}, and its file lacks the rows of the added ones ({listed(lacking)}). Merge "
            "it (merge_and_unload) and give the merged model."
        )
    changed = [BaseValue(config, "vocab_size", config.vocab_size)]
    config.vocab_size = size
    for module in modules:
        for parameter in (module.weight, getattr(module, "bias", None)):
            if parameter is None or len(parameter) == size:  # tied weights are one
                continue
            changed.append(BaseValue(parameter, "data", parameter.data))
            more = parameter.new_zeros(max(0, size - len(parameter)), *parameter.shape[1:])
            parameter.data = torch.cat([parameter.data, more])[:size]
        name = "num_embeddings" if hasattr(module, "num_embeddings") else "out_features"
        changed.append(BaseValue(module, name, getattr(module, name)))
        setattr(module, name, size)
    return changed


def _place_of(name: str) -> tuple[str, bool]:
    """The base's name of a tensor, and whether it is that weight itself, and no factor of an update."""
    place = _canonical(name)
    for infix in ("base_layer.", "original_module.", "token_adapter."):
        place = place.replace(infix, "")
    return place, "lora_" not in place


def replicated_layers(base: Any, config: Any) -> list[BaseValue]:
    """What PEFT is about to change in order to repeat layers, if the adapter wants that."""
    if not getattr(config, "layer_replication", None):
        return []
    owner = base
    while hasattr(owner, "model"):  # where PEFT looks for the layers
        owner = owner.model
    name = "layers" if hasattr(owner, "layers") else "h"
    values = [BaseValue(owner, name, getattr(owner, name, None))]
    fields = [field for field in ("num_hidden_layers", "layer_types") if hasattr(owner.config, field)]
    return [*values, *(BaseValue(owner.config, field, getattr(owner.config, field)) for field in fields)]


def inject(base: Any, files: AdapterFiles) -> tuple[Any, list[BaseValue]]:
    """Put PEFT's modules around the base, without the adapter's weights.

    Returns:
        PEFT's model, and the weights that the adapter's start has replaced in the base.

    Raises:
        InputError: if the adapter does not fit.
    """
    from peft import PeftModelForCausalLM
    from transformers.initialization import no_init_weights

    config = replace(files.config)  # PEFT changes it
    # A rank that no tensor of the file has is refused before modules of it are made.
    rank = getattr(config, "r", 0)
    longest = max(max(tensor.shape, default=0) for tensor in files.tensors.values())
    if isinstance(rank, int) and rank > longest and config.peft_type.value == "LORA":
        raise InputError(
            f"{files.folder}: its configuration says rank {rank}, and the longest side of its tensors is "
            f"{longest}. The two are not of one adapter: save it again."
        )
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    replaces = support.replaces_weights(config)
    if replaces and (getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False)):
        raise InputError(
            f"{files.folder}: the adapter {replaces}, and those of a quantised base cannot be had back. Set "
            "model.quantisation to none."
        )
    before = {p: p.data.clone() for p in base.parameters() if p.ndim > 1} if replaces else {}
    types = getattr(base.config.get_text_config(), "layer_types", None)
    # What a plain start would draw comes from the file, or the adapter is refused.
    plain = config.peft_type.value == "LORA" and config.init_lora_weights in (True, "gaussian")
    try:
        with warnings.catch_warnings(), no_init_weights() if plain else nullcontext():
            warnings.simplefilter("ignore")
            model = PeftModelForCausalLM(base, config, NAME)
    except FOREIGN as error:
        raise does_not_fit(files, base, error) from None
    if types and getattr(config, "layer_replication", None):
        # The copies need the kind of attention of the layers that they are copies of.
        repeated = [types[i] for start, end in config.layer_replication for i in range(start, end)]
        base.config.get_text_config().layer_types = repeated
    return model, [BaseValue(p, "data", data) for p, data in before.items() if not torch.equal(p.data, data)]


def load(model: Any, files: AdapterFiles) -> list[BaseValue]:
    """Put every tensor of the file into PEFT's model.

    Returns:
        The parameters of the base that the file has replaced.

    Raises:
        InputError: with counts and the first names if tensors are missing or have no place, two are
            one weight, shapes differ, or a pattern of scales matches nothing.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    # The adapter's tensors by the names under which PEFT would save them. PEFT's own answer takes a pass
    # through every module's state, which plain LoRA can do without.
    places = dict(model.named_parameters(remove_duplicate=False))
    mark = f".{NAME}."
    if is_plain(files.config):
        saved: dict[str, Tensor] = {
            f"{name}.".replace(mark, ".")[:-1]: parameter
            for name, parameter in places.items()
            if mark in f"{name}."
        }
    else:
        saved = dict(get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False))
    tensors = _renamed(files, saved)

    # Whole and packed numbers where the model has weights would be taken as they stand.
    weights = [n for n in tensors.keys() & saved.keys() if saved[n].is_floating_point()]
    wrong = sorted(n for n in weights if tensors[n].dtype not in NUMBERS)
    if wrong:
        kinds = ", ".join(sorted({str(tensors[n].dtype).removeprefix("torch.") for n in wrong}))
        raise InputError(
            f"{files.folder}: {len(wrong)} of its tensors are of type {kinds} ({listed(wrong)}), which is "
            "not read. Save the adapter in 16 or 32 bits."
        )
    # Biases, embeddings and whatever else of the base is in the file: PEFT puts it in the base's place.
    of_base = {places[n] for n in tensors.keys() & places.keys() if mark not in f"{n}."}
    replaced = [BaseValue(parameter, "data", parameter.data.clone()) for parameter in of_base]
    firsts: dict[int, str] = {}
    for name in sorted(tensors.keys() & places.keys()):
        first = firsts.setdefault(id(places[name]), name)
        if first != name and not torch.equal(tensors[first], tensors[name]):
            raise InputError(
                f"{files.folder}: {first} and {name} are one weight in the model, and the adapter holds two "
                "that differ. The base that it was trained on does not tie them: name that one."
            )
    _check_patterns(model, files)
    try:
        result: Any = set_peft_model_state_dict(model, tensors, NAME)
    except KeyError:
        restore(replaced)
        check_complete(files.folder, list(saved.keys() - tensors.keys()), [])
        raise
    except (RuntimeError, ValueError) as error:
        restore(replaced)
        other = sorted(n for n in tensors.keys() & saved.keys() if tensors[n].shape != saved[n].shape)
        reason: Exception = error
        if other:
            sizes = " and ".join(str(tuple(group[other[0]].shape)) for group in (tensors, saved))
            reason = ValueError(
                f"size mismatch of {len(other)} of its {len(tensors)} tensors, as of {other[0]}: {sizes} by "
                "its configuration and this base, which do not go together"
            )
        raise does_not_fit(files, unwrapped(model), reason) from None
    if model.active_peft_config.is_prompt_learning:
        missing = list(saved.keys() - tensors.keys())
        unexpected = list(tensors.keys() - saved.keys() - places.keys())
    else:
        missing = [n for n in saved if n not in tensors]
        if missing:
            absent = set(result.missing_keys)
            # Tied modules share a tensor, of which one name is in the file.
            loaded = {tensor.data_ptr() for n, tensor in model.state_dict().items() if n not in absent}
            missing = [n for n in missing if saved[n].data_ptr() not in loaded]
        unexpected = list(result.unexpected_keys)
    if missing or unexpected:
        restore(replaced)
    check_complete(files.folder, missing, unexpected)
    return replaced


def is_plain(config: Any) -> bool:
    """Whether an adapter is LoRA's two factors for each module, and nothing else."""
    more = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
            "layer_replication", "kasa_config", "velora_config")  # fmt: skip
    return (
        config.peft_type.value == "LORA"
        and config.bias == "none"
        and config.init_lora_weights in (True, "gaussian")
        and not any(getattr(config, name, None) for name in more)
    )


def check_complete(folder: Path, missing: list[str], unexpected: list[str]) -> None:
    """Refuse an adapter of which tensors are missing or left over."""
    if not missing and not unexpected:
        return
    clauses = []
    if unexpected:
        has = "has" if len(unexpected) == 1 else "have"
        clauses.append(
            f"{len(unexpected)} of its tensors {has} no place in the model ({listed(sorted(unexpected))})"
        )
    if missing:
        what = counted(len(missing), "tensor")
        verb = "is" if len(missing) == 1 else "are"
        clauses.append(f"{what} of the adapter {verb} not in its file ({listed(sorted(missing))})")
    raise InputError(
        f"{folder}: {', and '.join(clauses)}. Loaded so, it would be another model: save the adapter again "
        "from the model that it was trained in, or name its own base."
    )


def _check_patterns(model: Any, files: AdapterFiles) -> None:
    """Refuse patterns of ranks and scales that match no module: the default would decide in their place."""
    from peft.utils.other import get_pattern_key

    if not (files.fields.get("alpha_pattern") or files.fields.get("rank_pattern")):
        return
    whole = unwrapped(model)
    names = {
        name.replace(".base_layer", "") for name, _ in (*whole.named_modules(), *whole.named_parameters())
    }
    for field in ("alpha_pattern", "rank_pattern"):
        pattern = files.fields.get(field) or {}
        unmatched = [key for key in pattern if not any(get_pattern_key([key], n) == key for n in names)]
        if unmatched:
            raise InputError(
                f"{files.folder}: {len(unmatched)} of the {len(pattern)} entries of its {field} name no "
                f"module here ({listed(unmatched)}), so that the default would decide how strongly they "
                "act. Name the base that it was trained on."
            )


def _renamed(files: AdapterFiles, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors under the names that PEFT would give them here, where their own names tell which."""
    # What PEFT writes a second time where embeddings are saved with the adapter is left out: the trained
    # module under its wrapper's name, the base's own one beside it, and of token rows a tied head's copy.
    tensors, rows = dict(files.tensors), ".token_adapter.trainable_tokens_delta"
    delta = next((t for name, t in tensors.items() if name.endswith(f"embed_tokens{rows}")), None)
    for name, tensor in files.tensors.items():
        plain = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
        is_trained = plain in tensors and plain != name and torch.equal(tensors[plain], tensor)
        is_base = ".original_module." in name and plain in tensors
        is_tied = name.endswith(f"lm_head{rows}") and delta is not None and torch.equal(delta, tensor)
        if is_trained or is_base or is_tied:
            del tensors[name]
    for names in _by_canonical(tensors).values():
        if len(names) > 1 and not saved.keys() >= set(names):
            raise InputError(
                f"{files.folder}: {listed(sorted(names))} are for one place in the model. Save the adapter "
                "again, with one tensor for each."
            )
    places = _by_canonical(saved.keys() - tensors.keys())
    mapping = {
        names[0]: places[key][0]
        for key, names in _by_canonical(tensors.keys() - saved.keys()).items()
        if len(names) == 1 == len(places.get(key, ()))
        and saved[places[key][0]].shape == tensors[names[0]].shape
    }
    if mapping:
        log.warning(
            "%s: %d of its tensors were saved under another wrapper's names (%s) and are taken for what "
            "they name.",
            files.folder, len(mapping), listed(sorted(mapping), 1),
        )  # fmt: skip
    return {mapping.get(name, name): tensor for name, tensor in tensors.items()}


def _by_canonical(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_canonical(name), []).append(name)
    return groups


def _canonical(name: str) -> str:
    """A tensor's name without what models are wrapped in and without the adapter's name."""
    name = re.sub(r"\.(lora_\w+|ia3_l)\.(?!weight$|bias$)[^.]+(?=\.(?:weight|bias)$|$)", r".\1", name)
    name = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.(?:weight|bias)$)", "", name)
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def does_not_fit(files: AdapterFiles, base: Any, error: BaseException) -> InputError:
    """The sentence for what PEFT or the model raises while an adapter is put on."""
    return InputError(f"{files.folder}: this adapter does not fit {base.name_or_path}: {in_words(error)}.")
