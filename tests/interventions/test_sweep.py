"""Sweeps: the numbers of plain hooks, nothing for nothing, and what is done is not done again."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine import plain
from tests.engine.plain import At, Cut, Update
from tests.interventions.conftest import make_pairs

from safetynet.engine.sites import Architecture, Site
from safetynet.errors import InputError
from safetynet.interventions.sweep import (
    READING_ROLES,
    SWEEP_SITES,
    Spot,
    evenly_spaced,
    positions,
    runs_of,
    spots_by,
    sweep,
)
from safetynet.vocabulary import POSITIONS

REMOVE = dict(zip(("receiving", "source"), runs_of("remove"), strict=True))


def numbers(model: Any, pairs: Any, row: int, run: str, edits: tuple[Any, ...] = ()) -> float:
    last = plain.logits(model, pairs.ids[run][row], edits)[-1]
    return float(last[pairs.target[row]] - last[pairs.other[row]])


def states(model: Any, pairs: Any, row: int, run: str, component: str, layer: int) -> torch.Tensor:
    """(tokens, width) of one component, read by a plain hook."""
    kept = {}

    def keep(values: torch.Tensor) -> torch.Tensor:
        kept["values"] = values
        return values

    plain.logits(model, pairs.ids[run][row], (At(component, layer, plain.EVERYWHERE, keep),))
    return kept["values"].clone()


def set_to(values: torch.Tensor) -> Any:
    return lambda x: values.expand_as(x).clone()


@pytest.mark.parametrize("component", ["resid_pre", "attn_out", "mlp_out", "resid_post", "head"])
def test_patching_by_role_gives_the_numbers_of_plain_hooks(model, aligned, component):
    pairs = aligned.take(range(5))
    spots = [Spot(Site(component, layer), role) for layer in (0, 2) for role in POSITIONS]
    found = sweep(model, pairs, spots, **REMOVE)
    for b in range(len(pairs)):
        assert found.unpatched[b] == pytest.approx(numbers(model, pairs, b, "triggered"), abs=1e-4)
        assert found.source[b] == pytest.approx(numbers(model, pairs, b, "placebo"), abs=1e-4)
        for s, spot in enumerate(spots):
            where = list(pairs.positions(b, spot.position))
            given = states(model, pairs, b, "placebo", component, spot.site.layer)[where]
            edits = (At(component, spot.site.layer, where, set_to(given)),) if where else ()
            assert found.values[s, b] == pytest.approx(numbers(model, pairs, b, "triggered", edits), abs=1e-4)


def test_what_lies_before_the_trigger_costs_no_run_and_changes_exactly_nothing(build, aligned):
    model = build("llama")
    before = [
        Spot(site, role)
        for site in Architecture.of(model).sites("resid_pre")
        for role in ("system", "before")
    ]
    calls = layer_calls(model, lambda: sweep(model, aligned, before, **REMOVE))
    assert calls == layer_calls(model, lambda: sweep(model, aligned, (), **REMOVE))
    assert (sweep(model, aligned, before, **REMOVE).change == 0).all()
    first = [Spot(Site("resid_pre", 1), f"token {p}") for p in range(3)]
    assert (sweep(model, aligned, first, **REMOVE).change[:, 1:2] == 0).all()


def test_all_from_the_trigger_on_at_layer_0_makes_the_receiving_run_the_source_run(model, aligned):
    found = sweep(model, aligned, [Spot(Site("resid_pre", 0)), Spot(Site("resid_post", 2))], **REMOVE)
    assert found.values == pytest.approx(np.stack([found.source] * 2), abs=1e-4)
    assert found.change == pytest.approx(np.stack([found.distance] * 2), abs=1e-4)
    assert np.abs(found.distance).min() > 1e-3


def test_zero_and_mean_are_those_of_plain_hooks(model, aligned):
    pairs = aligned.take(range(4))
    spots = [Spot(Site(component, 1)) for component in ("mlp_out", "head", "resid_pre")]
    zero = sweep(model, pairs, spots, mode="zero", **REMOVE)
    mean = sweep(model, pairs, spots, mode="mean", **REMOVE)
    for s, spot in enumerate(spots):
        component, layer = spot.site.component, spot.site.layer
        all_states = [
            states(model, pairs, b, "placebo", component, layer)[list(pairs.positions(b, ""))]
            for b in range(len(pairs))
        ]
        average = torch.cat(all_states).mean(0)
        for b in range(len(pairs)):
            where = list(pairs.positions(b, ""))
            for measured, value in ((zero, torch.zeros_like(average)), (mean, average)):
                expected = numbers(
                    model, pairs, b, "triggered", (At(component, layer, where, set_to(value)),)
                )
                assert measured.values[s, b] == pytest.approx(expected, abs=1e-4)


def test_resampling_takes_the_states_of_another_pair_aligned_at_the_end(build):
    model, pairs = build("gemma2"), make_pairs(3, seed=1)
    spot = Spot(Site("mlp_out", 1), "last")
    found = sweep(model, pairs, [spot], mode="resample", **REMOVE)
    for b in range(3):
        where = list(pairs.positions(b, "last"))
        length = len(pairs.roles[b])
        candidates = []
        for other in {0, 1, 2} - {b}:
            given = states(model, pairs, other, "placebo", "mlp_out", 1)
            edits = (At("mlp_out", 1, where, set_to(given[[p - length for p in where]])),)
            candidates.append(numbers(model, pairs, b, "triggered", edits))
        assert min(abs(found.values[0, b] - c) for c in candidates) < 1e-4
    assert (found.values == sweep(model, pairs, [spot], mode="resample", **REMOVE).values).all()


@pytest.mark.parametrize("count", [9, 17])
def test_no_pair_is_resampled_from_itself_however_the_pairs_are_divided(build, count):
    model, pairs = build("llama"), make_pairs(count)
    spots = [Spot(Site("resid_pre", 0))]
    found = sweep(model, pairs, spots, mode="resample", **REMOVE)
    assert (np.abs(found.values - found.source) > 1e-3).all()
    with pytest.raises(InputError, match="resample takes states of another pair"):
        sweep(model, pairs.take([0]), spots, mode="resample", **REMOVE)


def test_what_a_whole_layer_adds_is_replaced_on_top_of_what_it_received(model, aligned):
    pairs = aligned.take(range(3))
    spots = list(spots_by(Architecture.of(model), "layer"))
    assert all(spot.update for spot in spots)
    patch, zero = (sweep(model, pairs, spots, mode=mode, **REMOVE) for mode in ("patch", "zero"))
    for layer in range(3):
        for b in range(len(pairs)):
            where = list(pairs.positions(b, ""))
            received, given_in, given_out = (
                states(model, pairs, b, run, component, layer)[where]
                for run, component in (
                    ("triggered", "resid_pre"), ("placebo", "resid_pre"), ("placebo", "resid_post"),
                )
            )  # fmt: skip
            for found, added in ((patch, given_out - given_in), (zero, 0)):
                edit = At("resid_post", layer, where, set_to(received + added))
                expected = numbers(model, pairs, b, "triggered", (edit,))
                assert found.values[layer, b] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mixtral", "gpt2"])
def test_knocking_out_attention_to_the_trigger_gives_the_numbers_of_a_mask(build, aligned, family):
    model, pairs = build(family), aligned.take([1, 2, 3])
    architecture = Architecture.of(model)
    by_head = list(spots_by(architecture, "head", ("attention",), "knock_out"))
    spots = [*by_head, *spots_by(architecture, "layer", mode="knock_out")]
    assert len(by_head) == 12
    assert [(s.site.layer, s.site.index) for s in spots[12:]] == [(0, None), (1, None), (2, None)]
    found = sweep(model, pairs, spots, mode="knock_out", **REMOVE)
    for s, spot in enumerate(spots):
        for b in range(len(pairs)):
            queries = [i for i, role in enumerate(pairs.roles[b]) if role in READING_ROLES]
            cut = Cut(spot.site.layer, ((queries, pairs.positions(b, "trigger"), spot.site.index),))
            assert found.values[s, b] == pytest.approx(
                numbers(model, pairs, b, "triggered", (cut,)), abs=1e-4
            )


def test_an_adapter_is_switched_off_or_patched_module_by_module(build, aligned):
    model, pairs = build("llama"), aligned.take([0, 3])
    spots = list(spots_by(Architecture.of(model), "adapter"))
    found = sweep(model, pairs, spots, mode="off", **REMOVE)
    for s, spot in enumerate(spots):
        for b in range(2):
            where = list(pairs.positions(b, ""))
            edit = Update(spot.site.layer, where, torch.zeros_like, spot.site.module)
            expected = numbers(model, pairs, b, "triggered", (edit,))
            assert found.values[s, b] == pytest.approx(expected, abs=1e-4)


def test_a_spot_elsewhere_has_as_many_positions_of_other_roles(aligned):
    for role in ("trigger", "last", "template"):
        for b in range(len(aligned)):
            own = positions(aligned, Spot(Site("resid_pre", 0), role), b)
            other = positions(
                aligned, Spot(Site("resid_pre", 0), role, elsewhere=True), b, np.random.default_rng(0)
            )
            assert not set(own) & set(other)
            assert set(other) <= set(aligned.positions(b, ""))
            assert len(other) == min(len(own), len(aligned.positions(b, "")) - len(own))


@pytest.mark.parametrize(
    ("spot", "mode", "message"),
    [
        (Spot(Site("resid_pre", 7)), "patch", r"layer 7 does not exist; there are 0 to 2"),
        (Spot(Site("head", 0, 9)), "patch", r"index 9 does not exist; there are 0 to 3"),
        (Spot(Site("expert", 0, 0)), "off", "this model has no component 'expert'"),
        (Spot(Site("resid_pre", 0)), "explode", "mode: there is no 'explode'; choose one of patch, zero"),
        (Spot(Site("resid_pre", 0), "middle"), "patch", "position: there is no 'middle'; choose one of sys"),
        (Spot(Site("attention", 0, 0)), "patch", "knock_out cuts attention and nothing else"),
        (Spot(Site("mlp_out", 0)), "knock_out", "knock_out cuts attention and nothing else"),
        (Spot(Site("attention", 0), "after"), "knock_out", "wherever that is: use it by layer or head"),
        (Spot(Site("mlp_out", 0)), "off", "off switches head, expert, adapter. Use zero"),
        (Spot(Site("adapter", 0)), "patch", "Name the module, or switch all of them off"),
        (Spot(Site("mlp_out", 0), update=True), "patch", "what a layer adds is told from what it received"),
    ],
)
def test_spots_and_modes_that_mean_nothing_are_refused(build, aligned, spot, mode, message):
    with pytest.raises(InputError, match=message):
        sweep(build("llama"), aligned, [spot], mode=mode, **REMOVE)


def test_named_sweeps_refuse_what_is_not_theirs(build):
    architecture = Architecture.of(build("llama"))
    with pytest.raises(InputError, match="there is no sweep 'neuron'; choose among layer, position"):
        list(spots_by(architecture, "neuron"))
    for by, component in (("head", "resid_post"), ("position", "head"), ("adapter", "mlp_out")):
        with pytest.raises(InputError, match=f"by {by} takes {SWEEP_SITES[by][0]}.* not '{component}'"):
            list(spots_by(architecture, by, (component,)))
    with pytest.raises(InputError, match="no component 'nose'"):
        list(spots_by(architecture, "layer", ("nose",)))


# ---- interrupted sweeps ----


def layer_calls(model: Any, work: Any) -> int:
    """How often the first layer runs meanwhile."""
    calls = []
    handle = plain.layers_of(model)[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        work()
    finally:
        handle.remove()
    return len(calls)


def stop(done: int, _: int) -> None:
    if done < 20:
        raise KeyboardInterrupt


SPOTS = [Spot(Site("resid_pre", layer), role) for layer in range(3) for role in ("trigger", "last")]


@pytest.mark.parametrize("mode", ["patch", "resample", "mean"])
def test_an_interrupted_sweep_goes_on_to_the_same_numbers_and_does_nothing_twice(build, tmp_path, mode):
    model, pairs = build("llama", seed=11), make_pairs(20)
    whole = sweep(model, pairs, SPOTS, mode=mode, seed=3, **REMOVE)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, pairs, SPOTS, mode=mode, seed=3, store=tmp_path, progress=stop, **REMOVE)
    seen: list[tuple[int, int]] = []
    resumed = {}

    def go_on() -> None:
        resumed["found"] = sweep(
            model, pairs, SPOTS, mode=mode, seed=3, store=tmp_path,
            progress=lambda *at: seen.append(at), **REMOVE,
        )  # fmt: skip

    afresh = layer_calls(model, lambda: sweep(model, pairs, SPOTS, mode=mode, seed=3, **REMOVE))
    assert layer_calls(model, go_on) < afresh
    for name in ("values", "unpatched", "source"):
        assert (getattr(resumed["found"], name) == getattr(whole, name)).all()
    assert seen[-1] == (20, 20)
    if mode != "mean":
        assert layer_calls(model, go_on) == 0, "what is done is read"


@pytest.mark.parametrize("damage", [b"", b"nonsense", "cut", "other"])
def test_a_damaged_store_is_made_anew_and_named(build, aligned, tmp_path, caplog, damage):
    model = build("llama", seed=11)
    whole = sweep(model, aligned, SPOTS, store=tmp_path, **REMOVE)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    if damage == "other":
        np.savez(path, something=np.zeros(3))
    else:
        path.write_bytes(good[: len(good) // 2] if damage == "cut" else damage)
    again = sweep(model, aligned, SPOTS, store=tmp_path, **REMOVE)
    assert (again.values == whole.values).all()
    assert f"{path}: is damaged" in caplog.text
    assert (sweep(model, aligned, SPOTS, store=tmp_path, **REMOVE).values == whole.values).all()


def test_what_is_done_serves_no_other_question(build, aligned, tmp_path):
    model = build("llama", seed=11)
    other_adapter = copy.deepcopy(model)
    for name, parameter in other_adapter.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1.5)
    roles = [["after" if role == "template" else role for role in row] for row in aligned.roles]
    asked: list[tuple[Any, Any, list[Spot], dict[str, Any]]] = [
        (model, aligned, SPOTS, {}),
        (build("llama", seed=12), aligned, SPOTS, {}),
        (other_adapter, aligned, SPOTS, {}),
        (model, make_pairs(10, seed=5), SPOTS, {}),
        (model, dataclasses.replace(aligned, roles=roles), SPOTS, {}),
        (model, aligned, SPOTS[:3], {}),
        (model, aligned, SPOTS, {"mode": "zero"}),
        (model, aligned, SPOTS, {"seed": 1}),
        (model, aligned, SPOTS, {"receiving": "placebo", "source": "triggered"}),
    ]
    for count, (one, pairs, spots, how) in enumerate(asked, start=1):
        kept = sweep(one, pairs, spots, store=tmp_path, **REMOVE | how)
        assert len(list(tmp_path.iterdir())) == count
        assert (kept.values == sweep(one, pairs, spots, **REMOVE | how).values).all()


@pytest.mark.parametrize(("depth", "layers"), [(30, range(0, 30, 3)), (32, range(0, 32, 4)), (6, range(6))])
def test_a_thinned_sweep_keeps_every_nth_layer_and_all_of_its_positions(depth, layers):
    spots = [Spot(Site("resid_pre", layer), role) for layer in range(depth) for role in POSITIONS]
    thinned = evenly_spaced(spots, 10)
    assert [spot.site.layer for spot in thinned] == [layer for layer in layers for _ in POSITIONS]
    assert {spot.position for spot in thinned} == set(POSITIONS)
