"""Adapters in a model: attached as they were saved, switched off exactly, exchanged, and taken off again.

In: a base model and an adapter's files. Out: PEFT's model, of which three things are known: every tensor of
the file is in it and none is missing; with the adapter switched off it is its base; what attaching changed in
the base can be undone.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.models import support
from safetynet.models.adapter_files import AdapterFiles, read
from safetynet.models.adapter_loading import (
    FOREIGN,
    BaseValue,
    check_complete,
    does_not_fit,
    inject,
    is_plain,
    load,
    replicated_layers,
    resize,
    restore,
    unwrap,
)
from safetynet.models.blocks import evaluating, shortened, unwrapped
from safetynet.models.files import counted, listed
from safetynet.models.loading import LoadedModel
from safetynet.models.lora import factors, include_start, silent, update_of
from safetynet.models.same_base import check_base

log = logging.getLogger("safetynet")
PROBE_TOKENS, PROBE_LAYERS, PROBE_ROWS, PROBE_VALUES = 4, 1, 256, 64
"""Of the prompt, of the layers and of the head that tell a base, and of each parameter's values."""
PROBE_TOLERANCE = 1e-3
"""Of the largest logit. The same modules compute the same numbers; what differs by more is another model."""
MERGED_FROM = 50_000_000
"""Parameters from which it pays to merge; answers of smaller models stay those of earlier versions."""
RECORD = "_safetynet_base_values"
"""Attribute of PEFT's model: what attaching has changed in the base, as `BaseValue`s."""


def attach(base: LoadedModel, source: AdapterFiles | Path | str, *, same_base: bool = False) -> Any:
    """Put an adapter onto a base model, as it was saved or not at all.

    Args:
        base: changed in place; `detach` gives it back as it was, and so does a refusal.
        source: as `adapter_files.read` takes it, or what it has read.
        same_base: the adapter names its base otherwise, and it is this model all the same.

    Returns:
        PEFT's model in evaluation mode.

    Raises:
        InputError: as `adapter_files.read`; if the adapter is of another base, or of a kind that is not
            measured right; if tensors are missing or have no place; if the model with the adapter
            switched off is not the base.
    """
    files = source if isinstance(source, AdapterFiles) else read(source)
    check_base(files, base, same_base)
    return put_on(base.model, files)


def put_on(model: Any, files: AdapterFiles) -> Any:
    """`attach`, whatever the adapter calls its base."""
    support.check(files.config, "evaluate")
    check_in_memory(model)
    before = _Probe.of(model)
    record = [*resize(model, files), *replicated_layers(model, files.config)]
    adapted = None
    try:
        adapted, replaced = inject(model, files)
        record += replaced
        setattr(adapted, RECORD, record)
        start = factors(adapted) if support.low_rank_start(files.config) else {}
        record += load(adapted, files)
        if start:
            as_trained = _logits(adapted)
            include_start(adapted, start)
            restore(replaced)
            owners = {id(value.owner) for value in replaced}  # also of a residual that the file holds
            record[:] = [value for value in record if id(value.owner) not in owners]
            # The start had been taken out of the weights. A model that reads some of them past PEFT's modules
            # gives other logits now. Sums round as coarsely as the coarsest type of number.
            apart = float((as_trained - _logits(adapted)).abs().max())
            types = {tensor.dtype for tensor in files.tensors.values()} | {unwrapped(adapted).dtype}
            coarse = max(torch.finfo(kind).eps for kind in types) ** 0.5
            if not apart <= max(PROBE_TOLERANCE, coarse) * float(as_trained.abs().max()):
                raise InputError(
                    f"{files.folder}: written for the base's own weights, this adapter gives other logits, "
                    f"by {apart:.3g}: the model reads some weights without calling their module, as Mamba "
                    "does dt_proj and embeddings do a tied head. An adapter that began by changing them is "
                    "no update of the base, and is not measured."
                )
        with switched_off(adapted):
            before.check(_Probe.of(adapted), files)
    except BaseException as error:
        if adapted is None:
            unwrap(model)
            restore(record)
        else:
            detach(adapted)
        if isinstance(error, FOREIGN) and not isinstance(error, torch.OutOfMemoryError):
            raise does_not_fit(files, model, error) from None
        raise
    if silent(adapted):
        log.warning("%s: every update of this adapter is zero, so that it changes nothing.", files.folder)
    return adapted.eval()


