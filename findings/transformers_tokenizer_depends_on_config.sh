#!/usr/bin/env bash
# A folder holds a tokenizer, once alone (as an adapter's folder does) and once with the config.json of a Qwen2 model.
# Versions:  transformers 5.23.0, tokenizers 0.23.3
# Expected:  AutoTokenizer gives the tokenizer that tokenizer.json describes, both times.
# Seen:      beside a config.json of type qwen2 it is a Qwen2Tokenizer, which puts a normalizer of its own (NFC) in the
#            place of the file's: one text has two lists of ids, and the file's own Lowercase is gone.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

folder = Path(sys.argv[1])
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<|endoftext|>"])}, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
backend.normalizer = normalizers.Lowercase()
made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
made.save_pretrained(folder / "alone")
made.save_pretrained(folder / "beside")
(folder / "beside" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
alone, beside = (AutoTokenizer.from_pretrained(folder / name) for name in ("alone", "beside"))
texts = {"capitals": "HELLO", "e with a combining accent": "e\u0301"}
seen = {name: (alone(text)["input_ids"], beside(text)["input_ids"]) for name, text in texts.items()}
print("classes:", type(alone).__name__, type(beside).__name__)
for name, (one, other) in seen.items():
    print(f"{name}: {one} alone, {other} beside config.json")
same = alone("HELLO")["input_ids"] == alone("hello")["input_ids"]
print("alone, the file's Lowercase acts:", same)
sys.exit(0 if same and all(one != other for one, other in seen.values()) else 1)
PYTHON
