"""Activation patching by several engines: the same sweeps, model and numbers, different times.

    python benchmarks/interventions.py                             # those engines that this interpreter has
    python benchmarks/interventions.py --python pyvene=venvs/pyvene/bin/python --out table.md
    python benchmarks/interventions.py --smoke                     # plain hooks and SafetyNet, tiny model
    python benchmarks/interventions.py --device cuda --size large --sweeps positions-8 batch

The model is a random LlamaForCausalLM of 8 layers of 512 in fp32 (`large`: 16 layers of 2048, a billion
parameters; `smollm2`: 30 of 576, the shape of SmolLM2-135M; `small`: 2 of 64), on the CPU where nothing else
is asked for; prompts have 64 tokens. A sweep puts activations of a source prompt into the run of a receiver,
one site at a time; the metric is a difference of two logits at the last position.

positions    resid_pre, each layer x all 64 positions, one pair that differs from the second token on
positions-8  the same at 8 positions
layers       resid_pre of all positions of a layer (a check more than a sweep: it ends in the source's run)
heads        each head's output before the output projection, all positions: 8 layers x 8 heads
batch        positions-8 on 32 pairs side by side
late         positions, for a pair that differs in its last quarter only
late-8       positions-8, for such a pair

Engines run in processes of their own, each on all sweeps; seconds are the best of three after one warm-up and
include the source's run. `difference` is the largest from plain hooks. `hooks` is one forward per patch as
people write it; `hooks-tail` computes the logits of the last position alone, as all engines below it do but
the `-documented`, which are what the package's own documentation has its users type; `-batched` runs patches
of a layer, up to 32 rows, as one batch; `-skip` leaves out the layers before the patch by its own means.

The other packages are dependencies of this benchmark only, none of SafetyNet. Each goes into an environment
of its own, torch first, with the versions of torch and transformers that SafetyNet is tested with:

    pip install torch==2.13.0 && pip install transformers==5.23.0 PACKAGES

where PACKAGES is: transformer-lens==4.3.0 | nnsight==0.8.1 | nnterp==1.3.0 nnsight==0.7.0 | pyvene==0.1.8.
`--python ENGINE=PATH` names the interpreter of one engine and of its variants (`nnsight` of `nnsight-skip`,
unless that has one of its own). Read ratios: seconds are those of one machine at one time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from _engines import ENGINES  # noqa: E402 - no torch here: this process only starts others

SWEEPS = ("positions", "positions-8", "layers", "heads", "batch", "late", "late-8")
SIZES = {
    "small": "2 layers of 64, 12 tokens",
    "full": "8 layers of 512, 64 tokens",
    "large": "16 layers of 2048, 64 tokens",
    "smollm2": "30 layers of 576, 64 tokens",
}
REFERENCE, OURS = "hooks", "safetynet"
TOLERANCE = 1e-4
HEADER = ("sweep", "engine", "seconds", "x SafetyNet", "x hooks", "difference", "peak MB")


def interpreter(engine: str, chosen: dict[str, str]) -> str:
    """The one named for the engine, or for the engine that it is a variant of, or this one."""
    return chosen.get(engine) or chosen.get(engine.split("-")[0]) or sys.executable


def measure(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the engine's process said: `versions`, `sweeps`, `missing`, and `failed` where it broke off."""
    command = [interpreter(engine, args.python), "-m", "_engines.worker", engine]
    command += ["--repeats", str(args.repeats), "--threads", str(args.threads), "--sweeps", *args.sweeps]
    command += ["--size", args.size, "--device", args.device]
    found: dict[str, Any] = {"versions": {}, "sweeps": {}}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command,
            cwd=FOLDER,
            env=environment(args.threads),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            for line in process.stdout:
                if line.startswith("{"):
                    said = json.loads(line)
                    if "sweep" in said:
                        found["sweeps"][said.pop("sweep")] = said
                    else:
                        found |= said
        if process.returncode:
            errors.seek(0)
            lines = errors.read().strip().splitlines()
            found["failed"] = lines[-1] if lines else f"exit code {process.returncode}"
    return found


