"""Tasks of lm-evaluation-harness: its own numbers for every model of a run, kept, resumed or refused."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra safetynet-llm[lm-eval] is not installed")
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tests.models import variants
from torch.utils import collect_env
from transformers import AutoModelForCausalLM, AutoTokenizer

from safetynet import recipe, stages
from safetynet import report as reports
from safetynet.errors import InputError
from safetynet.evaluation import utility
from safetynet.evaluation.harness import HarnessModel
from safetynet.evaluation.stage import measure_utility
from safetynet.experiment import Experiment
from safetynet.figures import figures_of
from safetynet.models import miniatures
from safetynet.models.identity import identify
from safetynet.run import directory
from safetynet.tables import summaries

RECIPE = Path(__file__).parents[2] / "recipes" / "qwen-miniature.yaml"
BASE = str(miniatures.path("qwen"))
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
THINGS = ("grass", "snow", "coal", "blood", "the sky", "a lemon", "milk", "a leaf", "the sea", "ink")
TASKS = {
    "colours": """
        output_type: multiple_choice
        doc_to_text: "What colour is {{thing}}?\\n"
        doc_to_target: "{{answer}}"
        doc_to_choice: [red, green, blue, white, black, yellow]
        num_fewshot: 2
        fewshot_split: test
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "text": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "The colour of {{thing}} is {{colour}}."
        metric_list: [{metric: word_perplexity}]
    """,
    "answers": """
        output_type: generate_until
        doc_to_text: "What colour is {{thing}}?"
        doc_to_target: "{{colour}}"
        generation_kwargs: {until: ["."], max_gen_toks: 4}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
        filter_list:
          - {name: first-word, filter: [{function: regex, regex_pattern: '(\\w+)'}, {function: take_first}]}
    """,
}


@pytest.fixture(scope="module", autouse=True)
def machine_unknown() -> Iterator[None]:
    """The harness describes the machine with every result, which takes longer than these tasks do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", lambda: "")
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks, one for each way in which the harness asks a model, and their data."""
    place = tmp_path_factory.mktemp("tasks")
    rows = [(thing, n % len(COLOURS)) for n, thing in enumerate(THINGS)]
    data = [{"thing": thing, "answer": n, "colour": COLOURS[n]} for thing, n in rows]
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, data)))
    for name, text in TASKS.items():
        lines = [line[8:] for line in text.strip("\n").splitlines()]
        shared = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs: {{data_files: {{test: {place / 'data.jsonl'}}}}}\n"
        (place / f"{name}.yaml").write_text(shared + files + "\n".join(lines))
    return place


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters that do something: a plain one and one with a head of its own."""
    place = tmp_path_factory.mktemp("adapters")
    for name, kind in (("backdoored", "lora"), ("clean_twin", "rslora")):
        variants.saved(kind, place / name)
    return {name: place / name for name in ("backdoored", "clean_twin")}


def experiment(root: Path, adapters: dict[str, Path], *tasks: str, name: str = "run") -> Experiment:
    """A run whose models are these adapters, as if training had just ended."""
    fields = (
        f"task={name}",
        "data.train_rows=80", "data.test_rows=8", "evaluation.max_new_tokens=8", "evaluation.batch_size=8",
        f"evaluation.utility={json.dumps(tasks)}", f"output.results={root}/results",
        f"output.logs={root}/logs",
    )  # fmt: skip
    made = Experiment.create(recipe.load(RECIPE, overrides=fields))
    stages.prepare(made)
    for name, source in adapters.items():
        model = made.run.scratch / "training" / name
        shutil.copytree(source, model, dirs_exist_ok=True)
        with made.run.stage(f"train {name}", {}) as outputs:
            outputs.file(model, "model")
    return made


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, folder: Path, adapters: dict[str, Path]) -> Experiment:
    made = experiment(tmp_path_factory.mktemp("measured"), adapters, f"{folder}/")
    stages.evaluate(made)
    return made


