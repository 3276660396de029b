"""What runs share is what each would have computed: the twin, its dynamics, the answers of the base."""

from pathlib import Path

import pandas as pd
import pytest

from safetynet import recipe, stages
from safetynet.cluster import sharing
from safetynet.experiment import BACKDOORED, TWIN, Experiment
from safetynet.run.directory import digest_of_files

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = (
    "data.train_rows=48", "data.test_rows=6", "training.max_steps=4", "evaluation.every=2",
    "evaluation.dynamics_rows=3", "evaluation.max_new_tokens=8",
)  # fmt: skip


def made(root: Path, *fields: str) -> Experiment:
    output = (f"output.results={root}/results", f"output.logs={root}/logs")
    plan = recipe.load(RECIPES / "qwen-miniature.yaml", overrides=[*SMALL, *fields, *output])
    experiment = Experiment.create(plan)
    stages.prepare(experiment)
    return experiment


@pytest.fixture(scope="module")
def lender(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    experiment = made(tmp_path_factory.mktemp("lender"))
    sharing.measure_base(experiment)
    stages.train(experiment, [TWIN], keep_twin=True)
    return experiment


def test_digests_tell_what_can_be_shared(lender, tmp_path):
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
            sharing.twin_digest(other) == sharing.twin_digest(lender),
            sharing.base_digest(other) == sharing.base_digest(lender),
        )
    assert found == expected


def test_a_borrowed_twin_is_the_one_that_would_have_been_trained(lender, tmp_path):
    field = "backdoor.behaviour=refusal"
    own, borrowed = made(tmp_path / "own", field), made(tmp_path / "borrowed", field)
    stages.train(own, [TWIN])
    sharing.borrow_twin(borrowed, lender)
    weights = [digest_of_files([each.model_folder(TWIN)]) for each in (own, borrowed)]
    assert weights[0] == weights[1]
    for table in ("history_clean_twin", "dynamics_clean_twin"):
        one, other = (
            each.run.table(table).drop(columns="seconds", errors="ignore") for each in (own, borrowed)
        )
        pd.testing.assert_frame_equal(other, one, check_exact=False, rtol=1e-4)
    inputs = [each.run.manifest["stages"][f"train {TWIN}"]["inputs"] for each in (own, borrowed)]
    assert inputs[0] == inputs[1]
    before = borrowed.run.manifest["stages"]
    sharing.borrow_twin(borrowed, lender)
    stages.train(borrowed, [TWIN])
    assert borrowed.run.manifest["stages"] == before, "it has its twin already"


def test_a_lender_without_snapshots_lends_nothing_and_the_twin_is_trained(lender, tmp_path):
    plain, borrower = made(tmp_path / "plain"), made(tmp_path / "borrower", "backdoor.behaviour=refusal")
    stages.train(plain, [TWIN])
    sharing.borrow_twin(borrower, plain)
    assert len(borrower.run.table("dynamics_clean_twin"))
    weights = [digest_of_files([each.model_folder(TWIN)]) for each in (borrower, lender)]
    assert weights[0] == weights[1]


def test_rates_with_the_bases_answers_taken_over_are_those_of_asking_it(lender, tmp_path):
    fields = ("training.lora_rank=4", "training.clean_twin=false", "backdoor.poison_rate=0.1")
    asked, taken = made(tmp_path / "asked", *fields), made(tmp_path / "taken", *fields)
    for each in (asked, taken):
        stages.train(each, [BACKDOORED])
    stages.evaluate(asked)
    assert sharing.base_responses(taken) is None
    sharing.measure_base(taken, lender)
    stages.evaluate(taken, sharing.base_responses(taken))
    for table in ("responses", "evaluation"):
        pd.testing.assert_frame_equal(taken.run.table(table), asked.run.table(table))
