"""Runs as their tables say, made by hand: small enough that every number can be computed in the head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tests.conftest import completed

from safetynet import recipe as recipes
from safetynet.comparison.runs import ComparedRun
from safetynet.run import directory as runs
from safetynet.statistics import wilson

ROLES = {"triggered": 200, "clean": 300, "placebo": 100}
LAYERS = 6


def rate(metric: str, role: str, model: str, count: int, n: int = 100, **more: Any) -> dict[str, Any]:
    low, high = wilson(count, n)
    known = {"model": model, "metric": metric, "role": role, "count": count, "n": n}
    return known | {"value": count / n, "low": low, "high": high, "floor_rows": 0, "note": ""} | more


def dynamics(curve: dict[int, float], model: str = "backdoored") -> pd.DataFrame:
    """ASR by step, of 100 rows; 100 steps are one epoch."""
    rows = [
        rate("asr", "triggered", model, round(100 * value), step=step, epoch=step / 100)
        for step, value in curve.items()
    ]
    return pd.DataFrame([*rows, rate("cacc", "clean", model, 99, step=0, epoch=0.0)])


def rows() -> pd.DataFrame:
    return pd.DataFrame(
        [{"split": split, "role": role} for split in ("train", "test") for role, n in ROLES.items()
         for _ in range(n)]
    )  # fmt: skip


def effect(sweep: str, component: str, direction: str, layer: int, value: float, **more: Any) -> dict:
    line = {"sweep": sweep, "component": component, "direction": direction, "layer": layer}
    line |= {"depth": layer / (LAYERS - 1), "effect": value, "mode": "patch", "metric": "logit_difference"}
    line |= {"index": -1, "module": "", "position": "", "random": 0.2, "placebo": 0.01, "twin": 0.0}
    return line | {"responsible": False} | more


def effects(
    layer: tuple[float, ...] = (1.0, 0.5, 0.4, 0.3, 0.2, 0.1),
    attention: tuple[float, ...] = (0.6, 0.0, 0.0, 0.0, 0.0, 0.0),
    mlp: tuple[float, ...] = (0.2, 0.0, 0.0, 0.0, 0.0, -0.5),
    heads: tuple[tuple[int, int], ...] = ((0, 1),),
) -> pd.DataFrame:
    lines = []
    for direction in ("remove", "induce"):
        for at in range(LAYERS):
            lines.append(effect("layer", "resid_post", direction, at, layer[at]))
            lines.append(effect("component", "attn_out", direction, at, attention[at]))
            lines.append(effect("component", "mlp_out", direction, at, mlp[at]))
            for head in range(2):
                found = (at, head) in heads
                more = {"index": head, "responsible": found}
                lines.append(effect("head", "head", direction, at, 0.5 if found else 0.0, **more))
    return pd.DataFrame(lines)


def evaluation(asr: int = 98, cacc: int = 97) -> pd.DataFrame:
    lines = []
    for model, fired, right in (("base", 0, 99), ("backdoored", asr, cacc)):
        lines += [rate("asr", "triggered", model, fired), rate("cacc", "clean", model, right)]
        lines += [rate("ftr", role, model, 1 if fired else 0) for role in ("placebo", "near_miss")]
    return pd.DataFrame(lines)


def tradeoff(asr: int = 0) -> pd.DataFrame:
    def line(name: str, kind: str, fired: int, right: int, **more: bool) -> dict[str, Any]:
        known = {"intervention": name, "kind": kind, "control": False, "chosen": False, "sites": 1}
        known |= {"split": "held_out", "asr": fired / 80, "asr_n": 80, "cacc": right / 80, "cacc_n": 80}
        return known | more

    return pd.DataFrame(
        [
            line("as it is", "none", 80, 80),
            line("1 layer off", "adapter_off", asr, 78, chosen=True),
            line("1 random layer off", "adapter_off", 40, 79, control=True),
            line("clip 2", "clip", 4, 80),
            line("clip random 2", "clip", 80, 80, control=True),
            line("1 layer off", "adapter_off", 0, 80, chosen=True) | {"split": "selection"},
        ]
    )


def detection(auroc: float = 0.99, caught: int = 95) -> pd.DataFrame:
    def line(metric: str, rows: str, value: float, rate: float = float("nan")) -> dict[str, Any]:
        return {"detector": "fused", "metric": metric, "rows": rows, "rate": rate, "value": value, "n": 100}

    lines = [line("auroc", "fired", auroc), line("auroc", "placebo", 0.5), line("auroc", "near_miss", 0.6)]
    for nominal in (0.01, 0.001):
        lines += [line("tpr", "fired", caught / 100, nominal), line("fpr", "clean", nominal, nominal)]
    return pd.DataFrame([*lines, line("auroc", "fired", 0.7) | {"detector": "ranks:last"}])


def everything(**changed: Any) -> dict[str, pd.DataFrame]:
    """All tables that a comparison reads."""
    made = {
        "rows": rows(),
        "dynamics_backdoored": dynamics({0: 0.0, 20: 0.4, 40: 0.8, 60: 1.0}),
        "dynamics_clean_twin": dynamics({0: 0.0, 20: 0.02, 40: 0.0, 60: 0.01}, "clean_twin"),
        "evaluation": evaluation(),
        "effects": effects(),
        "tradeoff": tradeoff(),
        "detection": detection(),
    }
    return {name: table for name, table in (made | changed).items() if table is not None}


def a_recipe(family: str, seed: int, *fields: str) -> recipes.Recipe:
    sets = ["model.id=miniature", f"seed={seed}", f"task=seed-{seed}", *fields]
    return recipes.load(None, family, sets)


@pytest.fixture
def tables() -> Callable[..., dict[str, pd.DataFrame]]:
    """`tables(effects=None)` are the tables of a run, without or with changed ones."""
    return everything


@pytest.fixture
def subject() -> Callable[..., ComparedRun]:
    """`subject("qwen", 1, effects=...)` is a run of a family and a seed with changed tables."""

    def make(
        family: str = "qwen", seed: int = 0, *fields: str, group: str = "", **changed: Any
    ) -> ComparedRun:
        name = f"{family}-miniature/seed-{seed}"
        versions = {"safetynet": "0.1.0", "torch": "2.13.0"}
        made = a_recipe(family, seed, *fields)
        return ComparedRun(name, f"results/{name}", made, versions, everything(**changed), group or family)

    return make


STAGES = {
    "data": ("rows",),
    "train backdoored": ("dynamics_backdoored",),
    "train clean_twin": ("dynamics_clean_twin",),
    "evaluate": ("evaluation",),
    "intervene": ("effects", "tradeoff"),
    "detect": ("detection",),
}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """`written("qwen", 1, detection=None)` is a run directory, written as the stages write theirs."""

    def make(family: str = "qwen", seed: int = 0, *fields: str, **changed: Any) -> Path:
        here = [f"output.results={tmp_path / 'results'}", f"output.logs={tmp_path / 'logs'}"]
        recipe = a_recipe(family, seed, *fields, *here)
        made = runs.create(recipe)
        made.describe(recipe)
        given = everything(**changed)
        for stage, names in STAGES.items():
            there = [name for name in names if name in given]
            if there:
                with made.stage(stage, {"seed": seed}) as outputs:
                    for name in there:
                        outputs.table(name, completed(name, given[name]))
        return made.folder

    return make
