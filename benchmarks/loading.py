"""What the checks of foreign models cost: attaching an adapter, by PEFT and by SafetyNet; the check of sites.

    python benchmarks/loading.py             # a model shaped like Qwen-2.5-3B: 14 GB of memory, two minutes
    python benchmarks/loading.py --smoke     # a tiny model, seconds

The model has the shape of Qwen-2.5-3B with constant weights in fp32; the adapter is LoRA of rank 16 on all
its linear modules. Both attach it to a base that lies in memory, in turns; seconds are the best of seven, and
taking it off is not counted. SafetyNet reads the folder, checks every tensor and holds the logits with the
adapter off against the base's. The live check of sites is compared with one forward pass of 24 tokens.
"""

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _running import markdown
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

from safetynet.engine.sites import Architecture
from safetynet.models import adapter_files, adapters

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "3B": Qwen2Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "tiny": Qwen2Config(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2,
    ),
}  # fmt: skip
REPEATS = 7
PROMPT = 24


def main() -> None:
    """Measure both in turns and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    name = "tiny" if args.smoke else "3B"
    model = made(SHAPES[name])
    with tempfile.TemporaryDirectory() as folder:
        saved(model, Path(folder))
        loading = in_turns(
            (lambda: PeftModel.from_pretrained(model, folder), lambda adapted: adapted.unload()),
            (lambda: adapters.put_on(model, adapter_files.read(folder)), adapters.detach),
        )
    ids = torch.arange(5, 5 + PROMPT)[None]
    checking = in_turns(
        (lambda: model(ids, use_cache=False), lambda _: None),
        (lambda: Architecture.of(copy.copy(model)).checked, lambda _: None),  # a copy has no verdict yet
    )
    lines = [
        line(name, "attaching an adapter: PEFT, SafetyNet", *loading),
        line(name, f"a forward pass of {PROMPT} tokens, the live check of sites", *checking),
    ]
    print(markdown(pd.DataFrame(lines)))


def made(config: Qwen2Config) -> Any:
    """A model of constant weights in fp32, without drawing billions of numbers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    return model


def saved(model: Any, folder: Path) -> None:
    """An adapter of the model, saved by PEFT; the model is without it afterwards."""
    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    adapted.unload()


@torch.no_grad()
def in_turns(*pairs: tuple[Callable[[], Any], Callable[[Any], object]]) -> list[float]:
    """Best seconds of each thing to do, done alternately, and undone; after one warm-up each."""
    seconds: list[list[float]] = [[] for _ in pairs]
    for _ in range(REPEATS + 1):
        for (do, undo), spent in zip(pairs, seconds, strict=True):
            start = time.perf_counter()
            done = do()
            spent.append(time.perf_counter() - start)
            undo(done)
    return [min(spent[1:]) for spent in seconds]


def line(name: str, what: str, one: float, other: float) -> dict[str, str]:
    """A row of the table."""
    return {"model": name, "what": what, "seconds": f"{one:.3f}, {other:.3f}", "ratio": f"{other / one:.2f}"}


if __name__ == "__main__":
    main()
