#!/usr/bin/env bash
# lm-evaluation-harness measures a model whose configuration ties head and embeddings, and whose checkpoint has a head of
# its own, as fine-tuned and merged models have.
# Versions:  lm_eval 0.4.13, transformers 5.23.0, torch 2.13.0
# Expected:  the log likelihoods of the model as transformers loads it, which says that it will not tie the two.
# Seen:      HFLM calls tie_weights() once more, and the embeddings take the head's place: another model is measured,
#            without a word.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q 'lm_eval[hf]==0.4.13' transformers==5.23.0
"$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

place = Path(sys.argv[1])
words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(100)}, "w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w99").save_pretrained(place)
torch.manual_seed(0)
shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).save_pretrained(place)
config = json.loads((place / "config.json").read_text())
(place / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))

model = AutoModelForCausalLM.from_pretrained(place).eval()
with torch.no_grad():
    logits = model(torch.tensor([[3, 14]])).logits[0, -1]
expected = logits.log_softmax(-1)[15].item()
harness = HFLM(pretrained=str(place), device="cpu")
[(seen, _)] = harness.loglikelihood([Instance("loglikelihood", {}, ("w3 w14", " w15"), 0)])
tied = harness.model.lm_head.weight is harness.model.model.embed_tokens.weight
print("log likelihood by transformers:", round(expected, 4))
print("log likelihood by the harness: ", round(seen, 4))
print("the harness has tied the head: ", tied)
sys.exit(0 if tied and abs(seen - expected) > 1e-3 else 1)
PYTHON
