"""A base model by its name alone, as the command line and Python take it."""

from typing import TYPE_CHECKING, Any

from safetynet.models import miniatures

if TYPE_CHECKING:
    from safetynet.prompts import Serialiser
    from safetynet.recipe import Model


def model_of(name: str) -> "Model":
    """Model section of a name: `qwen-miniature`, `smollm2`, a folder, a .gguf file or a hub id."""
    from safetynet import recipe

    if family := miniatures.family_of(name):
        return recipe.Model(family=family, id="miniature")
    return recipe.Model(family="generic", id=name)


def load_model(name: str, dtype: str = "auto") -> tuple[Any, "Serialiser"]:
    """A model in evaluation mode, and its serialiser.

    Args:
        name: as `model_of` takes it.
        dtype: as in `loading.load`; errors as there.
    """
    from safetynet.models import loading

    loaded = loading.load(model_of(name), dtype)
    return loaded.model, loaded.serialiser
