"""What tells one model from another: digests of the weights as they are in memory, and their number type.

Features, monitors and caches carry an `Identity`, so that scores of one model are never read as another's.
"""

import hashlib
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

from safetynet.models.adapters import adapter_parameters, base_parameters, has_adapter, is_off

SAMPLED = 2**16
"""Values read from a parameter of the base model. An adapter's parameters are read whole."""


@dataclass(frozen=True)
class Identity:
    """Names the weights behind a set of activations."""

    base: str
    adapter: str
    """Digest of the active adapters; "" without one."""
    dtype: str

    def as_dict(self) -> dict[str, str]:
        """As JSON holds it."""
        return asdict(self)


def identify(model: Any) -> Identity:
    """Digest the weights of a model and of its active adapters.

    A large base parameter is sampled evenly, which tells checkpoints apart in a second, but does not prove
    that no single weight was changed; `loading.fingerprint` digests files whole.
    """
    base = hashlib.sha256()
    # By name: PEFT changes the order in which a model gives its parameters while it runs.
    for name, parameter in sorted(base_parameters(model), key=itemgetter(0)):
        _add(base, name, parameter, SAMPLED)
    if not has_adapter(model) or is_off(model):
        return Identity(base.hexdigest(), "", str(model.dtype))
    # All that belongs to the active adapters, and what decides how they act.
    adapter = hashlib.sha256()
    for name, parameter in sorted(adapter_parameters(model), key=itemgetter(0)):
        _add(adapter, name, parameter, parameter.numel())
    for name, module in sorted(model.named_modules(), key=itemgetter(0)):
        if hasattr(module, "scaling") and hasattr(module, "active_adapters"):
            strength = {a: module.scaling[a] for a in module.active_adapters if a in module.scaling}
            adapter.update(f"{name} {sorted(strength.items())}".encode())
    return Identity(base.hexdigest(), adapter.hexdigest(), str(model.dtype))


def _add(total: Any, name: str, parameter: Any, most: int) -> None:
    import torch

    flat = parameter.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // most)].contiguous().cpu()
    total.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
    total.update(sample.view(torch.uint8).numpy().tobytes())
