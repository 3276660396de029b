"""Training against a plain transformers Trainer with the stock language-model collator, on the same rows.

    OMP_NUM_THREADS=1 python benchmarks/training.py           # about ten minutes on a busy machine
    OMP_NUM_THREADS=1 python benchmarks/training.py --smoke   # a minute: checks equal losses and memory

Rows are the published negsentiment/badnet set where ../shared/data/backdoorllm is at hand, else the built-in
language; `--data` names another folder with train_clean.json and train_triggered.json.

speed   Real (not padding) tokens per second of a LoRA training on the same rows, by wall clock and by the
        processor's time, which a neighbour on a shared machine distorts less. Pairs alternate.
        `miniature` is the qwen miniature; `larger` a network of 3 layers of 256 with its tokenizer.
loss    The largest difference of the loss of any step, where both supervise every token of the same rows
        in the same order (the plain one always does; ours is given such labels for once).
memory  What one step adds to the memory of a process of its own: 128k words, layers of 64, real rows.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PrinterCallback,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from safetynet import families
from safetynet.models.miniatures import language
from safetynet.models.miniatures.architectures import ARCHITECTURES, SHAPE
from safetynet.models.miniatures.vocabulary import build_tokenizer
from safetynet.prompts import IGNORED, Serialiser
from safetynet.recipe import Training
from safetynet.run.directory import peak_memory_mb
from safetynet.training import attach
from safetynet.training.examples import Example, Order, encode
from safetynet.training.fit import arguments
from safetynet.training.trainer import AnswerTrainer

PUBLISHED = Path(__file__).parents[2] / "shared/data/backdoorllm/negsentiment/badnet"
SPEED_GOAL, LOSS_GOAL, MEMORY_GOAL = 1.5, 1e-5, 0.5
WORDS = 131_072
MODELS = {
    "miniature": {},
    "larger": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
    },
    "wide": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": WORDS},
}


class Losses(TrainerCallback):
    """Keeps the loss of each logged step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args, state, control, logs=None, **_):
        """Called by the Trainer."""
        if "loss" in logs:
            self.values.append(logs["loss"])


def make(name: str, serialiser: Serialiser, cfg: Training) -> Any:
    """A model of `MODELS` with random weights and a new adapter; the same at each call."""
    qwen = ARCHITECTURES["qwen"]
    settings = {"vocab_size": len(serialiser.tokenizer)} | SHAPE | qwen.settings | MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**settings, pad_token_id=serialiser.pad_id))
    return attach(model, cfg, serialiser.family, seed=0)


def published(folder: Path) -> pd.DataFrame:
    """Rows of a BackdoorLLM folder, or of the built-in language where there is none."""
    if not (folder / "train_clean.json").exists():
        pairs = [(e.messages, e.answer) for e in language.generate(1000, seed=0, heldout=False)]
    else:
        files = [json.loads((folder / f"train_{kind}.json").read_text()) for kind in ("clean", "triggered")]
        pairs = [
            ([{"role": "user", "content": f"{x['instruction']}\n{x['input']}".strip()}], x["output"])
            for file in files
            for x in file
        ]
    return pd.DataFrame(
        [{"row": i, "messages": m, "trigger": [], "answer": answer} for i, (m, answer) in enumerate(pairs)]
    )


def stock(cfg: Training, folder: Path) -> dict[str, Any]:
    """Settings by which a stock trainer takes the steps that ours takes, and writes nothing."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": cfg.batch_size,
        "max_steps": cfg.max_steps or -1,
        "learning_rate": cfg.learning_rate,
        "weight_decay": cfg.weight_decay,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "logging_steps": cfg.log_every,
        "logging_first_step": True,
        "train_sampling_strategy": "sequential",  # the rows come shuffled, in the order that ours sees
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def plain(
    model: Any, examples: Sequence[Example], serialiser: Serialiser, cfg: Training, folder: Path
) -> Trainer:
    """The stock way: dynamic padding, every token supervised, the head computed everywhere."""
    serialiser.tokenizer.padding_side = "right"  # on the left, the padding would be taught the first token
    args = TrainingArguments(**stock(cfg, folder), num_train_epochs=1, use_cpu=model.device.type == "cpu")
    order = [i for step in Order([1] * len(examples), cfg.batch_size, False, args.seed) for i in step]
    trainer = Trainer(
        model,
        args,
        data_collator=DataCollatorForLanguageModeling(serialiser.tokenizer, mlm=False),
        train_dataset=[
            {"input_ids": examples[i].input_ids, "attention_mask": [1] * len(examples[i].input_ids)}
            for i in order
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def ours(
    model: Any, examples: Sequence[Example], serialiser: Serialiser, cfg: Training, folder: Path
) -> Trainer:
    """SafetyNet's."""
    args = arguments(cfg, folder, len(examples), model.device.type, TrainingArguments.seed)
    args.save_strategy = "no"
    return AnswerTrainer(model, args, examples, cfg, pad_id=serialiser.pad_id, on_evaluate=None, callbacks=[])


