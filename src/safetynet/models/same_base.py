"""Whether an adapter was trained on this base model: by its name, and where names differ by the weights."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetynet.errors import InputError
from safetynet.models.adapter_files import AdapterFiles
from safetynet.models.files import OLD_BUFFERS, at_hand, hub_id, pointer

if TYPE_CHECKING:
    from safetynet.models.loading import LoadedModel

log = logging.getLogger("safetynet")
HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


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
    if files.base is None or hub_id(files.base).casefold() == hub_id(base.id).casefold():
        return
    try:
        if Path(files.base).samefile(base.id):  # two names of one folder
            return
    except OSError:  # not there, or no name of a file
        pass
    other, here = at_hand(files.base, files.folder), at_hand(base.id)
    same = _same_weights(other, here) if other is not None and here is not None else None
    if same:
        log.info(
            "%s: it calls its base %s, whose weights are those of %s.", files.folder, files.base, base.id
        )
        return
    compared = same is not None
    if same_base:
        if compared:
            log.warning(
                "%s: it was trained on %s, whose weights are not those of %s. As asked for, it is taken for "
                "an adapter of the latter.",
                files.folder, files.base, base.id,
            )  # fmt: skip
        return
    hint = (
        ", whose weights are others. Take a run whose model.id is its base, or say --same-base (in Python "
        "same_base=True) to put it on this one all the same."
        if compared
        else (
            ". Take a run whose model.id is its base. Or is it the same model under another name? Its "
            "weights are not here to compare: if so, say --same-base (in Python same_base=True)."
        )
    )
    raise InputError(f"{files.folder}: this adapter was trained on {files.base}, not on {base.id}{hint}")


def _same_weights(one: Path, other: Path) -> bool | None:
    """Whether two folders hold the same tensors, in whatever files and floating-point type they are stored.

    Old constants do not count, nor does a head of one alone that is the other's embeddings: there it is
    tied. None where one of them cannot be read: a download that is not whole says nothing.
    """
    from safetensors import SafetensorError

    try:
        first, second = _tensors(one), _tensors(other)
        lone = first.keys() ^ second.keys()
        if lone - {HEAD}:
            return False
        pairs = [(first[name], second[name]) for name in first.keys() & second.keys()]
        if lone:
            head, tied = (first[HEAD], second) if HEAD in first else (second[HEAD], first)
            embeddings = next((tensor for name, tensor in tied.items() if name.endswith(EMBEDDINGS)), None)
            if embeddings is None:
                return False
            pairs.append((head, embeddings))
        for (a, name), (b, counterpart) in pairs:
            left, right = a.get_tensor(name), b.get_tensor(counterpart)
            if left.shape != right.shape or not (left.is_floating_point() and right.is_floating_point()):
                return False
            narrow = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
            if not left.to(narrow).equal(right.to(narrow)):
                return False
        return True
    except (OSError, SafetensorError):
        return None


def _tensors(folder: Path) -> dict[str, tuple[Any, str]]:
    """Opened file and name of every tensor, by its name without the prefix that some files lack."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if any(map(pointer, files)):
        raise OSError("stand-ins of files that were not downloaded")
    opened = [safe_open(str(file), framework="pt") for file in files]
    return {
        name.removeprefix("model."): (file, name)
        for file in opened
        for name in file.keys()  # noqa: SIM118 - no mapping
        if not name.endswith(OLD_BUFFERS)
    }
