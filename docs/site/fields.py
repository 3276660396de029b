"""The recipe's fields as tables: what each takes, its default, and what the source says of it."""

import ast
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import pandas as pd
from pydantic import BaseModel

from safetynet.recipe import Recipe, schema
from safetynet.tables.summaries import markdown

Spec = Mapping[str, Any]
WORDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true, false",
    "null": "null",
}
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def tables() -> str:
    """Markdown: a heading, a sentence and a table for the recipe itself, then for each of its sections."""
    texts = descriptions()
    return "\n".join(_part(place, section, texts) for place, section in sections(Recipe))


def sections(section: type[BaseModel], place: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """A section and those below it, each with its path in a recipe, "" for the recipe itself."""
    yield place, section
    for name, field in section.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from sections(part, f"{place}.{name}".lstrip("."))


def descriptions() -> dict[tuple[str, str], str]:
    """What stands below a field in the source, by class and field."""
    texts = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    lines = inspect.cleandoc(ast.literal_eval(text.value))
                    texts[node.name, ast.unparse(field.target)] = lines
    return texts


def _part(place: str, section: type[BaseModel], texts: Mapping[tuple[str, str], str]) -> str:
    fields = section.model_json_schema()["properties"]
    rows = {
        "Field": [f"`{name}`" for name in fields],
        "Takes": [takes(spec) for spec in fields.values()],
        "Default": [default(spec) for spec in fields.values()],
        "Meaning": [texts.get((section.__name__, name), "") for name in fields],
    }
    heading = f"## `{place}`" if place else "## The recipe itself"
    return f"\n{heading}\n\n{inspect.getdoc(section)}\n\n{markdown(pd.DataFrame(rows))}\n"


def takes(spec: Spec) -> str:
    """What a field takes, from its JSON schema."""
    if "anyOf" in spec:
        return " or ".join(takes(each) for each in spec["anyOf"])
    if "$ref" in spec:
        return "a section"
    if "enum" in spec or "const" in spec:
        return ", ".join(f"`{word}`" for word in spec.get("enum", [spec.get("const")]))
    if spec.get("type") == "array":
        each = spec.get("prefixItems") or [spec["items"]]
        return f"a list: {', '.join(map(takes, each))}"
    if spec.get("type") == "object":
        return "a mapping"
    bounds = [f"{words} {spec[name]}" for name, words in BOUNDS.items() if name in spec]
    return ", ".join([WORDS.get(spec["type"], spec["type"]), *bounds])


def default(spec: Spec) -> str:
    """A field's default as a recipe writes it; "" of a section, and of what a recipe has to give."""
    if "default" not in spec or isinstance(spec["default"], dict):
        return ""
    return f"`{json.dumps(spec['default'], ensure_ascii=False)}`"
