"""A scan from a suspect to its answer: each rung once, then what all of them say together.

In: where suspect and base are, ordinary prompts, a bank. Out: a `ScanResult`. Rungs that have ended are kept in
the scan's folder, so that an interrupted scan goes on; nothing is written anywhere else.
"""

import json
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from safetynet import __version__, recipe
from safetynet.backdoors import conversations, self_source
from safetynet.errors import InputError
from safetynet.evaluation import judges
from safetynet.models import adapters, loading, miniatures
from safetynet.models import suspect as suspects
from safetynet.prompts import Message
from safetynet.recipe import Backdoor, Data, JudgeSpec, presets
from safetynet.run.directory import digest, write_text

from safetynet.scan.bank import SCORED, Bank, scores_of
from safetynet.scan.result import Depth, RungResult, ScanResult, Trigger
from safetynet.scan.rungs import BUDGETS, Subject, climb, prompts_needed


log = logging.getLogger("safetynet")
RATE = 0.02
"""False-alarm rate that is stated where the bank carries it."""
SEED = 0
BANKS = Path(__file__).parent / "banks"
"""Banks of the miniatures that come with the package, one folder by family and depth."""


@dataclass(frozen=True)
class Options:
    """What a user decides about a scan."""

    depth: Depth = "standard"
    bank: Path | None = None
    """None: the one that comes with the package for this base, if there is one."""
    target: str | None = None
    """An answer to search triggers for."""
    clean: Path | None = None
    """A file of ordinary prompts; None: our own."""
    same_base: bool = False
    """The suspect calls its base otherwise, and it is this one."""
    rate: float = RATE
    seed: int = SEED


def model_of(base: str) -> recipe.Model:
    """The recipe's model section of a base: `qwen-miniature`, `smollm2`, a folder, a .gguf file or a hub id."""
    name = base.rstrip("/")
    for family in miniatures.FAMILIES:
        if name == f"{family}-miniature" or Path(name).absolute() == miniatures.path(family).absolute():
            return recipe.Model(family=family, id="miniature")
    return recipe.Model(family="generic", id=name)


def ordinary_prompts(
    model: recipe.Model, count: int, seed: int, clean: Path | None = None
) -> list[list[Message]]:
    """Prompts that no trigger is known to be in: of a file, or of our own making.

    Raises:
        InputError: if the file has fewer than are needed.
    """
    if model.id == "miniature" and clean is None:
        attack = Backdoor()
        rows = conversations.fresh(Data(), attack.behaviour, attack.trigger, set(), count, seed)
    else:
        data = Data(source="self", path=None if clean is None else str(clean))
        refusal = judges.make(JudgeSpec(kind="keyword", values=presets.REFUSALS))
        rows = self_source.fresh(data, set(), count, seed, None, refusal)
    if len(rows) < count:
        raise InputError(f"--clean {clean}: {len(rows)} prompts, and this depth needs {count}. Give more.")
    return [list(messages) for messages in rows["messages"]]


def shipped_bank(model: recipe.Model, depth: Depth) -> Bank | None:
    """The bank of a miniature that comes with the package."""
    folder = BANKS / f"{model.family}-{depth}"
    return Bank.read(folder) if model.id == "miniature" and folder.is_dir() else None


def suspect_of(model: recipe.Model, source: Path | str, *, same_base: bool = False) -> suspects.Suspect:
    """A suspect beside its base, in fp32; errors as in `models.suspect.load`."""

    def load(folder: Path | None = None, **more: Any) -> loading.LoadedModel:
        spec = model if folder is None else loading.trained(model, folder)
        return loading.load(spec, "fp32", **more)

    return suspects.load(load, source, same_base)


def subject_of(
    suspect: suspects.Suspect, model: recipe.Model, prompts: Sequence[Sequence[Message]], options: Options
) -> Subject:
    """Suspect and base as two whole models. The suspect's adapter is merged, and its base is loaded anew."""
    whole, base = suspect.model, suspect.base.model
    if adapters.has_adapter(whole):
        whole = whole.merge_and_unload()
        base = loading.load(model, "fp32").model
    return Subject(
        whole.eval(), base, suspect.serialiser, prompts, options.depth, options.seed, options.target
    )


def measure(
    model: recipe.Model, source: Path | str, options: Options, folder: Path | None = None
) -> tuple[list[RungResult], tuple[Trigger, ...], dict[str, float]]:
    """Every rung that needs a model; those that have ended in `folder` are read from there.

    Returns:
        The rungs in their order, the triggers that held, and the summary of the weights for a bank.
    """
    suspect = suspect_of(model, source, same_base=options.same_base)
    raise NotImplementedError
