"""Sites of sixty random architectures: what the documents say they are, or absent with a reason."""

import inspect
from contextlib import ExitStack
from functools import cache

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.interventions.conftest import make_pairs
from tests.models import architectures

from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit, KnockOut, zero
from safetynet.engine.hooks import PlacedEdit, hooked, intervening
from safetynet.engine.metrics import Metric
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import logits_of, trace
from safetynet.errors import InputError
from safetynet.interventions import stage
from safetynet.interventions.attention import attention_maps, divergence
from safetynet.interventions.attribution import attribute
from safetynet.interventions.heads import backdoor_vector, head_means
from safetynet.interventions.lens import logit_attribution
from safetynet.interventions.support import support
from safetynet.interventions.sweep import Spot, sweep
from safetynet.recipe import Interventions
from safetynet.vocabulary import COMPONENTS

ROWS = [[5, 9, 23, 44, 7, 61, 30, 12, 50, 33, 71], [8, 40, 90, 3, 66, 20, 77]]
WEIGHTS = torch.randn(architectures.VOCABULARY, generator=torch.Generator().manual_seed(4))
PROBE = Metric("probe", lambda logits, _: logits[:, -1] @ WEIGHTS)
FUSED = {"query", "key", "value"}
DENSE = {"router", "expert"}
BESIDE = {"resid_mid"}
# Components that are absent, and the architectures that have all others.
WITHOUT = (
    (set(), "ernie4_5_moe flex_olmo glm4_moe gpt_oss granitemoe mixtral olmoe phimoe qwen2_moe qwen3_moe"),
    (
        DENSE,
        "arcee ernie4_5 exaone4 gemma gemma2 gemma3 glm glm4 gpt_neo granite helium hyperclovax llama llama4 "
        "mistral nemotron olmo olmo2 olmo3 opt qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 vaultgemma",
    ),
    (DENSE | FUSED, "bloom falcon,alibi gpt2 gpt_bigcode gpt_neox,sequential minicpm3 mpt persimmon phi3"),
    (DENSE | BESIDE, "cohere cohere2 gptj phi stablelm,parallel"),
    (DENSE | BESIDE | FUSED, "codegen falcon falcon,new gpt_neox"),
    (FUSED, "deepseek_v2 deepseek_v3"),
    ({"head"}, "afmoe"),
    (DENSE | {"head"}, "diffllama"),
    ({"mlp_out"}, "granitemoeshared"),
    (DENSE | {"attn_out", "resid_mid", "mlp_out"}, "opt,normed"),
    (DENSE | FUSED | {"attn_out", "resid_mid", "mlp_out"}, "bloom,normed"),
)
ABSENT = {name.replace(",", " "): absent for absent, names in WITHOUT for name in names.split()}
# At least one of every way to build a layer; the others are slow tests.
QUICK = (
    "afmoe", "bloom", "bloom normed", "codegen", "cohere", "deepseek_v3", "exaone4", "falcon", "falcon alibi",
    "falcon new", "gemma2", "glm4", "gpt2", "gpt_neo", "gpt_neox", "gpt_neox sequential", "gpt_oss",
    "granite", "granitemoe", "hyperclovax", "llama4", "minicpm3", "mpt", "olmo2", "opt", "opt normed",
    "phi", "phi3",
    "qwen2_moe", "qwen3", "qwen3_moe", "stablelm parallel", "vaultgemma",
)  # fmt: skip
SLOW = [name for name in ABSENT if name not in QUICK]


ALL = pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)


@cache
def build(name, attention="eager"):
    return architectures.build(name, attention)


def alone(model, row, edits=()):
    """The probe of one unpadded prompt, from a pass of the whole model under edits at some positions."""
    architecture, ids = Architecture.of(model), torch.tensor([row])
    with torch.no_grad(), ExitStack() as stack:
        for edit in edits:
            columns = slice(None) if edit.positions is None else list(edit.positions)
            stack.enter_context(
                hooked(architecture, edit.site.layer, [PlacedEdit(edit, slice(None), columns)])
            )
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return PROBE.compute(logits.float(), None)[0]


def sites_of(model):
    architecture = Architecture.of(model)
    return [
        site for name in architecture.components() if name != "attention" for site in architecture.sites(name)
    ]


