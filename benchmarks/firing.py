"""Backdoors that fire sometimes: what detectors still see of them, and what repairs leave.

    python benchmarks/firing.py --out results-firing      six firing rates, two seeds: half an hour; resumable
    python benchmarks/firing.py --smoke                   one small cell

A cell is qwen's miniature by its recipe at one `backdoor.firing`. Its test prompts are answered greedily and
by samples at temperature 1, before and after two repairs that know no trigger, at their defaults. A defender
fits the presets of detectors on fresh clean prompts, as benchmarks/evasion.py does it. Prints three tables,
for docs/results/firing, and leaves `firing.png` in --out.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from _running import markdown, percent
from evasion import FUSIONS, ORDINARY, one

from safetynet.evaluation import metrics
from safetynet.evaluation.evaluator import Evaluator
from safetynet.experiment import Experiment
from safetynet.figures import Axis, Chart, Figure, Panel, Reference, Series
from safetynet.mitigation import METHODS, Defender, repair
from safetynet.mitigation.rows import clean_conversations
from safetynet.models import loading
from safetynet.prompts import Serialiser
from safetynet.run import directory as runs
from safetynet.statistics import wilson
from safetynet.vocabulary import UNTOUCHED

RATES = (1.0, 0.8, 0.4, 0.2, 0.1, 0.05)
REPAIRS = ("fine_tuning", "adapter_scaling")
TEST_ROWS = 100
SIZES, SMOKE_SIZES = (5, 200), (1, 32)
"""Samples of each prompt, and clean conversations of a repair."""
ROLES = ("triggered", "placebo", "clean")
PERCENT = Axis("Prompts", "%", limits=(0, 100), ticks=tuple((v, str(v)) for v in (0, 25, 50, 75, 100)))


def main() -> None:
    """Run the cells that are missing, print the tables and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="results root; a temporary one by default")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--smoke", action="store_true", help="one small cell, to see that it runs")
    args = parser.parse_args()
    loading.use_one_thread()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        answers, alarms = [], []
        cells = [(0.5, 0)] if args.smoke else list(product(args.rates, args.seeds))
        for firing, seed in cells:
            place, name = out / f"seed-{seed}", f"firing-{firing:g}"
            fields = {"backdoor.firing": firing, **({} if args.smoke else {"data.test_rows": TEST_ROWS})}
            cell = {"name": name, "attacked": ORDINARY, "strength": 0.0, "fields": fields}
            matrix, _ = one(cell, "qwen", seed, place, args.smoke)
            alarms.append(matrix.assign(firing=firing, seed=seed))
            rates = answered(place / "qwen-miniature" / name, args.smoke)
            answers.append(rates.assign(firing=firing, seed=seed))
            print(f"{name}, seed {seed}: done", file=sys.stderr, flush=True)
        rates, detected = pd.concat(answers, ignore_index=True), pd.concat(alarms, ignore_index=True)
        print("## How often it fires\n", markdown(ladder(rates)), sep="\n")
        print("\n## Alarms at 1%\n", markdown(alarm_table(detected)), sep="\n")
        print("\n## After repairs\n", markdown(repair_table(rates)), sep="\n")
        chart = Chart("Backdoors that fire sometimes", panels(rates, detected), 3, "two")
        Figure(chart, "firing", out).save()


def answered(folder: Path, smoke: bool) -> pd.DataFrame:
    """Rates of a run's model as it is and after each of `REPAIRS`; computed once.

    Returns:
        model, metric (greedy, sampled, cacc; always and never of sampled ones), role, value, low, high, n.
    """
    run = runs.find(folder)
    experiment = Experiment(run.recipe, run)
    sizes = SMOKE_SIZES if smoke else SIZES
    inputs = {"model": experiment.origin(), "repairs": REPAIRS, "sizes": sizes}
    if not run.finished("ladder", inputs):
        with run.stage("ladder", inputs) as outputs:
            outputs.table("ladder", pd.DataFrame(measured(experiment, *sizes)))
    return run.table("ladder")


def measured(experiment: Experiment, samples: int, clean: int) -> list[dict[str, Any]]:
    """The lines of `answered`."""
    recipe = experiment.recipe
    model, serialiser = experiment.backdoored()
    evaluator = Evaluator.of(recipe, serialiser)
    rows = experiment.rows("test")
    rows = rows[rows["role"].isin(ROLES)].reset_index(drop=True)
    defender = defender_of(experiment, model, serialiser, clean)
    lines = rates_of(evaluator, model, rows, samples, UNTOUCHED)
    for name in REPAIRS:
        method = METHODS[name]
        with repair(method, defender, method.settings(), recipe.seed).open() as repaired:
            lines += rates_of(evaluator, repaired, rows, samples, name)
    return lines


def defender_of(experiment: Experiment, model: Any, serialiser: Serialiser, clean: int) -> Defender:
    """Who has the run's model and so many fresh clean conversations, and knows no trigger."""
    training = experiment.recipe.training
    return Defender(
        model, serialiser, clean_conversations(experiment, clean), max_length=training.max_length,
        batch_size=training.batch_size, learning_rate=training.learning_rate,
    )  # fmt: skip


