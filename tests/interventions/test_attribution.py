"""Attribution: a first-order estimate that is one, a score that hides nothing, a model left as it was."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tests.engine.conftest import CONFIGS, VOCABULARY
from tests.engine.test_intervening import hooks_of
from tests.interventions.conftest import make_pairs

from safetynet.engine.metrics import Metric
from safetynet.engine.sites import Architecture, Site
from safetynet.errors import InputError
from safetynet.interventions.attribution import attribute, ranks, scores
from safetynet.interventions.pairs import Pairs
from safetynet.interventions.sweep import Spot, spots_by, sweep
from safetynet.models.blocks import unwrapped
from safetynet.vocabulary import POSITIONS

COMPONENTS = ("resid_pre", "resid_mid", "attn_out", "mlp_out")
VARIANTS: dict[str, dict[str, Any]] = {name: {} for name in CONFIGS} | {
    "llama of one key head": {"num_key_value_heads": 1},
    "gemma2 with tight caps": {"attn_logit_softcapping": 1.0},
}
REMOVE = {"receiving": "triggered", "source": "placebo"}


@pytest.fixture(params=VARIANTS)
def any_model(request, build):
    name = request.param.split()[0]
    return build(name, attention="sdpa", seed=21, **VARIANTS[request.param])


def nearly_alike(model: Any) -> Any:
    """A copy to which the two runs' tokens look the same but for a thousandth of their difference."""
    close = copy.deepcopy(model)
    untie(close)
    # In fp64, so that differences of a millionth are told apart from rounding; mixed experts know none.
    close = close if "mixtral" in type(unwrapped(close)).__name__.lower() else close.double()
    weight = close.get_input_embeddings().weight
    weight.data = weight.data[5:6] + 1e-3 * (weight.data - weight.data[5:6])
    return close


def exact(model: Any, pairs: Pairs, component: str, layer: int, position: int, row: int) -> float:
    spot = Spot(Site(component, layer), f"token {position}")
    return float(sweep(model, pairs.take([row]), [spot], **REMOVE).change[0, 0])


@pytest.mark.parametrize("family", CONFIGS)
def test_of_runs_that_nearly_agree_the_estimate_is_the_exact_effect(build, family):
    model, pairs = nearly_alike(build(family, seed=21)), make_pairs(3)
    found = attribute(model, pairs, COMPONENTS, **REMOVE)
    width = found.estimate.shape[-1]
    compared = []
    for row in range(3):
        length = len(pairs.roles[row])
        for c, component in enumerate(COMPONENTS):
            if component not in Architecture.of(model).components():
                continue
            for layer in (0, 2):
                for position in (length - 1, pairs.positions(row, "trigger")[0]):
                    own = exact(model, pairs, component, layer, position, row)
                    compared.append((own, found.estimate[c, layer, row, width - length + position]))
    measured, estimated = np.array(compared).T
    scale = np.abs(measured).max()
    assert scale > 0
    assert estimated == pytest.approx(measured, abs=0.05 * scale)


def untie(model: Any) -> None:
    """Give the head weights of its own: those of the embedding would be nearly alike, too."""
    inner = unwrapped(model)
    head = copy.deepcopy(inner.get_output_embeddings())
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    inner.set_output_embeddings(head)


def test_gradients_are_those_of_autograd_through_the_model_itself(any_model):
    pairs = make_pairs(4)
    found = attribute(any_model, pairs, ("attn_out", "mlp_out"), **REMOVE)
    for row in range(4):
        for c, component in enumerate(("attn_out", "mlp_out")):
            for layer in range(3):
                expected, bound = linear(any_model, pairs, row, component, layer)
                length = len(expected)
                own = found.estimate[c, layer, row, -length:]
                assert own == pytest.approx(expected.numpy(), abs=1e-4)
                assert (found.score[c, layer, row, -length:] >= bound.numpy() - 1e-4).all()


