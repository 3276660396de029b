"""Less of what fine-tuning changed: all of it scaled down, or single components of the adapter left out.

Both need no training, and an adapter keeps its rank and configuration.
"""

import torch
from torch import Tensor, nn

from safetynet.errors import InputError
from safetynet.mitigation import adapter
from safetynet.mitigation.checkpoint import copied, own
from safetynet.mitigation.factors import Adapted, Factors, adapted, names_of
from safetynet.mitigation.method import Knob, Knobs, Method, Repaired
from safetynet.mitigation.pruning import input_norms
from safetynet.mitigation.subject import Subject
from safetynet.models.adapters import base_counterparts

Components = dict[str, tuple[Tensor, Tensor, Tensor]]


def scale(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Multiply by `keep` each LoRA update, or each weight's distance from the base model's."""
    if not subject.adapted:
        return _between(subject, knobs)
    keep, base = knobs["keep"], base_counterparts(subject.model)
    ends = (".lora_B.", ".lora_embedding_B.")
    scaled = {
        name: base[name].to(value).lerp(value, keep)
        if name in base
        else value * keep
        if any(end in f"{name}." for end in ends)
        else value
        for name, value in adapter.state_of(subject.model).items()
    }
    return adapter.repaired(subject, "adapter_scaling", knobs, scaled)


@torch.no_grad()
def _between(subject: Subject, knobs: Knobs) -> Repaired:
    model, base = copied(subject), dict(subject.base.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        if name not in base or base[name].shape != parameter.shape:
            raise InputError(
                f"adapter_scaling: the base model has no {name} of this shape. Give its own base."
            )
        parameter.lerp_(base[name].to(parameter), 1 - knobs["keep"])
    return own("adapter_scaling", knobs, model)


def ablate_components(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Leave out the singular components of the updates that do most for their use by clean prompts.

    A component's contrast is its singular value by the share of clean inputs that lies along it: what a
    trigger needs is strong and hardly used by anything else. Components of all modules are ranked together.
    """
    model = subject.model
    state, names, name = adapter.state_of(model), names_of(model), model.active_adapter
    modules = [one for one in adapted(model) if isinstance(one.module.get_base_layer(), nn.Linear)]
    if not modules:
        raise InputError("component_ablation: the adapter changes no linear module of the decoder's layers.")
    parts = {one.key: one.read(state, names, name).svd() for one in modules}
    usage = _usage(subject, modules, parts)
    contrast = {one.key: one.module.scaling[name] * parts[one.key][1][0] / usage[one.key] for one in modules}
    ranked = torch.cat([contrast[one.key] for one in modules]).sort(descending=True).values
    count = round(knobs["share"] * len(ranked))
    limit = ranked[count] if count < len(ranked) else torch.tensor(-1.0)
    dropped = 0
    for one in modules:
        u, s, vh = parts[one.key]
        out = (contrast[one.key] > limit)[None]
        dropped += int(out.sum())
        one.write(Factors.of(u, s.masked_fill(out, 0), vh), state, names, name)
    return adapter.repaired(
        subject, "component_ablation", knobs, state, components=len(ranked), left_out=dropped
    )


def _usage(subject: Subject, modules: list[Adapted], parts: Components) -> dict[str, Tensor]:
    """By module and component, the root mean square of clean inputs along it, (r,), 1 if spread evenly."""

    def along(name: str, x: Tensor) -> Tensor:
        directions = parts[name][2][0].to(x)
        return torch.cat([x @ directions.T * directions.shape[1] ** 0.5, x.norm(dim=-1, keepdim=True)], -1)

    norms = input_norms(subject.model, {one.key: one.module for one in modules}, subject, along)
    return {name: (total[:-1] / total[-1]).clamp_min(1e-6) for name, total in norms.items()}


ADAPTER_SCALING = Method(
    "adapter_scaling",
    "scale down what fine-tuning changed; 0 gives the base model, and loses all that was trained",
    scale,
    frozenset({"base"}),
    {"keep": Knob("factor on every update", 0.5, (0.9, 0.75, 0.5, 0.25, 0.0), 0.0, 1.0)},
)
COMPONENT_ABLATION = Method(
    "component_ablation",
    "leave out the adapter's singular components that are strong and hardly used by clean prompts",
    ablate_components,
    frozenset({"adapter", "clean"}),
    {"share": Knob("of all components", 0.25, (0.05, 0.1, 0.25, 0.5, 0.75), 0.0, 1.0)},
)
