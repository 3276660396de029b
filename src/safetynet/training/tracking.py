"""Experiment trackers: Weights & Biases and TensorBoard; neither asks questions or needs a network."""

import importlib.util
import logging
import netrc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import TrainerCallback

from safetynet.errors import InputError

PROJECT = "safetynet"
"""Project on Weights & Biases, unless WANDB_PROJECT names another."""
NETWORK_TIMEOUT_S = 3.0
INIT_TIMEOUT_S = 15.0
"""A server that refuses the key is asked again for so long; wandb's own limit is 90 s."""

logger = logging.getLogger(__name__)


@contextmanager
def tracker(kind: str, folder: Path, name: str) -> Iterator[list[TrainerCallback]]:
    """Open a tracker and close it again, also when training fails.

    Args:
        kind: `none`, `wandb` or `tensorboard`.
        folder: trackers write below it, in a folder of their own.
        name: of the run.

    Yields:
        The Trainer's callbacks for it.

    Raises:
        InputError: if the package is not installed.
    """
    if kind == "none":
        yield []
        return
    if importlib.util.find_spec(kind) is None:
        raise InputError(
            f"tracking: {kind} is not installed. Run `pip install {kind}`, or set tracking to none."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _wandb(folder, name) if kind == "wandb" else _tensorboard(folder / "tensorboard") as callback:
        yield [callback]


@contextmanager
def _wandb(folder: Path, name: str) -> Iterator[TrainerCallback]:
    import wandb
    from transformers.integrations.integration_utils import WandbCallback

    def begin(mode: Any) -> Any:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            dir=str(folder),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S),
        )

    # WANDB_MODE overrules; offline runs are uploaded later with `wandb sync`.
    mode = os.environ.get("WANDB_MODE") or ("online" if _usable() else "offline")
    try:
        run = begin(mode)
    except wandb.Error as error:
        logger.warning("Weights & Biases refuses (%s); this run is recorded offline.", error)
        run = begin("offline")
    try:
        yield WandbCallback()
    finally:
        run.finish()


def _usable() -> bool:
    """Whether there is a key for the server, and a network to it."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = str(url.hostname), url.port or (80 if url.scheme == "http" else 443)
    try:
        if not os.environ.get("WANDB_API_KEY") and netrc.netrc().authenticators(host) is None:
            return False
        with socket.create_connection((host, port), NETWORK_TIMEOUT_S):
            return True
    except (OSError, netrc.NetrcParseError):  # no ~/.netrc, or no network
        return False


@contextmanager
def _tensorboard(folder: Path) -> Iterator[TrainerCallback]:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    writer: Any = SummaryWriter(log_dir=str(folder))
    try:
        yield TensorBoardCallback(writer)
    finally:
        writer.close()