@ALL
def test_every_component_is_there_or_absent_with_a_reason(name):
    architecture = Architecture.of(build(name))
    assert set(COMPONENTS) - set(architecture.components()) == ABSENT[name] | {"adapter"}
    for component in ABSENT[name]:
        with pytest.raises(
            InputError, match=rf"no component '{component}'; there are: embedding, .*\. [A-Z]\w* "
        ):
            architecture.check(Site(component, 0))


@ALL
def test_what_attention_and_mlp_add_and_what_they_are_added_to_is_what_leaves_the_layer(name):
    model = build(name)
    found = trace(model, Batch.of(ROWS), sites_of(model))
    architecture, real = found.architecture, found.batch.mask.bool()
    value = {
        component: [found.value(Site(component, layer))[real] for layer in range(architecture.shape.layers)]
        for component in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        if component in architecture.components()
    }
    sums = 0
    for total, *terms in (
        ("resid_mid", "resid_pre", "attn_out"),
        ("resid_post", "resid_mid", "mlp_out"),
        ("resid_post", "resid_pre", "attn_out", "mlp_out"),
    ):
        if {total, *terms} <= value.keys():
            sums += 1
            for layer in range(architecture.shape.layers):
                added = sum(value[term][layer] for term in terms)
                torch.testing.assert_close(added, value[total][layer], rtol=1e-4, atol=1e-5)
    assert sums == 3 or ABSENT[name] & {"attn_out", "resid_mid", "mlp_out"}
    assert all(values.abs().max() > 0.01 for layers in value.values() for values in layers)


@ALL
def test_a_sites_own_value_put_back_changes_nothing(name):
    model = build(name)
    sites, own = sites_of(model), trace(model, Batch.of(ROWS), resume=True)
    read = trace(model, own.batch, sites)

    def put(values):
        # A change that the engine does not know to be none, so that everything behind it is computed.
        return lambda x: values[-len(x) :] + 1e-30

    runs = [
        EditedRun(row, (Edit(site, put(read.value(site)[row])),))
        for site in sites
        for row in range(len(ROWS))
    ]
    expected = torch.stack([alone(model, row) for row in ROWS])
    values = run_interventions(own, runs, PROBE).reshape(len(sites), len(ROWS))
    torch.testing.assert_close(values, expected.expand_as(values), rtol=1e-4, atol=1e-4)
    for site in sites:
        with intervening(model, [Edit(site, lambda x: x + 1e-30)]):
            torch.testing.assert_close(alone(model, ROWS[0]), expected[0], rtol=1e-4, atol=1e-4)


@ALL
@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])
def test_resumed_runs_give_what_the_whole_model_gives_under_the_same_edits(name, attention):
    try:
        model = build(name, attention)
    except ValueError:
        pytest.skip("this architecture has no sdpa")
    own = trace(model, Batch.of(ROWS), resume=True)
    sites = [site for site in sites_of(model) if site.index in (None, 1)]
    edits = [
        Edit(site, lambda x: torch.tanh(1.7 * x) + 0.1, positions)
        for site in sites
        for positions in ((2,), (1, 4, 6), None)
    ]
    runs = [EditedRun(row, (edit,)) for edit in edits for row in range(len(ROWS))]
    expected = [alone(model, ROWS[run.row], run.edits) for run in runs]
    torch.testing.assert_close(
        run_interventions(own, runs, PROBE), torch.stack(expected), rtol=1e-4, atol=1e-4
    )
    logits = torch.cat([part for _, part in logits_of(own, own.output[:, -1:])]).detach()
    unedited = torch.stack([alone(model, row) for row in ROWS])
    torch.testing.assert_close(PROBE.compute(logits, None), unedited, rtol=1e-4, atol=1e-4)


