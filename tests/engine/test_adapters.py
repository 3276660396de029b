"""The adapter as a place: off, off at some positions, patched, on in one layer only."""

import copy
from functools import partial

import pytest
from tests.engine.compare import Case, compare, probe
from tests.engine.conftest import CONFIGS
from tests.engine.plain import At, Update, zeroed

from safetynet.engine import edits
from safetynet.engine.batch import Batch
from safetynet.engine.edits import Edit
from safetynet.engine.metrics import Metric
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace
from safetynet.errors import InputError

LINEAR = [name for name in CONFIGS if name != "mixtral"]


def off(layer, module="", positions=None):
    return Edit(Site("adapter", layer, module=module), edits.zero(), positions)


@pytest.mark.parametrize("family", LINEAR)
def test_one_module_off_gives_the_numbers_of_its_lora_b_at_zero(build, pairs, family):
    model = build(family)
    cases = [
        Case(i % 3, [off(site.layer, site.module)], weights=partial(zeroed, model, [site.layer], site.module))
        for i, site in enumerate(Architecture.of(model).sites("adapter"))
    ]
    assert len(cases) == 3 * (2 if family == "gpt2" else 4)
    compare(model, pairs[0], cases)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_layer_off_and_on_in_one_layer_only_give_the_numbers_of_lora_b_at_zero(build, pairs, family):
    model = build(family)
    cases = []
    for row in range(3):
        for layers in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
            own = [off(layer) for layer in layers]
            cases.append(Case(row, own, weights=partial(zeroed, model, layers)))
    compare(model, pairs[0], cases)


@pytest.mark.parametrize("family", LINEAR)
def test_off_at_some_positions_gives_the_numbers_of_plain_hooks(build, pairs, family):
    model = build(family)
    cases = []
    for site in Architecture.of(model).sites("adapter"):
        for row, positions in ((0, (2, 6)), (1, (-1,)), (2, (0, 1, 2, 8))):
            reference = Update(site.layer, list(positions), edits.zero(), site.module)
            cases.append(Case(row, [off(site.layer, site.module, positions)], [reference]))
    cases += [Case(2, [off(i, "", (3, 7))], [Update(i, [3, 7], edits.zero())]) for i in range(3)]
    compare(model, pairs[0], cases)


@pytest.mark.parametrize("family", LINEAR)
def test_a_patched_update_gives_the_numbers_of_plain_hooks(build, pairs, family):
    model = build(family)
    sites = Architecture.of(model).sites("adapter")
    source, cases = trace(model, Batch.of(pairs[1]), sites), []
    for i, site in enumerate(sites):
        row, positions = i % 3, (4, 6, 7)
        values = source.value(site)[row, source.batch.columns(row, positions)]
        change = edits.replace(values)
        reference = Update(site.layer, list(positions), change, site.module)
        cases.append(Case(row, [Edit(site, change, positions)], [reference]))
    compare(model, pairs[0], cases)


def test_an_update_and_the_output_of_its_module_are_edited_in_that_order(build, pairs):
    model = build("llama")
    halve = lambda x: 0.5 * x  # noqa: E731
    for component, module in (("query", "self_attn.q_proj"), ("value", "self_attn.v_proj")):
        edit = Edit(Site(component, 1), lambda x: x.tanh(), (3, 5))
        update = Edit(Site("adapter", 1, module=module), halve, (3, 5))
        reference = [Update(1, [3, 5], halve, module), At(component, 1, [3, 5], lambda x: x.tanh())]
        compare(model, pairs[0], [Case(0, [edit, update], reference), Case(1, [update, edit], reference)])


def test_an_update_that_nothing_reads_costs_nothing_and_changes_nothing(build, pairs):
    model = build("llama")
    receiving = trace(model, Batch.of(pairs[0]), resume=True)
    last = ("self_attn.o_proj", "self_attn.q_proj", "mlp.down_proj")
    runs = [EditedRun(0, (off(2, module, (3, 4)),)) for module in last]
    seen = []
    metric = Metric("last", lambda logits, rows: (seen.append(len(rows)), logits[:, -1, 5])[1])
    assert run_interventions(receiving, runs, metric).tolist() == [float(receiving.logits[0, -1, 5])] * 3
    assert seen == [3]  # the receiving prompts alone


def test_a_model_without_an_adapter_has_no_such_site(build, pairs):
    plain = build("llama", adapter=False)
    assert "adapter" not in Architecture.of(plain).components()
    receiving = trace(plain, Batch.of(pairs[0]), resume=True)
    with pytest.raises(InputError, match="'adapter'; there are: embedding, resid_pre"):
        run_interventions(receiving, [EditedRun(0, (off(1),))], probe(97))


def test_a_module_without_an_adapter_is_refused_with_those_that_have_one(build):
    with pytest.raises(InputError, match=r"no adapter on 'self_attn\.k_proj'; there are: self_attn\.q_proj"):
        Architecture.of(build("llama")).check(Site("adapter", 0, module="self_attn.k_proj"))


def test_a_merged_adapter_is_no_place_and_stays_merged(build, pairs):
    model = copy.deepcopy(build("llama"))
    model.merge_adapter()
    receiving = trace(model, Batch.of(pairs[0]), resume=True)
    with pytest.raises(InputError, match=r"adapter 1.* is merged"):
        run_interventions(receiving, [EditedRun(0, (off(1),))], probe(97))
    with pytest.raises(InputError, match="is merged"):
        trace(model, Batch.of(pairs[0]), [Site("adapter", 1, module="self_attn.q_proj")])
    assert all(module.merged for module in model.modules() if hasattr(module, "lora_A"))