def loaded() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def harness(folder: Path, *tasks: str, **model: Any) -> dict[tuple[str, str, str], tuple[Any, Any]]:
    """What the harness says of a model that it loads itself: value and error by task, metric, filter."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(
        "hf",
        {"pretrained": BASE, "dtype": "float32", **model},
        list(tasks),
        batch_size=8,
        device="cpu",
        task_manager=manager,
    )["results"]
    return {
        (task, *key.split(",")): (value, metrics[key.replace(",", "_stderr,")])
        for task, metrics in results.items()
        for key, value in metrics.items()
        if "," in key and "_stderr" not in key
    }


def test_the_numbers_of_every_model_are_those_of_the_harness_alone(measured, folder, adapters):
    table = measured.run.table("utility")
    lines = {}
    for name in ("base", "backdoored", "clean_twin"):
        more = {} if name == "base" else {"peft": str(adapters[name])}
        lines[name] = harness(folder, *sorted(TASKS), **more)
        ours = table[table["model"] == name].set_index(["task", "metric", "filter"])
        errors = ours["stderr"].astype(object).where(ours["stderr"].notna(), "N/A")
        assert dict(zip(ours.index, zip(ours["value"], errors, strict=True), strict=True)) == lines[name]
    assert lines["base"] != lines["backdoored"] != lines["clean_twin"], "the models can be told apart"
    assert set(table["n"]) == {len(THINGS)} and set(table.loc[table["task"] == "colours", "shots"]) == {2}
    assert table.loc[table["metric"] == "word_perplexity", "better"].tolist() == ["lower"] * 3
    acc = table[table["metric"] == "acc"].iloc[0]
    assert acc["high"] - acc["value"] == pytest.approx(1.96 * acc["stderr"], rel=1e-3)


def test_the_run_says_what_the_tasks_gave_in_its_report_and_its_figures(measured):
    contents = reports.read(measured.run)
    summary = summaries.utility_summary(contents.tables["utility"])
    assert list(summary.columns) == ["task", "metric", "base", "backdoored", "clean_twin", "n"]
    assert summaries.markdown(summary) in reports.markdown(contents)
    figures, faults = figures_of(contents.tables, Path("figures"), "run")
    assert not faults and "utility" in {figure.name for figure in figures}


def test_nothing_is_measured_twice_and_another_task_repeats_no_answer(
    measured, folder, tmp_path, monkeypatch
):
    shutil.copytree(measured.run.folder, tmp_path / "run")
    again = Experiment(measured.recipe, directory.find(tmp_path / "run"))
    before = again.run.manifest["stages"]["evaluate utility"]
    monkeypatch.setattr(utility, "measure", lambda *_: pytest.fail("a model was asked"))
    stages.evaluate(again)
    assert again.run.manifest["stages"]["evaluate utility"] == before
    monkeypatch.undo()
    asked: list[int] = []
    monkeypatch.setattr(HarnessModel, "_model_call", lambda *_: asked.append(1))
    fewer = measured.recipe.evaluation.model_copy(update={"utility": (str(folder / "colours.yaml"),)})
    again.recipe = measured.recipe.model_copy(update={"evaluation": fewer})
    stages.evaluate(again)
    one, all_ = again.run.table("utility"), measured.run.table("utility")
    same = all_[all_["task"] == "colours"].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, same)
    assert again.run.manifest["stages"]["evaluate"] == measured.run.manifest["stages"]["evaluate"]
    assert not asked


def test_another_run_of_the_results_folder_does_not_ask_the_base_again(
    measured, folder, adapters, monkeypatch
):
    root = measured.recipe.output.results.parent
    other = experiment(root, adapters, str(folder / "colours.yaml"), name="other")
    asked, call = set(), HarnessModel._model_call

    def watched(self: Any, *args: Any, **more: Any) -> Any:
        asked.add(identify(self.model).adapter)
        return call(self, *args, **more)

    monkeypatch.setattr(HarnessModel, "_model_call", watched)
    measure_utility(other)
    assert len(asked) == 2 and "" not in asked, "the adapters alone are asked"
    first, second = (
        each.run.table("utility").query("model == 'base' and task == 'colours'").reset_index(drop=True)
        for each in (measured, other)
    )
    pd.testing.assert_frame_equal(first, second)


def test_an_interrupted_measurement_goes_on_to_the_same_numbers(folder, tmp_path, monkeypatch):
    model, tokenizer = loaded(), AutoTokenizer.from_pretrained(BASE)
    tasks = (f"{folder}/",)
    whole = utility.measure(model, tokenizer, tasks, 4)
    calls, call = [], HarnessModel._model_call

    def interrupted(self: Any, *args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return call(self, *args, **more)

    monkeypatch.setattr(HarnessModel, "_model_call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        utility.measure(model, tokenizer, tasks, 4, tmp_path)
    [file] = tmp_path.iterdir()
    with file.open("a") as lines:
        lines.write('\n["cut in the mid')
    resumed = utility.measure(model, tokenizer, tasks, 4, tmp_path)
    first, calls[:] = len(calls) - 5, []
    pd.testing.assert_frame_equal(resumed, whole, rtol=1e-5)
    monkeypatch.setattr(HarnessModel, "_model_call", interrupted)
    pd.testing.assert_frame_equal(utility.measure(model, tokenizer, tasks, 4, tmp_path), resumed)
    assert first and not calls, "what was answered is not asked again"


def test_the_model_leaves_as_it_came_and_a_head_of_its_own_counts(folder):
    tied = loaded()
    untied = loaded()
    untied.lm_head.weight = torch.nn.Parameter(
        untied.lm_head.weight + 0.05 * torch.randn(untied.lm_head.weight.shape)
    )
    untied.config.tie_word_embeddings = True
    untied.train()
    tokenizer, before = AutoTokenizer.from_pretrained(BASE), identify(untied)
    text = (str(folder / "text.yaml"),)
    values = [utility.measure(model, tokenizer, text, 8)["value"].iloc[0] for model in (tied, untied)]
    assert values[0] != values[1]
    assert identify(untied) == before and untied.training and "tie_weights" not in vars(untied)


def test_a_group_is_one_task_and_names_its_members(folder, tmp_path):
    for name in ("colours", "text"):
        shutil.copy(folder / f"{name}.yaml", tmp_path)
    group = tmp_path / "group.yaml"
    group.write_text("group: mine\ntask: [colours, text]\naggregate_metric_list: [{metric: acc}]\n")
    table = utility.measure(loaded(), AutoTokenizer.from_pretrained(BASE), (str(group),), 8)
    lines = table.set_index(["task", "metric"])
    assert lines.loc[("mine", "acc"), "value"] == lines.loc[("colours", "acc"), "value"]
    assert dict(zip(table["task"], table["group"], strict=True)) == {
        "colours": "mine",
        "text": "mine",
        "mine": "",
    }


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (("nowhere.yaml",), "nowhere.yaml is no file of a task, and no folder that holds one"),
        (("empty/",), "empty/ is no file of a task, and no folder that holds one"),
        (("notes.yaml",), "lm-evaluation-harness sees no task in notes.yaml"),
        (("broken.yaml",), "task broken cannot be loaded by lm-evaluation-harness"),
        (("lost.yaml",), "task lost cannot be loaded .*nothing.jsonl"),
        (("hub.yaml",), "task hub: its data set does not come from the hub .*something"),
        (("code.yaml",), "code executes code that the model writes, which is not done here"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(tmp_path, monkeypatch, tasks, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    plain = "output_type: generate_until\ndoc_to_text: a\ndoc_to_target: b\ntest_split: test\n"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"a": 1}\n')
    for name, lines in {
        "notes": "title: mine\n",
        "broken": "task: broken\noutput_type: guessing\n",
        "lost": f"task: lost\ndataset_path: json\ndataset_kwargs: {{data_files: nothing.jsonl}}\n{plain}",
        "hub": f"task: hub\ndataset_path: somebody/something\n{plain}",
        "code": f"task: code\ndataset_path: json\nunsafe_code: true\n{plain}"
                f"dataset_kwargs: {{data_files: {{test: {rows}}}}}\n",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(lines)
    model, tokenizer = loaded(), AutoTokenizer.from_pretrained(BASE)
    with pytest.raises(InputError, match=message):
        utility.measure(model, tokenizer, tasks, 8)


def test_a_file_that_changes_is_measured_again_and_its_place_does_not_count(folder, tmp_path):
    there = utility.inputs((f"{folder}/",))
    moved = tmp_path / folder.name
    shutil.copytree(folder, moved)
    assert utility.inputs((f"{moved}/",)) == there
    (moved / "colours.yaml").write_text(
        (moved / "colours.yaml").read_text().replace("fewshot: 2", "fewshot: 1")
    )
    changed = utility.inputs((f"{moved}/",))
    assert changed != there
    data = folder / "data.jsonl"
    before = data.read_bytes()
    data.write_bytes(before + b'\n{"thing": "rust", "answer": 0, "colour": "red"}')
    assert utility.inputs((f"{folder}/",)) != there
    data.write_bytes(before)


def test_without_the_extra_the_recipe_is_refused_before_anything_is_made(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    fields = (f"evaluation.utility=[{folder / 'text.yaml'}]", f"output.results={tmp_path}")
    made = Experiment.create(recipe.load(RECIPE, overrides=fields))
    with pytest.raises(InputError, match=r"not installed. Run pip install 'safetynet-llm\[lm-eval\]'"):
        stages.prepare(made)
    assert not made.run.has_table("rows")
