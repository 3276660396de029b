"""Whether an adapter was trained on this base model: by its name, and where names differ by the weights."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetynet.errors import InputError
from safetynet.models.adapter_files import AdapterFiles

if TYPE_CHECKING:
    from safetynet.models.loading import LoadedModel

log = logging.getLogger("safetynet")


def check_base(files: AdapterFiles, base: "LoadedModel", same_base: bool) -> None:
    """Refuse an adapter of another base model.

    The last word of a path says nothing: models of one name lie in many folders, and one model has many
    names. Where the names differ, the weights decide if the named base is at hand; if not, the user has to.

    Args:
        files: of the adapter.
        base: that it is to be attached to.
        same_base: the user says that it is the same.

    Raises:
        InputError: naming both, and what to do.
    """
    if files.base is None and not same_base:
        log.warning("%s: the adapter names no base model; it is taken for one of %s.", files.folder, base.id)
        return
    if files.base is None or _same_name(files.base, base.id):
        return
    other, here = _at_hand(files.base, files.folder), _at_hand(base.id, Path())
    if other is not None and here is not None and _same_weights(other, here):
        log.info(
            "%s: it calls its base %s, whose weights are those of %s.", files.folder, files.base, base.id
        )
        return
    known = other is not None and here is not None
    if same_base:
        if known:
            log.warning(
                "%s: it was trained on %s, whose weights are not those of %s. As asked for, it is taken for "
                "an adapter of the latter.",
                files.folder, files.base, base.id,
            )  # fmt: skip
        return
    hint = (
        ", whose weights are others. Take a run whose model.id is its base."
        if known
        else (
            ". Take a run whose model.id is its base. Or is it the same model under another name? Its "
            "weights are not here to compare: if so, say --same-base (in Python same_base=True)."
        )
    )
    raise InputError(f"{files.folder}: this adapter was trained on {files.base}, not on {base.id}{hint}")


def _same_name(one: str, other: str) -> bool:
    """Whether two names are one hub id or one folder."""
    return _hub_id(one).casefold() == _hub_id(other).casefold() or (
        Path(one).exists() and Path(other).exists() and Path(one).resolve() == Path(other).resolve()
    )


def _hub_id(name: str) -> str:
    """`owner/name` of a snapshot in the hub's cache; any other name as it is."""
    part = next((p for p in name.replace("\\", "/").split("/") if p.startswith("models--")), None)
    return part.removeprefix("models--").replace("--", "/") if part else name.rstrip("/")


def _at_hand(name: str, beside: Path) -> Path | None:
    """The folder of a model's weights on this machine, if it is here."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for folder in (Path(name), beside / name):
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            return folder
    try:
        config = try_to_load_from_cache(_hub_id(name), "config.json")
    except HFValidationError:
        return None
    cached = Path(config).parent if isinstance(config, str) else None
    return cached if cached is not None and any(cached.glob("*.safetensors")) else None


def _same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, in whatever files and number type they are stored."""
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, Any]:
        opened = [safe_open(str(file), framework="pt") for file in sorted(folder.glob("*.safetensors"))]
        return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - no mapping

    first, second = tensors(one), tensors(other)
    if first.keys() != second.keys():
        return False
    for name in first:
        a, b = first[name].get_tensor(name), second[name].get_tensor(name)
        narrow = a.dtype if a.element_size() <= b.element_size() else b.dtype
        if a.shape != b.shape or not a.to(narrow).equal(b.to(narrow)):
            return False
    return True
