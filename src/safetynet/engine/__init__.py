"""Run a causal language model under edits. Knows no backdoor.

A `Site` names where, an `Edit` or `KnockOut` what happens there, a `Batch` holds prompts. `trace` records a
forward pass; `run_interventions` resumes it under edits, many runs at once, and gives a `Metric` of each;
`intervening` lets the whole model run under edits, generation included.
docs/interventions.md shows a first patch.
"""

from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, KnockOut, clip, low_rank, project_out, replace, reroute, steer, zero
from safetynet.engine.hooks import intervening
from safetynet.engine.metrics import Metric, kl, log_probability, logit_difference
from safetynet.engine.reading import activations, mean_activations
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import Trace, trace

__all__ = [
    "Architecture", "Batch", "Edit", "EditedRun", "KnockOut", "Metric", "Site", "Trace", "activations",
    "clip", "intervening", "kl", "log_probability", "logit_difference", "low_rank", "mean_activations",
    "project_out", "replace", "reroute", "run_interventions", "steer", "trace", "zero",
]  # fmt: skip
