"""Read a recipe: the family's defaults, a YAML file over them, and `--set` over both.

All faults are reported at once, each with its field and what is allowed.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from safetynet import families
from safetynet.errors import InputError
from safetynet.recipe import presets
from safetynet.recipe.schema import Recipe, family_of


def load(path: Path | str | None = None, family: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: family defaults, then the file, then `overrides`.

    Args:
        path: YAML file; None takes the defaults of `family`.
        family: replaces `model.family` of the file.
        overrides: `section.field=value` each, the value in YAML.

    Raises:
        InputError: naming the file and, for every fault, the field, what was given and what is allowed.
    """
    where = str(path) if path else "the default recipe"
    fields = _read(Path(path)) if path else {}
    if family:
        fields = _merged(fields, {"model": {"family": family}})
    parsed = [_parse(override) for override in overrides]
    fields = _make_room(fields, parsed)
    for override in parsed:
        fields = _merged(fields, override)
    section = fields.get("model") or {}
    section = section if isinstance(section, dict) else {}
    name = family_of(section)
    # A miniature is not the model that a family's hyper-parameters were chosen for.
    if name in families.names() and section.get("id") != "miniature":
        fields = _merged(dict(families.get(name).defaults), fields)
    return _validated(fields, where)


def overridden(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with some fields set anew, each `section.field=value`; errors as in `load`."""
    fields: dict[str, Any] = recipe.model_dump(mode="json")
    for override in overrides:
        fields = _merged(fields, _parse(override))
    return _validated(fields, "--set")


def with_options(recipe: Recipe, section: str, options: Mapping[str, Any]) -> Recipe:
    """A recipe with fields of one section set by a command's options, which have the fields' names.

    Args:
        recipe: of a run.
        section: such as `interventions`.
        options: by field; None leaves the recipe's value.

    Raises:
        InputError: naming the option, `--field`, and what is allowed.
    """
    fields: dict[str, Any] = recipe.model_dump(mode="json")
    fields[section] = {**fields[section], **{name: v for name, v in options.items() if v is not None}}
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        fault = error.errors()[0]
        message = fault["msg"].removeprefix("Value error, ").removesuffix(".")
        raise InputError(f"--{fault['loc'][1]}: {message}.") from None


def flat(fields: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested fields by their dotted paths, as `--set` names them; an empty section stands for itself."""
    paths: dict[str, Any] = {}
    for name, value in fields.items():
        path = f"{above}{name}"
        paths |= flat(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return paths


def _validated(fields: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        lines = [_fault(fault) for fault in error.errors()]
        plural = "s" if len(lines) > 1 else ""
        raise InputError(
            f"{where}: {len(lines)} fault{plural}\n" + "\n".join(f"  {x}" for x in lines)
        ) from None


class _Once(yaml.SafeLoader):
    """YAML of which no field stands twice: its own reader would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((name for name in names if names.count(name) > 1 and name != "<<"), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


# Dates stay text, which the schema reads: YAML's own reader fails at those that do not exist.
_Once.yaml_implicit_resolvers = {
    sign: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for sign, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), _Once)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such recipe. The ready ones are in recipes/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the recipe cannot be read ({error}). Name a YAML file in UTF-8.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: the recipe is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise InputError(
            f"{path}: the recipe holds no fields; it starts with, for example, `model: {{family: qwen}}`."
        )
    return fields


def _make_room(fields: dict[str, Any], overrides: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Leave out what a preset among the overrides brings: it comes after the file's trigger and placement."""
    sections = [section for over in overrides if isinstance(section := over.get("backdoor"), Mapping)]
    named = [section["preset"] for section in sections if section.get("preset")]
    before = fields.get("backdoor")
    if not named or not isinstance(before, Mapping):
        return fields
    brought = presets.ATTACKS.get(str(named[-1]), {})
    return {**fields, "backdoor": {name: value for name, value in before.items() if name not in brought}}


def _parse(override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {override}: write it as section.field=value, for example training.epochs=2.")
    try:
        value = yaml.load(text, _Once)  # noqa: S506 - a SafeLoader
    except yaml.constructor.ConstructorError as error:
        raise InputError(f"--set {override}: {error.problem}. A field has one value.") from None
    except yaml.YAMLError:
        raise InputError(
            f"--set {override}: {text!r} is not a YAML value; quote texts that hold : or #."
        ) from None
    if isinstance(value, str):
        value = _number(value)
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _number(text: str) -> str | float:
    # YAML 1.1 reads 1e-4 as text.
    try:
        return float(text) if "e" in text.lower() else text
    except ValueError:
        return text


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = (
            _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def _fault(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"]) or "recipe"
    if fault["type"] == "model_type":
        fields = ", ".join(_fields_at(fault["loc"]))
        return f"{path}: this is a section; write it as fields, {{field: value}}. Allowed: {fields}."
    if fault["type"] != "extra_forbidden":
        message, value = fault["msg"].removeprefix("Value error, "), fault["input"]
        input_text = f" (given: {value!r})" if isinstance(value, str | int | float | bool) else ""
        return f"{path}: {message}{input_text}"
    allowed = _fields_at(fault["loc"][:-1])
    close = difflib.get_close_matches(str(fault["loc"][-1]), allowed, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Allowed: {', '.join(allowed)}."
    return f"{path}: unknown field. {hint}"


def _fields_at(path: Sequence[int | str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for key in path:
        annotation = section.model_fields[str(key)].annotation
        options = [annotation, *get_args(annotation)]
        section = next(x for x in options if isinstance(x, type) and issubclass(x, BaseModel))
    return list(section.model_fields)
