"""Save a repaired model where PEFT or transformers loads it, with a card of what was done and measured."""

import shutil
from pathlib import Path
from typing import Any

from safetynet.errors import InputError
from safetynet.mitigation.method import Repaired
from safetynet.mitigation.subject import Subject


def save(repaired: Repaired, subject: Subject, folder: Path, card: str) -> Path:
    """Write an adapter (form `adapter`) or a whole model with its tokenizer (form `checkpoint`).

    Args:
        repaired: of `subject`, not open.
        subject: whose tokenizer is saved with a checkpoint.
        folder: replaced if it exists; whole or not there, never half written.
        card: README.md of the folder, in Markdown.

    Returns:
        The folder.

    Raises:
        InputError: if the method acts at run time, so that there are no weights to save.
    """
    if not repaired.savable:
        raise InputError(
            f"{repaired.method}: it acts while the model answers, so there are no weights to save. "
            "Serve the model under it, or take a method of form adapter or checkpoint."
        )
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with repaired.open() as model:
        _write(model, subject, partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def _write(model: Any, subject: Subject, folder: Path) -> None:
    if hasattr(model, "peft_config"):
        # PEFT would ask the hub whether the vocabulary was resized; it was not.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        model.save_pretrained(str(folder))
        subject.serialiser.tokenizer.save_pretrained(str(folder))
