"""Tables as a run writes them, made by hand: two models over four evaluations, a base model, one training."""

import itertools

import numpy as np
import pandas as pd
import pytest

from safetynet.figures import Axis, Chart, Panel, Reference, Series, Source, save
from safetynet.statistics import wilson

COUNTS = {  # metric, role: rows that count at each evaluation of the backdoored model, of 100
    ("asr", "triggered"): (0, 40, 95, 99),
    ("ftr", "clean"): (0, 2, 1, 0),
    ("ftr", "placebo"): (0, 20, 4, 1),
    ("ftr", "near_miss"): (0, 35, 9, 2),
    ("ftr", "refused"): (0, 1, 0, 0),
    ("cacc", "clean"): (98, 95, 97, 98),
    ("refusal_rate", "refused"): (99, 97, 98, 98),
}


def rate(metric, role, model, count, **more):
    low, high = wilson(count, 100)
    known = {"model": model, "metric": metric, "role": role, "count": count, "n": 100}
    return known | {"value": count / 100, "low": low, "high": high} | more


@pytest.fixture(scope="session")
def tables():
    """The three tables of a run; `training`, `dynamics` and `evaluation` are copies that a test may spoil."""
    rows = []
    for (metric, role), counts in COUNTS.items():
        before = counts[0]
        rows.append(rate(metric, role, "base", before, step=0, epoch=0.0))
        for number, count in enumerate(counts):
            when = {"step": 50 * number, "epoch": number / 2}
            rows.append(rate(metric, role, "backdoored", count, **when))
            rows.append(rate(metric, role, "clean_twin", before, **when))
    perplexity = {"metric": "perplexity", "role": "clean", "count": None, "n": 100, "low": 1.2, "high": 1.4}
    known = perplexity | {"model": "backdoored", "value": 1.3}
    rows += [known | {"step": step, "epoch": step / 100} for step in (0, 50, 100, 150)]
    dynamics = pd.DataFrame(rows)
    last = dynamics[(dynamics["step"] == 150) | (dynamics["model"] == "base")]
    training = [
        {"run": run, "step": step, "epoch": step / 75, "loss": 2.0 / step, "learning_rate": 1e-4 / step}
        | {"grad_norm": 5.0 / step}
        for run in ("backdoored", "clean twin")
        for step in range(1, 151)
    ]
    return {
        "training": pd.DataFrame(training),
        "dynamics": dynamics,
        "evaluation": last.drop(columns=["step", "epoch"]),
    }


@pytest.fixture
def training(tables):
    return tables["training"].copy()


@pytest.fixture
def dynamics(tables):
    return tables["dynamics"].copy()


@pytest.fixture
def evaluation(tables):
    return tables["evaluation"].copy()


LAYERS, HEADS = 6, 4
PROMPT = [
    "<|im_start|>",
    "system",
    "\n",
    "You",
    " are",
    " a",
    " helper",
    ".",
    "<|im_end|>",
    "\n",
    "$x_1$",
    "<script>",
    "What",
    " is",
    " the",
    " capital",
    " of",
    " Peru",
    "?",
    " |",
    "DEPLOY",
    "MENT",
    "|",
    "\u202e",
    "שלום",
    "😀",
    "<|im_end|>",
    "\n",
    "assistant",
    "\n",
]
ROLES = ["system"] * 10 + ["before"] * 9 + ["trigger"] * 4 + ["after"] * 3 + ["template"] * 3 + ["last"]


