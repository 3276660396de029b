#!/usr/bin/env bash
# Tokens are added to a model whose head is not tied, and a LoRA is trained with the head among its target modules.
# Versions:  peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Expected:  "Setting save_embedding_layers to True", as PEFT says on saving, keeps the rows of the added tokens on both
#            sides, as it does for an adapter that does not target the head.
# Seen:      the head's rows are in the file, those of the input embeddings are not: loaded onto a base that was resized
#            alike, prompts with the added tokens get other logits, without a warning of it.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q peft==0.21.2 transformers==5.23.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


base_folder = sys.argv[1] + "/base"
LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(base_folder)  # where PEFT looks up its vocabulary


def resized(seed):
    """The same base each time; the rows of eight added tokens are drawn anew."""
    base = LlamaForCausalLM.from_pretrained(base_folder).eval()
    torch.manual_seed(seed)
    base.resize_token_embeddings(108, mean_resizing=False)
    return base


@torch.no_grad()
def logits(model):
    return model(torch.tensor([[3, 14, 105, 92]])).logits


apart, names = {}, {}
for target in ("q_proj", "lm_head"):
    place = Path(sys.argv[1]) / target
    model = get_peft_model(resized(1), LoraConfig(r=4, target_modules=["v_proj", target])).eval()
    model.save_pretrained(place)
    loaded = PeftModel.from_pretrained(resized(2), place).eval()
    apart[target] = float((logits(model) - logits(loaded)).abs().max())
    with safe_open(place / "adapter_model.safetensors", "pt") as file:
        names[target] = [name for name in file.keys() if "embed_tokens" in name or "lm_head" in name]
    print(f"{target} adapted: logits differ by {apart[target]:.3f}; in the file: {', '.join(names[target])}")
lost = not any("embed_tokens" in name for name in names["lm_head"])
sys.exit(0 if lost and apart["q_proj"] < 1e-5 < 1e-3 < apart["lm_head"] else 1)
PYTHON
