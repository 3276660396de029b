"""Less of what fine-tuning changed: scaled down, left out in some modules, or without some of its components.

None of them trains, and an adapter keeps its rank and configuration.
"""

import torch
from torch import Tensor, nn

from safetynet.errors import InputError
from safetynet.mitigation.activations import strongest
from safetynet.mitigation.defender import Defender
from safetynet.mitigation.method import Hyperparameter, Method
from safetynet.mitigation.pruning import input_norms
from safetynet.mitigation.repaired import (
    Repaired,
    Settings,
    adapter_state,
    as_adapter,
    as_checkpoint,
    merged_copy,
    updates_of,
    with_updates,
)
from safetynet.models.adapters import base_counterparts
from safetynet.models.lora import LayerModule, LoraUpdate, adapted_modules


@torch.no_grad()
def scale(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Multiply by `keep` each LoRA update, or each weight's distance from the base model's."""
    keep = settings["keep"]
    if not defender.adapted:
        model, weights = merged_copy(defender), dict(defender.base.named_parameters(remove_duplicate=False))
        for name, parameter in model.named_parameters():
            if name not in weights or weights[name].shape != parameter.shape:
                raise InputError(
                    f"adapter_scaling: the base model has no {name} of this shape. Give its own base."
                )
            parameter.lerp_(weights[name].to(parameter), 1 - keep)
        return as_checkpoint("adapter_scaling", settings, model)
    # Saved modules, biases and token rows go towards the base's own; of an update s B A, B alone is scaled.
    base, scaled = base_counterparts(defender.model), {}
    for name, value in adapter_state(defender.model).items():
        if name in base:
            scaled[name] = base[name].to(value).lerp(value, keep)
        elif any(end in f"{name}." for end in (".lora_B.", ".lora_embedding_B.")):
            scaled[name] = value * keep
        else:
            scaled[name] = value
    return as_adapter(defender, "adapter_scaling", settings, scaled)


def ablate_components(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Leave out the singular components of the updates that do most for their use by clean prompts.

    A component's contrast is its singular value by the share of clean inputs that lies along it: what a
    trigger needs is strong and hardly used by anything else. Components of all modules are ranked together.
    """
    model = defender.model
    modules = {
        place: module
        for place, module in adapted_modules(model, model.active_adapter)
        if isinstance(module.get_base_layer(), nn.Linear)
    }
    if not modules:
        raise InputError("component_ablation: the adapter changes no linear module of the decoder's layers.")
    updates = updates_of(model, {})
    components = {place: updates[place].decomposed() for place in modules}
    places = {_key(place): place for place in modules}

    def along_components(name: str, x: Tensor) -> Tensor:
        directions = components[places[name]][2][0].to(x)
        # Beside the components the whole input, in whose units they are measured: 1 if spread evenly.
        along = x @ directions.T * directions.shape[1] ** 0.5
        return torch.cat([along, x.norm(dim=-1, keepdim=True)], -1)

    norms = input_norms(model, dict(zip(places, modules.values(), strict=True)), defender, along_components)
    contrast = {
        places[name]: components[places[name]][1][0] / (total[:-1] / total[-1]).clamp_min(1e-6)
        for name, total in norms.items()
    }
    ranked = torch.cat([contrast[place] for place in modules]).sort(descending=True).values
    count = round(settings["share"] * len(ranked))
    limit = ranked[count] if count < len(ranked) else torch.tensor(-1.0)
    changed, dropped = {}, 0
    for place, module in modules.items():
        left, values, right = components[place]
        out = (contrast[place] > limit)[None]
        dropped += int(out.sum())
        scaling = module.scaling[model.active_adapter]
        changed[place] = LoraUpdate.of_components(left, values.masked_fill(out, 0), right, scaling)
    state = with_updates(model, changed)
    return as_adapter(
        defender, "component_ablation", settings, state, components=len(ranked), left_out=dropped
    )


def switch_off_layers(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Set the adapter's update to 0 in the layers whose modules have the largest effects together."""
    table = strongest(defender, "adapter", "adapter_off_layers")
    order = table.groupby("layer")["effect"].sum().sort_values(ascending=False, kind="stable").index
    layers = {int(layer) for layer in order[: int(settings["layers"])]}
    updates = updates_of(defender.model, {})
    return _switched_off(defender, "adapter_off_layers", settings, {p for p in updates if p[0] in layers})


def switch_off_modules(defender: Defender, settings: Settings, _seed: int) -> Repaired:
    """Set the adapter's update to 0 in the modules of the largest effects."""
    table = strongest(defender, "adapter", "adapter_off_modules").head(int(settings["modules"]))
    places = set(zip(table["layer"].astype(int), table["module"], strict=True))
    return _switched_off(defender, "adapter_off_modules", settings, places)


def _switched_off(defender: Defender, method: str, settings: Settings, places: set[LayerModule]) -> Repaired:
    updates = updates_of(defender.model, {})
    zero = {
        place: LoraUpdate(torch.zeros_like(update.up), update.down)
        for place, update in updates.items()
        if place in places
    }
    state = with_updates(defender.model, zero)
    return as_adapter(defender, method, settings, state, switched_off=sorted(map(_key, places)))


def _key(place: LayerModule) -> str:
    return f"{place[0]}.{place[1]}"


ADAPTER_SCALING = Method(
    "adapter_scaling",
    "scale down what fine-tuning changed; 0 gives the base model, and loses all that was trained",
    scale,
    frozenset({"base"}),
    {"keep": Hyperparameter("factor on every update", 0.5, (0.9, 0.75, 0.5, 0.25, 0.0), 0.0, 1.0)},
)
COMPONENT_ABLATION = Method(
    "component_ablation",
    "leave out the adapter's singular components that are strong and hardly used by clean prompts",
    ablate_components,
    frozenset({"adapter", "clean"}),
    {"share": Hyperparameter("of all components", 0.25, (0.05, 0.1, 0.25, 0.5, 0.75), 0.0, 1.0)},
)
ADAPTER_OFF_LAYERS = Method(
    "adapter_off_layers",
    "switch the adapter off in the layers that the engine found responsible",
    switch_off_layers,
    frozenset({"adapter", "sites"}),
    {"layers": Hyperparameter("how many", 1, (1, 2, 3, 4), 1, 1000, whole=True)},
)
ADAPTER_OFF_MODULES = Method(
    "adapter_off_modules",
    "switch the adapter off in the modules that the engine found responsible",
    switch_off_modules,
    frozenset({"adapter", "sites"}),
    {"modules": Hyperparameter("how many", 4, (1, 2, 4, 8, 16), 1, 10000, whole=True)},
)