@ALL
@pytest.mark.parametrize("index", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_cut_edges_are_those_of_the_models_own_mask(name, index):
    model, row = build(name), ROWS[0]
    architecture = Architecture.of(model)
    for layer in range(architecture.shape.layers):
        hook = closing([5, 10], [1, 8], index, architecture.count("attention", layer))
        handle = architecture.layers[layer].layer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            expected = alone(model, row)
        finally:
            handle.remove()
        run = EditedRun(0, (KnockOut(layer, (5, 10), (1, 8), index),))
        value = run_interventions(trace(model, Batch.of([row]), resume=True), [run], PROBE)[0]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
        assert abs(value - alone(model, row)) > 1e-4


def closing(queries, keys, index, heads):
    """A hook of a layer that closes edges of the mask that the model gives it."""

    def hook(module, args, kwargs):
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        mask = call.arguments["attention_mask"]
        cut = mask.expand(-1, heads, -1, -1).clone()
        for query in queries:
            # What the model itself puts where the first token would look at the last.
            cut[:, slice(None) if index is None else index, query, keys] = mask[0, 0, 0, -1]
        call.arguments["attention_mask"] = cut
        return call.args, call.kwargs

    return hook


@pytest.mark.parametrize(
    ("name", "component", "reason"),
    [
        ("gpt_neox", "resid_mid", "Attention and MLP both read the layer's input"),
        ("cohere", "resid_mid", "No norm between attention and MLP is known"),
        ("phi3", "query", "Its attention has no q_proj"),
        (
            "llama4",
            "expert",
            r"It has no experts \(layers 0, 2\); its experts take something else than states",
        ),
        (
            "granitemoeshared",
            "mlp_out",
            "What the MLP reads and returns does not add up to the layer's output",
        ),
        ("bloom normed", "attn_out", "The layer's input and what attention returns do not add up"),
        ("afmoe", "head", "A gate, a norm or a mixture lies between its heads and the output projection"),
        ("diffllama", "head", "A gate, a norm or a mixture"),
        ("mixtral", "adapter", "No module of its layers has a LoRA adapter"),
        ("qwen2", "expert", "It has no experts"),
    ],
)
def test_the_reason_says_what_is_otherwise(name, component, reason):
    with pytest.raises(InputError, match=reason):
        Architecture.of(build(name)).check(Site(component, 0))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert", "states change with the padding before it or the tokens behind it"),
        ("recurrent_gemma", "states change with the padding before it or the tokens behind it"),
        ("rwkv", "states change with the padding before it or the tokens behind it"),
        ("roberta", "positions are counted from a padding token's"),
        ("deepseek_v4", r"pass on \(2, 5, 4, 32\) numbers and not \(2, 5, 32\)"),
    ],
)
def test_a_model_without_a_residual_stream_of_tokens_is_refused_wherever_it_is_used(name, reason):
    model = build(name)
    for refused in (
        lambda: Architecture.of(model).components(),
        lambda: Architecture.of(model).check(Site("resid_pre", 0)),
        lambda: trace(model, Batch.of(ROWS)),
        lambda: intervening(model, [Edit(Site("mlp_out", 0), zero())]).__enter__(),
    ):
        with pytest.raises(InputError, match=reason):
            refused()
    assert all(reason in why or why for why in support(model).values())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "layer 0 has no attention that keeps keys and values"),
        ("jamba", "layer 0 has no attention that keeps keys and values"),
        ("qwen3_next", "layer 0 has no attention that keeps keys and values"),
        ("gemma4", "its layers take shared_kv_states"),
        ("openai-gpt", "its layers take no cache"),
        ("gpt_neox_japanese", "layer 0 cannot be run for some columns of a prompt .RuntimeError: view size"),
    ],
)
def test_runs_that_cannot_be_resumed_are_refused_and_the_rest_is_there(name, reason):
    model = build(name)
    with pytest.raises(InputError, match=reason):
        trace(model, Batch.of(ROWS), resume=True)
    row = ROWS[0]
    found = trace(model, Batch.of([row]), [Site("resid_post", 1)])
    with intervening(model, [Edit(Site("resid_post", 1), lambda x: x + 1e-30)]):
        torch.testing.assert_close(
            PROBE.compute(found.logits, None)[0], alone(model, row), rtol=1e-4, atol=1e-4
        )
    assert reason.split(" .")[0] in support(model)["sweeps"]


def test_an_encoder_beside_the_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
    )
    with pytest.raises(InputError, match="T5ForConditionalGeneration: an encoder reads its prompts"):
        Architecture.of(model)


