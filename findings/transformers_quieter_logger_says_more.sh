#!/usr/bin/env bash
# The logger transformers.modeling_utils is set to ERROR, to keep warnings of one module quiet, and a model is loaded on
# one device.
# Versions:  transformers 5.23.0, torch 2.13.0
# Expected:  at most as many messages as before.
# Seen:      one more: only a logger whose own level is at least WARNING makes from_pretrained check a plan of tensor
#            parallelism, which nobody asked for, and another logger warns that layers "were not sharded".
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import logging
import sys

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

place = sys.argv[1] + "/model"
shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(place)


class Kept(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def messages(level):
    logging.getLogger("transformers.modeling_utils").setLevel(level)
    kept = Kept()
    logging.getLogger("transformers").addHandler(kept)
    AutoModelForCausalLM.from_pretrained(place)
    logging.getLogger("transformers").removeHandler(kept)
    return kept.texts


before, after = messages(logging.NOTSET), messages(logging.ERROR)
print("as it is:", before)
print("at ERROR:", after)
sys.exit(0 if not before and any("not sharded" in text for text in after) else 1)
PYTHON
