"""Refuse a split in which test prompts were trained on.

In: the rows of a run. Out: a table of what was compared, for the manifest, or an InputError.

Prompts are compared by content hash twice: as they are, and with the inserted trigger, placebo and
near-miss strings cut out of their spans, since a clean twin in training gives a triggered test row away.
Rows of one group count as one prompt whatever their text, which covers triggers that rewrite the prompt.
"""

import hashlib

import pandas as pd

from safetynet.errors import InputError
from safetynet.prompts import prompt_hash

SHOWN = 5
"""Pairs of rows that the error names."""


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
            "prompt": prompts_without_trigger(rows),
        }
    )
    train, test = keys[keys["split"] == "train"], keys[keys["split"] == "test"]
    leaked = {key: test[test[key].isin(train[key])] for key in ("exact", "prompt", "group")}
    affected = test[test["row"].isin(pd.concat(leaked.values())["row"])]
    if len(affected):
        # Each test row counts once, by the closest kind of leak that it has.
        exact = set(leaked["exact"]["row"])
        stripped = set(leaked["prompt"]["row"]) - exact
        grouped = set(leaked["group"]["row"]) - exact - stripped
        twins = {key: train.drop_duplicates(key).set_index(key)["row"] for key in leaked}
        pairs = []
        for _, row in affected.head(SHOWN).iterrows():
            key = "exact" if row["row"] in exact else "prompt" if row["row"] in stripped else "group"
            pairs.append(f"test row {row['row']} = train row {twins[key][row[key]]}")
        raise InputError(
            f"{len(affected)} of {len(test)} test rows were trained on: {len(exact)} with the same prompt, "
            f"{len(stripped)} more that differ only in the inserted trigger, {len(grouped)} more of the same "
            f"group ({'; '.join(pairs)}). Remove these rows from one of the two splits, or split by group."
        )
    lines = []
    for split, part in keys.groupby("split", sort=True):
        hashes = sorted(part["prompt"].unique())
        digest = hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        lines.append({"split": split, "rows": len(part), "prompts": len(hashes), "digest": digest})
    return pd.DataFrame(lines)


def prompts_without_trigger(rows: pd.DataFrame) -> list[str]:
    """`prompt_hash` of each row's prompt, by which rows of one prompt are known whatever their role."""
    return [prompt_hash(m, t) for m, t in zip(rows["messages"], rows["trigger"], strict=True)]
