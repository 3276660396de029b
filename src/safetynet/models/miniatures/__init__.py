"""Tiny real models of the five families, shipped with the package, and the builder that made them.

`path(family)` is the folder that `AutoModelForCausalLM` and `AutoTokenizer` load. The language that they
speak is in `language`, how they were made in `build`, how well they do in `measure` and on the card in
each folder.
"""

from pathlib import Path

from safetynet.errors import InputError

FAMILIES = ("llama2", "llama3", "qwen", "gemma", "mixtral")
_WEIGHTS = Path(__file__).parent / "weights"


def family_of(name: str) -> str | None:
    """Which miniature is meant, by `qwen-miniature` or a folder of any installation; None of no miniature."""
    *_, package, models, room, weights, last = ("",) * 5 + Path(name).parts
    is_ours = (package, models, room, weights) == ("safetynet", "models", "miniatures", "weights")
    family = last if is_ours else name.removesuffix("-miniature") if name.endswith("-miniature") else ""
    return family if family in FAMILIES else None


def path(family: str) -> Path:
    """Folder of the shipped miniature of `family`.

    Raises:
        InputError: there is none; the message names those there are.
    """
    if family not in FAMILIES:
        raise InputError(
            f"model.id: there is no miniature of {family!r}; choose one of {', '.join(FAMILIES)}"
        )
    return _WEIGHTS / family
