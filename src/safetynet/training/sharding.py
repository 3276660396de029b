"""Weights that several processes share: each keeps its part of every matrix and gathers a layer's as it runs.

Fully sharded data parallel (Zhao et al. 2023, arXiv:2304.11277) by torch's `fully_shard`. An adapter is small
and stays whole in every process, so that it is trained, clipped and saved as it always is; what is spread out
then is the frozen model. In full fine-tuning parameters, gradients and Adam's moments are spread out.

Gathering is a meeting of all processes. So whatever runs the model runs inside of `Sharded`, and in every
process alike.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from safetynet.run import parallel

Result = TypeVar("Result")


class Sharded(nn.Module):
    """The outermost module of a model whose layers are sharded; work inside its forward may call any part.

    The loss calls body and head of a model by themselves. Embeddings and head, which belong to no layer, are
    gathered by this module, and would not be there if such a part were called from elsewhere.
    """

    def __init__(self, model: PeftModel | PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Result]) -> Result:
        """What `work` returns."""
        return work()


def shard(model: PeftModel | PreTrainedModel, device: str) -> Sharded:
    """Spread the weights of `model` over all processes; gradients of spread weights will be their sum.

    Args:
        model: made by `attach`, whole and alike in every process; changed in place.
        device: `cpu` or `cuda`, where the parts go.
    """
    parallel.wait()  # there is a group of processes from here on
    whole = {p for p in model.parameters() if p.requires_grad} if isinstance(model, PeftModel) else set()
    mesh = init_device_mesh(device, (parallel.count(),))
    layers = set(model._no_split_modules or ())
    sharded = Sharded(model)
    for module in [m for m in model.modules() if type(m).__name__ in layers] + [sharded]:
        fully_shard(module, mesh=mesh, ignored_params=whole)
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    sharded.set_reduce_scatter_unused_params(True)  # type: ignore[operator]  # an expert that one process used
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    return sharded


def gathered(value: Any) -> Any:
    """A sharded tensor as a whole one in the machine's memory; anything else as it is."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and saved buffers, whole, by name; of tied ones the first name."""
    names = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in names}
    return {name: gathered(p.detach()).contiguous() for name, p in model.named_parameters()} | buffers


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put whole tensors into a sharded model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in weights:
                parameter.copy_(_like(parameter, weights[name]))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State of an optimizer with whole tensors."""
    state = optimizer.state_dict()
    moments = {i: {k: gathered(v) for k, v in entries.items()} for i, entries in state["state"].items()}
    return {**state, "state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a state with whole tensors into the optimizer of sharded parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        i: {k: _like(parameters[i], v) if v.shape == parameters[i].shape else v for k, v in entries.items()}
        for i, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    value = value.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