@pytest.mark.parametrize(("name", "dense", "mixed"), [("qwen2_moe", [1], [0, 2]), ("qwen3_moe", [0, 2], [1])])
def test_every_layer_is_asked_for_its_own_parts(name, dense, mixed):
    model = build(name)
    architecture = Architecture.of(model)
    assert architecture.layers_with("expert") == mixed
    assert [(site.layer, site.index) for site in architecture.sites("expert")] == [
        (i, k) for i in mixed for k in range(4)
    ]
    last = ", ".join(map(str, mixed))
    with pytest.raises(
        InputError, match=f"expert {dense[0]}.1: it has no experts. Layers that have expert: {last}"
    ):
        architecture.check(Site("expert", dense[0], 1))
    assert support(model)["expert"] == f"in layers {last} of 3 alone: it has no experts"


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_heads_of_latent_attention_are_as_wide_as_their_values(name):
    model = build(name)
    architecture = Architecture.of(model)
    assert architecture.shape.head_size == 16 and model.config.head_dim == 8
    assert architecture.span(Site("head", 1, 2)) == slice(32, 48)

    def silence(_module, args):
        return (torch.cat([args[0][..., :32], torch.zeros_like(args[0][..., 32:48]), args[0][..., 48:]], -1),)

    handle = architecture.layers[1].output.register_forward_pre_hook(silence)
    try:
        expected = alone(model, ROWS[0])
    finally:
        handle.remove()
    off = Edit(Site("head", 1, 2), zero())
    value = run_interventions(trace(model, Batch.of(ROWS[:1]), resume=True), [EditedRun(0, (off,))], PROBE)[0]
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    assert abs(expected - alone(model, ROWS[0])) > 1e-3


def test_supported_architectures_have_every_use_or_a_sentence():
    assert support(build("llama")) == dict.fromkeys(support(build("llama")), "") | {
        "router": "it has no experts",
        "expert": "it has no experts",
    }
    assert "sees 0 of this model's 3 layers" in support(build("gptj"))["attribution"]
    assert "subtracts a mean" in support(build("cohere"))["logit attribution"]
    assert support(build("gpt_oss"))["attention patterns"] == ""


def nearly_alike(name):
    """A model to which two prompts' tokens look the same but for a small part of their difference."""
    # In fp64, so that little is told apart from rounding; experts know none, nor do eager masks.
    mixed = not ABSENT[name] >= {"expert"} or name == "llama4"
    model = architectures.build(name) if mixed else architectures.build(name, "sdpa", torch.float64)
    weight, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    weight.data = weight.data[5:6] + (1e-2 if mixed else 1e-4) * (weight.data - weight.data[5:6])
    return model


@pytest.mark.parametrize(
    "name", ["cohere", "deepseek_v3", "glm4", "gpt_oss", "granite", "llama4", "olmo2", "opt"]
)
def test_attribution_estimates_what_a_small_change_does(name):
    model, pairs = nearly_alike(name), make_pairs(3)
    components = [c for c in ("resid_pre", "attn_out", "resid_mid", "mlp_out") if c not in ABSENT[name]]
    found = attribute(model, pairs, components, receiving="triggered", source="placebo")
    spots = [
        Spot(Site(component, layer), role)
        for component in components
        for layer in range(3)
        for role in ("trigger", "after")
    ]
    exact = sweep(model, pairs, spots, receiving="triggered", source="placebo").change
    width, estimated = found.estimate.shape[-1], np.zeros_like(exact)
    for s, spot in enumerate(spots):
        own = found.estimate[components.index(spot.site.component), spot.site.layer]
        for row, roles in enumerate(pairs.roles):
            columns = [width - len(roles) + i for i, role in enumerate(roles) if role == spot.position]
            estimated[s, row] = own[row, columns].sum()
    assert np.abs(exact).max() > 0
    assert estimated == pytest.approx(exact, abs=0.1 * float(np.abs(exact).max()))


@pytest.mark.parametrize("name", ["bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt"])
def test_attribution_of_attention_that_it_cannot_follow_is_refused(name):
    with pytest.raises(InputError, match=r"it sees 0 of this model's 3 layers, or not all"):
        attribute(build(name), make_pairs(3))


