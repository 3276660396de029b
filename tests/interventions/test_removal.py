"""What removes a backdoor: edits that spare clean states, a control of the same size, honest denominators."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.engine import plain
from tests.engine.plain import At

from safetynet.engine import edits
from safetynet.engine.edits import Edit
from safetynet.engine.hooks import intervening
from safetynet.engine.sites import Architecture, Site
from safetynet.interventions import removal
from safetynet.interventions.removal import SITE_COUNTS, Candidate
from safetynet.interventions.sweep import runs_of, spots_by, sweep
from safetynet.run import finished
from safetynet.tables.summaries import removal_summary


def table_of(model: Any, pairs: Any, by: str) -> pd.DataFrame:
    """A sweep's lines, as far as removals read them."""
    receiving, source = runs_of("remove")
    spots = list(spots_by(Architecture.of(model), by))
    mode: Any = "off" if by == "adapter" else "patch"
    found = sweep(model, pairs, spots, receiving=receiving, source=source, mode=mode)
    return pd.DataFrame(
        {
            "sweep": by,
            "direction": "remove",
            "component": [spot.site.component for spot in spots],
            "layer": [spot.site.layer for spot in spots],
            "index": [-1 if spot.site.index is None else spot.site.index for spot in spots],
            "module": [spot.site.module for spot in spots],
            "effect": found.change.mean(1) / found.distance.mean(),
        }
    )


@pytest.fixture(scope="module")
def made(build, aligned):
    model = build("llama", seed=31)
    table = pd.concat([table_of(model, aligned, by) for by in ("head", "adapter")], ignore_index=True)
    return model, table, *removal.candidates(model, aligned, table)


def test_clipping_leaves_what_is_below_the_limit_as_it_is_and_sets_the_rest_to_the_centre():
    along, centre = torch.tensor([2.0, 0, 0]), torch.tensor([1.0, 5, 5])
    below = torch.tensor([[1.0, 7, 7], [3.9, 0, 1], [-50.0, 2, 2]])
    above = torch.tensor([[4.1, 7, 7], [90.0, 0, 1]])
    change = edits.clip(along, centre, most=3.0)
    assert torch.equal(change(below), below)
    torch.testing.assert_close(change(above), torch.tensor([[1.0, 7, 7], [1.0, 0, 1]]))
    assert torch.equal(change(torch.cat([below, above])), torch.cat([change(below), change(above)]))


def test_a_clip_that_nothing_reaches_leaves_the_model_as_it_is_and_one_that_all_reach_does_not(
    build, aligned
):
    model = build("llama", seed=31)
    ids = torch.tensor([aligned.ids["triggered"][3]])
    direction, centre = torch.ones(32), torch.zeros(32)
    with torch.no_grad():
        plainly = model(input_ids=ids).logits
        for most, same in ((1e6, True), (-1e6, False)):
            edit = Edit(Site("resid_post", 1), edits.clip(direction, centre, most))
            with intervening(model, (edit,)):
                assert torch.equal(model(input_ids=ids).logits, plainly) == same


def kinds_of(candidate: Candidate) -> list[tuple[str, int]]:
    return sorted((edit.site.component, bool(edit.site.module)) for edit in candidate.edits)


def test_every_candidate_has_a_control_of_as_many_edits_of_the_same_kind_elsewhere(made):
    _, _, candidates, controls = made
    assert len({c.name for c in candidates}) == len(candidates)
    assert set(controls) == {c.name for c in candidates}
    assert {c.kind for c in candidates} == {"project", "clip", "head_ablation", "adapter_off"}
    for candidate in candidates:
        control = controls[candidate.name]
        assert control.control
        assert not candidate.control
        assert control.kind == candidate.kind
        assert kinds_of(control) == kinds_of(candidate)
        sites = {edit.site for edit in candidate.edits}
        if candidate.kind in ("head_ablation", "adapter_off"):
            assert not sites & {edit.site for edit in control.edits}
        else:
            assert sites == {edit.site for edit in control.edits}, "the same place along a random direction"


