"""What cannot be done is refused in a sentence that says what can."""

import copy

import pytest
import torch
from tests.engine.compare import probe

from safetynet.engine import edits
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, KnockOut
from safetynet.engine.hooks import intervening
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError
from safetynet.vocabulary import COMPONENTS


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("residual", 0), "no component 'residual'; there are: embedding, resid_pre, query"),
        (Site("router", 0), "no component 'router'"),
        (Site("expert", 0, 1), "no component 'expert'"),
        (Site("resid_pre", 3), "layer 3 does not exist; there are 0 to 2"),
        (Site("resid_pre", -1), "layer -1 does not exist"),
        (Site("embedding", 1), "layer 1 does not exist; there are 0 to 0"),
        (Site("head", 0, 4), "index 4 does not exist; there are 0 to 3"),
        (Site("key", 0, 2), "index 2 does not exist; there are 0 to 1"),
        (Site("mlp_out", 0, 0), "index 0 does not exist; there are none"),
        (
            Site("adapter", 0, module="mlp.up_proj"),
            "no adapter on 'mlp.up_proj'; there are: self_attn.q_proj",
        ),
    ],
)
def test_a_site_that_does_not_exist_is_refused_wherever_it_is_named(build, batches, site, message):
    model, edit = build("llama"), Edit(site, edits.zero())
    with pytest.raises(InputError, match=message):
        run_interventions(trace(model, batches[0], resume=True), [EditedRun(0, (edit,))], probe(97))
    with pytest.raises(InputError, match=message):
        trace(model, batches[0], [site])
    with pytest.raises(InputError, match=message), intervening(model, [edit]):
        pass


def test_every_component_of_the_list_exists_in_some_model(build):
    found = Architecture.of(build("mixtral")).components()
    assert found == list(COMPONENTS)
    with pytest.raises(InputError, match="component"):
        Architecture.of(build("gpt2")).sites("query")


AT = Site("resid_mid", 1)


@pytest.mark.parametrize(
    ("row", "own", "message"),
    [
        (1, (Edit(AT, torch.tanh, (9,)),), "position 9: prompt 1 has positions 0 to 8"),
        (1, (Edit(AT, torch.tanh, (-10,)),), "position -10: prompt 1"),
        (0, (Edit(AT, torch.tanh, (5, 3)),), "resid_mid 1: positions have to ascend"),
        (0, (Edit(AT, torch.tanh, (3, 3)),), "resid_mid 1: positions have to ascend"),
        (0, (Edit(AT, torch.tanh, (13, -1)),), "resid_mid 1: positions have to ascend"),
        (0, (KnockOut(1, (5,), (14,)),), "position 14: prompt 0"),
        (0, (KnockOut(1, (14,), (2,)),), "position 14: prompt 0"),
        (0, (KnockOut(1, (5,), (2,), 4),), "attention 1.4: index 4 does not exist"),
        (0, (Edit(Site("attention", 1), torch.tanh),), "attention 1: a pattern has no values to change"),
        (3, (), "prompt 3 does not exist; there are 3"),
        (-1, (), "prompt -1 does not exist"),
    ],
)
def test_positions_and_prompts_that_do_not_exist_are_refused(build, batches, row, own, message):
    with pytest.raises(InputError, match=message):
        run_interventions(trace(build("llama"), batches[0], resume=True), [EditedRun(row, own)], probe(97))


def edit(component, layer, positions=None, index=None, module=""):
    return Edit(Site(component, layer, index, module), torch.tanh, positions)


