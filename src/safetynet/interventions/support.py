"""What of the engine and of its analyses a model supports, found by trying; no backdoor or prompt is needed.

In: a model. Out: for each component and each use "" or the sentence that refuses it.
"""

from collections.abc import Callable
from typing import Any

from safetynet.engine.batch import Batch
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError
from safetynet.interventions.attention import divergence
from safetynet.interventions.attribution import check_watched
from safetynet.interventions.heads import backdoor_vector, head_means
from safetynet.interventions.lens import logit_attribution
from safetynet.models.causal_lm import CausalLM
from safetynet.vocabulary import COMPONENTS

PROMPT = [[3, 5, 4, 6]]
USES: dict[str, Callable[[Any], object]] = {
    "sweeps": lambda model: trace(model, Batch.of(PROMPT, device=model.device), resume=True),
    "attribution": lambda model: check_watched(Architecture.of(model), Batch.of(PROMPT, device=model.device)),
    "attention patterns": lambda model: divergence(model, PROMPT, PROMPT),
    "logit attribution": lambda model: logit_attribution(model, {"prompt": PROMPT}, [3], [4]),
    "backdoor vector": lambda model: backdoor_vector(model, head_means(model, PROMPT), [Site("head", 0, 0)]),
}
"""Uses by name, each tried on one prompt of four tokens."""


def support(model: CausalLM) -> dict[str, str]:
    """What a model supports.

    Args:
        model: the model, with a vocabulary of at least seven tokens.

    Returns:
        By component (`sites.COMPONENTS`, adapters left out) and use (`USES`): "" where it is there in all
        layers, else why it is not, with the layers that have it.
    """
    try:
        architecture = Architecture.of(model)
        every = range(architecture.shape.layers)
        reasons = {name: architecture.why_absent(name) for name in COMPONENTS if name != "adapter"}
    except InputError as error:
        return dict.fromkeys([*(name for name in COMPONENTS if name != "adapter"), *USES], str(error))
    for name, why in reasons.items():
        layers = architecture.layers_with(name)
        if layers and len(layers) < len(every) and name != "embedding":
            reasons[name] = f"in layers {', '.join(map(str, layers))} of {len(every)} alone: {why}"
    for use, attempt in USES.items():
        try:
            attempt(model)
            reasons[use] = ""
        except InputError as error:
            reasons[use] = str(error)
    return reasons
