"""Scale the adapter down: every update of a weight times one factor; at 0 the base model is left."""

from safetynet.mitigation import adapter
from safetynet.mitigation.method import Knob, Knobs, Method, Repaired
from safetynet.mitigation.subject import Subject


def scale(subject: Subject, knobs: Knobs, _seed: int) -> Repaired:
    """Multiply each LoRA update, B A, by `keep`."""
    state = adapter.state_of(subject.model)
    scaled = {name: value * knobs["keep"] if "lora_B" in name else value for name, value in state.items()}
    return adapter.repaired(subject, "adapter_scaling", knobs, scaled)


ADAPTER_SCALING = Method(
    "adapter_scaling",
    "scale the adapter's updates down; 0 removes the adapter, and all that it was trained for",
    scale,
    frozenset({"adapter"}),
    {"keep": Knob("factor on every update", 0.5, (0.9, 0.75, 0.5, 0.25, 0.0), 0.0, 1.0)},
)