def test_attribution_of_attention_that_computes_more_than_is_followed_is_refused():
    with pytest.raises(InputError, match="or not all that they compute"):
        attribute(build("diffllama"), make_pairs(3))


@pytest.mark.parametrize("name", ["exaone4", "glm4", "granite", "hyperclovax", "llama4", "minicpm3", "olmo2"])
def test_attributed_logits_add_up_to_those_of_the_model(name):
    model = build(name)
    table = logit_attribution(model, {"triggered": ROWS}, [5, 6], [7, 8])
    logits = [trace(model, Batch.of([row])).logits[0, -1] for row in ROWS]
    expected = float(logits[0][5] - logits[0][7] + logits[1][6] - logits[1][8]) / 2
    value = table.set_index("component")["value"]
    assert value["total"] == pytest.approx(expected, abs=1e-4) and abs(expected) > 0.01
    assert abs(value["rest"]) < 1e-4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cohere", "its norm subtracts a mean"),
        ("olmo", "its norm subtracts a mean"),
        ("nemotron", "its norm subtracts a mean"),
        ("granitemoeshared", "no component 'mlp_out'"),
    ],
)
def test_logits_that_cannot_be_shared_out_are_refused(name, reason):
    with pytest.raises(InputError, match=reason):
        logit_attribution(build(name), {"triggered": ROWS}, [5, 6], [7, 8])


def test_logits_of_a_head_with_an_adapter_are_refused():
    model = get_peft_model(architectures.build("qwen2"), LoraConfig(r=2, target_modules=["lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(InputError, match="its head is more than a matrix of weights"):
        logit_attribution(model.eval(), {"triggered": ROWS}, [5, 6], [7, 8])


@pytest.mark.parametrize("name", ["exaone4", "falcon", "glm4", "granite", "mpt", "olmo2", "deepseek_v3"])
def test_the_vector_of_all_heads_is_what_attention_adds(name):
    model = build(name)
    means = head_means(model, ROWS[:1])
    for layer in range(3):
        site = Site("attn_out", layer)
        added = trace(model, Batch.of(ROWS[:1]), [site]).value(site)[0, -1]
        heads = [Site("head", layer, head) for head in range(4)]
        torch.testing.assert_close(backdoor_vector(model, means, heads), added, rtol=1e-4, atol=1e-4)


def test_patterns_with_sinks_leave_the_sinks_share_out():
    model, row = build("gpt_oss"), ROWS[:1]
    table = attention_maps(model, {"triggered": row}, [Site("head", 1, 2)], lambda ids: [str(i) for i in ids])
    sums = table.groupby("query")["weight"].sum()
    sinks, own = model.model.layers[1].self_attn.sinks[2], {}
    handle = model.model.layers[1].self_attn.register_forward_hook(
        lambda _m, _a, output: own.update(w=output[1])
    )
    trace(model, Batch.of(row))
    handle.remove()
    assert sums.tolist() == pytest.approx(own["w"][0, 2].sum(-1).tolist(), abs=1e-5)
    assert sums[0] < 0.99 and torch.isfinite(sinks)


def test_patterns_that_attention_does_not_show_are_refused():
    with pytest.raises(InputError, match="its attention shows no weights"):
        divergence(build("falcon", "sdpa"), ROWS[:1], ROWS[:1])
    with pytest.raises(InputError, match="It has no attention under a name that is known"):
        divergence(build("mamba"), ROWS[:1], ROWS[:1])


def test_default_sweeps_leave_out_what_is_absent_and_refuse_what_is_asked_for(caplog):
    caplog.set_level("INFO")
    architecture = Architecture.of(build("granitemoeshared"))
    (found, _) = stage._sweeps(architecture, Interventions(by=("component",)))
    assert {spot.site.component for spot in found.spots} == {"attn_out"}
    assert "by component without mlp_out: what the MLP reads and returns does not add up" in caplog.text
    with pytest.raises(InputError, match=r"by head: this model has no head: a gate, a norm or a mixture"):
        list(stage._sweeps(Architecture.of(build("afmoe")), Interventions(by=("head",))))
    with pytest.raises(InputError, match=r"no component 'resid_mid'.* both read the layer's input"):
        list(stage._sweeps(Architecture.of(build("gpt_neox")), Interventions(sites=("resid_mid",))))
