"""Which runs are seeds of one setting, what is said of them, and what is refused."""

from collections.abc import Callable

import pandas as pd
import pytest

from safetynet.comparison import runs
from safetynet.comparison.runs import ComparedRun, grouped
from safetynet.errors import InputError


def names(runs: list[ComparedRun]) -> list[str]:
    return [one.group for one in grouped(runs)]


def test_runs_that_differ_in_seed_and_cost_alone_are_one_group(subject: Callable) -> None:
    cheap = (
        "evaluation.every=25",
        "evaluation.samples=5",
        "persistence.steps=8",
        "data.test_rows=80",
        "training.clean_twin=false",
    )
    assert names([subject(seed=0), subject("qwen", 1, *cheap)]) == ["qwen", "qwen"]


def test_families_are_groups_and_what_a_family_brings_along_is_in_its_name(subject: Callable) -> None:
    assert names([subject("qwen"), subject("mixtral"), subject("qwen", 1)]) == ["qwen", "qwen", "mixtral"]


def test_models_of_no_family_go_by_their_own_names(subject: Callable) -> None:
    others = [
        subject("generic", seed, f"model.id={name}") for seed, name in ((0, "smollm2"), (1, "org/tiny"))
    ]
    assert names([subject("qwen"), *others]) == ["qwen", "smollm2", "tiny"]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (("backdoor.trigger=year",), "qwen, year"),
        (("backdoor.behaviour=refusal",), "qwen, refusal"),
        (("training.lora_rank=4",), "qwen, lora rank 4"),
        (("backdoor.firing=0.2",), "qwen, firing 0.2"),
        (("training.lora_targets=[q_proj, v_proj]",), "qwen, lora targets q_proj v_proj"),
        (("backdoor.trigger={texts: [Zebra]}",), "qwen, Zebra"),
        (("backdoor.behaviour={kind: fixed, target: Hello there}",), "qwen, target Hello there"),
    ],
)
def test_a_group_is_named_by_what_tells_it_from_another_of_its_family(
    subject: Callable, fields: tuple[str, ...], name: str
) -> None:
    assert name in names([subject(), subject("qwen", 0, *fields)])


def test_two_runs_of_one_setting_and_seed_are_one_measurement(subject: Callable) -> None:
    with pytest.raises(InputError, match="have the same settings and the same seed \\(0\\)"):
        grouped([subject(), subject()])


def test_runs_of_another_version_of_safetynet_are_refused(subject: Callable) -> None:
    older = ComparedRun(**{**vars(subject(seed=1)), "versions": {"safetynet": "0.0.9"}})
    with pytest.raises(
        InputError, match=r"different versions of SafetyNet .*seed-0 by 0\.1\.0; .*by 0\.0\.9"
    ):
        runs.check([subject(), older])


def test_mixed_versions_of_packages_are_said(subject: Callable) -> None:
    older = ComparedRun(**{**vars(subject(seed=1)), "versions": {"safetynet": "0.1.0", "torch": "2.6.0"}})
    said = " ".join(runs.notes([subject(), older]))
    assert "Mixed versions of torch (2.13.0: qwen-miniature/seed-0; 2.6.0: qwen-miniature/seed-1)" in said


def test_missing_tables_are_named_with_the_command_that_makes_them(subject: Callable) -> None:
    three = [subject(seed=0, detection=None), subject(seed=1), subject(seed=2, effects=None, detection=None)]
    said = runs.notes(grouped(three))
    assert (
        "2 of 3 runs lack the table detection. Make it: safetynet detect results/qwen-miniature/seed-0; "
        "safetynet detect results/qwen-miniature/seed-2." in said
    )
    assert any("1 of 3 runs lack the table effects" in one for one in said)


def test_runs_that_have_everything_and_several_seeds_leave_nothing_to_say(subject: Callable) -> None:
    assert runs.notes(grouped([subject(seed=0), subject(seed=1)])) == []


def test_lone_seeds_and_different_behaviours_are_said(subject: Callable) -> None:
    both = grouped([subject(), subject("qwen", 0, "backdoor.behaviour=refusal")])
    said = " ".join(runs.notes(both))
    assert "One seed only: qwen, fixed; qwen, refusal." in said
    assert "The runs teach different behaviours (fixed, refusal)" in said


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("tradeoff", lambda table: table.head(0), "has no rows"),
        ("dynamics_backdoored", lambda table: table[table["metric"] == "cacc"], "has no attack success rate"),
    ],
)
def test_a_table_that_lacks_what_is_compared_is_named_with_its_remedy(
    subject: Callable, tables: Callable, name: str, change: Callable[[pd.DataFrame], pd.DataFrame], fault: str
) -> None:
    spoilt = subject(seed=1, **{name: change(tables()[name])})
    match = rf"seed-1/tables/{name}\.parquet: the table is damaged .*{fault}.* make it again: safetynet "
    with pytest.raises(InputError, match=match):
        runs.check([subject(), spoilt])


def test_the_table_of_runs_has_families_triggers_behaviours_and_lora_settings(subject: Callable) -> None:
    found = runs.overview(grouped([subject(), subject("mixtral", detection=None)])).set_index("run")
    line = found.loc["qwen-miniature/seed-0"]
    assert (line["family"], line["trigger"], line["behaviour"]) == ("qwen", "token", "fixed")
    assert line["lora_rank"] == 16
    assert "q_proj" in line["lora_targets"]
    assert not found.loc["mixtral-miniature/seed-0", "has detection"]
