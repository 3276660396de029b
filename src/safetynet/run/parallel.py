"""Several processes that work on one run together, as torchrun and `accelerate launch` start them.

Every process goes through the same stages. What can be divided is: parts are computed in turn and brought
together in order, so that each process has the same numbers as a single one would. The first process alone
writes the run directory. With one process, which is the ordinary case, nothing here does anything or loads
torch.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")
PATIENCE = timedelta(hours=12)
"""How long processes wait for each other; the first one draws and writes while the others wait."""
# Taken out of the environment: transformers would load empty weights into all processes but one, and its
# Trainer would wrap the model by itself.
SHARDED = os.environ.pop("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
"""Whether `accelerate launch --use_fsdp` asks processes to share a model's weights in training."""

_in_step = False


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_first() -> bool:
    """Whether this process writes."""
    return rank() == 0


def device_index() -> int:
    """Number of the GPU that belongs to this process."""
    return int(os.environ.get("LOCAL_RANK", "0")) if count() > 1 else 0


def shares_weights() -> bool:
    """Whether processes share the weights of the model that they train."""
    return SHARDED and count() > 1


@contextmanager
def in_step() -> Iterator[None]:
    """Inside, every process computes every part: where weights are shared, a model needs all of them."""
    global _in_step  # a state of the process, as its rank is
    before, _in_step = _in_step, True
    try:
        yield
    finally:
        _in_step = before


def is_in_step() -> bool:
    """Whether this is inside of `in_step`."""
    return _in_step


def wait() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        _joined().barrier()


def from_first(compute: Callable[[], Result]) -> Result:
    """What the first process computes; an error of it is every process's error."""
    if count() == 1:
        return compute()
    found = [_tried(compute) if is_first() else None]
    # Nobody changes what is read here before all have come this far.
    _joined().barrier()
    _joined().broadcast_object_list(found, src=0)
    return _value(found[0])


def in_turn(parts: Sequence[Part], work: Callable[[Part], Result]) -> list[Result]:
    """`work` of each part, in their order; parts are dealt to the processes one by one.

    A part's result does not depend on how many processes there are, as long as `work` looks at that part
    alone. An error of any process is every process's error.
    """
    if count() == 1 or _in_step:
        return [work(part) for part in parts]
    own = _tried(lambda: [work(part) for part in parts[rank() :: count()]])
    gathered: list[Any] = [None] * count()
    _joined().all_gather_object(gathered, own)
    dealt = [_value(one) for one in gathered]
    return [dealt[i % count()][i // count()] for i in range(len(parts))]


def _tried(compute: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return compute(), None
    except Exception as error:  # noqa: BLE001  # raised again, in every process
        return None, error


def _value(tried: Any) -> Any:
    value, error = tried
    if error is not None:
        raise error
    return value


def _joined() -> Any:
    """torch.distributed with its group; made when it is needed first, which waits for the other processes."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        gpus = torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(device_index())
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
        atexit.register(distributed.destroy_process_group)  # its threads do not survive the interpreter's end
    return distributed
