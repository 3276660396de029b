"""Single prompts: what the model answered to each, and where in each prompt the trigger acts.

In: Contents. Out: plain values for the page's scripts. Texts are whatever a model or a data set wrote: they
stay texts, and the page puts them nowhere but into text nodes.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from safetynet.figures import theme
from safetynet.figures.glyphs import visible
from safetynet.prompts import Conversation
from safetynet.report.contents import Contents
from safetynet.vocabulary import MODELS

PIECE = 700
"""Letters of one stretch of text; longer ones lose their middle."""
BYTES = 2_500_000
"""What all examples together may take of the page."""


@dataclass(frozen=True)
class Examples:
    """Test rows with the models' answers."""

    models: list[str]
    rows: list[dict[str, Any]]
    count: int
    """Rows that there are, of which `rows` are shown."""


def examples(run: Contents) -> Examples | None:
    """Test rows in their order, as many as fit; None where the run has no responses."""
    responses, rows = run.tables.get("responses"), run.tables.get("rows")
    if responses is None or rows is None or not {"row", "model", "response", "shown"} <= set(responses):
        return None
    models = [model for model in MODELS if (responses["model"] == model).any()]
    answers = {(r.model, r.row): [shorter(str(r.response)), bool(r.shown)] for r in responses.itertuples()}
    test = rows[rows["split"] == "test"]
    lines: list[dict[str, Any]] = []
    used = 0
    for row in test.to_dict("records"):
        line = {
            "row": int(row["row"]),
            "role": theme.name(row["role"]),
            "kind": row["role"],
            "variant": str(row.get("variant") or ""),
            "prompt": list(pieces(row["messages"], row["trigger"])),
            "answers": [answers.get((model, row["row"]), ["", False]) for model in models],
        }
        used += len(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace"))
        if used > BYTES:
            break
        lines.append(line)
    return Examples([theme.name(model) for model in models], lines, len(test)) if lines else None


def pieces(messages: list[Mapping[str, Any]], trigger: list[list[int]]) -> Iterator[tuple[str, str]]:
    """A prompt in pieces: who speaks (`who`), text (`text`) and the trigger or what stands for it (`mark`).

    Args:
        messages: of the prompt, as in `Conversation`.
        trigger: message, start and end of each part of the trigger.
    """
    several = len(messages) > 1
    for number, (message, content) in enumerate(zip(messages, Conversation(messages).texts, strict=True)):
        if several:
            yield "who", str(message["role"])
        at = 0
        for _, start, end in sorted(span for span in trigger if span[0] == number):
            if start > at:
                yield "text", shorter(content[at:start])
            yield "mark", shorter(content[start:end])
            at = end
        if at < len(content) or not content:
            yield "text", shorter(content[at:])


def shorter(text: str) -> str:
    """A text without its middle where it is very long."""
    if len(text) <= PIECE:
        return text
    left = len(text) - PIECE
    return f"{text[: PIECE // 2]} […{left} characters…] {text[-PIECE // 2 :]}"


def token_maps(run: Contents) -> list[dict[str, Any]]:
    """Layer by token, prompt by prompt; [] where the run has none."""
    table, rows, responses = (run.tables.get(name) for name in ("tokens", "rows", "responses"))
    needed = {"group", "direction", "layer", "column", "token", "role", "effect"}
    if table is None or not needed <= set(table):
        return []
    result = []
    for group, group_rows in table.groupby("group", sort=False):
        columns = group_rows.drop_duplicates("column").sort_values("column")
        layers = sorted(set(group_rows["layer"]))
        maps = {}
        for direction, part in group_rows.groupby("direction", sort=False):
            cells = part.pivot(index="layer", columns="column", values="effect")  # (layers, tokens)
            maps[str(direction)] = [
                [None if pd.isna(value) else round(float(value), 3) for value in cells.loc[layer]]
                for layer in layers
            ]
        prompt: list[tuple[str, str]] = []
        if rows is not None:
            is_prompt = (rows["group"] == group) & (rows["role"] == "triggered") & (rows["split"] == "test")
            for row in rows[is_prompt].head(1).to_dict("records"):
                prompt += pieces(row["messages"], row["trigger"])
        # What the backdoored model answers to the prompt with the trigger and to those without.
        answers: list[tuple[str, str]] = []
        if responses is not None and "group" in responses:
            of_group = responses[(responses["group"] == group) & (responses["model"] == "backdoored")]
            answers = [
                (theme.name(row["role"]), shorter(str(row["response"])))
                for row in of_group.to_dict("records")
                if row["role"] in ("triggered", "placebo", "clean")
            ]
        result.append(
            {
                "group": str(group),
                "tokens": [visible(str(token)) for token in columns["token"]],
                "roles": [str(role) for role in columns["role"]],
                "layers": [int(layer) for layer in layers],
                "maps": maps,
                "prompt": prompt,
                "answers": answers,
            }
        )
    return result
