"""Hooks that keep of each layer only what a view asks for, while the model runs.

A reader is a context manager: inside it the model is hooked, `begin` says which tokens users wrote, and after
a forward pass `take` gives the reduced tensors. Passes between `take` and `begin` are not read. Nothing of a
layer's full output outlives its hook. Batches are padded on the left, so that each prompt ends in the last
column.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from safetynet.detection.features import ADAPTER, COMPARED, FeatureSpec
from safetynet.errors import InputError
from safetynet.models.adapters import has_adapter
from safetynet.models.blocks import decoder_layers, eagerly, hidden_of, unwrapped
from safetynet.models.lora import update_of
from safetynet.models.support import check_model

MIN_NORM = 1e-12


class Reader:
    """Reads the views of a specification that one ordinary forward pass contains.

    Raises:
        InputError: if a layer does not exist, or a view needs an adapter and there is none.
    """

    def __init__(self, model: Any, spec: FeatureSpec) -> None:
        self.views = set(spec.views)
        layers = decoder_layers(model)
        indices = range(len(layers)) if spec.layers is None else spec.layers
        wrong = [i for i in indices if not 0 <= i < len(layers)]
        if wrong:
            raise InputError(
                f"layers: {wrong[0]} is outside 0-{len(layers) - 1} of a model of {len(layers)} layers."
            )
        self.layers = [layers[i] for i in indices]
        if self.views & COMPARED and not has_adapter(model):
            raise InputError(
                "views divergence and unexplained need a model with a PEFT adapter, which they switch off. "
                "Leave them out."
            )
        self.adapters = adapted_modules(model) if self.views & set(ADAPTER) else []
        self.head = unwrapped(model).get_output_embeddings()
        self.taken: dict[str, list[Tensor]] = {}
        self.user: Tensor | None = None
        self.reading = False

    def __enter__(self) -> Self:
        hooks = [(module.layer, self._adapter_hook(module)) for module in self.adapters]
        if self.views & {"last", "mean", "steps", "divergence"}:
            hooks += [(layer, self._hidden) for layer in self.layers]
        if self.views & {"confidence", "step_confidence", *COMPARED}:
            hooks.append((self.head, self._logits))
        self.hooked = ExitStack()
        self.hooked.enter_context(eagerly())
        for module, hook in hooks:
            self.hooked.callback(module.register_forward_hook(hook).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.hooked.close()

    def begin(self, user: Tensor | None) -> None:
        """Expect a pass.

        Args:
            user: (B, T) fp32, 1 at the tokens that users wrote; None for a pass over one new token per row.
        """
        self.user, self.taken, self.reading = user, {}, True

    def take(self) -> dict[str, Tensor]:
        """Tensors of the last pass, fp32: hidden views (B, L, d), adapter views (B, M, r), logits (B, V)."""
        tensors, self.taken, self.reading = self.taken, {}, False
        stacked = {
            name: torch.stack([t.to(parts[0].device) for t in parts], 1) for name, parts in tensors.items()
        }
        if "logits" in stacked:
            stacked["logits"] = stacked["logits"][:, 0]
        return stacked

    def _keep(self, view: str, value: Tensor) -> None:
        self.taken.setdefault(view, []).append(value.detach().float())

    def _hidden(self, module: Any, inputs: Any, output: Any) -> None:
        if not self.reading:
            return
        states = hidden_of(output)
        self._keep("last", states[:, -1])
        if "mean" in self.views and self.user is not None:
            # In half precision a long prompt's sum would lose its small terms.
            weights = self.user.to(states.device)
            mean = torch.einsum("bt,btd->bd", weights, states.float()) / weights.sum(1, keepdim=True)
            self._keep("mean", mean)

    def _logits(self, module: Any, inputs: Any, output: Tensor) -> None:
        if self.reading:
            self._keep("logits", output[:, -1])

    def _adapter_hook(self, module: "AdaptedModule") -> Any:
        def hook(_: Any, inputs: Any, output: Tensor) -> None:
            if not self.reading:
                return
            x = inputs[0]
            if "energy" in self.views:
                self._keep("energy", module.energy(x[:, -1], output[:, -1]))
            if "direction" in self.views:
                self._keep("direction", module.cosines(output[:, -1]))
            if "energy_max" in self.views and self.user is not None:
                energy = module.energy(x, output) * self.user[..., None].to(x.device)
                self._keep("energy_max", energy.amax(1))

        return hook


@dataclass(frozen=True)
class AdaptedModule:
    """One linear module with a LoRA update s B A = U diag(S) Vᵀ."""

    layer: Any
    adapter: str
    left: Tensor
    """(r, out): rows are the left singular vectors."""
    turn: Tensor
    """(r, r): takes A x to the update's coordinates along the left singular vectors."""

    def energy(self, x: Tensor, output: Tensor) -> Tensor:
        """(..., in) and (..., out) to (..., r): |coordinate of the update| / ‖Wx‖."""
        lora = self.layer.lora_A[self.adapter]
        coordinates = lora(x.to(lora.weight.dtype)).float() @ self.turn.T
        frozen = output.float() - coordinates @ self.left
        return coordinates.abs() / frozen.norm(dim=-1, keepdim=True).clamp_min(MIN_NORM)

    def cosines(self, output: Tensor) -> Tensor:
        """(..., out) to (..., r)."""
        unit = output.float() / output.float().norm(dim=-1, keepdim=True).clamp_min(MIN_NORM)
        return unit @ self.left.T


def adapted_modules(model: Any) -> list[AdaptedModule]:
    """Every linear module of the layers that an active LoRA adapter updates.

    Fused experts are no modules and stay out, as do embeddings and the head, which see no states of a layer.

    Raises:
        InputError: if there is none, one whose update is more than B A, or modules of different ranks.
    """
    check_model(model, "adapter views")
    adapted = []
    for module in (module for layer in decoder_layers(model) for module in layer.modules()):
        # A wrapper around a fused parameter has the same factors, but no weight that maps inputs to outputs.
        if hasattr(module, "lora_A") and not hasattr(module, "parameter_name"):
            names: Sequence[str] = [name for name in module.active_adapters if name in module.lora_A]
            for name in names[:1]:
                with torch.no_grad():
                    update = update_of(module, name)
                    left = update.decomposed()[0][0].T.contiguous()  # (r, out)
                    adapted.append(AdaptedModule(module, name, left, left @ update.up[0]))
    if not adapted:
        raise InputError(
            "views energy, energy_max and direction need a model with an active LoRA adapter. Attach one, or "
            "leave these views out."
        )
    if len(ranks := sorted({len(module.turn) for module in adapted})) > 1:
        raise InputError(
            "views energy, energy_max and direction need updates of one rank, and this adapter's are of "
            f"ranks {', '.join(map(str, ranks))}. Leave these views out."
        )
    return adapted


def confidence(logits: Tensor) -> Tensor:
    """(B, V) to (B, 2): log-odds of the likeliest token, and entropy in nats."""
    log = logits.float().log_softmax(-1)
    top = log.amax(-1)
    rest = torch.log(-torch.expm1(top.clamp_max(-1e-7)))
    return torch.stack([top - rest, -(log.exp() * log).sum(-1)], -1)
