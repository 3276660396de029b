"""The reference: one unpadded prompt, one full forward pass, plain hooks. Shares no code with the engine.

An edit here is an object whose `hooks(model)` registers hooks and returns their handles.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

EVERYWHERE = slice(None)


def layers_of(model: Any) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.transformer.h if hasattr(inner, "transformer") else inner.model.layers


@contextmanager
def edited(model: Any, edits: Sequence[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for edit in edits:
            for handle in edit.hooks(model):
                stack.callback(handle.remove)
        yield


def logits(model: Any, ids: list[int], edits: Sequence[Any] = ()) -> torch.Tensor:
    """(tokens, vocabulary) of a prompt by itself."""
    with torch.no_grad(), edited(model, edits):
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def attention_of(layer: Any) -> Any:
    return layer.attn if hasattr(layer, "attn") else layer.self_attn


def _norms(layer: Any) -> tuple[Any, Any, Any]:
    """Ends of attention and MLP, and the norm before the MLP."""
    if hasattr(layer, "pre_feedforward_layernorm"):
        return (
            layer.post_attention_layernorm,
            layer.post_feedforward_layernorm,
            layer.pre_feedforward_layernorm,
        )
    before = layer.ln_2 if hasattr(layer, "ln_2") else layer.post_attention_layernorm
    return attention_of(layer), layer.mlp, before


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _put(output: Any, value: Any) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


@dataclass(frozen=True)
class At:
    """Edit one component of one layer at some positions, in all rows."""

    component: str
    layer: int
    positions: Any
    """A list, or EVERYWHERE."""
    change: Any
    """(k, width) to (k, width)."""
    span: Any = field(default_factory=lambda: EVERYWHERE)

    def _edited(self, values: Any) -> Any:
        values = values.clone()
        part = values[:, self.positions][..., self.span]
        new = self.change(part.reshape(-1, part.shape[-1])).reshape(part.shape)
        values[:, self.positions, self.span] = new.to(values.dtype)
        return values

    def hooks(self, model: Any) -> list[Any]:
        layer = layers_of(model)[self.layer]
        attention_end, mlp_end, before = _norms(layer)
        attention = attention_of(layer)
        output = attention.c_proj if hasattr(attention, "c_proj") else attention.o_proj

        def change_input(module, args, kwargs):
            if args:
                return (self._edited(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": self._edited(kwargs["hidden_states"])}

        def change_output(module, args, out):
            return _put(out, self._edited(_first(out)))

        if self.component in ("resid_pre", "embedding"):
            return [layer.register_forward_pre_hook(change_input, with_kwargs=True)]
        if self.component == "resid_mid":
            return self._mid(layer, before)
        if self.component == "head":
            return [output.register_forward_pre_hook(change_input, with_kwargs=True)]
        module = {
            "resid_post": layer,
            "attn_out": attention_end,
            "mlp_out": mlp_end,
            "query": getattr(attention, "q_proj", None),
            "key": getattr(attention, "k_proj", None),
            "value": getattr(attention, "v_proj", None),
        }[self.component]
        return [module.register_forward_hook(change_output)]

    def _mid(self, layer: Any, before: Any) -> list[Any]:
        """The MLP reads the edited sum, and the difference is added to what the layer returns."""
        kept = {}

        def change_input(module, args):
            kept["difference"] = self._edited(args[0]) - args[0]
            return (args[0] + kept["difference"],)

        def add(module, args, out):
            return _put(out, _first(out) + kept["difference"])

        return [before.register_forward_pre_hook(change_input), layer.register_forward_hook(add)]


@dataclass(frozen=True)
class Cut:
    """Give a layer's attention a mask of our own, in which edges are missing: (queries, keys, head)."""

    layer: int
    edges: tuple[tuple[Sequence[int], Sequence[int], int | None], ...]

    def hooks(self, model: Any) -> list[Any]:
        attention = attention_of(layers_of(model)[self.layer])
        heads = model.config.num_attention_heads

        def hook(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            n, window = x.shape[1], getattr(attention, "sliding_window", None)
            mask = torch.full((1, heads, n, n), torch.finfo(x.dtype).min, dtype=x.dtype)
            for query in range(n):
                oldest = 0 if window is None else max(0, query - window + 1)
                mask[:, :, query, oldest : query + 1] = 0
            for queries, keys, head in self.edges:
                for query in queries:
                    for key in keys:
                        mask[:, EVERYWHERE if head is None else head, query, key] = torch.finfo(x.dtype).min
            return args, kwargs | {"attention_mask": mask}

        return [attention.register_forward_pre_hook(hook, with_kwargs=True)]


def lora_update(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What the only adapter of a linear module adds to its output."""
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return x @ a.T @ b.T * module.scaling["default"]


@dataclass(frozen=True)
class Update:
    """Change the LoRA update of linear modules of one layer, all of them or one, at some positions."""

    layer: int
    positions: Any
    change: Any
    module: str = ""

    def hooks(self, model: Any) -> list[Any]:
        def hook(module, args, out):
            old = lora_update(module, args[0])
            new = old.clone()
            new[0, self.positions] = self.change(old[0, self.positions])
            return out - old + new

        found = layers_of(model)[self.layer].named_modules()
        linear = [(n, m) for n, m in found if hasattr(m, "lora_A") and not hasattr(m, "parameter_name")]
        return [m.register_forward_hook(hook) for n, m in linear if self.module in ("", n)]


@contextmanager
def zeroed(model: Any, layers: Sequence[int], ends: str = "") -> Iterator[None]:
    """Every lora_B of some layers is zero, or of one module of them whose name ends so."""
    kept = []
    for index in layers:
        for name, module in layers_of(model)[index].named_modules():
            if hasattr(module, "lora_B") and name.endswith(ends):
                weight = module.lora_B["default"].weight
                kept.append((weight, weight.detach().clone()))
                weight.data.zero_()
    assert kept
    try:
        yield
    finally:
        for weight, was in kept:
            weight.data.copy_(was)


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts written out: each expert for each token, times its weight; both may change."""

    layer: int
    weights: tuple[tuple[Any, Any], ...] = ()
    """Positions and changes of (k, experts) routing weights."""
    experts: tuple[tuple[int, Any, Any], ...] = ()
    """Expert, positions and change of (k, width) that it adds."""
    without: tuple[tuple[str, Any], ...] = ()
    """Parameter whose adapter is off, and the positions at which it is."""

    def hooks(self, model: Any) -> list[Any]:
        block = layers_of(model)[self.layer].mlp

        def hook(module, args, out):
            return self._output(module, args[0][0])[None]

        return [block.register_forward_hook(hook)]

    def _output(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        routed = (x @ block.gate.weight.T).softmax(-1)
        top, chosen = routed.topk(block.gate.top_k, dim=-1)
        weights = torch.zeros_like(routed).scatter(1, chosen, top / top.sum(-1, keepdim=True))
        for positions, change in self.weights:
            weights[positions] = change(weights[positions])
        total = torch.zeros_like(x)
        for expert in range(weights.shape[1]):
            added = weights[:, expert : expert + 1] * self._expert(block.experts, expert, x)
            for index, positions, change in self.experts:
                if index == expert:
                    added[positions] = change(added[positions])
            total += added
        return total

    def _expert(self, experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        rows = []
        for position, row in enumerate(x):
            off = {name for name, places in self.without if position in torch.arange(len(x))[places]}
            up = fused(experts, "gate_up_proj", expert, "gate_up_proj" in off) @ row
            gate, linear = up.chunk(2)
            hidden = torch.nn.functional.silu(gate) * linear
            rows.append(fused(experts, "down_proj", expert, "down_proj" in off) @ hidden)
        return torch.stack(rows)


def fused(experts: Any, name: str, expert: int, plain: bool = False) -> torch.Tensor:
    """One expert's weight, (out, in), with its adapter's update unless `plain`."""
    update: Any = 0
    while hasattr(experts, "lora_A"):
        if experts.parameter_name == name and not plain:
            a, b = experts.lora_A["default"].weight, experts.lora_B["default"].weight
            rank, count = experts.r["default"], experts.num_experts
            own_a = a[expert * rank : (expert + 1) * rank]
            own_b = b.reshape(b.shape[0], rank, count)[:, :, expert]
            update = own_b @ own_a * experts.scaling["default"]
        experts = experts.base_layer
    return getattr(experts, name)[expert] + update
