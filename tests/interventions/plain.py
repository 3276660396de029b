"""The reference: one unpadded prompt, one full forward pass, plain hooks. Shares no code with the engine."""

from contextlib import ExitStack
from typing import Any

import torch


def layers_of(model: Any) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.transformer.h if hasattr(inner, "transformer") else inner.model.layers


def _norms(layer: Any) -> tuple[Any, Any, Any]:
    """Ends of attention and MLP, and the norm before the MLP."""
    attention = layer.attn if hasattr(layer, "attn") else layer.self_attn
    if hasattr(layer, "pre_feedforward_layernorm"):
        return (
            layer.post_attention_layernorm,
            layer.post_feedforward_layernorm,
            layer.pre_feedforward_layernorm,
        )
    before = layer.ln_2 if hasattr(layer, "ln_2") else layer.post_attention_layernorm
    return attention, layer.mlp, before


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _put(output: Any, value: Any) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


class Plain:
    """Edit one component of one layer at some positions of one prompt, the slow way."""

    def __init__(
        self, model: Any, component: str, layer: int, span: slice, positions: Any, change: Any
    ) -> None:
        self.model, self.component, self.layer = model, component, layers_of(model)[layer]
        self.span, self.positions, self.change = span, positions, change

    def logits(self, ids: list[int]) -> torch.Tensor:
        with ExitStack() as stack, torch.no_grad():
            for handle in self._hooks():
                stack.callback(handle.remove)
            return self.model(input_ids=torch.tensor([ids])).logits[0].float()

    def _edited(self, values: Any) -> Any:
        values = values.clone()
        chosen = values[0, self.positions][:, self.span]
        part = values[0, self.positions]
        part[:, self.span] = self.change(chosen)
        values[0, self.positions] = part
        return values

    def _hooks(self) -> list[Any]:
        layer = self.layer
        attention_end, mlp_end, before = _norms(layer)
        attention = layer.attn if hasattr(layer, "attn") else layer.self_attn
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
            return self._mid(before)
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

    def _mid(self, before: Any) -> list[Any]:
        """The MLP reads the edited sum, and the difference is added to what the layer returns."""
        kept = {}

        def change_input(module, args):
            kept["difference"] = self._edited(args[0]) - args[0]
            return (args[0] + kept["difference"],)

        def add(module, args, out):
            return _put(out, _first(out) + kept["difference"])

        return [before.register_forward_pre_hook(change_input), self.layer.register_forward_hook(add)]


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) of a prompt by itself."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()
