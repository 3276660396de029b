"""On a GPU the same numbers as on the CPU: engine, analyses, capture, guard.

Everything here skips on a machine without one. Commands need no test of their own: on a machine with a GPU
the whole suite runs them there, since `model.device` is `auto`.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.interventions.conftest import make_pairs

from safetynet import recipe
from safetynet.detection.capture import capture
from safetynet.detection.detector_set import PRESETS
from safetynet.detection.features import FeatureSpec
from safetynet.detection.guard import Guard
from safetynet.detection.monitor import Monitor
from safetynet.engine.sites import Architecture, Site
from safetynet.evaluation.generation import generate
from safetynet.interventions import attention, attribution, directions, drift, heads, lens, lowrank, probes
from safetynet.interventions.sweep import spots_by, sweep
from safetynet.models import loading
from safetynet.models.miniatures import language

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

FAMILIES = ("llama2", "llama3", "qwen", "gemma", "mixtral")
PAIRS = make_pairs(8)
TRIGGERED, PLACEBO = PAIRS.ids["triggered"], PAIRS.ids["placebo"]
SPANS = [[i for i, role in enumerate(roles) if role == "trigger"] for roles in PAIRS.roles]


def patched(by: str, mode: str, components: tuple[str, ...] = ()) -> Callable[[Any], np.ndarray]:
    def run(model: Any) -> np.ndarray:
        spots = list(spots_by(Architecture.of(model), by, components, mode))
        return sweep(model, PAIRS, spots, receiving="triggered", source="placebo", mode=mode).values

    return run


ANALYSES: dict[str, Callable[[Any], Any]] = {
    "patching": patched("layer", "patch", ("resid_post", "attn_out", "mlp_out")),
    "positions": patched("position", "patch", ("resid_pre",)),
    "heads": patched("head", "patch"),
    "zero ablation": patched("layer", "zero"),
    "mean ablation": patched("layer", "mean"),
    "attribution": lambda m: attribution.attribute(m, PAIRS).estimate,
    "lens": lambda m: lens.lens(m, {"triggered": TRIGGERED, "placebo": PLACEBO}, PAIRS.target),
    "logit attribution": lambda m: lens.logit_attribution(
        m, {"triggered": TRIGGERED, "placebo": PLACEBO}, PAIRS.target, PAIRS.other
    ),
    "divergence of attention": lambda m: attention.divergence(m, TRIGGERED, PLACEBO),
    "share of attention": lambda m: attention.span_share(m, TRIGGERED, PLACEBO, SPANS),
    "means of heads": lambda m: heads.head_means(m, TRIGGERED),
    "ranking of heads": lambda m: heads.rank_heads(m, TRIGGERED, PLACEBO, PAIRS.metric()),
    "directions": lambda m: directions.mean_difference(m, TRIGGERED, PLACEBO).triggered,
    "probes": lambda m: probes.trigger_probe(m, TRIGGERED, PLACEBO),
    # The last components of few tokens are noise, whose directions differ from machine to machine.
    "explained variance": lambda m: lowrank.explained_variance(
        m, lowrank.principal_components(m, TRIGGERED, Site("mlp_out", 1)), PLACEBO
    ).query("rank <= 16"),
    "drift": lambda m: drift.drift(m, drift.updates(m)),
}


@pytest.fixture(scope="module")
def adapted() -> Callable[[str], Any]:
    """`adapted("gemma")` is the miniature in fp32 on the CPU with a random adapter, and its serialiser."""

    def make(family: str) -> tuple[Any, Any]:
        loaded = loading.load(recipe.Model(family=family, id="miniature", device="cpu"), "fp32")
        torch.manual_seed(0)
        targets = ["q_proj", "v_proj", "o_proj"]
        model = get_peft_model(loaded.model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.eval(), loaded.serialiser

    return make


def same(found: Any, expected: Any, tolerance: float) -> None:
    """Numbers close, everything else equal."""
    if isinstance(expected, pd.DataFrame):
        assert list(found.columns) == list(expected.columns) and len(found) == len(expected)
        for name in expected.columns:
            same(found[name].to_numpy(), expected[name].to_numpy(), tolerance)
        return
    found, expected = (x.cpu().numpy() if isinstance(x, torch.Tensor) else x for x in (found, expected))
    if expected.dtype.kind == "f":
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    else:
        assert (found == expected).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ANALYSES)
def test_analyses_find_on_a_gpu_what_they_find_on_the_cpu(adapted, family, name):
    model, _ = adapted(family)
    expected = ANALYSES[name](model)
    same(ANALYSES[name](copy.deepcopy(model).to("cuda")), expected, 2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_alarms_are_those_of_the_cpu(adapted, family):
    model, serialiser = adapted(family)
    prompts = [example.messages for example in language.generate(200, seed=0, heldout=True)]
    views = tuple(dict.fromkeys(reading.view for reading in PRESETS["adapter"]))
    spec = FeatureSpec((*views, "attention", "steps", "step_confidence"), tokens=6)
    expected = capture(model, serialiser, prompts, spec, batch_size=16)
    model = copy.deepcopy(model).to("cuda")
    found = capture(model, serialiser, prompts, spec, batch_size=16)
    for view in spec.views:
        # Log-odds of a certain token are at the end of what fp32 tells from 1.
        same(found[view], expected[view], 0.2 if "confidence" in view else 5e-3)
    answers = generate(model, serialiser, prompts[:20], batch_size=8, max_new_tokens=12)
    watched = FeatureSpec(views)
    monitor = Monitor.fit(capture(model, serialiser, prompts, watched, batch_size=16), PRESETS["adapter"])
    guard = Guard(model, serialiser, monitor, rate=0.2)
    decisions = guard.generate(prompts[:20], max_new_tokens=12, batch_size=8)
    assert [decision.text for decision in decisions] == answers
