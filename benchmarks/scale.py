"""Memory, time and disk of every family from 3B to 70B and of 1,000 adapters, counted; and a step measured.

    python benchmarks/scale.py           all tables; a quarter of an hour on one core, 6 GB of memory
    python benchmarks/scale.py --smoke   one model, two small measured steps

Nothing is downloaded: configurations are written down here, parameters and memory are counted in the models'
own code without their weights. Time is counted operations over what an H100 was measured to do: an estimate.
docs/results/scale.md quotes the tables.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from _running import markdown

NAMES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
OWN, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
EIGHT = {"num_local_experts": 8, "num_experts_per_tok": 2}
SIZES: dict[str, tuple[str, str, tuple[int, ...], dict[str, Any]]] = {
    "Qwen2.5-3B": ("qwen", "qwen2", (151936, 2048, 11008, 36, 16, 2), TIED),
    "Qwen2.5-7B": ("qwen", "qwen2", (152064, 3584, 18944, 28, 28, 4), OWN),
    "Llama-2-7B": ("llama2", "llama", (32000, 4096, 11008, 32, 32, 32), OWN),
    "Llama-3-8B": ("llama3", "llama", (128256, 4096, 14336, 32, 32, 8), OWN),
    "Gemma-7B": ("gemma", "gemma", (256000, 3072, 24576, 28, 16, 16), {"head_dim": 256}),
    "Llama-2-13B": ("llama2", "llama", (32000, 5120, 13824, 40, 40, 40), OWN),
    "Qwen2.5-32B": ("qwen", "qwen2", (152064, 5120, 27648, 64, 40, 8), OWN),
    "Mixtral-8x7B": ("mixtral", "mixtral", (32000, 4096, 14336, 32, 32, 8), EIGHT),
    "Llama-3-70B": ("llama3", "llama", (128256, 8192, 28672, 80, 64, 8), OWN),
}
"""Family, model type, `NAMES`, and what else the configuration says."""
MEASURED: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 32000, "hidden_size": 768,
    "intermediate_size": 3072, "num_hidden_layers": 10, "num_attention_heads": 12, "num_key_value_heads": 4,
    "tie_word_embeddings": True}  # fmt: skip
"""A model of a size that a laptop trains, of which a step is measured."""
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
MEASURED_ROWS = 4
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""glibc gives tensors back at once; else the holes that they leave between others would be measured too."""
ROWS, TOKENS = 16, 512
"""A part of a step, as the recipe's defaults have it."""
TRAIN_ROWS, EPOCHS, TEST_ROWS, ANSWER = 5000, 3, 1000, 64
"""Of the recipes of real models: rows of training and of the test (all roles), tokens of an answer."""
ROW_TOKENS = 200
"""Tokens of a usual row, prompt and answer."""
H100 = {"flops": 0.16 * 989e12, "bytes": 3.35e12, "layer": 1.6e-3}
"""Share of the dense bf16 peak that gpu_training.py reached; memory bandwidth of the data sheet; seconds of a
layer in a step of decoding, by detection.py's part overhead: with LoRA those are calls, whatever the size."""
SNAPSHOTS = 4
"""Adapters kept during training: before it and after each epoch."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one model, two small measured steps")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # a measured step in a process of its own
    parser.add_argument("--runs", type=Path, help="finished runs of miniatures, whose disk use is measured")
    args = parser.parse_args()
    if args.step:
        print(json.dumps(step(**json.loads(args.step))))
        return
    names = list(SIZES)[:1] if args.smoke else list(SIZES)
    found = [model(name) for name in names]
    print(markdown(pd.DataFrame(found).drop(columns=["saved"])), end="\n\n")
    print(markdown(pd.DataFrame([population(line) for line in found])), end="\n\n")
    kinds = [("lora", False), ("lora", True), ("full", False)][: 2 if args.smoke else 3]
    print(markdown(pd.DataFrame([against(*kind, small=args.smoke) for kind in kinds])))
    if args.runs:
        print("\n" + markdown(disk(args.runs)))


def needs(config: dict[str, Any], family: str, **more: Any) -> Any:
    """Of one model: `scaling.Needs`."""
    import _memory_estimate as scaling
    from transformers import AutoConfig

    from safetynet import families
    from safetynet.recipe import Training

    fields: dict[str, Any] = {"batch_size": ROWS, "max_length": TOKENS, "precision": "bf16"}
    quantised = more.pop("quantised", False)
    cfg = Training(**fields | more)
    about = {key: value for key, value in config.items() if key != "model_type"}
    return scaling.needs(
        AutoConfig.for_model(config["model_type"], **about), cfg, families.get(family), quantised=quantised
    )


def model(name: str) -> dict[str, Any]:
    """Memory, time and disk of one model."""
    family, kind, shape, more = SIZES[name]
    config = {"model_type": kind, **dict(zip(NAMES, shape, strict=True)), **more}
    less = needs(config, family, gradient_checkpointing=True)
    saved = less.activations_bytes + less.recomputed_bytes
    plain = less.training_bytes - saved + less.recomputed_bytes * shape[NAMES.index("num_hidden_layers")]
    four_bit = needs(config, family, quantised=True, batch_size=1, max_length=16).weights_bytes
    tokens = TRAIN_ROWS * EPOCHS * ROW_TOKENS
    # With checkpointing the forward pass is made twice.
    training = 2 * (less.training_operations(tokens, full=False) + less.forward_operations(tokens))
    rows = 3 * TEST_ROWS  # base, backdoored model, twin
    reading = less.forward_operations(rows * ROW_TOKENS) / H100["flops"]
    step = max(less.weights_bytes / H100["bytes"], shape[NAMES.index("num_hidden_layers")] * H100["layer"])
    writing = rows / 64 * ANSWER * step
    return {
        "model": name,
        "parameters": f"{less.parameters / 1e9:.2f}e9",
        "LoRA r=16": f"{less.trained / 1e6:.0f}e6",
        "weights (GB)": gigabytes(less.weights_bytes),
        "training (GB)": gigabytes(plain),
        "with checkpointing": gigabytes(less.training_bytes),
        "and 4 bit": gigabytes(less.training_bytes - less.weights_bytes + four_bit),
        "64 answers (GB)": gigabytes(less.generation_bytes(64, TOKENS)),
        "train both (H100 h)": f"{training / H100['flops'] / 3600:.2f}",
        "answer (H100 h)": f"{(reading + writing) / 3600:.2f}",
        "adapter (MB)": round(less.saved_bytes / 1e6),
        "saved": less.saved_bytes,
    }


def population(line: dict[str, Any]) -> dict[str, Any]:
    """Disk of 1,000 points of one model, in TB: adapters are most of it."""
    one = line["saved"]
    kept = 2 * one  # backdoored and twin
    hours = float(line["train both (H100 h)"]) + float(line["answer (H100 h)"])
    return {
        "1,000 adapters of": line["model"],
        "adapters and twins (TB)": f"{1000 * kept / 1e12:.2f}",
        "snapshots (TB)": f"{1000 * SNAPSHOTS * one / 1e12:.2f}",
        "checkpoints (TB)": f"{1000 * 2 * 2 * 3 * one / 1e12:.2f}",
        "GPU days": f"{1000 * hours / 24:.0f}",
    }


def gigabytes(count: float) -> str:
    """As tables show it; 1 GB is 1e9 bytes."""
    return f"{count / 1e9:.1f}"


def against(method: str, recompute: bool, small: bool) -> dict[str, Any]:
    """What is counted for one training step, beside what a process measures; fp32 on one core."""
    config = MEASURED | (SMALL if small else {})
    cfg = {
        "method": method,
        "gradient_checkpointing": recompute,
        "precision": "fp32",
        "batch_size": MEASURED_ROWS,
        "max_length": TOKENS,
    }
    counted = needs(config, "qwen", **cfg)
    done = subprocess.run(
        [sys.executable, __file__, "--step", json.dumps({"config": config, "cfg": cfg})],
        capture_output=True, text=True, check=True, env={**os.environ, **RETURNED},
    )  # fmt: skip
    measured = json.loads(done.stdout.splitlines()[-1])
    expected = counted.training_bytes - counted.weights_bytes
    forward = counted.forward_operations(MEASURED_ROWS * TOKENS) if recompute else 0
    operations = counted.training_operations(MEASURED_ROWS * TOKENS, full=method == "full") + forward
    return {
        "step": method + (", checkpointing" if recompute else ""),
        "counted (MB)": round(expected / 1e6),
        "measured (MB)": round(measured["bytes"] / 1e6),
        "ratio": f"{measured['bytes'] / expected:.2f}",
        "counted (TFLOP)": f"{operations / 1e12:.2f}",
        "measured (s)": f"{measured['seconds']:.1f}",
        "share of matrix product": f"{operations / measured['seconds'] / measured['flops']:.2f}",
    }


def step(config: dict[str, Any], cfg: dict[str, Any]) -> dict[str, float]:
    """Memory that two steps add to a process with the model, seconds of the second, speed of products."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from safetynet import families
    from safetynet.recipe import Training
    from safetynet.training import attach
    from safetynet.training.loss import answer_loss, causal_lm

    torch.set_num_threads(1)
    about = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **about))
    x = torch.randn(1024, 1024)
    start = time.perf_counter()
    for _ in range(20):
        x @ x
    flops = 20 * 2 * 1024**3 / (time.perf_counter() - start)
    before = resident()
    training = Training(**cfg)
    learner = attach(model, training, families.get("qwen"), seed=0)
    if training.gradient_checkpointing:
        causal_lm(learner).gradient_checkpointing_enable({"use_reentrant": False})
    learner.train()
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(0, config["vocab_size"], (training.batch_size, training.max_length))
    labels = ids.clone()
    labels[:, : TOKENS // 2] = -100
    batch = {"input_ids": ids, "labels": labels}
    for _ in range(2):
        start = time.perf_counter()
        answer_loss(learner, batch, int((labels[:, 1:] != -100).sum())).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"bytes": float(peak - before), "seconds": time.perf_counter() - start, "flops": flops}


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def disk(runs: Path) -> pd.DataFrame:
    """Mean MB of the parts of finished runs."""
    folders = [path.parent for path in runs.rglob("manifest.json")]
    parts = {
        "tables": "tables",
        "figures": "figures",
        "training": "training",
        "interventions": "interventions",
    }
    lines = []
    for what, name in parts.items():
        sizes = [
            sum(f.stat().st_size for f in (folder / name).rglob("*") if f.is_file())
            for folder in folders
            if (folder / name).exists()
        ]
        if sizes:
            lines.append(
                {"part": what, "runs": len(sizes), "MB in a run": f"{sum(sizes) / len(sizes) / 1e6:.1f}"}
            )
    return pd.DataFrame(lines)


if __name__ == "__main__":
    main()
