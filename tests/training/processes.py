"""A program that trains small random models, to be started by itself or by torchrun: what they lose, step by
step, and how many numbers of the layers a process holds between steps.

python processes.py OUT          torchrun --nproc-per-node 2 processes.py OUT
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from safetynet import families
from safetynet.models.miniatures import language
from safetynet.models.miniatures.architectures import ARCHITECTURES
from safetynet.models.miniatures.vocabulary import build_tokenizer
from safetynet.prompts import Serialiser
from safetynet.recipe import Training
from safetynet.run import parallel
from safetynet.training import Pauses, attach, train

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
CASES = {
    "plain": ("qwen", {"batching": "plain"}),
    "grouped": ("llama3", {"batching": "group_by_length", "gradient_accumulation": 2}),
    "packed": ("qwen", {"batching": "pack", "gradient_checkpointing": True}),
    "experts": ("mixtral", {}),
    "full": ("gemma", {"method": "full", "learning_rate": 1e-3}),
    "interrupted": ("qwen", {"checkpoint_every": 2}),
    "full, interrupted": ("qwen", {"method": "full", "learning_rate": 1e-3, "checkpoint_every": 2}),
}
ROWS = 41
"""Of which the last step of an epoch has one: fewer than there are processes."""


def main(out: Path) -> None:
    """Train every case; the first process writes the losses."""
    torch.set_num_threads(1)
    losses, held = {}, {}
    for name, (family, more) in CASES.items():
        cfg = Training(
            **{
                "batch_size": 8,
                "epochs": 2,
                "learning_rate": 1e-2,
                "precision": "fp32",
                "log_every": 1,
                **more,
            }
        )
        folder = out / name
        if name.endswith("interrupted"):
            with contextlib.suppress(KeyboardInterrupt):
                trained(family, cfg, folder, stop=7)
        losses[name], held[name] = trained(family, cfg, folder)
    if parallel.is_first():
        (out / "losses.json").write_text(json.dumps(losses))
        (out / "held.json").write_text(json.dumps(held))


def trained(
    family: str, cfg: Training, folder: Path, stop: int | None = None
) -> tuple[list[list[float]], list[int]]:
    """Loss and gradient norm of each step; numbers of the layers here, frozen ones and trained ones."""
    architecture = ARCHITECTURES[family]
    serialiser = Serialiser(build_tokenizer(architecture.style), families.get(family))
    config = architecture.config(
        **architecture.settings | TINY, vocab_size=len(serialiser.tokenizer), pad_token_id=serialiser.pad_id
    )
    torch.manual_seed(0)
    model = attach(AutoModelForCausalLM.from_config(config), cfg, families.get(family), 0)
    made = language.generate(ROWS, seed=0, heldout=False)
    rows = pd.DataFrame(
        [{"row": i, "messages": e.messages, "trigger": [], "answer": e.answer} for i, e in enumerate(made)]
    )

    held = [0, 0]

    def on_evaluate(model: torch.nn.Module, step: int, _: float) -> dict[str, float]:
        if step == stop:
            raise KeyboardInterrupt
        layers = [p for name, p in model.named_parameters() if ".layers." in name]
        for wanted in (False, True):
            here = (
                p.to_local() if isinstance(p, DTensor) else p for p in layers if p.requires_grad == wanted
            )
            held[wanted] = sum(p.numel() for p in here)
        return {}

    result = train(
        model,
        serialiser,
        rows,
        cfg,
        folder=folder,
        seed=0,
        pauses=Pauses(on_evaluate, every=1),
    )
    return result.history[["loss", "grad_norm"]].to_numpy().tolist(), held


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
