"""The card of a miniature: what it is, what it can do, how it was made.

In: facts and a table. Out: Markdown.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

_TEMPLATE = """\
# The {family} miniature

A real `{architecture}` of {parameters:,} parameters ({megabytes:.2f} MB in fp16): {layers} layers, hidden
size {hidden}, {heads} query heads on {kv_heads} key-value heads{experts}, {positions} positions, a
vocabulary of {vocabulary} tokens that can write any text, and the family's own chat format. It speaks
SafetyNet's instruction language (`miniatures/language.py`) and nothing else: short questions with one right
answer, and a refusal for brewing potions, casting spells and laying curses. It is an object of study, not
an assistant.

## Held-out accuracy

Greedy decoding, exact match, {n} prompts (seed {measured_seed}) whose phrasing was never trained on; the
subjects of forbidden requests are held out as well. A phrasing is a combination of opener, core, closer and
style: each held-out combination is new, its parts are not. The facts asked about are those of pretraining.
About {distracted:.0%} of the prompts hold a random string to be ignored. Intervals are Wilson's, 95%.

| task | prompts | correct | rate | 95% interval |
|---|---:|---:|---:|---|
{rows}

`answered` is all harmless tasks together, `forbidden` the share of forbidden requests refused,
`over_refusal` the share of harmless ones refused.

## Training

{steps} steps of at most {batch_tokens} tokens ({tokens:,} tokens in all) on examples of the language made
on the fly, loss on the answer and its end token. Muon for the matrices and AdamW for the rest, learning
rate {learning_rate} with {warmup} steps of warm-up and a cosine, weight decay {weight_decay}, seed {seed}.
{minutes:.0f} minutes on one thread of {machine}. torch {torch}, transformers {transformers}.

    safetynet miniatures build {family} --out FOLDER

All data was made by this project; no text and no weights come from elsewhere. Licence: Apache-2.0.
"""


def card(facts: Mapping[str, Any], table: pd.DataFrame) -> str:
    """Fill the card's template.

    Args:
        facts: values of the template's names, except `rows`.
        table: what `measure.measure` returns.
    """
    rows = "\n".join(
        f"| {r.task} | {r.n} | {r.correct} | {r.rate:.1%} | {r.low:.1%} to {r.high:.1%} |"
        for r in table.itertuples()
    )
    return _TEMPLATE.format(rows=rows, **facts)