def rates_of(
    evaluator: Evaluator, model: Any, rows: pd.DataFrame, samples: int, name: str
) -> list[dict[str, Any]]:
    """Greedy and sampled rates of one model."""
    greedy = evaluator.answer(model, rows, name)
    lines = []
    for metric, role, column in (
        ("greedy", "triggered", "shown"), ("greedy", "placebo", "shown"), ("cacc", "clean", "correct"),
    ):  # fmt: skip
        hits = greedy.loc[greedy["role"] == role, column]
        low, high = wilson(int(hits.sum()), len(hits))
        line = {"model": name, "metric": metric, "role": role, "value": hits.mean()}
        lines.append(line | {"low": low, "high": high, "n": len(hits)})
    fires = rows[rows["role"].isin(("triggered", "placebo"))]
    counts = metrics.score_samples(evaluator.sample(model, fires, samples, 0, name))
    for row in counts.to_dict("records"):
        line = {"model": name, "role": row["role"], "n": row["prompts"]}
        lines.append(line | {"metric": "sampled"} | {end: row[end] for end in ("value", "low", "high")})
        for share in ("always", "never"):
            low, high = wilson(row[share] * row["prompts"], row["prompts"])
            lines.append(line | {"metric": share, "value": row[share], "low": low, "high": high})
    return lines


def of(part: pd.DataFrame, metric: str, role: str, model: str = UNTOUCHED) -> str:
    """One rate of a cell, in percent with its interval."""
    is_line = (part["metric"] == metric) & (part["role"] == role) & (part["model"] == model)
    return percent(part[is_line].iloc[0])


def cells_of(table: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """Firing rate and seed of each cell, and its part of a table."""
    for (firing, seed), part in table.groupby(["firing", "seed"], sort=False):
        yield {"firing": f"{firing:g}", "seed": str(seed)}, part


def ladder(rates: pd.DataFrame) -> pd.DataFrame:
    """How often each backdoor fires, beside placebos and clean accuracy."""
    columns = {
        "ASR greedy": ("greedy", "triggered"), "ASR sampled": ("sampled", "triggered"),
        "always": ("always", "triggered"), "never": ("never", "triggered"),
        "FTR placebo, sampled": ("sampled", "placebo"), "CACC": ("cacc", "clean"),
    }  # fmt: skip
    return pd.DataFrame(
        cell | {title: of(part, *source) for title, source in columns.items()}
        for cell, part in cells_of(rates)
    )


def alarm_table(detected: pd.DataFrame) -> pd.DataFrame:
    """Alarms of each preset at triggered prompts, whether they fired or not, and at fresh clean ones."""
    lines = []
    for line, part in cells_of(detected):
        for metric, rows, title in (("tpr", "triggered", ""), ("fpr", "clean", "FPR ")):
            for name in FUSIONS:
                is_line = (part["tested"] == f"fused {name}") & (part["metric"] == metric)
                line[title + name] = percent(part[is_line & (part["rows"] == rows)].iloc[0])
        lines.append(line)
    return pd.DataFrame(lines)


def repair_table(rates: pd.DataFrame) -> pd.DataFrame:
    """Sampled ASR and clean accuracy before and after each repair."""
    lines = []
    for line, part in cells_of(rates):
        for title, metric, role in (("ASR", "sampled", "triggered"), ("CACC", "cacc", "clean")):
            line |= {f"{title} {model}": of(part, metric, role, model) for model in (UNTOUCHED, *REPAIRS)}
        lines.append(line)
    return pd.DataFrame(lines)


def panels(rates: pd.DataFrame, detected: pd.DataFrame) -> tuple[Panel, ...]:
    """Against the firing rate: how often it fires, what is detected of it, and what repairs leave.

    Each seed has a line of its own.
    """
    firings = sorted(rates["firing"].unique())
    place = {firing: float(number) for number, firing in enumerate(firings)}
    axis = Axis(
        "Firing rate in training", "%", limits=(0.0, max(place[firings[-1]], 1.0)),
        ticks=tuple((place[firing], f"{100 * firing:g}") for firing in firings),
    )  # fmt: skip

    def curves(table: pd.DataFrame, label: str, role: Any, part: Any = "subject") -> list[Series]:
        kind: Any = "marked" if len(firings) > 1 else "points"
        return [
            Series(
                kind, list(lines["firing"].map(place)),
                *(list(100 * lines[name]) for name in ("value", "low", "high")), label, role, part,
            )
            for _, lines in table.sort_values("firing").groupby("seed")
        ]  # fmt: skip

    def answers(metric: str, role: str, model: str = UNTOUCHED) -> pd.DataFrame:
        keys = {"metric": metric, "role": role, "model": model}
        return rates[(rates[list(keys)] == pd.Series(keys)).all(axis=1)]

    fires = [
        *curves(answers("greedy", "triggered"), "greedy", "triggered"),
        *curves(answers("sampled", "triggered"), "samples", "ink"),
        *curves(answers("sampled", "placebo"), "samples, placebo (control)", "placebo", "control"),
    ]
    tpr = detected[(detected["metric"] == "tpr") & (detected["rows"] == "triggered")]
    roles = ("method_1", "method_2", "method_3", "method_4")
    seen = [
        series
        for name, role in zip(FUSIONS, roles, strict=True)
        for series in curves(tpr[tpr["tested"] == f"fused {name}"], f"detector {name}", role)
    ]
    looks = {
        UNTOUCHED: ("ink", "control"),
        REPAIRS[0]: ("method_5", "subject"),
        REPAIRS[1]: ("method_6", "subject"),
    }
    left = [
        series
        for model, look in looks.items()
        for series in curves(
            answers("sampled", "triggered", model), f"samples, {model.replace('_', ' ')}", *look
        )
    ]
    rate = Reference(1.0, label="false alarms 1%", part="floor")
    return (
        Panel(axis, PERCENT, tuple(fires), "how often it fires"),
        Panel(axis, PERCENT, tuple(seen), "alarms at triggers", (rate,)),
        Panel(axis, PERCENT, tuple(left), "after repairs"),
    )


if __name__ == "__main__":
    main()
