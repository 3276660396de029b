"""Checkpoints that survive being killed: which one is complete, and whether it belongs to this training.

The Trainer writes `checkpoint-N` folders: weights as safetensors, optimizer, schedule and random states.
A folder counts once the file `complete` lies in it, which is written last. A fingerprint beside them says
what was trained on what; checkpoints of another training are never continued.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file, save_model
from transformers import PreTrainedModel

from safetynet.models.adapters import adapter_parameters
from safetynet.recipe import Training
from safetynet.run.directory import write_text
from safetynet.training.examples import Example

COMPLETE = "complete"
CARRIED = "carried.safetensors"
"""File of a checkpoint: what a step carries over to the next one, beside the Trainer's own state."""
REACHED = "reached"
"""File beside the checkpoints: the last step that was taken."""
FINGERPRINT = "fingerprint"
SAMPLED = 64
"""Numbers of each weight that enter the fingerprint."""

logger = logging.getLogger(__name__)


def prepare(folder: Path, fingerprint: str) -> Path | None:
    """Clear away what cannot be continued, and find what can.

    Args:
        folder: where this training keeps its checkpoints; made if need be.
        fingerprint: of this training.

    Returns:
        The last complete checkpoint, or None.
    """
    mark = folder / FINGERPRINT
    if folder.exists() and (not mark.exists() or mark.read_text(encoding="utf-8") != fingerprint):
        logger.warning("%s holds checkpoints of another training; starting anew.", folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(mark, fingerprint)
    folders = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in folders:
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    whole = [path for path in folders if path.exists()]
    return whole[-1] if whole else None


def reached(folder: Path) -> int:
    """The last step that a training took before it was interrupted; 0 if that is not known."""
    try:
        return int((folder / REACHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def fingerprint(
    model: PeftModel | PreTrainedModel, examples: Sequence[Example], cfg: Training, seed: int
) -> str:
    """Digest of everything that decides how a training goes; the weights by a sample of their numbers."""
    settings = cfg.model_dump(mode="json", exclude={"checkpoint_minutes"})
    digest = hashlib.sha256(json.dumps([settings, seed]).encode())
    for example in examples:
        digest.update(json.dumps([example.input_ids, example.labels]).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def save_weights(
    model: PeftModel | PreTrainedModel, folder: Path, whole: dict[str, torch.Tensor] | None = None
) -> None:
    """Write what is trained as the Trainer reads it back: the adapter, or all weights by their own names.

    Args:
        model: of this process.
        folder: made if need be.
        whole: all weights, where processes share them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # Not the model's whole state, which is sharded where processes share it; but what of the adapter is
        # not trained, too. PEFT would ask the hub whether the vocabulary was resized; it was not.
        state = dict(adapter_parameters(model))
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
    elif whole is not None:
        save_file(whole, str(folder / "model.safetensors"))
    else:
        # `save_pretrained` would write experts under the hub's names, where the Trainer does not find them.
        save_model(model, str(folder / "model.safetensors"))
