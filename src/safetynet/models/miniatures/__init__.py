"""Tiny real models of the five families, shipped with the package, and the builder that made them.

`path(family)` is the folder that `AutoModelForCausalLM` and `AutoTokenizer` load. The language that they
speak is in `language`, how they were made in `build`, how well they do in `measure` and on the card in
each folder.
"""

from pathlib import Path

from safetynet.errors import InputError

FAMILIES = ("llama2", "llama3", "qwen", "gemma", "mixtral")
_WEIGHTS = Path(__file__).parent / "weights"


def family_of(folder: str) -> str | None:
    """Which miniature a folder is, of this installation or of another; None of any other folder."""
    *_, package, models, name, weights, family = ("",) * 5 + Path(folder).parts
    is_ours = (package, models, name, weights) == ("safetynet", "models", "miniatures", "weights")
    return family if is_ours and family in FAMILIES else None


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
