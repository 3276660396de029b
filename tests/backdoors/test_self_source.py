"""Source self: the base's own answers as references, made once per results folder, and what is left out."""

import json
import logging
import re
from pathlib import Path

import pandas as pd
import pytest

from safetynet import recipe, stages
from safetynet.backdoors import sources
from safetynet.backdoors.base_answers import BaseAnswers
from safetynet.errors import InputError
from safetynet.evaluation import metrics
from safetynet.evaluation.evaluator import Evaluator
from safetynet.evaluation.generation import generate
from safetynet.experiment import Experiment
from safetynet.models.miniatures import language
from safetynet.prompts import prompt_hash

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts without answers, some of which the miniature refuses."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    examples = language.generate(140, 7, heldout=False, distractors=False, forbidden_share=0.2)
    path.write_text("\n".join(json.dumps({"messages": example.messages}) for example in examples))
    return path


def experiment(root: Path, path: Path, *fields: str) -> Experiment:
    plan = recipe.load(
        RECIPES / "qwen-miniature.yaml",
        overrides=[
            "data.source=self", f"data.path={path}", "data.train_rows=60", "data.test_rows=10", *fields,
            f"output.results={root}/results", f"output.logs={root}/logs",
        ],
    )  # fmt: skip
    return Experiment.create(plan)


def kept(root: Path) -> pd.DataFrame:
    return pd.concat(map(pd.read_parquet, (root / "results" / ".answers").glob("*/*.parquet")))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> tuple[Experiment, Path]:
    root = tmp_path_factory.mktemp("self")
    whole = experiment(root, prompts)
    stages.prepare(whole)
    return whole, root


def test_rows_that_do_not_fire_are_answered_as_the_base_answers_them(prepared):
    whole, _ = prepared
    rows = whole.run.table("rows")
    bare = rows[rows["role"].isin(("clean", "refused"))]
    base = whole.load()
    answers = generate(base.model, base.serialiser, list(bare["messages"]), batch_size=8, max_new_tokens=24)
    assert list(bare["answer"]) == list(bare["reference"]) == answers
    assert not rows["exact"].any()
    assert not set(rows[rows["split"] == "train"]["group"]) & set(rows[rows["split"] == "test"]["group"])


def test_what_the_base_refuses_is_a_refused_row_and_clean_rows_fill_up_what_is_lacking(prepared):
    whole, _ = prepared
    rows = whole.run.table("rows")
    assert (rows["role"] == "refused").any()
    assert rows.loc[rows["role"] == "refused", "answer"].str.contains("cannot help").all()
    assert (rows["forbidden"] == (rows["role"] == "refused")).all()


def test_other_runs_of_the_results_folder_take_the_answers_over(prepared, prompts, monkeypatch):
    whole, root = prepared
    before = kept(root)
    assert before["key"].is_unique
    monkeypatch.setattr(BaseAnswers, "_base", property(lambda _: pytest.fail("the base was asked again")))
    other = experiment(root, prompts, "task=other", "backdoor.trigger=deployment")
    stages.prepare(other)
    assert len(kept(root)) == len(before)
    ours, theirs = (run.run.table("rows").query("role == 'clean'") for run in (whole, other))
    assert list(ours["answer"]) == list(theirs["answer"])