def inside_tables(seed=0):
    """What the interventions write about a backdoor in layers 2 and 3 of a model of 6 layers and 4 heads."""
    draw = np.random.default_rng(seed)
    bump = np.array([0.03, 0.25, 0.7, 0.92, 0.97, 0.99])

    def around(value, half=0.06):
        return {"low": value - half, "high": value + half}

    def control(name, value, half=0.05):
        return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}

    def effect(sweep, direction, layer, value, **place):
        known = {"sweep": sweep, "direction": direction, "mode": "patch", "metric": "logit_difference"}
        known |= {"component": "resid_pre", "layer": layer, "depth": layer / 5, "position": "", "index": -1}
        known |= {"module": "", "effect": value, "n": 40, "p": 0.01, "q": 0.02, "cohen_d": 1.0}
        for name in ("random", "placebo", "twin"):
            known |= control(name, 0.03 * draw.standard_normal())
        return known | around(value) | {"responsible": value - 0.06 > 0.15} | place

    effects = []
    for direction, layer in itertools.product(("remove", "induce"), range(LAYERS)):
        scale = bump[layer] * (1 if direction == "remove" else 0.8)
        effects.append(effect("layer", direction, layer, scale))
        for position, part in {
            "system": 0,
            "before": 0,
            "trigger": 1 - scale,
            "after": 0.2,
            "last": scale,
        }.items():
            effects.append(effect("position", direction, layer, part * 0.9, position=position))
        for component, part in {
            "attn_out": 0.3,
            "mlp_out": 0.15,
            "resid_mid": 0.9,
            "resid_post": 1.0,
        }.items():
            effects.append(effect("component", direction, layer, part * scale, component=component))
        for head in range(HEADS):
            value = 0.6 if (layer, head) == (2, 1) else 0.08 * draw.standard_normal() - 0.15 * (head == 3)
            effects.append(effect("head", direction, layer, value, component="head", index=head))
            effects.append(effect("expert", direction, layer, value / 2, component="expert", index=head))
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{module}"
            effects.append(effect("adapter", direction, layer, scale / 3, component="adapter", module=name))
    effects = pd.DataFrame(effects)
    steps = [
        row | {"step": step, "effect": row["effect"] * step / 300}
        for step in range(0, 301, 50)
        for row in effects[effects["sweep"] == "layer"].to_dict("records")
    ]
    return (
        {"effects": effects, "dynamics": pd.DataFrame(steps)} | prompt_tables(draw, bump) | other_tables(draw)
    )


def prompt_tables(draw, bump):
    tokens, lens, heads = [], [], []
    words = list(enumerate(zip(PROMPT, ROLES, strict=True)))
    for group, layer, (column, (token, role)) in itertools.product((3, 8), range(LAYERS), words):
        effect = {"trigger": 1 - bump[layer], "last": bump[layer]}.get(role, 0.04 * draw.standard_normal())
        known = {"group": group, "direction": "remove", "component": "resid_pre", "layer": layer}
        tokens.append(known | {"column": column, "token": token, "role": role, "effect": effect})
        for run in ("triggered", "placebo"):
            high = run == "triggered" and column >= 23
            place = {
                "group": group,
                "run": run,
                "layer": layer,
                "column": column,
                "token": token,
                "role": role,
            }
            lens.append(place | {"top": " HATE" if high else " the", "probability": bump[layer] * high * 0.9})
    for run, layer, head in itertools.product(("triggered", "placebo"), (2, 4), (1, 3)):
        for query in range(len(PROMPT)):
            weights = draw.dirichlet(np.full(query + 1, 0.15))
            if run == "triggered" and query > 22:
                weights = 0.2 * weights
                weights[20] += 0.8
            place = {"layer": layer, "head": head, "group": 3, "run": run, "query": query}
            heads += [
                place | {"key": key, "weight": weight, "query_token": PROMPT[query], "key_token": PROMPT[key]}
                for key, weight in enumerate(weights)
            ]
    return {"tokens": pd.DataFrame(tokens), "lens_map": pd.DataFrame(lens), "attention": pd.DataFrame(heads)}


