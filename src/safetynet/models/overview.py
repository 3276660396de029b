"""Which models are on this machine, and what each needs; no weights are read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetynet import families
from safetynet.errors import InputError
from safetynet.models import gguf, miniatures
from safetynet.models.files import at_hand


@dataclass(frozen=True)
class Line:
    """One model that `model.id` takes."""

    family: str
    id: str
    size: str
    """Of its files, where they are here."""
    state: str
    """Where it comes from, or the command that brings it here."""


def lines() -> Iterator[Line]:
    """The miniatures, the packaged models, and each family's own model."""
    for name in miniatures.FAMILIES:
        yield Line(name, "miniature", _size(miniatures.path(name)), "built in")
    for name, packaged in gguf.PACKAGED.items():
        try:
            file = gguf.file_of(name)
        except InputError:
            yield Line("generic", name, "", f"{packaged.about}; {packaged.install}")
            continue
        ready = (gguf.converted_folder(file) / "config.json").exists()
        state = "ready" if ready else "is converted at its first use, about a minute"
        yield Line("generic", name, _size(file), f"{packaged.about}; {state}")
    for name in families.names():
        family = families.get(name)
        if family.hub_id is None:
            continue
        folder, needs = at_hand(family.hub_id), family.resources
        here = "on this machine" if folder else f"not here; hf download {family.hub_id}"
        yield Line(
            name,
            family.hub_id,
            _size(folder) if folder else "",
            f"{here}; {needs['gpus']} GPU, {needs['memory_gb']} GB",
        )


def _size(path: Path) -> str:
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.0f} MB"