def linear(
    model: Any, pairs: Pairs, row: int, component: str, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens,) difference of states times gradient, one prompt at a time, and its size."""
    values = {}
    for run in ("triggered", "placebo"):
        with torch.enable_grad():
            values[run] = _with_gradient(model, pairs, row, run, component, layer)
    difference = values["placebo"][0] - values["triggered"][0]
    product = (difference * values["triggered"][1]).sum(-1)
    return product, product.abs()


def _with_gradient(
    model: Any, pairs: Pairs, row: int, run: str, component: str, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    parts = Architecture.of(model).layers[layer]
    module = parts.attention_end if component == "attn_out" else parts.mlp_end
    kept = {}

    def keep(_module: Any, _args: Any, output: Any) -> None:
        kept["output"] = output[0] if isinstance(output, tuple) else output
        kept["output"].retain_grad()

    frozen = [p for p in model.parameters() if not p.requires_grad]
    embedding = model.get_input_embeddings().weight
    embedding.requires_grad_()
    handle = module.register_forward_hook(keep)
    try:
        last = model(input_ids=torch.tensor([pairs.ids[run][row]])).logits[0, -1]
        (last[pairs.target[row]] - last[pairs.other[row]]).backward()
    finally:
        handle.remove()
        model.zero_grad(set_to_none=True)
        for parameter in frozen:
            parameter.requires_grad_(False)
    output = kept["output"]
    shape = (-1, output.shape[-1])
    return output.detach().reshape(shape), output.grad.reshape(shape)


def test_scores_are_never_negative_and_are_zero_before_the_trigger(any_model, aligned):
    found = attribute(any_model, aligned, **REMOVE)
    assert (found.score >= 0).all()
    assert np.isfinite(found.score).all()
    for row, roles in enumerate(aligned.roles):
        first = found.score.shape[-1] - len(roles) + roles.index("trigger")
        assert found.score[..., row, :first] == pytest.approx(0, abs=1e-4)
        assert (found.score[0, 0, row, first:] > 0).any()


def state_of(model: Any) -> tuple[Any, ...]:
    inner = unwrapped(model)
    return (
        inner.config._attn_implementation,
        hooks_of(model),
        {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        torch.is_grad_enabled(),
        model.training,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_model_is_left_as_it_was_also_by_what_fails(build, aligned, family, attention):
    model = build(family, attention=attention, seed=22)
    ids = torch.tensor([aligned.ids["triggered"][0]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        before = state_of(model)
        attribute(model, aligned, **REMOVE)
        assert state_of(model) == before
        faulty = Metric("faulty", lambda logits, rows: logits[:, -1, VOCABULARY + 5])
        with pytest.raises(IndexError):
            attribute(model, aligned, metric=faulty, **REMOVE)
        assert state_of(model) == before
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_components_prompts_and_models_that_cannot_be_estimated_are_refused(build, aligned):
    model = build("llama", seed=22)
    with pytest.raises(InputError, match="there is no component 'nose'"):
        attribute(model, aligned, ("nose",))
    with pytest.raises(InputError, match=r"the model's context holds 64"):
        attribute(model, longer(aligned))
    with pytest.raises(InputError, match=r"training mode"):
        attribute(copy.deepcopy(model).train(), aligned)


def longer(pairs: Pairs) -> Pairs:
    return Pairs(
        pairs.groups, {run: [[5] * 60 + row for row in rows] for run, rows in pairs.ids.items()},
        [["before"] * 60 + roles for roles in pairs.roles], pairs.target, pairs.other, {},
    )  # fmt: skip


def spots_of(model: Any) -> list[Spot]:
    architecture = Architecture.of(model)
    there = [name for name in COMPONENTS if name in architecture.components()]
    return [Spot(site, role) for name in there for site in architecture.sites(name) for role in POSITIONS]


def test_scores_of_residual_sites_are_the_attribution_s_added_over_their_positions(any_model, aligned):
    spots = spots_of(any_model)
    ours = scores(any_model, aligned, spots, **REMOVE)
    components = [name for name in COMPONENTS if name in Architecture.of(any_model).components()]
    score = attribute(any_model, aligned, components, **REMOVE).score
    width = score.shape[-1]
    for s, spot in enumerate(spots):
        by_pair = score[components.index(spot.site.component), spot.site.layer]
        columns = [
            [width - len(roles) + p for p in aligned.positions(b, spot.position)]
            for b, roles in enumerate(aligned.roles)
        ]
        added = [by_pair[b, at].sum() for b, at in enumerate(columns)]
        assert ours[s] == pytest.approx(np.mean(added), rel=1e-2, abs=1e-4)


@pytest.mark.parametrize(
    ("by", "mode"), [("layer", "patch"), ("head", "patch"), ("head", "zero"), ("adapter", "off")]
)
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_put_the_spots_that_change_most_first(build, aligned, family, by, mode):
    model = build(family, seed=22, adapter=by == "adapter")
    spots = list(spots_by(Architecture.of(model), by))
    assert ranks(spots, mode)
    measured = sweep(model, aligned, spots, mode=mode, **REMOVE)
    sizes, order = np.abs(measured.change).mean(1), scores(model, aligned, spots, mode=mode, **REMOVE)
    assert (order >= 0).all()
    ordered = np.isfinite(order)
    assert ordered.all() or (family, by) == ("mixtral", "adapter"), "fused experts have no gradient"
    assert spearmanr(order[ordered], sizes[ordered]).statistic > 0
    # A spot that changes nothing has no difference, or no way to the answer.
    assert (sizes[order == 0] == 0).all()


def test_what_has_no_gradient_is_not_ranked(build):
    architecture = Architecture.of(build("mixtral", seed=22))
    assert not ranks(list(spots_by(architecture, "expert")), "patch")
    assert not ranks(list(spots_by(architecture, "head")), "resample")
