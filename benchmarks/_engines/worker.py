"""One engine in a process of its own: runs sweeps, prints one line of JSON for each.

    python -m _engines.worker ENGINE --sweeps positions heads --repeats 3

Started by `interventions.py` in its folder, with the interpreter that has the engine's package. Seconds are
the best of the repetitions after one warm-up; a sweep includes the source's run.
"""

import argparse
import gc
import importlib
import json
import platform
import resource
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from . import ENGINES
from .workload import SHAPES, TOKENS, Sweep, build_model, build_prompts, build_tokenizer, sweeps


def peak_mb() -> float:
    """Largest size of this process so far; on a GPU of what was allocated there."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if platform.system() == "Darwin" else 1024)


def forget_peak() -> None:
    """Let the largest size count from now on, where the system allows it (GPUs and Linux)."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def measure(run: Any, prepared: Any, sweep: Sweep, repeats: int, device: str) -> dict[str, Any]:
    """Seconds, results and memory of one sweep; or why there are none."""
    receiver, source = (ids.to(device) for ids in build_prompts(sweep))
    forget_peak()
    seconds = []
    try:
        for _ in range(1 + repeats):
            start = time.perf_counter()
            metrics = run(prepared, receiver, source, sweep, TOKENS).double().tolist()  # waits for a GPU
            seconds.append(time.perf_counter() - start)
    except NotImplementedError as reason:
        return {"sweep": sweep.name, "unsupported": str(reason)}
    return {
        "sweep": sweep.name,
        "seconds": min(seconds[1:]),
        "all_seconds": seconds,
        "peak_mb": peak_mb(),
        "metrics": metrics,
    }


def main() -> int:
    """Say the versions first, then the sweeps; `missing` where the engine's package is not there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--sweeps", nargs="+", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=SHAPES, default="full")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.size]
    name, attribute = ENGINES[args.engine]
    try:
        module = importlib.import_module(f"{__package__}.{name}")
        model = build_model(shape, args.device)
        weights = sum(p.double().abs().sum().item() for p in model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            prepared = module.prepare(model, build_tokenizer(shape, Path(folder)))
        packages = ("torch", "transformers", *module.PACKAGES)
        versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
        forget_peak()  # loading needs more than keeping
        say({"versions": versions, "weights": weights, "loaded_mb": peak_mb()})
        for sweep in args.sweeps:
            run = getattr(module, attribute)
            say(measure(run, prepared, sweeps(shape)[sweep], args.repeats, args.device))
    except ImportError as error:
        say({"missing": str(error)})
    return 0


def say(found: dict[str, Any]) -> None:
    """One line of JSON; the packages may print other lines."""
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    sys.exit(main())
