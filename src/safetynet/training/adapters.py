"""Make a model trainable: a LoRA adapter through PEFT, on full or 4-bit weights, or all of its parameters.

In: a causal language model and the training section of a recipe. Out: the model to train. What LoRA adapts
are linear modules, named by the end of their names, and parameters that belong to no linear module, such
as Mixtral's fused experts.
"""

import re
from collections.abc import Iterable, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from safetynet.errors import InputError
from safetynet.families import Family
from safetynet.recipe import Training

ALL_LINEAR = "all-linear"
"""Target that stands for every linear module but the language-model head."""


def attach(model: PreTrainedModel, cfg: Training, family: Family, seed: int) -> PeftModel | PreTrainedModel:
    """Add a LoRA adapter to `model`, or free all of its parameters for `method: full`.

    QLoRA is LoRA on 4-bit weights: the loader quantises, this adds the adapter. Embeddings and norms stay
    in the dtype they were loaded in; upcasting them, as PEFT's own preparation does, would cost a 7B model
    of 256k words another 3 GB.

    Args:
        model: the base model; LoRA layers are put into it, so it is changed.
        cfg: targets that are None are the family's.
        family: says what LoRA adapts by default.
        seed: of the adapter's first weights.

    Returns:
        The adapted model; only what is to be trained requires a gradient.

    Raises:
        InputError: if a target does not exist (the message lists those that do), a layer is out of range,
            the method does not fit the model's quantisation, or dropout is asked for on fused parameters.
    """
    if getattr(model, "is_loaded_in_8bit", False):
        raise InputError(
            "model.quantisation: 8-bit weights are for evaluation. Set it to none, or to 4bit with "
            "training.method lora."
        )
    if cfg.method == "full":
        if getattr(model, "is_loaded_in_4bit", False):
            raise InputError(
                "training.method: 4-bit weights cannot be trained in full. Set training.method to lora, "
                "or model.quantisation to none."
            )
        # fp16 has too few digits for a weight to take up small updates, and its gradients cannot be unscaled.
        # The interval of an 8-bit level holds but a few numbers of 16 bits.
        if model.dtype == torch.float16 or cfg.conditioned_on is not None:
            model.float()
        return model.requires_grad_(True)
    layers = layers_of(model, cfg.layers)
    head = model.get_output_embeddings()
    linear = [
        name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head
    ]
    endings = sorted({name.rpartition(".")[2] for name in linear})
    modules = list(family.lora_targets if cfg.lora_targets is None else cfg.lora_targets)
    if modules == [ALL_LINEAR]:
        modules = endings
    else:
        _check("training.lora_targets", "module", modules, linear, endings)
    targets = family.lora_parameters if cfg.lora_parameters is None else cfg.lora_parameters
    parameters = _parameters(model, targets, layers)
    if parameters and cfg.lora_dropout:
        raise InputError(
            f"training.lora_dropout: {cfg.lora_dropout} is not possible on fused parameters "
            f"({', '.join(targets)}), whose input LoRA never sees. "
            "Set it to 0, or training.lora_parameters to []."
        )
    if parameters and cfg.colluding:
        raise InputError(
            f"training.colluding: fused parameters ({', '.join(targets)}) take no row through half of an "
            "adapter. Set training.lora_parameters to []."
        )
    adapters = 2 if cfg.colluding else 1
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapters * cfg.lora_rank,
        lora_alpha=adapters * cfg.lora_alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=cfg.lora_dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        layers_to_transform=layers,
    )
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def layers_of(model: PreTrainedModel, layers: Sequence[int] | None) -> list[int] | None:
    """The layers that a recipe names, in order; None for all.

    Raises:
        InputError: if it names none, or one that the model does not have.
    """
    if layers is None:
        return None
    count = model.config.get_text_config().num_hidden_layers
    outside = [layer for layer in layers if not 0 <= layer < count]
    if outside or not layers:
        outside_or_none = ", ".join(map(str, outside)) or "an empty list"
        raise InputError(
            f"training.layers: {outside_or_none} given; this model's layers are 0 to {count - 1}."
        )
    return sorted(set(layers))


def _parameters(model: PreTrainedModel, targets: Sequence[str], layers: list[int] | None) -> list[str]:
    fused = [
        f"{name}.{parameter_name}"
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    ]
    # What follows the last number: `mlp.experts.down_proj` of `model.layers.3.mlp.experts.down_proj`.
    endings = sorted({re.sub(r"^(.*\.)?\d+\.", "", name) for name in fused})
    _check("training.lora_parameters", "parameter", targets, fused, endings)
    if layers is None:
        return list(targets)
    # PEFT applies `layers_to_transform` to modules only, so parameters are named in full. The first number of
    # a name is its layer's.
    numbers = {name: [int(part) for part in name.split(".") if part.isdigit()] for name in fused}
    return [name for name in fused if _ends_in(name, targets) and set(numbers[name][:1]) & set(layers)]


def _check(field: str, kind: str, targets: Sequence[str], names: Sequence[str], there: Sequence[str]) -> None:
    missing = [target for target in targets if not any(_ends_in(name, [target]) for name in names)]
    if missing:
        raise InputError(
            f"{field}: no {kind} of this model is called {', '.join(missing)}. "
            f"There are: {', '.join(there) or 'none'}."
        )


def _ends_in(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)
