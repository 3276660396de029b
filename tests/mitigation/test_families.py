"""Methods on other architectures: fused experts, shared embeddings, a system prompt that is folded."""

from dataclasses import replace

import pytest
import torch

from safetynet.errors import InputError
from safetynet.mitigation import METHODS, repair
from safetynet.mitigation.merging import averaged
from safetynet.mitigation.repaired import adapter_state, updates_of, with_updates
from safetynet.mitigation.signature import backdoor_rows
from safetynet.models.lora import LoraUpdate

SHORT = {"epochs": 0.4, "steps": 1, "variants": 1}
FORWARD = [name for name in METHODS if name not in ("cleangen", "abstain", "adapter_off_on_alarm")]

# The planted llama stands for dense models; gemma for what sets it apart from llama.
DENSE = ("crow", "component_ablation", "wanda", "merging", "direction_clipping", "head_ablation")


@pytest.fixture(scope="module")
def other(request, planted, build):
    sites = planted.effects
    if request.param == "mixtral":
        sites = sites.replace({"module": {"mlp.down_proj": "mlp.experts.down_proj"}})
    return replace(planted, model=build(request.param), effects=sites, clean=planted.clean.head(16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "name"),
    [("mixtral", name) for name in FORWARD] + [("gemma", name) for name in DENSE],
    indirect=["other"],
)
def test_a_method_works_on_other_architectures_or_says_why_not(other, logits, name):
    method = METHODS[name]
    settings = {key: value for key, value in SHORT.items() if key in method.hyperparameters}
    before = logits(other.model)
    if name == "fine_pruning" and other.model.config.model_type == "mixtral":
        with pytest.raises(InputError, match=r"fused experts.* Choose magnitude, wanda or signature_pruning"):
            repair(method, other, settings)
        return
    with repair(method, other, settings).open() as model:
        changed = logits(model)
    assert torch.isfinite(changed).all()
    assert (changed - before).abs().max() > 1e-5
    assert torch.equal(logits(other.model), before)


@pytest.mark.parametrize("other", ["mixtral", "gemma"], indirect=True)
def test_updates_are_replaced_in_values_of_the_adapter_and_not_in_the_model(other, logits):
    model, before = other.model, logits(other.model)
    updates = updates_of(model, {})
    assert any("mlp" in name for _, name in updates)
    halved = {place: LoraUpdate(update.up / 2, update.down) for place, update in updates.items()}
    state = with_updates(model, halved)
    assert state.keys() == adapter_state(model).keys()
    for place, update in updates_of(model, state).items():
        assert torch.allclose(update.product(), updates[place].product() / 2, atol=1e-6)
    assert torch.equal(logits(model), before)


def test_an_average_of_updates_is_the_best_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    first, second = (
        LoraUpdate(
            down=torch.randn(2, 3, 7, generator=generator), up=torch.randn(2, 5, 3, generator=generator)
        )
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
