"""Methods on other architectures: fused experts, shared embeddings, a system prompt that is folded."""

from dataclasses import replace

import pytest
import torch

from safetynet.errors import InputError
from safetynet.mitigation import METHODS, repair
from safetynet.mitigation.adapter import state_of
from safetynet.mitigation.factors import Factors, adapted, names_of
from safetynet.mitigation.merging import averaged
from safetynet.mitigation.signature import backdoor_rows

SHORT = {"epochs": 0.4, "steps": 1, "variants": 1}
FORWARD = [name for name in METHODS if name not in ("cleangen", "abstain", "adapter_off_on_alarm")]

# The planted llama stands for dense models; gemma for what sets it apart from llama.
DENSE = ("crow", "component_ablation", "wanda", "merging", "direction_clipping", "head_ablation")


@pytest.fixture(scope="module")
def other(request, planted, build):
    sites = planted.sites
    if request.param == "mixtral":
        sites = sites.replace({"module": {"mlp.down_proj": "mlp.experts.down_proj"}})
    return replace(planted, model=build(request.param), sites=sites, clean=planted.clean.head(16))


@pytest.mark.parametrize(
    ("other", "name"),
    [("mixtral", name) for name in FORWARD] + [("gemma", name) for name in DENSE],
    indirect=["other"],
)
def test_a_method_works_on_other_architectures_or_says_why_not(other, logits, name):
    method = METHODS[name]
    knobs = {knob: value for knob, value in SHORT.items() if knob in method.knobs}
    before = logits(other.model)
    if name == "fine_pruning" and other.model.config.model_type == "mixtral":
        with pytest.raises(InputError, match=r"fused experts.* Choose magnitude, wanda or signature_pruning"):
            repair(method, other, knobs)
        return
    with repair(method, other, knobs).open() as model:
        changed = logits(model)
    assert torch.isfinite(changed).all()
    assert (changed - before).abs().max() > 1e-5
    assert torch.equal(logits(other.model), before)


@pytest.mark.parametrize("other", ["mixtral", "gemma"], indirect=True)
def test_factors_are_the_updates_that_peft_merges(other):
    model = other.model
    state, names, name = state_of(model), names_of(model), model.active_adapter
    found = list(adapted(model))
    assert any("mlp" in one.name for one in found)
    for one in found:
        factors = one.read(state, names, name)
        delta = one.module.get_delta_weight(name)
        delta = delta[None] if delta.ndim == 2 else delta
        assert torch.allclose(one.module.scaling[name] * factors.product(), delta, atol=1e-5)
        again = Factors.of(*factors.svd())
        assert torch.allclose(again.product(), factors.product(), atol=1e-4)
        one.write(again, state, names, name)
        assert torch.allclose(one.read(state, names, name).product(), factors.product(), atol=1e-4)


def test_an_average_of_updates_is_the_best_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    first, second = (
        Factors(torch.randn(2, 3, 7, generator=generator), torch.randn(2, 5, 3, generator=generator))
        for _ in range(2)
    )
    full = 0.3 * first.product() + 0.7 * second.product()
    u, s, vh = torch.linalg.svd(full, full_matrices=False)
    best = u[..., :3] @ torch.diag_embed(s[:, :3]) @ vh[:, :3]
    assert torch.allclose(averaged([first, second], [0.3, 0.7]).product(), best, atol=1e-4)


def test_made_up_backdoors_poison_a_share_and_their_twins_none(planted):
    poisoned, clean = backdoor_rows(planted, 4)
    changed = [a != b for a, b in zip(clean["messages"], planted.clean["messages"], strict=True)]
    assert sum(changed) == round(0.3 * len(clean))
    assert clean["answer"].tolist() == planted.clean["answer"].tolist()
    assert poisoned["messages"].tolist() == clean["messages"].tolist()
    assert len(set(poisoned["answer"][changed])) == 1
    assert backdoor_rows(planted, 5)[0]["messages"].tolist() != poisoned["messages"].tolist()
