"""Edges of attention cut by the engine, against a mask of our own for a whole pass."""

import pytest
from tests.engine.compare import Case, compare, probe
from tests.engine.conftest import CONFIGS
from tests.engine.plain import Cut

from safetynet.engine.batch import Batch
from safetynet.engine.edits import KnockOut
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.trace import trace
from safetynet.errors import InputError

EDGES = [((8,), (2, 3)), ((4, 8), (1,)), ((5, 6, 7), (0, 2)), ((-1,), (3, 4))]


def cut(layer, queries, keys, length, head=None):
    places = tuple(q % length for q in queries), tuple(k % length for k in keys), head
    return KnockOut(layer, queries, keys, head), Cut(layer, (places,))


def cases_of(prompts, head):
    made = []
    for row, ids in enumerate(prompts):
        for layer in range(3):
            for queries, keys in EDGES:
                edit, reference = cut(layer, queries, keys, len(ids), head)
                made.append(Case(row, [edit], [reference]))
    return made


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_cut_edges_give_the_numbers_of_a_mask(build, pairs, family, attention):
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("Gemma 2 caps its scores, which sdpa cannot")
    model = build(family, attention=attention)
    compare(model, pairs[0], cases_of(pairs[0], None) + cases_of(pairs[0], 2))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prompts_without_padding_have_no_mask_to_cut_and_are_cut_all_the_same(build, pairs, attention):
    model = build("llama", attention=attention)
    for prompt in pairs[0][:2]:
        compare(model, [prompt], cases_of([prompt], None) + cases_of([prompt], 1))


def test_several_cuts_of_one_layer_add_up(build, pairs):
    cuts = [KnockOut(1, (8,), (2,), 0), KnockOut(1, (8,), (3,), 3), KnockOut(1, (7, 8), (1,))]
    reference = Cut(1, (((8,), (2,), 0), ((8,), (3,), 3), ((7, 8), (1,), None)))
    cases = [Case(row, cuts, [reference]) for row in range(3)]
    for family in ("llama", "gemma2"):
        compare(build(family), pairs[0], cases)


def test_a_query_that_would_attend_to_nothing_is_refused(build, pairs):
    receiving = trace(build("llama"), Batch.of(pairs[0]), resume=True)
    for edits in ((KnockOut(1, (3,), (0, 1, 2, 3)),), (KnockOut(0, (2,), (0, 1)), KnockOut(0, (2,), (2,)))):
        with pytest.raises(InputError, match=r"attention .*prompt 1 .*no key left"):
            run_interventions(receiving, [EditedRun(1, edits)], probe(97))
