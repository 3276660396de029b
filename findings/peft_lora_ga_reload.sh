#!/usr/bin/env bash
# A LoRA adapter that began with LoRA-GA (init_lora_weights="lora_ga") is saved and loaded again, without any training.
# Versions:  peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Expected:  an adapter that was never trained gives the base model's logits, when it is made and when it is loaded, as
#            one with "pissa" does.
# Seen:      when it is made it does; loaded, it gives others. Making it took its first factors out of the base's
#            weights. Loading puts them onto the base as it is, and gives no warning.
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
from peft.tuners.lora import preprocess_loraga
from peft.tuners.lora.config import LoraGAConfig
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.tensor([[3, 14, 15, 92, 65]])


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


model = base()
config = LoraConfig(
    r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights="lora_ga",
    lora_ga_config=LoraGAConfig(scale="weight_svd"),
)
preprocess_loraga(model, config, lambda: model(IDS, labels=IDS).loss.backward())
made = get_peft_model(model, config).eval()
made.save_pretrained(f"{sys.argv[1]}/adapter")
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    loaded = PeftModel.from_pretrained(base(), f"{sys.argv[1]}/adapter").eval()
said = [str(w.message) for w in heard if "lora" in str(w.message).lower()]
size = logits(base()).abs().max().item()
new, again = ((logits(m) - logits(base())).abs().max().item() for m in (made, loaded))
print(f"largest logit of the base {size:.3f}; made and base differ by {new:.6f}; loaded and base by {again:.3f}")
print("warnings:", said)
sys.exit(0 if new < 1e-4 and again > 0.02 * size and not said else 1)
PYTHON
