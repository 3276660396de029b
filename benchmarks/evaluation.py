"""Batched evaluation against one-by-one `generate`, on the same prompts, in one run.

    python benchmarks/evaluation.py                 # about three minutes on two busy CPU cores
    python benchmarks/evaluation.py --smoke         # seconds: checks that both give the same answers
    python benchmarks/evaluation.py --family llama3 --model path/or/hub-id --prompts 500

Cases: `as it is` is the model, which stops at its end token; `random` has the same tokenizer and the random
weights of a larger network (8 layers of 512), which never stops: there matrices dominate, not overheads.
Plain is transformers' `model.generate` for one prompt at a time: greedy, with cache, no padding. Times are
medians over repeats that alternate between the two, since a shared machine drifts.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from safetynet import recipe
from safetynet.evaluation.generation import generate
from safetynet.models import loading
from safetynet.models.miniatures import language
from safetynet.prompts import Serialiser

GOAL = 5.0
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


def compare(case: str, model: Any, serialiser: Serialiser, prompts: Conversations, args: Any) -> float:
    """Print the lines of one case; returns the speed-up."""
    runs = {
        "plain": lambda: plain(model, serialiser, prompts, args.max_new_tokens),
        "safetynet": lambda: generate(
            model, serialiser, prompts, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens
        ),
    }
    generate(model, serialiser, prompts[:4], batch_size=4, max_new_tokens=4)  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    answers: dict[str, list[str]] = {}
    for _ in range(args.repeats):
        for name, run in runs.items():
            elapsed, answers[name] = timed(run, model.device)
            seconds[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    same = sum(a == b for a, b in zip(answers["plain"], answers["safetynet"], strict=True))
    for name in runs:
        spread = f"{min(seconds[name]):.2f}-{max(seconds[name]):.2f}"
        rate, speedup = len(prompts) / median[name], median["plain"] / median[name]
        print(
            f"{case:<10} {name:<10} {median[name]:>9.2f} {spread:>13} {rate:>10.1f} {speedup:>8.1f}x", end=""
        )
        print(f"{same:>7}/{len(prompts)}" if name == "safetynet" else "")
    return median["plain"] / median["safetynet"]


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
    speedups = [
        compare("as it is", loaded.model, loaded.serialiser, prompts, args),
        compare("random", random_model(loaded.serialiser, device), loaded.serialiser, few, args),
    ]
    return int(not args.smoke and min(speedups) < GOAL)


if __name__ == "__main__":
    sys.exit(main())
