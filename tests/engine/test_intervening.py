"""The whole model under edits, generation included; whatever happens, it is left as it was."""

import functools
import threading

import pytest
import torch
from tests.engine.compare import probe
from tests.engine.conftest import CONFIGS
from tests.engine.plain import EVERYWHERE, At, Mixture, edited, logits, zeroed

from safetynet.engine import edits
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, KnockOut
from safetynet.engine.hooks import exclusive, intervening
from safetynet.engine.metrics import Metric
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.sites import Site
from safetynet.engine.trace import logits_of, trace
from safetynet.errors import InputError
from safetynet.models.blocks import unwrapped


def push(x):
    return x + torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(2))


SET = [("resid_pre", 1), ("resid_mid", 1), ("attn_out", 1), ("mlp_out", 0), ("head", 2), ("resid_post", 2)]
OWN = [Edit(Site(component, layer), push) for component, layer in SET]
PLAIN = [
    At(component, layer, EVERYWHERE, push)
    for component, layer in sorted(SET, key=lambda one: one[0] == "resid_mid")
]


@pytest.fixture(scope="module")
def build(build):
    """Models of this file's own: where another test read attentions, transformers has left hooks behind."""
    return functools.partial(build, seed=7)


def hooks_of(model):
    """Every hook on every module, and every forward that is not its class's."""
    registered = [
        (name, key)
        for name, module in model.named_modules()
        for key in module._forward_hooks | module._forward_pre_hooks
    ]
    return registered, [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("family", CONFIGS)
def test_forward_and_generate_under_edits_give_what_plain_hooks_give(build, pairs, family):
    model = build(family)
    ids = torch.tensor([pairs[0][1], pairs[1][1]])
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    with torch.no_grad():
        with intervening(model, OWN) as same:
            assert same is model
            forward, generated = model(input_ids=ids).logits, model.generate(input_ids=ids, **options)
        with edited(model, PLAIN):
            expected, reference = model(input_ids=ids).logits, model.generate(input_ids=ids, **options)
        assert torch.allclose(forward, expected, atol=1e-4)
        assert torch.equal(generated.sequences, reference.sequences)
        for own, other in zip(generated.scores, reference.scores, strict=True):
            assert torch.allclose(own, other, atol=1e-4)
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-2)
    assert hooks_of(model) == ([], [])


def test_adapter_router_and_experts_can_be_edited_in_a_whole_model(build, pairs):
    model, ids = build("mixtral"), pairs[0][0]
    with torch.no_grad():
        with intervening(model, [Edit(Site("adapter", layer), edits.zero()) for layer in (0, 2)]):
            found = model(input_ids=torch.tensor([ids])).logits[0]
        with zeroed(model, [0, 2]):
            assert torch.allclose(found, logits(model, ids), atol=1e-4)
        sites = [Edit(Site("router", 1, 2), edits.zero()), Edit(Site("expert", 1, 0), lambda x: 2 * x)]
        with intervening(model, sites):
            found = model(input_ids=torch.tensor([ids, ids])).logits

        def without(weights):
            return weights * torch.tensor([1.0, 1, 0, 1])

        reference = Mixture(1, ((EVERYWHERE, without),), ((0, EVERYWHERE, lambda x: 2 * x),))
        assert torch.allclose(found[1], logits(model, ids, [reference]), atol=1e-4)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit(Site("resid_pre", 1), torch.tanh, (3,)), "resid_pre 1 is edited at some positions"),
        (KnockOut(1, (3,), (1,)), "attention 1 is edited at some positions"),
        (Edit(Site("attention", 1), torch.tanh), "attention 1: a pattern has no values"),
        (Edit(Site("resid_pre", 3), torch.tanh), "layer 3 does not exist"),
    ],
)
def test_what_no_whole_model_can_do_is_refused_before_a_hook_is_set(build, edit, message):
    model = build("llama")
    with (
        pytest.raises(InputError, match=message),
        intervening(model, [Edit(Site("mlp_out", 0), torch.tanh), edit]),
    ):
        pass
    assert hooks_of(model) == ([], [])


def fail(x):
    raise ZeroDivisionError("the change")


@pytest.mark.parametrize(
    "component", ["resid_pre", "resid_mid", "head", "key", "adapter", "router", "expert"]
)
def test_a_change_that_fails_leaves_the_model_as_it_was(build, pairs, component):
    model = build("mixtral")
    before, batch = logits(model, pairs[0][0]), Batch.of(pairs[0])
    receiving, edit = trace(model, batch, resume=True), Edit(Site(component, 1), fail)
    with pytest.raises(ZeroDivisionError, match="the change"):
        run_interventions(
            receiving,
            [EditedRun(0, (edit,)), EditedRun(1, (Edit(Site("resid_pre", 0), torch.tanh),))],
            probe(97),
        )
    with pytest.raises(ZeroDivisionError, match="the change"), intervening(model, [edit]):
        logits(model, pairs[0][0])
    assert hooks_of(model) == ([], [])
    assert not any(
        module._disable_adapters for module in model.modules() if hasattr(module, "_disable_adapters")
    )
    assert torch.equal(logits(model, pairs[0][0]), before)


def test_a_metric_that_fails_or_runs_the_model_finds_it_whole(build, pairs):
    model = build("gemma2")
    receiving, before = trace(model, Batch.of(pairs[0]), resume=True), logits(model, pairs[0][0])
    runs, calls = [EditedRun(0, (Edit(Site("resid_pre", 1), torch.tanh),))], []

    def compute(found, rows):
        calls.append(torch.equal(logits(model, pairs[0][0]), before))
        if len(calls) == 2:
            raise ZeroDivisionError("the metric")
        return found.sum((1, 2))

    with pytest.raises(ZeroDivisionError, match="the metric") as kept:
        run_interventions(receiving, runs, Metric("own", compute))
    assert calls == [True, True]
    assert hooks_of(model) == ([], [])  # although the error, and so its frames, are still there
    assert kept.value


def test_the_head_gives_the_layers_back_even_if_it_is_not_read_to_its_end(build, batches):
    model = build("llama")
    found = logits_of(trace(model, batches[0]), torch.zeros(3, 2, 32))
    next(found)
    assert hooks_of(model) == ([], [])


def test_two_threads_on_one_model_get_the_numbers_of_one(build, batches):
    model = build("llama")
    sets = [
        [EditedRun(row, (Edit(Site(what, layer), change, (2, 5)),)) for row in range(3) for layer in range(3)]
        for what, change in (("resid_mid", torch.tanh), ("adapter", edits.zero()))
    ]

    def sweep(own, runs):
        return run_interventions(trace(own, batches[0], resume=True), runs, probe(97), tokens=30)

    expected, found = [sweep(model, runs) for runs in sets], [[], []]

    def work(i, own):
        found[i] = [sweep(own, sets[i]) for _ in range(4)]

    # One of them has PEFT's wrapper in hand, the other what is inside.
    threads = [
        threading.Thread(target=work, args=(i, own)) for i, own in enumerate((model, unwrapped(model)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(found[i]) == 4
        assert all(torch.equal(one, expected[i]) for one in found[i])


def test_a_wrapped_model_and_what_is_inside_share_one_lock(build):
    model, taken = build("llama"), []

    def take():
        with exclusive(unwrapped(model)):
            taken.append("inside")

    thread = threading.Thread(target=take)
    with intervening(model, []):
        thread.start()
        thread.join(0.2)
        taken.append("wrapped")
    thread.join()
    assert taken == ["wrapped", "inside"]
