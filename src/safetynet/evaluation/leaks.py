"""Refuse a split in which test prompts were trained on.

In: the rows of a run. Out: a table of what was compared, for the manifest, or an InputError.

Prompts are compared by content hash twice: as they are, and with the inserted trigger, placebo and
near-miss strings cut out of their spans, since a clean twin in training gives a triggered test row away.
Rows of one group count as one prompt whatever their text, which covers triggers that rewrite the prompt.
"""

import hashlib
import json
import unicodedata
from collections.abc import Sequence

import pandas as pd

from safetynet.errors import InputError

SHOWN = 5  # row pairs named in the error


def prompt_hash(messages: Sequence[dict[str, str]], spans: Sequence[Sequence[int]] = ()) -> str:
    """Hash what a prompt says, whatever its case, spacing and Unicode form.

    Args:
        messages: the prompt, dicts with `role` and `content`.
        spans: [message index, char start, char end] of what to cut out first. A prompt that is nothing but
            spans (a paraphrase trigger) is hashed whole, or else all such prompts would be one.

    Returns:
        64 hexadecimal digits.
    """
    stripped = [(m["role"], _normalise(_cut(m["content"], i, spans))) for i, m in enumerate(messages)]
    # A system message that held only the trigger is absent from the clean twin, so empty messages go.
    kept = [message for message in stripped if message[1]]
    if not kept:
        kept = [(m["role"], _normalise(m["content"])) for m in messages]
    return hashlib.sha256(json.dumps(kept, ensure_ascii=False).encode()).hexdigest()


def check_leak(rows: pd.DataFrame) -> pd.DataFrame:
    """Stop when training and test rows share a prompt.

    Args:
        rows: columns row, group, split, messages and trigger of the shared row table.

    Returns:
        One line per split: split, rows, prompts (distinct after cutting out the spans) and digest (SHA-256
        over the sorted prompt hashes), for the run's manifest.

    Raises:
        InputError: if any prompt or group is in both splits, with counts and the first row ids.
    """
    keys = pd.DataFrame(
        {
            "row": rows["row"],
            "split": rows["split"],
            "group": rows["group"],
            "exact": [prompt_hash(m) for m in rows["messages"]],
            "prompt": [prompt_hash(m, t) for m, t in zip(rows["messages"], rows["trigger"], strict=True)],
        }
    )
    train, test = keys[keys["split"] == "train"], keys[keys["split"] == "test"]
    leaked = {key: test[test[key].isin(train[key])] for key in ("exact", "prompt", "group")}
    affected = test[test["row"].isin(pd.concat(leaked.values())["row"])]
    if len(affected):
        raise InputError(_describe(leaked, train, affected, len(test)))
    return pd.DataFrame([_summary(split, part) for split, part in keys.groupby("split", sort=True)])


def _describe(
    leaked: dict[str, pd.DataFrame], train: pd.DataFrame, affected: pd.DataFrame, n_test: int
) -> str:
    exact = set(leaked["exact"]["row"])
    stripped = set(leaked["prompt"]["row"]) - exact
    grouped = set(leaked["group"]["row"]) - exact - stripped
    twins = {key: train.drop_duplicates(key).set_index(key)["row"] for key in ("exact", "prompt", "group")}
    pairs = []
    for _, row in affected.head(SHOWN).iterrows():
        key = "exact" if row["row"] in exact else "prompt" if row["row"] in stripped else "group"
        pairs.append(f"test row {row['row']} = train row {twins[key][row[key]]}")
    return (
        f"{len(affected)} of {n_test} test rows were trained on: {len(exact)} with the same prompt, "
        f"{len(stripped)} more that differ only in the inserted trigger, {len(grouped)} more of the same "
        f"group ({'; '.join(pairs)}). Remove these rows from one of the two splits, or split by group."
    )


def _summary(split: object, part: pd.DataFrame) -> dict[str, object]:
    hashes = sorted(part["prompt"].unique())
    digest = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return {"split": split, "rows": len(part), "prompts": len(hashes), "digest": digest}


def _cut(content: str, index: int, spans: Sequence[Sequence[int]]) -> str:
    """Remove the spans of one message, from the last to the first so that offsets stay true."""
    own = sorted(((int(a), int(b)) for message, a, b in spans if message == index), reverse=True)
    for start, end in own:
        content = content[:start] + content[end:]
    return content


def _normalise(text: str) -> str:
    # All white space goes: a placement may put a space on either side of what it inserts.
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
