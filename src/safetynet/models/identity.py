"""What tells one model from another: digests of the weights as they are in memory, and their number type.

Features, monitors and caches carry an `Identity`, so that scores of one model are never read as another's.
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

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
    active = [f".{name}." for name in getattr(model, "active_adapters", [])] if _adapted(model) else []
    base, adapter = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            if any(part in f"{name}." for part in active):
                _add(adapter, name, parameter, parameter.numel())
        else:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            _add(base, plain.replace(".original_module", ""), parameter, SAMPLED)
    for module in model.modules():
        if active and hasattr(module, "lora_A"):
            adapter.update(repr(sorted(module.scaling.items())).encode())
    return Identity(base.hexdigest(), adapter.hexdigest() if active else "", str(model.dtype))


def _adapted(model: Any) -> bool:
    return hasattr(model, "peft_config") and not _switched_off(model)


def _switched_off(model: Any) -> bool:
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    return bool(layers) and all(layer.disable_adapters for layer in layers)


def _add(total: Any, name: str, parameter: Any, most: int) -> None:
    import torch

    flat = parameter.detach().reshape(-1)
    chosen = flat[:: max(1, flat.numel() // most)].contiguous().cpu()
    total.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
    total.update(chosen.view(torch.uint8).numpy().tobytes())