def detach(model: Any) -> Any:
    """Take the adapter off; the base model, as it was before `attach`."""
    restore(recorded(model))
    setattr(model, RECORD, [])
    if model.active_peft_config.is_prompt_learning:
        return model.base_model
    base = model.get_base_model()
    unwrap(base)
    return base


@contextmanager
def switched_off(model: Any) -> Iterator[Any]:
    """The base model while entered, whatever the adapter has changed in it.

    PEFT's own `disable_adapter` leaves biases, embeddings and weights that attaching has replaced.

    Raises:
        InputError: if the model has no adapter, or one that changes its base and was not attached here.
    """
    if not has_adapter(model):
        raise InputError("model: it has no adapter that could be switched off. Give the base model itself.")
    config = model.active_peft_config
    with ExitStack() as stack:
        if config.is_prompt_learning or config.is_adaption_prompt:
            stack.enter_context(model.disable_adapter())
        else:
            stack.enter_context(_layers_off(model))
            # Layers that are put back below may be none of the adapter's, and the model says that it is off.
            stack.callback(setattr, model, "_adapters_disabled", model._adapters_disabled)
            model._adapters_disabled = True
        stack.enter_context(_base_in_place(model))
        yield model


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """Inside, an adapter of a large model is part of the base's weights, where that is what PEFT computes.

    W x + s B (A x) is (W + s B A) x to rounding, in one product instead of three. Merged are plain LoRA
    updates of linear modules in fp32 that nothing hooks; every other model stays as it is. The base's tensors
    are kept aside, which takes the memory of the adapted weights once more, and are themselves put back.
    """
    layers = _mergeable(model)
    weights = [layer.get_base_layer().weight for layer in layers]
    before = [weight.data for weight in weights]
    try:
        with torch.no_grad(), _layers_off(model) if layers else nullcontext():
            for layer, weight in zip(layers, weights, strict=True):
                weight.data = weight + update_of(layer, model.active_adapter).product()[0]
            yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data


@contextmanager
def exchanged(model: Any, folder: Path) -> Iterator[Any]:
    """The model with the weights of another adapter of its configuration; its own are back afterwards.

    The weights change place, not the modules: adding an adapter and taking it off again takes PEFT several
    times as long as a sweep of a miniature takes.

    Raises:
        InputError: as `adapter_files.read`; if the two adapters differ in configuration, so that the weights
            would act with the first one's strength, or in their tensors.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    files, name = read(folder), model.active_adapter
    differing = support.differing(model.active_peft_config, files.config)
    if differing:
        raise InputError(
            f"{folder}: this adapter's configuration differs in {listed(differing)} from the one in the "
            "model, by which its weights would then act. Attach it to a base model of its own."
        )
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # What the model ties, such as new rows of embeddings and head, stands once in a file.
    tied = {weights[key].data_ptr() for key in weights.keys() & files.tensors.keys()}
    before = {
        key: weight.clone()
        for key, weight in weights.items()
        if key in files.tensors or weight.data_ptr() not in tied
    }
    check_complete(folder, list(before.keys() - files.tensors), list(files.tensors.keys() - before.keys()))
    set_peft_model_state_dict(model, dict(files.tensors), name)
    try:
        yield model.eval()
    finally:
        set_peft_model_state_dict(model, before, name)


def has_adapter(model: Any) -> bool:
    """Whether PEFT's wrapper is around a model."""
    return hasattr(model, "peft_config")


