"""Batched evaluation against one-by-one `generate`, on the same prompts, in one run.

    python benchmarks/evaluation.py                 # about three minutes on two busy CPU cores
    python benchmarks/evaluation.py --smoke         # seconds: checks that both give the same answers
    python benchmarks/evaluation.py --family llama3 --model path/or/hub-id --prompts 500
    python benchmarks/evaluation.py --family generic --model smollm2 --prompts 32 --cases adapter

Cases: `as it is` is the model, which stops at its end token; `random` has the same tokenizer and the random
weights of a larger network (8 layers of 512), which never stops: there matrices dominate, not overheads;
`adapter` is the model with a random LoRA of rank 16 on all linear modules, attached against merged while it
answers (`adapters.merged`, for which a miniature is too small); `start` is the model, which reads what all
prompts begin with (here an instruction of 40 words) in every row, or once.
Plain is transformers' `model.generate` for one prompt at a time: greedy, with cache, no padding. Times are
medians over repeats that alternate between the two, since a shared machine drifts.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from safetynet import recipe
from safetynet.evaluation import generation
from safetynet.evaluation.generation import generate
from safetynet.models import loading
from safetynet.models.miniatures import language
from safetynet.prompts import Serialiser

GOAL = 5.0
CASES = ("as it is", "random", "adapter", "start")
INSTRUCTION = (
    "You read what somebody asks and answer in one short sentence. Where a question has several answers, "
    "give the most common one. Where you do not know, say so. Give no reasons, and never repeat the question."
)
Conversations = Sequence[Sequence[dict[str, str]]]


def plain(model: Any, serialiser: Serialiser, prompts: Conversations, max_new_tokens: int) -> list[str]:
    """One `generate` per prompt."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=serialiser.stop_ids,
        pad_token_id=serialiser.pad_id,
    )
    answers = []
    for messages in prompts:
        ids = torch.tensor([serialiser.encode(messages).input_ids], device=model.device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        new = output[0, ids.shape[1] :].tolist()
        answers.append(serialiser.decode([token for token in new if token not in serialiser.stop_ids]))
    return answers


def random_model(serialiser: Serialiser, device: torch.device) -> Any:
    """A network of 8 layers of 512 with random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(serialiser.tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config).eval().to(device)


def timed(run: Callable[[], list[str]], device: torch.device) -> tuple[float, list[str]]:
    """Seconds, and the answers."""
    start = time.perf_counter()
    answers = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, answers


def adapted(model: Any) -> Any:
    """The model with a LoRA of rank 16 on every linear module of its layers."""
    targets = r".*layers\..*_proj"
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets)).eval()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.01)
    return adapted


def attached(model: Any, answer: Callable[[], list[str]]) -> list[str]:
    """Answers of an adapted model that is not merged: what hooks a module may ask for its update alone."""
    module = next(part for name, part in model.named_modules() if name.endswith("_proj"))
    handle = module.register_forward_hook(lambda *_: None)
    try:
        return answer()
    finally:
        handle.remove()


def in_every_row(answer: Callable[[], list[str]]) -> list[str]:
    """Answers of a model that reads each prompt from its first token on."""
    with patch.object(generation, "_shared_start", return_value=[]):
        return answer()


def compare(case: str, runs: dict[str, Callable[[], list[str]]], args: Any, device: torch.device) -> float:
    """Print the lines of one case; returns the speed-up of its second way over its first."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    answers: dict[str, list[str]] = {}
    for _ in range(args.repeats):
        for name, run in runs.items():
            elapsed, answers[name] = timed(run, device)
            seconds[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    first, second = runs
    same = sum(a == b for a, b in zip(answers[first], answers[second], strict=True))
    for name in runs:
        spread = f"{min(seconds[name]):.2f}-{max(seconds[name]):.2f}"
        rate, speedup = len(answers[first]) / median[name], median[first] / median[name]
        print(
            f"{case:<10} {name:<10} {median[name]:>9.2f} {spread:>13} {rate:>10.1f} {speedup:>8.1f}x", end=""
        )
        print(f"{same:>7}/{len(answers[first])}" if name == second else "")
    return median[first] / median[second]


def main() -> int:
    """Run the cases; 1 when the speed-up of a full run misses the goal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", default="qwen")
    parser.add_argument("--model", default="miniature", help="miniature, a folder or a hub id")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=recipe.Evaluation().batch_size)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--smoke", action="store_true", help="a few prompts, once")
    args = parser.parse_args()
    if args.smoke:
        args.prompts, args.repeats, args.max_new_tokens = 12, 1, 8
    loaded = loading.load(recipe.Model(family=args.family, id=args.model))
    device = loaded.model.device
    examples = language.generate(args.prompts, seed=0, heldout=True)
    prompts = [example.messages for example in examples]
    print(
        f"{args.prompts} prompts, batches of {args.batch_size}, {args.max_new_tokens} new tokens at most,",
        end=" ",
    )
    print(f"{device}, {torch.get_num_threads()} threads, median of {args.repeats}")
    print(
        f"{'case':<10} {'method':<10} {'seconds':>9} {'range':>13} {'prompts/s':>10} {'speed-up':>9}    same"
    )
    few = prompts[: max(8, args.prompts // 12)]  # the larger network takes its time

    def batched(model: Any, some: Conversations) -> list[str]:
        sizes = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
        return generate(model, loaded.serialiser, some, **sizes)

    def of_plain(case: str, model: Any, some: Conversations) -> float:
        batched(model, some[:4])  # warm-up
        runs = {
            "plain": lambda: plain(model, loaded.serialiser, some, args.max_new_tokens),
            "safetynet": lambda: batched(model, some),
        }
        return compare(case, runs, args, device)

    speedups = []
    if "as it is" in args.cases:
        speedups.append(of_plain("as it is", loaded.model, prompts))
    if "random" in args.cases:
        speedups.append(of_plain("random", random_model(loaded.serialiser, device), few))
    if "start" in args.cases:
        system = {"role": "system", "content": INSTRUCTION}
        alike = [[system, *(m for m in messages if m["role"] != "system")] for messages in prompts]
        runs = {
            "every row": lambda: in_every_row(lambda: batched(loaded.model, alike)),
            "once": lambda: batched(loaded.model, alike),
        }
        compare("start", runs, args, device)
    if "adapter" in args.cases:
        model = adapted(loaded.model)
        runs = {
            "attached": lambda: attached(model, lambda: batched(model, prompts)),
            "merged": lambda: batched(model, prompts),
        }
        compare("adapter", runs, args, device)
    return int(not args.smoke and bool(speedups) and min(speedups) < GOAL)


if __name__ == "__main__":
    sys.exit(main())
