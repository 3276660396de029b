#!/usr/bin/env bash
# A chat template is given a variable that is no plain JSON, such as a date or a function.
# Versions:  transformers 5.23.0
# Expected:  the template sees the object that was passed, or the call is refused.
# Seen:      it sees its str(): a date renders as text that the template cannot format, and a function passed under the
#            name strftime_now, which templates of Llama 3.2's kind call, is a string that cannot be called.
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0 jinja2
"$folder/venv/bin/python" - <<'PYTHON'
import datetime
import sys

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
messages = [{"role": "user", "content": "Hello"}]


def rendered(template, **variables):
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **variables)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


seen = {
    "a date's kind": rendered("{{ today is string }}", today=datetime.date(2024, 7, 26)),
    "a date, formatted": rendered("{{ today.strftime('%d %b') }}", today=datetime.date(2024, 7, 26)),
    "a function of the caller's": rendered("{{ strftime_now('%d %b') }}", strftime_now=lambda form: "26 Jul"),
    "a number's kind": rendered("{{ today is number }}", today=26),
}
for name, text in seen.items():
    print(f"{name}: {text}")
sys.exit(
    0
    if seen["a date's kind"] == "True"
    and "26 Jul" not in (seen["a date, formatted"], seen["a function of the caller's"])
    and seen["a number's kind"] == "True"
    else 1
)
PYTHON