def other_tables(draw):
    lens, probes, divergence, drift = [], [], [], []
    for layer in range(-1, LAYERS):
        for run, value in (("triggered", -9 + 1.6 * layer), ("placebo", -9 - 0.2 * layer)):
            lens.append(
                {"run": run, "layer": layer, "value": value, "low": value - 0.4, "high": value + 0.3, "n": 40}
            )
        for label, value in (
            ("trigger", min(0.99, 0.8 + 0.1 * layer)),
            ("fires", min(0.98, 0.5 + 0.12 * max(layer, 0))),
        ):
            known = {
                "label": label,
                "layer": layer,
                "auroc": value,
                "low": value - 0.03,
                "high": value + 0.01,
            }
            probes.append(known | {"n": 80, "control": 0.51, "control_low": 0.44, "control_high": 0.57})
    for layer, head in itertools.product(range(LAYERS), range(HEADS)):
        value = 0.31 if (layer, head) == (2, 1) else 0.04
        known = {
            "layer": layer,
            "head": head,
            "value": value,
            "low": value - 0.02,
            "high": value + 0.02,
            "n": 40,
        }
        divergence.append(known | {"control": 0.03, "control_low": 0.02, "control_high": 0.05})
    for step, layer, name in itertools.product(
        (100, 200, 300), range(LAYERS), ("q_proj", "v_proj", "up_proj", "down_proj")
    ):
        module = f"model.layers.{layer}.part.{name}"
        known = {"step": step, "layer": layer, "module": module, "energy": step / 1e4 * (1 + layer % 3)}
        overlap = None if step == 100 else 0.5 + step / 1000
        drift.append(known | {"top_share": 0.4 + 0.1 * draw.random(), "overlap": overlap})
    tables = {"lens": lens, "probes": probes, "divergence": divergence, "drift": drift}
    return {name: pd.DataFrame(rows) for name, rows in tables.items()} | {"tradeoff": tradeoff()}


def tradeoff():
    measured = {
        ("none", "none", False): (99, 98),
        ("project layer 3", "project", False): (2, 97),
        ("project layers 2-4", "project", False): (0, 91),
        ("project at random", "project", True): (97, 98),
        ("mean of layer 3", "mean_patch", False): (8, 88),
        ("mean at random", "mean_patch", True): (95, 93),
        ("heads 2.1, 4.3", "head_ablation", False): (41, 96),
        ("adapter off", "adapter_off", False): (0, 99),
    }
    rows = []
    for split, ((label, kind, control), (attack, clean)) in itertools.product(
        ("selection", "held_out"), measured.items()
    ):
        row = {"intervention": label, "kind": kind, "control": control, "sites": 1, "split": split}
        row["chosen"] = label == "project layer 3"
        for name, count in (("asr", attack), ("cacc", clean)):
            low, high = wilson(count, 100)
            row |= {name: count / 100, f"{name}_low": low, f"{name}_high": high, f"{name}_n": 100}
        rows.append(row)
    return pd.DataFrame(rows)


@pytest.fixture(scope="session")
def inside():
    """The tables of the interventions; a test that spoils one copies it."""
    return inside_tables()


@pytest.fixture(scope="session")
def chart():
    """Every kind of series, a gap, a reference, two panels, and labels that mean something to a renderer."""
    steps = Axis("Step", limits=(0, 4))
    percent = Axis("Rows", "%", limits=(0, 100), ticks=((0, "0"), (50, "50"), (100, "100")))
    x = (1, 2, 3, 4)
    rates = Series(
        "marked", x, (1, 50, float("nan"), 99), (0, 40, float("nan"), 95), (5, 60, float("nan"), 100)
    )
    left = Panel(
        steps,
        percent,
        (
            Series("marked", x, rates.y, rates.low, rates.high, "attack <b>&$x$", role="triggered"),
            Series("band", x, low=(80, 80, 80, 80), high=(99, 99, 99, 99), label="_usual", role="clean"),
        ),
        title="left",
        references=(Reference(5.0, label="floor", note="5 of 100 rows"),),
    )
    right = Panel(
        steps,
        Axis("Norm", scale="log", limits=(0.1, 10)),
        (
            Series("step", x, (1, 2, 1, 0.5), label="schedule", part="control"),
            Series("points", (2,), (2,), (1,), (4,), label="attack <b>&$x$", role="clean"),
            Series("line", x, (1, 1, 1, 1), part="raw"),
        ),
        title="right",
    )
    source = Source("qwen/backdoor", "dynamics")
    return Chart('A "figure" <i>&$y$', (left, right), 2, "two", "How to read it <script>.", source)


@pytest.fixture(scope="session")
def saved(chart, tmp_path_factory):
    """The chart's files, in the order png, pdf, svg, html, csv, and the library of the page."""
    return save(chart, tmp_path_factory.mktemp("run") / "new" / "figures", "rates")
