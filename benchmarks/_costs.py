"""What a monitor costs: time of answers under the guard, memory of capture.

In: models, prompts. Out: tables. Times are those of one machine that does nothing else. Random models stand
for larger ones: 8 layers of 512 on the CPU, Qwen2.5-3B's shape on a GPU.
"""

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def overheads(models: dict[str, Any], serialiser: Any, prompts: pd.DataFrame, repeats: int) -> pd.DataFrame:
    """Ratio of guarded to plain generation: monitors of one pass and of more, in each of the models."""
    from safetynet.detection.capture import capture
    from safetynet.detection.detector_set import PRESETS
    from safetynet.detection.guard import Guard, overhead
    from safetynet.detection.monitor import Monitor
    from safetynet.detection.stage import Plan

    tables = []
    for (size, each), name in product(models.items(), ("activations", "adapter", "behaviour")):
        spec = Plan.of([name], 0.2).spec
        features = capture(each, serialiser, list(prompts["messages"]), spec, batch_size=64)
        guard = Guard(each, serialiser, Monitor.fit(features, PRESETS[name]), rate=0.2)
        table = overhead(guard, list(prompts["messages"]), new_tokens=32, repeats=repeats)
        tables.append(table.assign(model=size, panel=name).round(4))
        print(tables[-1].to_string(), file=sys.stderr, flush=True)
    return pd.concat(tables, ignore_index=True)


def eight_layers(serialiser: Any) -> Any:
    """A random network in which matrices cost more than what surrounds them, with a random adapter."""
    import torch
    from evaluation import random_model

    return adapted(random_model(serialiser, torch.device("cpu")))


def of_a_gpu() -> Any:
    """A random network of Qwen2.5-3B's shape in bf16 on the GPU, with a random adapter."""
    import torch
    from gpu_training import QWEN_3B
    from transformers import AutoModelForCausalLM

    with torch.device("cuda"):
        return adapted(AutoModelForCausalLM.from_config(QWEN_3B, dtype=torch.bfloat16))


def adapted(model: Any) -> Any:
    """With LoRA of rank 16 at every linear module, not zero."""
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, adapter).eval()


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
