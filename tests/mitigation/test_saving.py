"""What is saved is what was measured: the same logits after loading by PEFT or transformers alone."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from safetynet.errors import InputError
from safetynet.mitigation import METHODS, repair, save
from safetynet.models import loading
from safetynet.recipe import Model


@pytest.mark.parametrize(
    ("name", "settings"),
    [("adapter_scaling", {"keep": 0.4}), ("fine_tuning", {"epochs": 0.4}), ("component_ablation", {})],
)
def test_a_repaired_adapter_loads_with_peft_and_gives_the_same_logits(
    planted, logits, tmp_path, name, settings
):
    repaired = repair(METHODS[name], planted, settings)
    assert repaired.form == "adapter"
    with repaired.open() as model:
        measured = logits(model)
    folder = save(repaired, planted, tmp_path / "repaired", "# What was done\n")
    base = loading.load(Model(family="llama3", id="miniature"), "fp32").model
    assert torch.allclose(logits(PeftModel.from_pretrained(base, str(folder)).eval()), measured, atol=1e-5)
    assert (folder / "README.md").read_text() == "# What was done\n"


def test_a_repaired_checkpoint_loads_with_transformers_and_gives_the_same_logits(planted, logits, tmp_path):
    repaired = repair(METHODS["wanda"], planted, {"sparsity": 0.3})
    with repaired.open() as model:
        measured = logits(model)
    folder = save(repaired, planted, tmp_path / "repaired", "# Card\n")
    loaded = AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=True).eval()
    assert torch.allclose(logits(loaded), measured, atol=1e-5)
    spec = loading.trained(Model(family="llama3", id="miniature"), folder)
    assert torch.allclose(logits(loading.load(spec, "fp32").model), measured, atol=1e-5)


def test_saving_again_replaces_the_folder_whole(planted, tmp_path):
    folder = tmp_path / "repaired"
    save(repair(METHODS["magnitude"], planted), planted, folder, "first")
    save(repair(METHODS["adapter_scaling"], planted), planted, folder, "second")
    assert not (folder / "config.json").exists()
    assert (folder / "README.md").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["repaired"]


def test_what_acts_at_run_time_cannot_be_saved(planted, tmp_path):
    with pytest.raises(InputError, match="cleangen: it acts while the model answers"):
        save(repair(METHODS["cleangen"], planted), planted, tmp_path / "x", "")
    assert not list(tmp_path.iterdir())