@pytest.mark.parametrize(
    "twice",
    [
        (edit("mlp_out", 1, (3,)), edit("mlp_out", 1, (2, 3))),
        (edit("mlp_out", 1, (3,)), edit("mlp_out", 1)),
        (edit("mlp_out", 1), edit("mlp_out", 1, (3,))),
        (edit("mlp_out", 1, (13,)), edit("mlp_out", 1, (-1,))),
        (edit("head", 1, (3,)), edit("head", 1, (3,), 2)),
        (edit("resid_post", 0, (3,)), edit("resid_pre", 1, (3,))),
        (edit("embedding", 0, (3,)), edit("resid_pre", 0, (3,))),
        (edit("adapter", 1), edit("adapter", 1, (3,), module="self_attn.q_proj")),
    ],
)
def test_two_edits_of_one_place_are_refused_whatever_the_place_is_called(build, batches, twice):
    receiving = trace(build("llama"), batches[0], resume=True)
    with pytest.raises(InputError, match="edited twice at the same position"):
        run_interventions(receiving, [EditedRun(0, twice)], probe(97))
    apart = [
        (edit("mlp_out", 1, (3,)), edit("mlp_out", 1, (2, 4))),
        (edit("head", 1, (3,), 1), edit("head", 1, (3,), 2)),
        (edit("resid_post", 1, (3,)), edit("resid_pre", 1, (3,))),
        (edit("adapter", 1, module="self_attn.v_proj"), edit("adapter", 1, module="self_attn.q_proj")),
    ]
    assert len(run_interventions(receiving, [EditedRun(0, both) for both in apart], probe(97))) == 4


def test_two_edits_of_one_place_are_refused_in_a_whole_model(build):
    both = [edit("resid_post", 0), edit("resid_pre", 1)]
    with pytest.raises(InputError, match="edited twice"), intervening(build("llama"), both):
        pass


@pytest.mark.parametrize("shape", [(3, 32), (2, 31), (1, 32), (5,)])
def test_values_that_do_not_fit_their_place_are_refused(build, batches, shape):
    receiving = trace(build("llama"), batches[0], resume=True)
    patch = Edit(Site("mlp_out", 1), edits.replace(torch.ones(shape)), (2, 3))
    with pytest.raises(InputError, match=rf"replace: values of shape \({shape[0]},.* were given"):
        run_interventions(receiving, [EditedRun(0, (patch,))], probe(97))


def test_a_change_that_returns_another_number_of_values_is_refused(build, batches):
    receiving = trace(build("llama"), batches[0], resume=True)
    with pytest.raises(InputError, match=r"mlp_out 1: .* values of shape \(2, 32\) and returned \(1, 32\)"):
        run_interventions(
            receiving, [EditedRun(0, (Edit(Site("mlp_out", 1), lambda x: x[:1], (2, 3)),))], probe(97)
        )


def test_prompts_longer_than_the_context_are_refused_with_both_lengths(build):
    for family in ("llama", "gpt2"):
        with pytest.raises(InputError, match="the longest has 65 tokens, the model's context holds 64"):
            trace(build(family), Batch.of([[5] * 65, [4]]))
        assert trace(build(family), Batch.of([[5] * 64])).logits.shape == (1, 1, 97)


def test_empty_prompts_and_no_prompts_are_refused():
    for rows in ([], [[]], [[1], []]):
        with pytest.raises(InputError, match="at least one"):
            Batch.of(rows)


def test_a_model_on_several_devices_is_refused(build, batches):
    model = copy.deepcopy(build("llama", adapter=False))
    model.lm_head.to("meta")
    with pytest.raises(InputError, match=r"several devices \(cpu, meta\)"):
        trace(model, batches[0])


@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_2"])
def test_an_attention_that_takes_no_mask_is_refused(build, batches, kernel):
    model = copy.deepcopy(build("llama", adapter=False))
    model.config._attn_implementation_internal = kernel
    with pytest.raises(InputError, match=f"attention '{kernel}' .*eager or sdpa"):
        trace(model, batches[0])


def test_a_model_in_training_is_refused(build, batches):
    with pytest.raises(InputError, match="training mode"):
        trace(copy.deepcopy(build("llama")).train(), batches[0])


def test_runs_on_a_trace_that_cannot_be_resumed_are_refused(build, batches):
    with pytest.raises(InputError, match="resume=True"):
        run_interventions(trace(build("llama"), batches[0]), [EditedRun(0, ())], probe(97))