def is_off(model: Any) -> bool:
    """Whether the adapter of a model is switched off at this moment."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return bool(model._adapters_disabled or (layers and all(layer.disable_adapters for layer in layers)))


def recorded(model: Any) -> list[BaseValue]:
    """What attaching has changed in the base; errors as in `switched_off`."""
    values = getattr(model, RECORD, None)
    if values is not None:
        return list(values)
    if changes := support.changes_base(model.peft_config[model.active_adapters[0]]):
        raise InputError(
            f"model: its adapter {changes}, and what the base was is not known here. Load it with "
            "safetynet.models.adapters.attach."
        )
    return []


def adapter_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """All parameters that belong to the active adapter, by their names in the model."""
    mark = f".{model.active_adapter}."
    replaced = {id(value.owner) for value in recorded(model) if value.name == "data"}
    for name, parameter in model.named_parameters():
        if mark in f"{name}." or id(parameter) in replaced:
            yield name, parameter


def unsaved(model: Any) -> list[str]:
    """Parameters of the base that the adapter's file replaces, and that PEFT would not save with it."""
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    replaced = {id(value.owner) for value in recorded(model) if value.name == "data"}
    return [n for n, p in model.named_parameters() if id(p) in replaced and n not in saved]


def base_counterparts(model: Any) -> dict[str, Tensor]:
    """What the base model has in place of `adapter_parameters`, where it has a tensor of that shape.

    Saved modules, token rows, biases and embeddings have one; factors of an update have none.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))  # the base's may be tied
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    mark = f".{model.active_adapter}"
    counterparts = {names[id(v.owner)]: v.value for v in reversed(recorded(model)) if v.name == "data"}
    for name in parameters:
        if f"modules_to_save{mark}." in name:
            counterparts[name] = parameters[name.replace(f"modules_to_save{mark}.", "original_module.")]
        elif name.endswith(f"trainable_tokens_delta{mark}"):
            layer = model.get_submodule(name.removesuffix(f".trainable_tokens_delta{mark}"))
            counterparts[name] = layer.trainable_tokens_original[model.active_adapter]
    return {name: tensor.detach() for name, tensor in counterparts.items()}


def base_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The base model's parameters by its own names, with their own values, whatever is attached to it."""
    if not has_adapter(model):
        yield from model.named_parameters()
        return
    prefix = "base_model." if model.active_peft_config.is_prompt_learning else "base_model.model."
    with _base_in_place(model):
        for name, parameter in model.named_parameters():
            if not any(f".{adapter}." in f"{name}." for adapter in model.peft_config):
                plain = name.removeprefix(prefix)
                for infix in (".base_layer", ".original_module", ".token_adapter"):
                    plain = plain.replace(infix, "")
                yield plain, parameter.detach()  # which stays the base's own when another is put in place


def virtual_tokens(model: Any) -> int:
    """Columns that a soft prompt puts before every prompt's own; 0 for all other models."""
    if not has_adapter(model) or not model.active_peft_config.is_prompt_learning or is_off(model):
        return 0
    config = model.active_peft_config
    return 0 if config.peft_type.value in support.PREFIXES else int(config.num_virtual_tokens)


def check_in_memory(model: Any) -> None:
    """Refuse a model of which a part lies on the disk, or waits in memory for its turn on a GPU.

    Raises:
        InputError: naming how many parts.
    """
    places = getattr(model, "hf_device_map", None) or {}
    moved = [name for name, place in places.items() if place in ("cpu", "disk")]
    if moved and len(set(places.values())) > 1:
        raise InputError(
            f"model: {len(moved)} of its {len(places)} parts do not fit the GPUs and are loaded when their "
            "turn comes, which adapters and interventions do not see. Use more GPUs, or model.quantisation: "
            "4bit."
        )


def _mergeable(model: Any) -> list[Any]:
    """The LoRA modules of a model that `merged` merges; none where one of them cannot be."""
    from peft.tuners.lora import LoraLayer, layer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not has_adapter(model) or len(model.active_adapters) != 1 or is_off(model):
        return []
    if not is_plain(model.active_peft_config) or sum(p.numel() for p in model.parameters()) < MERGED_FROM:
        return []
    tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layers: list[Any] = [m for m in tuned if isinstance(m, LoraLayer) and model.active_adapter in m.lora_A]
    bases = [module.get_base_layer() for module in layers]
    counts = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    exact = (
        all(
            type(module) is layer.Linear and not module.merged and not module.lora_variant for module in tuned
        )
        and all(type(base) is torch.nn.Linear and base.weight.dtype == torch.float32 for base in bases)
        and all(counts[id(base.weight)] == 1 for base in bases)  # a tied weight has another reader
        and not any(part._forward_hooks or part._forward_pre_hooks for m in layers for part in m.modules())
    )
    return layers if exact else []


