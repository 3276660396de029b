#!/usr/bin/env bash
# `transformers serve` is given the folder of a PEFT adapter with its tokenizer, as TRL and the Trainer save it.
# Versions:  transformers 5.23.0, peft 0.21.2, torch 2.13.0
# Expected:  what AutoModelForCausalLM.from_pretrained gives for the same folder: the base with the adapter.
# Seen:      its loader asks for config.json first and raises ("Unrecognized model ... Should have a model_type key"). With
#            the base's config.json beside the adapter it looks for the base's weights there and raises as well.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q 'transformers[serving]==5.23.0' peft==0.21.2
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import os
import shutil
import sys

from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cli.serving.model_manager import ModelManager

base, adapter = f"{sys.argv[1]}/base", f"{sys.argv[1]}/adapter"
words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(100)}, "w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w99")
shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(base)
model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
model.save_pretrained(adapter)
for place in (base, adapter):
    tokenizer.save_pretrained(place)
print("AutoModelForCausalLM:", AutoModelForCausalLM.from_pretrained(adapter).active_adapters())


def outcome(place):
    try:
        ModelManager(device="cpu", dtype="float32").load_model_and_processor(f"{place}@main")
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {str(error)[:90]}"
    return "loaded"


seen = {"the base": outcome(base), "the adapter": outcome(adapter)}
shutil.copy(f"{base}/config.json", adapter)
seen["the adapter with the base's config.json"] = outcome(adapter)
for name, said in seen.items():
    print(f"serve, {name}: {said}")
first, *others = seen.values()
sys.stdout.flush()
os._exit(0 if first == "loaded" and "loaded" not in others else 1)  # the manager's timers keep the process for minutes
PYTHON
