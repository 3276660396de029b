"""What files of models are before a library reads them: weights, stand-ins, and why there are none."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetynet.models import miniatures

if TYPE_CHECKING:
    from torch import Tensor

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
POINTERS = {  # how a stand-in begins: what it is
    b"version https://git-lfs": "a Git LFS pointer",
    b"/annex/objects/": "a git-annex pointer",
    b"# xet version": "a Xet pointer",
}
"""Files of a few lines that a clone leaves in place of large ones that were not downloaded."""
OLD_BUFFERS = (
    ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias",
)  # fmt: skip
"""Ends of the names of constants that old checkpoints hold, and that models make themselves today."""
SHOWN = 3
"""How many names a sentence lists before it says how many more there are."""


def pointer(path: Path) -> str | None:
    """What stands in for a file's content that was never downloaded; None for the content itself."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(64)
    return next((kind for mark, kind in POINTERS.items() if start.startswith(mark)), None)


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a whole model: its configuration and its weights, in whatever format."""
    if not (folder / "config.json").exists():
        return False
    weights = [p for p in folder.iterdir() if p.suffix == ".safetensors" or p.suffix in PICKLES]
    return any(p.name.startswith(("model", "pytorch_model")) for p in weights)


def headers(folder: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Name, type and shape of every tensor in a folder of safetensors, without the tensors."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(name)
                yield name, str(part.get_dtype()), part.get_shape()


def hub_id(name: str) -> str:
    """`owner/name` of a snapshot in the hub's cache, `qwen-miniature` of one; any other name as it is."""
    if family := miniatures.family_of(name):
        return f"{family}-miniature"
    part = next((p for p in name.replace("\\", "/").split("/") if p.startswith("models--")), None)
    return part.removeprefix("models--").replace("--", "/") if part else name.rstrip("/")


def at_hand(name: str, beside: Path = Path()) -> Path | None:
    """The folder of a model's weights on this machine, if it is here."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for folder in (Path(name), beside / name):
            if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
                return folder
    except OSError:  # longer than names of files are
        return None
    try:
        config = try_to_load_from_cache(hub_id(name), "config.json")
    except HFValidationError:
        return None
    cached = Path(config).parent if isinstance(config, str) else None
    return cached if cached is not None and any(cached.glob("*.safetensors")) else None


def hub_reason(error: BaseException) -> str | None:
    """Why the hub does not give something, in one clause; None where the error is another.

    What the hub's client raised lies somewhere down the chain of causes, wrapped by the library that asked.
    """
    from huggingface_hub import errors as hub

    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, hub.GatedRepoError):
            return "its owner grants access on request. Ask for it on the hub, then set HF_TOKEN"
        if isinstance(chain, hub.RepositoryNotFoundError | hub.RevisionNotFoundError):
            return "the hub knows no such model or revision, or HF_TOKEN is not valid for it"
        status = getattr(getattr(chain, "response", None), "status_code", None)
        if status in (401, 403):
            return "the hub refuses HF_TOKEN; set a valid one, or accept the model's licence on the hub"
        if type(chain).__name__ in (
            "ConnectError",
            "ConnectionError",
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
        ):
            return "there is no network to the hub and no local copy. Give a folder"
        chain = chain.__cause__ or chain.__context__
    return None


def in_words(error: object) -> str:
    """An error's own text on one line, cut to 300 characters, without a final stop."""
    return " ".join(str(error).split())[:300].rstrip(".")


def counted(number: int, what: str) -> str:
    """`1 tensor`, `2 tensors`: a number with its noun."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def listed(names: list[str], most: int = SHOWN) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def finite(tensor: "Tensor") -> bool:
    """Whether all values of a tensor of floating-point numbers are finite."""
    import torch  # here, so that reading a folder does not wait for it

    # A sum is finite only if every term is, and needs no second tensor; finite terms may still overflow it.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