@contextmanager
def _layers_off(model: Any) -> Iterator[None]:
    """Every layer of an adapter, and every module that it saves, lets its input through to the base's.

    PEFT's own switch also asks all modules for their state, takes gradients from them and gives them back,
    which takes as long as a pass of a small model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                stack.callback(setattr, module, "_disable_adapters", module._disable_adapters)
                module._disable_adapters = True
        yield


@contextmanager
def _base_in_place(model: Any) -> Iterator[None]:
    """The base's own values where attaching has changed them; the adapter's are back afterwards."""
    with ExitStack() as stack:
        for value in reversed(recorded(model)):  # what was changed twice ends as it began
            stack.callback(setattr, value.owner, value.name, getattr(value.owner, value.name))
            setattr(value.owner, value.name, value.value)
        yield


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """(PROBE_TOKENS, vocabulary) of a prompt of tokens from all over the vocabulary, in evaluation mode."""
    inner = unwrapped(model)
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    ids = torch.arange(PROBE_TOKENS, device=inner.device) * (vocabulary // PROBE_TOKENS)
    with evaluating(model):
        return model(input_ids=ids[None], use_cache=False).logits[0].float()


@contextmanager
def _short_head(inner: Any, rows: Tensor) -> Iterator[bool]:
    """Let a model give the logits of some tokens alone, where its head is a plain linear module.

    The head is the largest matrix of a small prompt's pass. Gives whether it was shortened; a head that an
    adapter is wrapped around is asked whole.
    """
    head = inner.get_output_embeddings()
    if type(head) is not torch.nn.Linear or not isinstance(head.weight, torch.nn.Parameter):
        yield False
        return
    short = torch.nn.Linear(head.in_features, len(rows), head.bias is not None, device="meta")
    for name, parameter in head.named_parameters():
        part = parameter.detach()[rows.to(parameter.device)]
        setattr(short, name, torch.nn.Parameter(part, requires_grad=False))
    inner.set_output_embeddings(short)
    try:
        yield True
    finally:
        inner.set_output_embeddings(head)


@dataclass(frozen=True)
class _Probe:
    """What tells a base model from another that differs in any module."""

    logits: Tensor
    """(PROBE_TOKENS, PROBE_ROWS), of tokens all over the vocabulary, through PROBE_LAYERS."""
    weights: dict[str, Tensor]
    """A few values of every parameter, by the base model's own names."""

    @classmethod
    def of(cls, model: Any) -> "_Probe":
        """Ask a model, whose adapter is off if it has one."""
        inner = unwrapped(model)
        rows = inner.get_input_embeddings().weight.shape[0]
        some = torch.arange(0, rows, max(1, rows // PROBE_ROWS))
        with shortened(inner, PROBE_LAYERS), _short_head(inner, some) as short:
            logits = _logits(model)
        logits = logits if short else logits[:, some.to(logits.device)]
        flat = ((name, p.detach().reshape(-1)) for name, p in base_parameters(model))
        return cls(logits, {name: p[:: max(1, len(p) // PROBE_VALUES)].clone() for name, p in flat})

    def check(self, after: "_Probe", files: AdapterFiles) -> None:
        """Refuse an adapter under which the base is another."""
        size, shapes = float(self.logits.abs().max()), (self.logits.shape, after.logits.shape)
        apart = float((self.logits - after.logits).abs().max()) if shapes[0] == shapes[1] else float("inf")
        moved = sorted(
            name
            for name in self.weights.keys() | after.weights.keys()
            if not (name in self.weights and name in after.weights)
            or not torch.equal(self.weights[name], after.weights[name])
        )
        if moved or not apart <= PROBE_TOLERANCE * size:
            raise InputError(
                f"{files.folder}: with this adapter switched off, the model is not its base: "
                + (
                    f"{counted(len(moved), 'parameter')} of it changed ({listed(moved)})"
                    if moved
                    else f"logits differ by {apart:.3g}"
                )
                + ". Merge it (merge_and_unload) and give the merged model."
            )
