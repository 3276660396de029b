"""A scan from a suspect's folder to its answer."""

from pathlib import Path
from typing import Any

from safetynet.experiment import Experiment
from safetynet.models import adapters, loading
from safetynet.models import suspect as suspects
from safetynet.scan.rungs import Subject, climb, prompts_needed

__all__ = ["climb", "subject_of"]


def subject_of(recipe: Any, source: Path, depth: str) -> Subject:
    from safetynet.backdoors import conversations
    from safetynet.recipe import Backdoor

    def load(folder: Path | None = None, **more: Any) -> loading.LoadedModel:
        spec = recipe.model if folder is None else loading.trained(recipe.model, folder)
        return loading.load(spec, "fp32", **more)

    suspect = suspects.load(load, source, True)
    model = suspect.model
    base = suspect.base.model
    if adapters.has_adapter(model):
        model = model.merge_and_unload()
        base = load().model
    attack = Backdoor()
    prompts = conversations.fresh(recipe.data, attack.behaviour, attack.trigger, set(), prompts_needed(depth), 7)
    return Subject(model, base, suspect.serialiser, [list(m) for m in prompts["messages"]], depth)
