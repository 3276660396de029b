"""A grid of recipes: one point for each combination of values, seeds and families.

In: a recipe file and what is varied. Out: points, each a whole recipe with a task of its own. Every point is
validated before any is returned, and all faults are told at once. Starts nothing.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from safetynet import families
from safetynet import recipe as recipes
from safetynet.cluster import notation
from safetynet.errors import InputError
from safetynet.recipe import Recipe
from safetynet.run.directory import digest

LONGEST_VALUE = 24
"""Characters of a value that enter the name of a point; longer ones are cut and told apart by a digest."""
OWN_FIELDS = {
    "task": "each point gets a task of its own",
    "seed": "use --seeds",
    "model.family": "use --families",
}


@dataclass(frozen=True)
class Point:
    """One recipe of a sweep."""

    recipe: Recipe
    varied: Mapping[str, Any]
    """Field: value, of what differs between points; seed and family among them."""

    @property
    def name(self) -> str:
        """Model and task: the place of its run directory below the results root."""
        return f"{self.recipe.model_name}/{self.recipe.task}"


def points(
    path: Path,
    grid: Sequence[str] = (),
    *,
    seeds: str | None = None,
    chosen: str | None = None,
    overrides: Sequence[str] = (),
) -> list[Point]:
    """All points of a sweep, families outermost, seeds innermost.

    Args:
        path: the recipe that all start from.
        grid: `section.field=value,value` each; a value that holds commas is written in YAML, [a, b].
        seeds: `first:end`, end not among them, or single ones between commas; None for the recipe's own.
        chosen: families between commas, or `all`; None for the recipe's own.
        overrides: `section.field=value` each, for every point.

    Raises:
        InputError: with every fault of the options, or else of every point that is no valid recipe.
    """
    faults: list[str] = []
    axes = [axis for text in grid if (axis := _axis(text, faults))]
    fields = [field for field, _ in axes]
    faults += [
        f"--grid: {field} stands there twice." for field in sorted(set(fields)) if fields.count(field) > 1
    ]
    numbers: Sequence[int | None] = [None]
    if seeds is not None:
        numbers = notation.seeds(seeds)
        if not numbers:
            faults.append(
                f"--seeds {seeds}: write first:end, as in 0:5 for 0 to 4, or numbers between commas."
            )
    names: Sequence[str | None] = [None]
    if chosen == "all":
        names = [name for name in families.names() if families.get(name).hub_id]
    elif chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        if not set(names) <= set(families.names()) or len(set(names)) < len(names):
            choice = ", ".join(families.names())
            faults.append(f"--families {chosen}: choose among {choice} (each once), or all.")
    if faults:
        raise InputError("\n  ".join(["the sweep cannot be started:", *faults]))
    points: list[Point] = []
    for family, *values, seed in itertools.product(names, *(values for _, values in axes), numbers):
        varied = dict(zip(fields, values, strict=True))
        try:
            points.append(_point(path, overrides, varied, seed, family))
        except InputError as error:
            about = ", ".join(
                f"{k}={v}" for k, v in {"family": family, **varied, "seed": seed}.items() if v is not None
            )
            faults.append(f"{about or 'the recipe'}: {error}")
    if faults:
        raise InputError(
            "\n".join([f"{len(faults)} of {len(faults) + len(points)} points are invalid.", *faults])
        )
    places = [point.name for point in points]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise InputError(
                f"{place}: two points of the sweep have this run directory. "
                "Leave `name` out of the recipe, so that each family has a folder of its own."
            )
    return points


def sweep_name(points: Sequence[Point]) -> str:
    """Name of a sweep: the same points give the same one, so that the same command goes on."""
    recipes_of = [point.recipe.model_dump(mode="json") for point in points]
    return f"{points[0].recipe.task.partition('--')[0]}-{digest(recipes_of)[:8]}"


def _axis(text: str, faults: list[str]) -> tuple[str, list[Any]] | None:
    field, equals, values = text.partition("=")
    if not equals or not field.strip() or not values.strip():
        faults.append(f"--grid {text}: write it as section.field=value,value.")
        return None
    if field in OWN_FIELDS:
        faults.append(f"--grid {text}: {OWN_FIELDS[field]}.")
        return None
    try:
        parsed = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        faults.append(
            f"--grid {text}: {values!r} are no YAML values between commas; quote texts that hold : or #."
        )
        return None
    shown = [json.dumps(value, sort_keys=True, default=str) for value in parsed]
    if len(set(shown)) < len(shown):
        faults.append(f"--grid {text}: a value stands there twice.")
        return None
    return field.strip(), parsed


def _point(
    path: Path, overrides: Sequence[str], varied: Mapping[str, Any], seed: int | None, family: str | None
) -> Point:
    from safetynet.models import loading

    values = dict(varied) if seed is None else {**varied, "seed": seed}
    sets = [f"{field}={json.dumps(value, default=str)}" for field, value in values.items()]
    made = recipes.load(path, family, [*overrides, *sets])
    loading.locate(made.model)  # a folder that is not there would fail in every point, one after the other
    lasts = [field.rpartition(".")[2] for field in values]
    words = []
    for (field, value), last in zip(values.items(), lasts, strict=True):
        # The last part of a field's name, where it is no other's; a value as a part of a file's name.
        words.append(last if lasts.count(last) == 1 else field)
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        safe = re.sub(r"[^A-Za-z0-9._]+", "_", text)
        is_whole = safe == text and len(safe) <= LONGEST_VALUE
        words.append(safe if is_whole else f"{safe[:LONGEST_VALUE]}_{digest(value)[:6]}")
    task = "-".join([f"{made.task}-" if words else made.task, *words])
    shown = values if family is None else {"model.family": family, **values}
    return Point(made.model_copy(update={"task": task}), shown)
