"""SafetyNet's own engine."""

from typing import Any

import torch

from .workload import Sweep

PACKAGES = ("safetynet",)


def prepare(model: Any, _tokenizer: Any) -> Any:
    """The model itself: nothing is converted."""
    return model


# ----------------------------------------------------------------------------------------------------------
# TO BE FILLED IN when `safetynet.interventions` has its engine. `sweep.sites` lists what to patch, in order;
# `sweep.component` is `resid_pre` or `head` for all of them. Ids are (pairs, length); returns (sites, pairs).
# ----------------------------------------------------------------------------------------------------------
def run_safetynet(model, receiver_ids, source_ids, sweep: Sweep, tokens) -> torch.Tensor:  # noqa: ARG001
    """The sweep by SafetyNet's engine."""
    raise ImportError("safetynet.interventions has no engine yet")
