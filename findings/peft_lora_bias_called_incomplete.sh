#!/usr/bin/env bash
# A LoRA with biases of its own (`lora_bias=True`) is saved on one machine, without DeepSpeed or FSDP.
# Versions:  peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Expected:  no warning: a bias is a vector, and every tensor is whole.
# Seen:      a PeftWarning says that each `lora_B.bias` has an invalid shape, since shards were not gathered, and that
#            the file is incomplete. It is complete: loaded again, the logits are the same to the bit.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q peft==0.21.2 transformers==5.23.0
"$folder/venv/bin/python" - "$folder/adapter" <<'PYTHON'
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


@torch.no_grad()
def logits(model):
    return model(torch.tensor([[3, 14, 92]])).logits


warned = {}
for bias in (False, True):
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_bias=bias)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(sys.argv[1])
    warned[bias] = [str(each.message) for each in caught if "invalid shape" in str(each.message)]
same = torch.equal(logits(model), logits(PeftModel.from_pretrained(base(), sys.argv[1]).eval()))
print(f"without biases: {len(warned[False])} warnings; with: {len(warned[True])}; loaded again, logits are the same: {same}")
print(*warned[True], sep="\n")
sys.exit(0 if same and not warned[False] and any("lora_B.bias" in text for text in warned[True]) else 1)
PYTHON
