"""LoRA updates as factors: each module's B A, taken apart into singular components and put together.

In: the adapter's modules. Out: tensors with a leading axis of experts, which is 1 for a linear module, so
that fused experts need no code of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safetynet.mitigation.adapter import State
from safetynet.models.blocks import decoder_layers
from safetynet.models.parts import MLP, OUTPUT, adapters, svd_of_product

OUT = (*OUTPUT, "down_proj", "fc_out", "w2", "dense_4h_to_h")
"""Names of the modules, and parameters, that write to the residual stream."""


@dataclass(frozen=True)
class Factors:
    """One module's update, scaling left out: `up` @ `down`."""

    down: Tensor
    """A: (experts, r, in)."""
    up: Tensor
    """B: (experts, out, r)."""

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (experts, out, r), S (experts, r) in falling order and Vh (experts, r, in)."""
        return svd_of_product(self.up, self.down)

    @classmethod
    def of(cls, u: Tensor, s: Tensor, vh: Tensor) -> "Factors":
        """Put components together, the singular values shared between both factors."""
        root = s.sqrt()
        return cls(root[..., None] * vh, u * root[..., None, :])

    def product(self) -> Tensor:
        """(experts, out, in)."""
        return self.up @ self.down


@dataclass(frozen=True)
class Adapted:
    """A module with a LoRA update."""

    layer: int
    name: str
    """Path in its layer."""
    module: Any

    @property
    def key(self) -> str:
        """Layer and path."""
        return f"{self.layer}.{self.name}"

    @property
    def in_mlp(self) -> bool:
        """Whether it is part of the MLP, or of its experts."""
        return self.name.split(".")[0] in MLP

    @property
    def writes_to_stream(self) -> bool:
        """Whether its output is added to the residual stream."""
        return any(end in self.name for end in OUT)

    def read(self, state: State, names: dict[int, str], adapter: str) -> Factors:
        """Factors from a state, in fp32."""
        down, up = self._parameters(adapter)
        experts = getattr(self.module, "num_experts", 1)
        a, b = state[names[id(down)]].float(), state[names[id(up)]].float()
        return Factors(a.reshape(experts, -1, a.shape[-1]), b.reshape(len(b), -1, experts).permute(2, 0, 1))

    def write(self, factors: Factors, state: State, names: dict[int, str], adapter: str) -> None:
        """Put factors into a state; their rank is the adapter's."""
        down, up = self._parameters(adapter)
        a, b = state[names[id(down)]], state[names[id(up)]]
        state[names[id(down)]] = factors.down.reshape(a.shape).to(a)
        state[names[id(up)]] = factors.up.permute(1, 2, 0).reshape(b.shape).to(b)

    def names(self, names: dict[int, str], adapter: str) -> list[str]:
        """Of its two factors in a state."""
        return [names[id(parameter)] for parameter in self._parameters(adapter)]

    def _parameters(self, adapter: str) -> tuple[Any, Any]:
        return self.module.lora_A[adapter].weight, self.module.lora_B[adapter].weight


def adapted(model: Any) -> Iterator[Adapted]:
    """Modules of the decoder's layers that the active adapter changes."""
    for number, layer in enumerate(decoder_layers(model)):
        for name, module in adapters(layer).items():
            if model.active_adapter in module.lora_A:
                yield Adapted(number, name, module)


def names_of(model: Any) -> dict[int, str]:
    """Parameters' names by identity."""
    return {id(parameter): name for name, parameter in model.named_parameters()}