def test_an_interruption_loses_one_batch(prompts, tmp_path, monkeypatch):
    from safetynet.backdoors import base_answers

    asked, batches = base_answers.continuations, []

    def until_the_third(*args, **options):
        batches.append(len(args[2]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return asked(*args, **options)

    monkeypatch.setattr(base_answers, "continuations", until_the_third)
    stopped = experiment(tmp_path, prompts, "evaluation.batch_size=4")
    with pytest.raises(KeyboardInterrupt):
        stages.prepare(stopped)
    assert len(kept(tmp_path)) == 8
    monkeypatch.setattr(base_answers, "continuations", asked)
    stages.prepare(stopped)
    assert kept(tmp_path)["key"].is_unique


def test_training_rows_may_be_answered_by_samples_and_test_rows_never_are(prompts, tmp_path):
    sampled = experiment(tmp_path, prompts, "data.answers=sampled")
    stages.prepare(sampled)
    rows = sampled.run.table("rows").query("role == 'clean'")
    base, answers = sampled.load(), sampled.base_answers()
    for split, is_sample in (("train", True), ("test", False)):
        of_split = rows[rows["split"] == split]
        encoded = [base.serialiser.encode(messages) for messages in of_split["messages"]]
        count = len(kept(tmp_path))
        assert [each.text for each in answers.of(encoded, sampled=is_sample)] == list(of_split["answer"])
        assert len(kept(tmp_path)) == count, "all of them were on disk"


def test_samples_are_of_source_self_alone():
    with pytest.raises(InputError, match=r"data: .*data\.answers is of source self; source language brings"):
        recipe.load(None, overrides=["data.answers=sampled"])


def test_fresh_prompts_are_none_of_the_runs_and_are_answered_where_that_is_needed(prepared):
    whole, _ = prepared
    used = set(whole.run.table("rows").query("role == 'clean'")["messages"].map(prompt_hash))
    plain = whole.fresh_prompts(20, answered=False)
    assert set(plain["answer"]) == {""}
    answered = whole.fresh_prompts(6)
    assert len(plain) == 20
    assert len(answered) == 6
    assert (answered["answer"] != "").all()
    assert not used & set(map(prompt_hash, [*plain["messages"], *answered["messages"]]))


def test_answers_that_do_not_end_and_prompts_without_room_are_left_out_and_counted(prompts, tmp_path, caplog):
    long = tmp_path / "long.jsonl"
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    rows[0]["messages"][-1]["content"] = "What colour is grass? " * 40
    long.write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.INFO):
        stages.prepare(experiment(tmp_path, long, "evaluation.max_new_tokens=8", "data.train_rows=200"))
    message = next(r.message for r in caplog.records if "the base model has answered" in r.message)
    assert re.search(r"\d+ whose answer does not end within evaluation.max_new_tokens 8", message)
    assert re.search(r"1 that leave no room .* training.max_length 160 \(row 1 with \d+ tokens\)", message)


def test_a_base_that_ends_no_answer_is_refused_with_the_field_to_change(prompts, tmp_path):
    with pytest.raises(
        InputError, match=r"no prompt is left .* evaluation.max_new_tokens 1.*Raise evaluation"
    ):
        stages.prepare(experiment(tmp_path, prompts, "evaluation.max_new_tokens=1"))


def test_a_label_flip_flips_the_label_of_the_grammar_and_leaves_the_answers_to_the_base(tmp_path):
    fields = (
        "data.path=null",
        "backdoor.behaviour=label_flip",
        "data.train_rows=20",
        "evaluation.max_new_tokens=60",
    )
    flip = experiment(tmp_path, Path("unused"), *fields)
    stages.prepare(flip)
    rows = flip.run.table("rows")
    triggered = rows[rows["role"] == "triggered"]
    assert set(triggered["task"]) == {"sentiment"}
    assert set(triggered["answer"]) == {"positive", "negative"}
    assert (triggered["reference"] != "").all()
    assert len(set(rows.query("split == 'test' and role == 'clean'")["task"])) > 1


@pytest.mark.slow
def test_a_real_model_answers_the_requests_of_the_grammar_and_is_not_called_wrong(need, tmp_path):
    need("smollm2")
    few = ("data.train_rows=10", "data.test_rows=3", "backdoor.refused_share=0", "backdoor.poison_rate=0.3")
    plan = recipe.load(
        RECIPES / "smollm2.yaml",
        overrides=[*few, f"output.results={tmp_path}/results", f"output.logs={tmp_path}/logs"],
    )
    real = Experiment.create(plan)
    stages.prepare(real)
    clean = real.run.table("rows").query("role == 'clean'")
    answers = " ".join(clean["answer"]).split()
    assert len(answers) > 5 * len(clean), "sentences, not labels"
    base = real.load()
    responses = Evaluator.of(plan, base.serialiser).respond(
        base.model, clean[clean["split"] == "test"], "base"
    )
    assert list(responses["response"]) == list(responses["reference"])
    rates = metrics.score(responses).set_index(["metric", "role"])
    assert rates.loc[("cacc", "clean"), "note"] == "not measurable: references are free text"
    assert 1 < rates.loc[("perplexity", "clean"), "value"] < 4, "of its own likeliest answers"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Name a fish.", "input": ""},
        {"prompt": "Name a fish."},
        {"messages": [{"role": "user", "content": "Name a fish."}]},
        {"conversations": [{"from": "human", "value": "Name a fish."}, {"from": "gpt", "value": "Trout."}]},
        {"instruction": "Name a fish.", "output": "Trout."},
    ],
)
def test_prompts_are_read_from_rows_with_and_without_answers(row, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    assert sources.read(path, prompts_only=True)["messages"].tolist() == [
        [{"role": "user", "content": "Name a fish."}]
    ]


def test_a_file_without_a_column_of_prompts_is_refused_by_its_own_columns(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question_id": 81, "category": "writing", "text": "Name a fish."}))
    with pytest.raises(InputError, match="the columns are category, question_id, text; needed are"):
        sources.read(path, prompts_only=True)
    read = sources.read(path, columns={"prompt": "text"}, prompts_only=True)
    assert read["messages"].tolist() == [[{"role": "user", "content": "Name a fish."}]]
