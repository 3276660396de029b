"""Tables as a run writes them, made by hand: two models over four evaluations, a base model, one training."""

import pandas as pd
import pytest

from safetynet.statistics import wilson
from safetynet.visualization import Axis, Chart, Panel, Reference, Series, Source, save

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
    return Chart('A "figure" <i>&$y$', (left, right), source, 2, "two", "How to read it <script>.")


@pytest.fixture(scope="session")
def saved(chart, tmp_path_factory):
    """The chart's files, in the order png, pdf, svg, html, csv."""
    return save(chart, tmp_path_factory.mktemp("run") / "new" / "figures", "rates")
