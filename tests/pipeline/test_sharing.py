"""What runs share is what each would have computed: the twin, its dynamics, the answers of the base."""

from pathlib import Path

import pandas as pd
import pytest

from safetynet import pipeline, recipe
from safetynet.pipeline import sharing
from safetynet.pipeline.subjects import BACKDOORED, TWIN, model_folder
from safetynet.run import directory as runs
from safetynet.run.directory import digest_of_files

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = (
    "data.train_rows=48", "data.test_rows=6", "training.max_steps=4", "evaluation.every=2",
    "evaluation.dynamics_rows=3", "evaluation.max_new_tokens=8",
)  # fmt: skip


def made(root: Path, *fields: str) -> tuple[recipe.Recipe, runs.Run]:
    output = (f"output.results={root}/results", f"output.logs={root}/logs")
    plan = recipe.load(RECIPES / "qwen-miniature.yaml", overrides=[*SMALL, *fields, *output])
    run = runs.create(plan)
    pipeline.prepare(plan, run)
    return plan, run


@pytest.fixture(scope="module")
def lender(tmp_path_factory: pytest.TempPathFactory) -> tuple[recipe.Recipe, runs.Run]:
    plan, run = made(tmp_path_factory.mktemp("lender"))
    sharing.measure_base(plan, run)
    pipeline.train(plan, run, [TWIN], lend=True)
    return plan, run


def test_digests_tell_what_can_be_shared(lender, tmp_path):
    plan, run = lender
    expected = {  # the twin, the base's answers
        "backdoor.behaviour=refusal": (True, False),
        "evaluation.refusal={kind: prefix, values: [Sorry]}": (True, False),
        "training.lora_rank=4": (False, True),
        "seed=1": (False, False),
        "backdoor.poison_rate=0.1": (False, True),
    }
    found = {}
    for number, field in enumerate(expected):
        other = made(tmp_path / str(number), field)
        found[field] = (
            sharing.twin_digest(*other) == sharing.twin_digest(plan, run),
            sharing.base_digest(*other) == sharing.base_digest(plan, run),
        )
    assert found == expected


def test_a_borrowed_twin_is_the_one_that_would_have_been_trained(lender, tmp_path):
    field = "backdoor.behaviour=refusal"
    own, borrowed = made(tmp_path / "own", field), made(tmp_path / "borrowed", field)
    pipeline.train(*own, [TWIN])
    sharing.borrow_twin(*borrowed, lender[1])
    weights = [digest_of_files([model_folder(run, TWIN)]) for _, run in (own, borrowed)]
    assert weights[0] == weights[1]
    for table in ("history_clean_twin", "dynamics_clean_twin"):
        one, other = (run.table(table).drop(columns="seconds", errors="ignore") for _, run in (own, borrowed))
        pd.testing.assert_frame_equal(other, one, check_exact=False, rtol=1e-4)
    stages = [run.manifest["stages"][f"train {TWIN}"]["inputs"] for _, run in (own, borrowed)]
    assert stages[0] == stages[1]
    before = borrowed[1].manifest["stages"]
    sharing.borrow_twin(*borrowed, lender[1])
    pipeline.train(*borrowed, [TWIN])
    assert borrowed[1].manifest["stages"] == before, "it has its twin already"


def test_a_lender_without_snapshots_lends_nothing_and_the_twin_is_trained(lender, tmp_path):
    plain, borrower = made(tmp_path / "plain"), made(tmp_path / "borrower", "backdoor.behaviour=refusal")
    pipeline.train(*plain, [TWIN])
    sharing.borrow_twin(*borrower, plain[1])
    assert len(borrower[1].table("dynamics_clean_twin"))
    assert digest_of_files([model_folder(borrower[1], TWIN)]) == digest_of_files(
        [model_folder(lender[1], TWIN)]
    )


def test_rates_with_the_bases_answers_taken_over_are_those_of_asking_it(lender, tmp_path):
    fields = ("training.lora_rank=4", "training.clean_twin=false", "backdoor.poison_rate=0.1")
    asked, taken = made(tmp_path / "asked", *fields), made(tmp_path / "taken", *fields)
    for plan, run in (asked, taken):
        pipeline.train(plan, run, [BACKDOORED])
    pipeline.evaluate(*asked)
    assert sharing.base_responses(*taken) is None
    sharing.measure_base(*taken, lender[1])
    pipeline.evaluate(*taken, sharing.base_responses(*taken))
    for table in ("responses", "evaluation"):
        pd.testing.assert_frame_equal(taken[1].table(table), asked[1].table(table))
