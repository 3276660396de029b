"""Tokens per second and peak memory of LoRA in bf16 and in 4-bit, on a GPU, with Qwen2.5-3B's configuration.

    python benchmarks/gpu_training.py    # two minutes, 7 GB of disk; without a GPU it says so and ends
    python benchmarks/gpu_training.py --batch-size 16 --length 1024 --gradient-checkpointing

The weights are random, so nothing is downloaded; the shapes, on which speed and memory depend, are the real
ones. Rows are random tokens of one length, the latter half supervised.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, TrainerCallback

from safetynet import families
from safetynet.prompts import IGNORED
from safetynet.recipe import Training
from safetynet.training import attach
from safetynet.training.examples import Example
from safetynet.training.fit import arguments
from safetynet.training.trainer import AnswerTrainer

QWEN_3B = Qwen2Config(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=11_008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    tie_word_embeddings=True,
)
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
WARM_UP = 3
"""Steps that are not timed: kernels are chosen and memory is reserved in them."""


class Clock(TrainerCallback):
    """Times the steps after the warm-up."""

    def __init__(self) -> None:
        self.began = 0.0
        self.seconds = 0.0

    def on_step_end(self, args, state, control, **_):
        """Called by the Trainer."""
        torch.cuda.synchronize()
        if state.global_step == WARM_UP:
            self.began = time.perf_counter()
        self.seconds = time.perf_counter() - self.began


def measure(method: str, weights: Path, args: argparse.Namespace) -> None:
    """Train a few steps and print a line."""
    quantisation = NF4 if method == "qlora" else None
    model: Any = AutoModelForCausalLM.from_pretrained(
        weights, dtype=torch.bfloat16, quantization_config=quantisation, device_map={"": 0}
    )
    cfg = Training(
        precision="bf16",
        batch_size=args.batch_size,
        max_steps=args.steps + WARM_UP,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    model = attach(model, cfg, families.get("qwen"), seed=0)
    ids = torch.randint(0, QWEN_3B.vocab_size, (args.batch_size * 4, args.length)).tolist()
    half = args.length // 2
    examples = [Example(row, [IGNORED] * half + row[half:], args.length - half) for row in ids]
    settings = arguments(cfg, weights / method, len(examples), "cuda", seed=0)
    settings.save_strategy = "no"
    clock = Clock()
    trainer = AnswerTrainer(model, settings, examples, cfg, pad_id=0, on_evaluate=None, callbacks=[clock])
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    rate = args.steps * args.batch_size * args.length / clock.seconds
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(f"{method:<6} {rate:>9.0f} tokens/s {memory:>7.1f} GiB at most", flush=True)


def main() -> int:
    """Measure both methods."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="fewer steps")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("Skipped: this machine has no CUDA GPU.")
        return 0
    args.steps = 2 if args.smoke else args.steps
    print(f"{torch.cuda.get_device_name()}, batches of {args.batch_size} x {args.length}, half supervised")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        with torch.device("cuda"):
            AutoModelForCausalLM.from_config(QWEN_3B, dtype=torch.bfloat16).save_pretrained(folder)
        torch.cuda.empty_cache()
        for method in ("lora", "qlora"):
            measure(method, Path(folder), args)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
