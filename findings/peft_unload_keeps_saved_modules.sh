#!/usr/bin/env bash
# An adapter with a trained copy of a module (modules_to_save) is taken off with unload().
# Versions:  peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Expected:  "the original base model", as the documentation of unload() says; disable_adapter() gives it.
# Seen:      the trained copy stays in the model that unload() returns, and the base model that was passed to PEFT is
#            the same object: who goes on with it goes on with the adapter's head.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q peft==0.21.2 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(**shape)).eval()
ids = torch.tensor([[3, 14, 15, 92, 65]])


@torch.no_grad()
def logits(model):
    return model(ids).logits


before = logits(base)
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])).eval()
for parameter in (p for p in model.parameters() if p.requires_grad):
    parameter.data += 0.1 * torch.randn_like(parameter)
adapted = logits(model)
with model.disable_adapter():
    off = torch.equal(logits(model), before)
unloaded = model.unload()
after = logits(unloaded)
print("disable_adapter() gives the base's logits:", off)
print("unload() gives the base's logits:         ", torch.equal(after, before))
print("furthest from the base after unload():    ", round((after - before).abs().max().item(), 3))
print("furthest from the base with the adapter:  ", round((adapted - before).abs().max().item(), 3))
print("the base that was passed to PEFT is changed:", unloaded is base)
sys.exit(0 if off and not torch.allclose(after, before, atol=0.01) else 1)
PYTHON