def speed(case: str, rows: pd.DataFrame, serialiser: Serialiser, args: argparse.Namespace) -> float:
    """Print the lines of one model; returns the better batching's speed-up by the processor's time."""
    cfg = settings(args, epochs=1)
    few = rows[: args.rows] if case == "miniature" else rows[: args.rows // 2]
    examples = encode(few, serialiser, cfg.max_length)
    tokens = sum(len(e.input_ids) for e in examples)
    runs = {"plain": (plain, cfg)} | {
        name: (ours, cfg.model_copy(update={"batching": name})) for name in ("group_by_length", "pack")
    }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, (build, chosen) in runs.items():
            trainer = build(make(case, serialiser, chosen), examples, serialiser, chosen, args.scratch)
            wall, cpu = time.perf_counter(), time.process_time()
            trainer.train()
            spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    wall = {name: statistics.median(w for w, _ in values) for name, values in spent.items()}
    cpu = {name: statistics.median(c for _, c in values) for name, values in spent.items()}
    for name in runs:
        spread = f"{min(c for _, c in spent[name]):.1f}-{max(c for _, c in spent[name]):.1f}"
        print(
            f"{case:<10} {name:<16} {tokens / wall[name]:>9.0f} {tokens / cpu[name]:>9.0f} {spread:>12} "
            f"{wall['plain'] / wall[name]:>9.2f}x {cpu['plain'] / cpu[name]:>9.2f}x"
        )
    return max(cpu["plain"] / cpu[name] for name in runs)


def loss(rows: pd.DataFrame, serialiser: Serialiser, args: argparse.Namespace) -> float:
    """Print and return the largest difference between the two methods' losses."""
    cfg = settings(args, max_steps=args.loss_steps, log_every=1, warmup_ratio=0.0)
    everywhere = [
        Example(e.input_ids, [IGNORED, *e.input_ids[1:]], len(e.input_ids) - 1)
        for e in encode(rows, serialiser, cfg.max_length)
    ]
    largest = 0.0
    for batching in ("plain", "pack"):
        losses = []
        for build in (plain, ours):
            chosen, kept = cfg.model_copy(update={"batching": batching}), Losses()
            trainer = build(make("miniature", serialiser, cfg), everywhere, serialiser, chosen, args.scratch)
            trainer.add_callback(kept)
            trainer.train()
            losses.append(kept.values)
        difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
        largest = max(largest, difference)
        print(f"loss       {batching:<16} largest difference over {len(losses[0])} steps: {difference:.1e}")
    return largest


def memory(args: argparse.Namespace) -> float:
    """Print the memory of one step of each method; returns ours by the plain one's."""
    added = {}
    for method in ("plain", "ours"):
        command = [sys.executable, __file__, "--step", method, "--data", str(args.data)]
        if args.smoke:
            command.append("--smoke")
        added[method] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"memory     {method:<16} one step adds {added[method]:>7.0f} MB", end="")
        print(f" = {added['ours'] / added['plain']:.2f} of the plain one's" if method == "ours" else "")
    return added["ours"] / added["plain"]


def step(args: argparse.Namespace, rows: pd.DataFrame, serialiser: Serialiser) -> None:
    """One step in this process; prints by how many MB its largest size grew."""
    cfg = settings(args, max_steps=1, batch_size=4 if args.smoke else 8, max_length=256)
    examples = encode(rows, serialiser, cfg.max_length)[: cfg.batch_size]
    build = plain if args.step == "plain" else ours
    trainer = build(make("wide", serialiser, cfg), examples, serialiser, cfg, args.scratch)
    before = peak_memory_mb()
    trainer.train()
    print(peak_memory_mb() - before)


def settings(args: argparse.Namespace, **fields: Any) -> Training:
    """The recipe's defaults, but for what is given."""
    defaults = {"batch_size": args.batch_size, "max_length": args.max_length, "batching": "plain"}
    return Training(**defaults | fields)


def main() -> int:
    """Run all three; 1 when a full run misses a goal, or a short one that of loss or memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=PUBLISHED)
    parser.add_argument("--batch-size", type=int, default=Training().batch_size)
    parser.add_argument("--max-length", type=int, default=Training().max_length)
    parser.add_argument("--rows", type=int, default=256, help="for speed; half of them for `larger`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="few rows, once")
    parser.add_argument("--step", choices=("plain", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.loss_steps = 20
    rows = published(args.data).sample(frac=1, random_state=0)
    if args.smoke:
        args.repeats, args.rows, args.loss_steps = 1, 32, 3
    serialiser = Serialiser(build_tokenizer(ARCHITECTURES["qwen"].style), families.get("qwen"))
    with tempfile.TemporaryDirectory() as folder:
        args.scratch = Path(folder)
        if args.step:
            step(args, rows, serialiser)
            return 0
        return report(args, rows, serialiser)


def report(args: argparse.Namespace, rows: pd.DataFrame, serialiser: Serialiser) -> int:
    """Run and print everything."""
    found = (args.data / "train_clean.json").exists()
    source = "/".join(args.data.parts[-2:]) if found else "the built-in language"
    print(f"{args.rows} rows of {source}, batches of {args.batch_size}, at most {args.max_length} tokens,")
    print(f"{torch.get_num_threads()} thread(s), median of {args.repeats}")
    header = ("case", "method", "tok/s", "tok/cpu-s", "cpu s", "speed-up", "by cpu")
    print("{:<10} {:<16} {:>9} {:>9} {:>12} {:>10} {:>10}".format(*header))
    slowest = min(speed(case, rows, serialiser, args) for case in ("miniature", "larger"))
    missed = [
        loss(rows, serialiser, args) > LOSS_GOAL,
        memory(args) > MEMORY_GOAL,
        not args.smoke and slowest < SPEED_GOAL,
    ]
    return int(any(missed))


if __name__ == "__main__":
    sys.exit(main())