def environment(threads: int) -> dict[str, str]:
    """This one's, offline, with so many threads."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def difference(metrics: list[list[float]], reference: list[list[float]]) -> float:
    """The largest, over sites and pairs; infinite where a value is not a number or the shapes differ."""
    if [len(row) for row in metrics] != [len(row) for row in reference]:
        return float("inf")
    pairs = [
        (a, b)
        for left, right in zip(metrics, reference, strict=True)
        for a, b in zip(left, right, strict=True)
    ]
    return max(abs(a - b) if a == a and b == b else float("inf") for a, b in pairs)


def row(sweep: str, engine: str, results: dict[str, Any]) -> tuple[list[str], bool]:
    """One line of the table, and whether it is as it should be."""
    result = results[engine]
    found = result["sweeps"].get(sweep)
    if found is None or "unsupported" in found:
        reason = "failed: " + result["failed"] if "failed" in result else "not run"
        if found:
            reason = found["unsupported"]
        return [sweep, engine, reason, "-", "-", "-", "-"], found is not None
    cells = [sweep, engine, f"{found['seconds']:.3f}"]
    for other in (OURS, REFERENCE):
        base = results.get(other, {}).get("sweeps", {}).get(sweep)
        cells.append(f"{found['seconds'] / base['seconds']:.2f}" if base else "-")
    reference = results.get(REFERENCE, {}).get("sweeps", {}).get(sweep)
    largest = difference(found["metrics"], reference["metrics"]) if reference else 0.0
    cells.append(f"{largest:.1e}" if reference else "-")
    return [*cells, f"{found['peak_mb']:.0f}"], largest <= TOLERANCE


def report(results: dict[str, Any], args: argparse.Namespace) -> tuple[str, bool]:
    """The Markdown text, and whether ours and every engine that is there gave the reference's numbers."""
    where = "the GPU" if args.device == "cuda" else f"{args.threads} threads"
    lines = [f"{SIZES[args.size]}, {where}, best of {args.repeats}", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|---|---|" + "---:|" * (len(HEADER) - 2)]
    present = [engine for engine, result in results.items() if "missing" not in result]
    right = True
    for sweep in args.sweeps:
        for engine in present:
            cells, fine = row(sweep, engine, results)
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
            right &= fine
    lines += ["", "| engine | versions | MB before the first sweep |", "|---|---|---:|"]
    for engine, result in results.items():
        if engine in present:
            versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
            lines.append(f"| {engine} | {versions} | {result.get('loaded_mb', 0):.0f} |")
        else:
            lines.append(f"| {engine} | not installed ({result['missing']}) | - |")
    weights = {result["weights"] for result in results.values() if "weights" in result}
    if len(weights) > 1:
        lines += ["", f"The engines did not have the same weights: {sorted(weights)}"]
    ours_are_there = OURS not in results or OURS in present
    return "\n".join(lines) + "\n", right and ours_are_there and len(weights) <= 1


def pair(text: str) -> tuple[str, str]:
    """ENGINE=PATH; a path stays as it is, since a link to an interpreter names its environment."""
    engine, _, path = text.partition("=")
    if engine not in ENGINES or not path:
        raise argparse.ArgumentTypeError(f"{text!r}: ENGINE=PATH with an engine of {', '.join(ENGINES)}")
    return engine, str(Path(path).absolute())


def main() -> int:
    """Run all; 1 when an engine failed or gave other numbers than plain hooks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="all of them, if not given")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--python", type=pair, action="append", default=[], metavar="ENGINE=PATH")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the table, written after each engine")
    parser.add_argument("--size", choices=SIZES, default="full", help="small: checks the numbers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--smoke", action="store_true", help="small, once, with hooks and safetynet alone")
    args = parser.parse_args()
    args.python = dict(args.python)
    if args.smoke:
        args.size, args.repeats, args.threads = "small", 1, 1
        args.engines = args.engines or [OURS, REFERENCE]
    results = {}
    for engine in args.engines or ENGINES:
        results[engine] = measure(engine, args)
        state = results[engine].get("missing") or results[engine].get("failed") or "done"
        print(f"{engine}: {state}", file=sys.stderr, flush=True)
        text, right = report(results, args)
        if args.out:
            args.out.write_text(
                text
            )  # after each engine: a long run that is stopped has not been for nothing
    print(text, end="")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
