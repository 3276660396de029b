"""Does an adapter do anything? What a server would load in silence, and what would change nothing.

In: an adapter's files, and its base where that is at hand. Out: faults, each a sentence with what to do. An
adapter whose names, targets or base are others is loaded by some servers without an error and answers as its
base does; what is measured then is the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from safetynet.errors import InputError
from safetynet.models import adapters, lora
from safetynet.models.adapter_files import NUMBERS, AdapterFiles
from safetynet.models.files import counted, finite, listed
from safetynet.scan import files as files_rung

if TYPE_CHECKING:
    from safetynet.models.loading import LoadedModel

SERVED = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Number types in which models are served."""
UPS = ("lora_B.", "lora_embedding_B")
"""How the names of the factors are marked that a training starts at zero."""


@dataclass(frozen=True)
class Effect:
    """What was looked at."""

    faults: tuple[str, ...]
    """Why the adapter must not be served as it is; empty where nothing was found."""
    notes: tuple[str, ...] = ()
    """What is worth knowing before it is served."""
    largest: float | None = None
    """Largest difference of a logit from the base's over the prompts; None where no base was compared."""


def verify(
    files: AdapterFiles,
    base: "LoadedModel | None" = None,
    prompts: Sequence[Sequence[dict[str, str]]] = (),
    *,
    same_base: bool = False,
) -> Effect:
    """Look for what makes an adapter silently do nothing, or less than it was trained for.

    Args:
        files: of the adapter, read.
        base: its base; changed while it is looked at, and given back as it was.
        prompts: conversations on which logits are compared.
        same_base: the adapter names its base otherwise, and it is this one all the same.

    Raises:
        InputError: for tensors that are no finite numbers.
    """
    # Errors of the scan's first rung: names, claims and files that do not go together.
    errors = [each for each in files_rung.check(files.folder, None).findings if each.level == "error"]
    sentences = [f"{each.where}: {each.message}" if each.where else each.message for each in errors]
    # B is zero before training; where it still is, B A is zero whatever A was drawn as.
    ups = [name for name in files.tensors if any(mark in name for mark in UPS)]
    zero = sorted(name for name in ups if not files.tensors[name].any())
    notes: tuple[str, ...] = ()
    if zero and len(zero) == len(ups):
        sentences.append(
            f"lora_B is zero in all {len(ups)} modules, as before training: the adapter changes nothing. "
            "Save it after training, from the process that holds the trained weights."
        )
    elif zero:  # experts that no prompt reached, or a part that was not saved
        untrained = f"lora_B is zero in {len(zero)} of {len(ups)} modules ({listed(zero)})"
        notes = (f"{untrained}: nothing changes there.",)
    if getattr(files.config, "lora_alpha", None) == 0:
        sentences.append(
            "lora_alpha is 0, so that every update is scaled to nothing. Set the value of the training."
        )
    tensors = {name: tensor for name, tensor in files.tensors.items() if tensor.dtype in NUMBERS}
    for number, dtype in SERVED.items():
        lost = [
            name
            for name, tensor in tensors.items()
            if not finite(cast := tensor.to(dtype)) or bool(cast.any()) != bool(tensor.any())
        ]
        if lost:
            sentences.append(
                f"In {number} {counted(len(lost), 'tensor')} of {len(tensors)} overflow, or round to zero "
                f"altogether ({listed(sorted(lost))}). Serve it in another number type."
            )
    faults = tuple(sentences)
    if base is None:
        return Effect(faults, notes)
    try:
        model = adapters.attach(base, files, same_base=same_base)
    except InputError as error:
        return Effect((*faults, f"It does not go into this base. {error}"), notes)
    try:
        largest = _largest_difference(model, base, prompts)
        updates_are_zero = lora.silent(model)
    finally:
        adapters.detach(model)
    if largest is None:
        overflow = "The logits with it are no finite numbers. A scale or a weight is too large: take another."
        return Effect((*faults, overflow), notes)
    if largest == 0:
        why = "every update is zero" if updates_are_zero else "no prompt reaches what it changes"
        same = f"The logits of {counted(len(prompts), 'prompt')} are those of the base bit by bit: {why}."
        return Effect((*faults, same), notes, largest)
    return Effect(faults, notes, largest)


@torch.no_grad()
def _largest_difference(
    model: torch.nn.Module, base: "LoadedModel", prompts: Sequence[Sequence[dict[str, str]]]
) -> float | None:
    """Of the logits with and without the adapter over all tokens; None where one is no finite number."""
    largest = 0.0
    for messages in prompts:
        ids = torch.tensor([base.serialiser.encode(messages).input_ids], device=base.model.device)
        here = model(input_ids=ids, use_cache=False).logits
        with adapters.switched_off(model) as off:
            there = off(input_ids=ids, use_cache=False).logits
        if not finite(here):
            return None
        tokens, words = min(here.shape[1], there.shape[1]), min(here.shape[2], there.shape[2])
        # A soft prompt has positions before the prompt's; added tokens come last.
        difference = here[:, -tokens:, :words] - there[:, -tokens:, :words]
        largest = max(largest, float(difference.abs().max()))
    return largest
