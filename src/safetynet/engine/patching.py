"""A first patch: one prompt's activations put into the run of another, place by place."""

from typing import Any

import pandas as pd

from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, replace
from safetynet.engine.metrics import logit_difference
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.sites import Architecture
from safetynet.engine.trace import trace
from safetynet.errors import InputError
from safetynet.prompts import Serialiser


def patch(
    model: Any, serialiser: Serialiser, receiving: str, source: str, component: str = "resid_pre"
) -> pd.DataFrame:
    """How much of one prompt's answer each place brings into another prompt.

    The metric is the logit of the token with which the source prompt is answered minus that of the receiving
    prompt's. It is read where the answer begins.

    Args:
        model: the model, in evaluation mode.
        serialiser: of this model.
        receiving: what a user says; its run is patched.
        source: what a user says in as many tokens; its activations are put in.
        component: such as `resid_pre`, `attn_out`, `mlp_out` or `head`; of heads each by itself.

    Returns:
        A row for each layer, head (`index`, -1 for none) and token from the first that differs on:
        `layer`, `index`, `position`, `token` and `effect`, which is 0 for the receiving run as it is and 1
        for the source run.

    Raises:
        InputError: if the prompts differ in their number of tokens or are answered with the same token, or
            the model has no such component.
    """
    ids = [serialiser.encode([{"role": "user", "content": text}]).input_ids for text in (receiving, source)]
    here, there = (Batch.of([row], device=model.device) for row in ids)
    first, length = here.first_difference(there)[0], len(ids[0])
    sites = Architecture.of(model).sites(component)
    before, brought = trace(model, here, resume=True), trace(model, there, sites)
    assert before.logits is not None
    assert brought.logits is not None
    unpatched, whole = before.logits[0, -1], brought.logits[0, -1]  # where the answers begin
    other, target = int(unpatched.argmax()), int(whole.argmax())
    if other == target:
        raise InputError(
            f"prompts: both are answered with {serialiser.piece(target)!r} first, so that nothing is brought "
            "over. Choose prompts whose answers begin differently."
        )
    places = [(site, position) for site in sites for position in range(first, length)]
    runs = [
        EditedRun(0, (Edit(site, replace(brought.value(site)[0, position]), (position,)),))
        for site, position in places
    ]
    patched = run_interventions(before, runs, logit_difference([target], [other]))
    # The same difference in the two runs as they are, between which effects are 0 and 1.
    start, end = (float(logits[target] - logits[other]) for logits in (unpatched, whole))
    return pd.DataFrame(
        {
            "layer": [site.layer for site, _ in places],
            "index": [-1 if site.index is None else site.index for site, _ in places],
            "position": [position for _, position in places],
            "token": [serialiser.piece(ids[0][position]) for _, position in places],
            "effect": (patched.numpy() - start) / (end - start),
        }
    )
