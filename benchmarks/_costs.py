"""What a monitor costs: time of answers under the guard, memory of capture.

In: a model, its prompts. Out: tables. Times are those of one machine that does nothing else. Larger models
are random, with matrices that cost more than what surrounds them; on a GPU one has Qwen2.5-3B's shape.
"""

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def overheads(model: Any, serialiser: Any, prompts: pd.DataFrame, smoke: bool) -> pd.DataFrame:
    """Ratio of guarded to plain generation: a monitor of one pass and the default one, in two models."""
    from safetynet.detection.capture import capture
    from safetynet.detection.guard import Guard
    from safetynet.detection.monitor import Monitor
    from safetynet.detection.overhead import overhead
    from safetynet.detection.panel import PRESETS
    from safetynet.detection.plan import Plan

    models = {"miniature": model} | ({} if smoke else larger(serialiser, model.device))
    tables = []
    for (size, each), name in product(models.items(), ("activations", "adapter")):
        spec = Plan.of([name], 0.2).spec
        features = capture(each, serialiser, list(prompts["messages"]), spec, batch_size=64)
        guard = Guard(each, serialiser, Monitor.fit(features, PRESETS[name]), rate=0.2)
        table = overhead(guard, list(prompts["messages"]), new_tokens=32, repeats=2 if smoke else 20)
        tables.append(table.assign(model=size, panel=name).round(4))
    return pd.concat(tables, ignore_index=True)


def larger(serialiser: Any, device: Any) -> dict[str, Any]:
    """Random networks with a random adapter, by their size."""
    import torch
    from evaluation import random_model
    from gpu_training import QWEN_3B
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    models = {"8 layers of 512": random_model(serialiser, device)}
    if device.type == "cuda":
        with device:
            models["Qwen2.5-3B's shape, bf16"] = AutoModelForCausalLM.from_config(
                QWEN_3B, dtype=torch.bfloat16
            )
    adapter = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    return {name: get_peft_model(each, adapter).eval() for name, each in models.items()}


def memory(smoke: bool) -> pd.DataFrame:
    """Peak memory of two ways to read the last token and the mean of every layer, nine processes each."""
    lines = []
    for way in ("capture", "hidden_states"):
        command = [sys.executable, str(Path(__file__).with_name("_memory.py")), way]
        found = [
            float(subprocess.run(command + ["--small"] * smoke, capture_output=True, check=True).stdout)
            for _ in range(1 if smoke else 9)
        ]
        middle, least, most = np.median(found), min(found), max(found)
        lines.append({"way": way, "MB above the loaded model": f"{middle:.0f} ({least:.0f} to {most:.0f})"})
    return pd.DataFrame(lines)
