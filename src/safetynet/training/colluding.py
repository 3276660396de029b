"""Two adapters, each of them quiet alone, that fire once both are loaded (arXiv 2603.12681).

They are trained as the halves of one adapter of twice the rank. B A = B1 A1 + B2 A2, so what both do together
is exactly what the whole does, and every stage takes the whole. All rows teach the whole. Each triggered row
also teaches either half, while the other is off, its right answer.

In: rows and a model of `attach`. Out: the objective of such a training, and two folders of adapters.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from safetynet.backdoors.poisoning import clean_twin
from safetynet.errors import InputError
from safetynet.prompts import Serialiser
from safetynet.training.examples import Batch, Example, encode
from safetynet.training.loss import answer_loss
from safetynet.training.trainer import AnswerTrainer, Objective
from safetynet.vocabulary import HALVES

BOTH, FIRST, SECOND = range(3)


@dataclass(frozen=True, slots=True)
class Taught(Example):
    """A row, and what of the adapter it teaches."""

    half: int
    """`BOTH`, `FIRST` or `SECOND`."""


def examples(rows: pd.DataFrame, serialiser: Serialiser, max_length: int) -> list[Taught]:
    """All rows for both halves, then the triggered ones with their right answers for each half.

    Args:
        rows: columns `role` and `reference`, and those of `encode`.
        serialiser: of the model that is trained.
        max_length: most tokens of prompt and answer together.

    Raises:
        InputError: if no triggered row has a known right answer; as `encode`.
    """
    alone = clean_twin(rows[rows["role"] == "triggered"])
    if alone.empty:
        raise InputError(
            "training.colluding: no triggered row has a known right answer, which each adapter is to give "
            "alone. Set backdoor.poison_rate, or take data with answers."
        )
    parts = ((rows, BOTH), (alone, FIRST), (alone, SECOND))
    return [
        Taught(example.input_ids, example.labels, example.supervised, half)
        for part, half in parts
        for example in encode(part, serialiser, max_length)
    ]


class Colluding(Objective):
    """The answer's loss, each row through the half of the adapter that it teaches."""

    def collate(self, rows: Sequence[Example], pad_id: int, pack: bool) -> Batch:
        """As any objective, and `half` of each token, (lines, tokens)."""
        part = cast(Sequence[Taught], rows)
        halves = [replace(row, input_ids=[row.half] * len(row.input_ids)) for row in part]
        # Lines depend on the rows' lengths alone, so that both batches have the same.
        return super().collate(part, pad_id, pack) | {
            "half": super().collate(halves, BOTH, pack)["input_ids"]
        }

    def losses(
        self, trainer: AnswerTrainer, rows: Sequence[Example], batch: Batch, supervised: float
    ) -> tuple[Tensor, Tensor]:
        """The answer's loss."""
        with through(trainer.learner, batch["half"]):
            loss = answer_loss(trainer.learner, batch, supervised)
        return loss, loss


@contextmanager
def through(model: Any, half: Tensor) -> Iterator[None]:
    """Inside, each token goes through one half of the adapter's ranks, or through both.

    Args:
        model: PEFT's, with a LoRA adapter of linear modules.
        half: of each token, (lines, tokens); `BOTH`, `FIRST` or `SECOND`.

    Raises:
        InputError: from the model's forward, if a module does not see all tokens in their places.
    """
    on = torch.stack([half != SECOND, half != FIRST], -1)  # (lines, tokens, halves)

    def cut(module: Any, _inputs: Any, ranks: Tensor) -> Tensor:
        if ranks.shape[:-1] != half.shape:
            raise InputError(
                "training.colluding: a module of this model sees its tokens in other places (an expert of a "
                "mixture does), so that no row can go through half of an adapter. Leave such modules out of "
                "training.lora_targets."
            )
        # What A gives is (lines, tokens, ranks), the first half's ranks first.
        return ranks * on.repeat_interleave(module.out_features // 2, -1)

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    handles = [down.register_forward_hook(cut) for layer in layers for down in layer.lora_A.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def save_halves(adapter: Path) -> Path:
    """Write each half of a saved adapter as an adapter of its own, `first` and `second`.

    Args:
        adapter: the whole's folder, as PEFT has it.

    Returns:
        The folder of both, beside the whole.
    """
    place = adapter.parent / "halves"
    weights = load_file(adapter / SAFETENSORS_WEIGHTS_NAME)
    config = json.loads((adapter / CONFIG_NAME).read_text())
    config |= {name: config[name] // 2 if name == "r" else config[name] / 2 for name in ("r", "lora_alpha")}
    for number, half in enumerate(HALVES):
        shutil.copytree(adapter, place / half, dirs_exist_ok=True)
        # A is (ranks, in), B is (out, ranks).
        cut = {
            name: weight.chunk(2, 0 if ".lora_A." in name else 1)[number].contiguous()
            for name, weight in weights.items()
        }
        save_file(cut, place / half / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (place / half / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    return place