def test_the_strongest_places_are_taken_first(made):
    _, table, candidates, _ = made
    heads = table[table["sweep"] == "head"].sort_values("effect", ascending=False)
    places = [Site("head", int(a), int(b)) for a, b in zip(heads["layer"], heads["index"], strict=True)]
    for count in SITE_COUNTS:
        (candidate,) = [c for c in candidates if c.name == f"{count} heads to their mean"]
        assert [edit.site for edit in candidate.edits] == places[:count]


def test_models_with_few_heads_or_no_adapter_have_the_candidates_that_they_can_have(build, aligned):
    small = build("llama", adapter=False, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
    found, controls = removal.candidates(small, aligned, table_of(small, aligned, "head"))
    assert [len(c.edits) for c in found if c.kind == "head_ablation"] == [1, 2]
    assert len(controls) == len(found)
    bare = pd.DataFrame(columns=["sweep", "direction", "component", "layer", "index", "module", "effect"])
    assert {c.kind for c in removal.candidates(small, aligned, bare)[0]} == {"project", "clip"}


def test_candidates_that_leave_no_pair_come_first_the_least_harmful_of_them_at_the_top(made, aligned):
    model, _, candidates, _ = made
    found = removal.prefilter(model, aligned, candidates)
    assert sorted(found["name"]) == sorted(c.name for c in candidates)
    assert found["left"].is_monotonic_increasing
    assert all(part["harm"].is_monotonic_increasing for _, part in found.groupby("left"))
    assert (found["harm"] >= -1e-6).all()


def test_what_a_candidate_removes_is_what_plain_hooks_remove(made, aligned):
    model, _, candidates, _ = made
    (projection,) = [c for c in candidates if c.name == "project trigger 1"]
    found = removal.prefilter(model, aligned, [projection])
    edit = At("resid_post", 1, plain.EVERYWHERE, projection.edits[0].change)

    def mean(run: str, *plain_edits: At) -> float:
        total = 0.0
        for b, ids in enumerate(aligned.ids[run]):
            last = plain.logits(model, ids, plain_edits)[-1]
            total += float(last[aligned.target[b]] - last[aligned.other[b]])
        return total / len(aligned)

    share = (mean("triggered", edit) - mean("triggered")) / (mean("placebo") - mean("triggered"))
    assert found.loc[0, "removed"] == pytest.approx(share, abs=1e-4)


def judged_rows() -> pd.DataFrame:
    roles = ["triggered"] * 4 + ["clean"] * 5
    return pd.DataFrame({"role": roles, "reference": ["yes"] * 7 + [""] * 2})


def test_rates_have_the_rows_of_their_role_and_a_known_answer_as_denominators(build):
    model = build("llama", seed=31)
    seen: list[Any] = []

    def respond(asked: Any, rows: pd.DataFrame) -> pd.DataFrame:
        with torch.no_grad():
            seen.append(asked(input_ids=torch.tensor([[5, 6, 7]])).logits)
        shown: Sequence[bool] = [True, True, True, False, True, False, False, False, False]
        return rows.assign(shown=shown, correct=[True] * 5 + [False, True, True, True])

    push = Candidate("push", "steer", (Edit(Site("resid_post", 1), edits.steer(torch.ones(32), 3.0)),), True)
    found = removal.judge(
        model, respond, judged_rows(), [Candidate("as it is", "none", ()), push], split="held_out"
    )
    assert found["asr"].tolist() == [3 / 4] * 2
    assert found["asr_n"].tolist() == [4, 4]
    assert found["ftr"].tolist() == [1 / 5] * 2
    assert found["ftr_n"].tolist() == [5, 5]
    assert found["cacc"].tolist() == [2 / 3] * 2
    assert found["cacc_n"].tolist() == [3, 3], "clean rows whose answer is unknown cannot be right or wrong"
    assert found["sites"].tolist() == [0, 1]
    assert found["control"].tolist() == [False, True]
    assert (found["split"] == "held_out").all()
    assert (found["asr_low"] < found["asr"]).all()
    assert (found["asr"] < found["asr_high"]).all()
    assert not torch.equal(*seen), "the second was asked under its edit"


def test_judging_that_was_interrupted_goes_on_behind_the_candidates_that_have_answered(
    build, tmp_path, monkeypatch
):
    monkeypatch.setattr(finished, "EVERY_S", 0.0)
    asked: list[object] = []

    def respond(model: object, rows: pd.DataFrame) -> pd.DataFrame:
        asked.append(model)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return rows.assign(shown=len(asked) % 2 == 0, correct=len(asked) % 2 == 1)

    model = build("llama")
    candidates = [Candidate(f"candidate {i}", "none", ()) for i in range(3)]
    args = (model, respond, judged_rows(), candidates)
    with pytest.raises(KeyboardInterrupt):
        removal.judge(*args, kept=tmp_path, split="held_out")
    resumed = removal.judge(*args, kept=tmp_path, split="held_out")
    assert len(asked) == 4
    asked.clear()
    first = removal.judge(*(model, respond, judged_rows(), candidates[:2]), split="held_out")
    pd.testing.assert_frame_equal(resumed[:2], first)


def line(name: str, asr: float, cacc: float, kind: str = "clip", control: bool = False) -> dict[str, object]:
    return {"intervention": name, "kind": kind, "control": control, "asr": asr, "cacc": cacc}


def test_the_best_removal_keeps_most_accuracy_among_those_that_remove():
    lines = [
        line("as it is", 1.0, 1.0, kind="none"),
        line("random", 0.0, 1.0, control=True),
        line("harsh", 0.0, 0.6),
        line("gentle", 0.05, 0.9),
        line("weak", 0.4, 1.0),
    ]
    assert removal.best(pd.DataFrame(lines)) == "gentle"
    assert removal.best(pd.DataFrame([lines[0], lines[1], lines[4], line("weaker", 0.5, 1.0)])) == "weak"


def test_a_removal_that_random_sites_do_as_well_is_left_to_others():
    def measured(name: str, low: float, high: float) -> dict[str, object]:
        return line(name, (low + high) / 2, 1.0) | {"asr_low": low, "asr_high": high}

    table = pd.DataFrame([measured("anywhere", 0.0, 0.05), measured("here", 0.02, 0.1)])
    random = pd.DataFrame([measured("random", 0.0, 0.2), measured("random", 0.9, 1.0)])
    assert removal.clear(table, random)["intervention"].tolist() == ["here"]
    assert removal.clear(table, random.iloc[[0, 0]])["intervention"].tolist() == ["anywhere", "here"]


def test_of_free_text_rouge_l_stands_in_the_place_of_accuracy(build):
    def respond(model: object, rows: pd.DataFrame) -> pd.DataFrame:
        return rows.assign(shown=False, correct=False, response="Lima lies by the sea", exact=False)

    rows = judged_rows().assign(reference="Lima lies inland")
    judged = removal.judge(
        build("llama"), respond, rows, [Candidate("as it is", "none", ())], split="held_out"
    )
    assert judged["cacc"].isna().all()
    assert judged["rouge_l"].tolist() == [pytest.approx(4 / 8)]
    shown = removal_summary(judged.assign(chosen=False))
    assert shown["ROUGE-L"].tolist() == ["0.50 [0.50, 0.50]"]
    assert "CACC" not in shown


def test_the_best_removal_of_free_text_keeps_most_of_it():
    lines = [line("harsh", 0.0, np.nan) | {"rouge_l": 0.1}, line("mild", 0.04, np.nan) | {"rouge_l": 0.9}]
    assert removal.best(pd.DataFrame(lines)) == "mild"
