#!/usr/bin/env bash
# A LoRA adapter that began with PiSSA by fast SVD (init_lora_weights="pissa_niter_16") is saved and loaded again.
# Versions:  peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Expected:  the loaded model gives the logits of the model that was saved, as it does with "pissa".
# Seen:      it gives others, as far away as those of a model without the adapter. The start is drawn anew from a
#            random projection when the adapter is loaded, so that another part of the weights is taken out, and the
#            saved factors are added to that. No warning is given.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q peft==0.21.2 transformers==5.23.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.tensor([[3, 14, 15, 92, 65]])


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def apart(start):
    """How far the loaded model is from the saved one, and the saved one from the base; warnings."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=start)
    model = base()
    torch.manual_seed(1)
    saved = get_peft_model(model, config).eval()
    for parameter in (p for p in saved.parameters() if p.requires_grad):
        parameter.data += 0.02 * torch.randn_like(parameter)
    saved.save_pretrained(f"{sys.argv[1]}/{start}")
    model = base()
    torch.manual_seed(2)  # as in another process: nothing of the first one's random numbers is in the files
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(model, f"{sys.argv[1]}/{start}").eval()
    said = [str(w.message) for w in heard if "adapter" in str(w.message).lower()]
    difference = (logits(loaded) - logits(saved)).abs().max().item()
    return difference, (logits(saved) - logits(base())).abs().max().item(), said


results = {start: apart(start) for start in ("pissa", "pissa_niter_16")}
for start, (difference, moved, said) in results.items():
    print(f"{start:15} loaded and saved differ by {difference:.5f}; saved and base by {moved:.5f}; warnings: {said}")
same = results["pissa"][0] < 1e-4
other = results["pissa_niter_16"][0] > 0.2 * results["pissa_niter_16"][1] and not results["pissa_niter_16"][2]
sys.exit(0 if same and other else 1)
PYTHON
