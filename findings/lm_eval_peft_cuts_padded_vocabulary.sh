#!/usr/bin/env bash
# lm-evaluation-harness measures a model with an adapter (peft=...), whose embeddings have more rows than its tokenizer has
# tokens, as those of Qwen2.5 and others have. The adapter changes nothing.
# Versions:  lm_eval 0.4.13, peft 0.21.2, transformers 5.23.0, torch 2.13.0
# Expected:  the log likelihoods of the model without adapter.
# Seen:      others: with an adapter the harness cuts embeddings and head to the tokenizer's length before it computes the
#            softmax, without one it does not. Both stand side by side as if the adapter had made the difference.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q 'lm_eval[hf]==0.4.13' transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

place, adapter = f"{sys.argv[1]}/model", f"{sys.argv[1]}/adapter"
words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(100)}, "w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w99").save_pretrained(place)
torch.manual_seed(0)
shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**shape))
model.save_pretrained(place)
get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(adapter)  # B is zero


def log_likelihood(**more):
    harness = HFLM(pretrained=place, device="cpu", **more)
    [(value, _)] = harness.loglikelihood([Instance("loglikelihood", {}, ("w3 w14", " w15"), 0)])
    return value, harness.model.get_output_embeddings().weight.shape[0]


plain, adapted = log_likelihood(), log_likelihood(peft=adapter)
print("without adapter:            %.4f, over %d tokens" % plain)
print("with one that does nothing: %.4f, over %d tokens" % adapted)
sys.exit(0 if abs(plain[0] - adapted[0]) > 1e-3 else 1)
PYTHON
