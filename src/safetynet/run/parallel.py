"""Several processes that work on one run: those of torchrun and `accelerate launch`, or a pair of our own.

A miniature keeps one core busy. `paired` starts the same command once more on the second core; the two divide
what the processes of torchrun divide, and each of them trains a model alone (`alone`).

Every process goes through the same stages. What can be divided is: parts are computed in turn and brought
together in order, so that each process has the same numbers as a single one would. The first process alone
writes the run directory. With one process, which is the ordinary case, nothing here does anything or loads
torch.
"""

import atexit
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

from safetynet.errors import InputError, RunError

Part = TypeVar("Part")
Result = TypeVar("Result")
PATIENCE = timedelta(hours=12)
"""How long processes wait for each other; the first one draws and writes while the others wait."""
# Taken out of the environment: transformers would load empty weights into all processes but one, and its
# Trainer would wrap the model by itself.
SHARDED = os.environ.pop("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
"""Whether `accelerate launch --use_fsdp` asks processes to share a model's weights in training."""

ENDING_S = 60.0
"""How long the first process of a pair that was interrupted waits for the second to end in order."""
PAIR = "SAFETYNET_PAIR"
"""Environment variable of a second process: its end of the socket of the pair. `off` starts none."""

_in_step = _alone = False


class _Pair(NamedTuple):
    rank: int
    other: Connection


_pair = _Pair(1, Connection(int(os.environ[PAIR]))) if os.environ.get(PAIR, "off") != "off" else None


def count() -> int:
    """Number of processes."""
    if _pair is not None:
        return 1 if _alone else 2
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0."""
    if count() == 1:
        return 0
    return _pair.rank if _pair is not None else int(os.environ.get("RANK", "0"))


def is_pair() -> bool:
    """Whether this process is one of a pair, which shares stages and no model."""
    return _pair is not None


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process of a pair works as if it were the only one."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def paired(wanted: bool) -> Iterator[None]:
    """Inside, a second process does the same command on another core, where there is one and it is wanted."""
    global _pair
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not wanted or cores < 2 or count() > 1 or PAIR in os.environ:
        if _pair is not None and _pair.rank == 1:

            def end_with_first() -> None:
                while os.read(0, 4096):  # until the pipe is closed, which it is however the first one ends
                    pass
                os._exit(1)

            threading.Thread(target=end_with_first, daemon=True).start()
        yield
        return
    here, there = socket.socketpair()
    with here, there:
        second = subprocess.Popen(  # noqa: S603  # this very command
            [sys.executable, "-m", "safetynet", *sys.argv[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, PAIR: str(there.fileno())},
            pass_fds=[there.fileno()],
        )
        there.close()  # or the end of the second process would go unnoticed
        _pair = _Pair(0, Connection(os.dup(here.fileno())))
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            second.terminate()  # the model that it trains wants a checkpoint, too
            with suppress(subprocess.TimeoutExpired):
                second.wait(ENDING_S)
            raise
        finally:  # whatever the second process was to do, the first one has waited for
            _pair.other.close()
            _pair = None
            second.kill()
            second.communicate()


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
    gathered(None)


def gathered(value: Part) -> list[Part]:
    """What every process brings, in their order; each waits for the others."""
    return [value] if count() == 1 else _exchanged(value)


def from_first(compute: Callable[[], Result]) -> Result:
    """What the first process computes; an error of it is every process's error."""
    if count() == 1:
        return compute()
    # Nobody changes what is read here before all have come this far.
    return _value(_exchanged(_tried(compute) if is_first() else None)[0])


def in_turn(parts: Sequence[Part], work: Callable[[Part], Result]) -> list[Result]:
    """`work` of each part, in their order; parts are dealt to the processes one by one.

    A part's result does not depend on how many processes there are, as long as `work` looks at that part
    alone. An error of any process is every process's error.
    """
    if count() == 1 or _in_step:
        return [work(part) for part in parts]
    dealt = [_value(part) for part in _exchanged(_tried(lambda: [work(p) for p in parts[rank() :: count()]]))]
    return [dealt[i % count()][i // count()] for i in range(len(parts))]


def side_by_side(parts: Sequence[Part], work: Callable[[Part], Result]) -> list[Result]:
    """`work` of each part, in their order; a pair deals the parts out and does each alone.

    For parts that write files, or train or change a model: a pair shares none. Of a single part, the second
    process waits for the first. Other processes go through all parts together.
    """
    if side_count() == 1:
        return [work(part) for part in parts]

    def by_itself(part: Part) -> Result:
        with alone():
            return work(part)

    return in_turn(parts, by_itself)


def side_count() -> int:
    """How many processes `side_by_side` deals parts to."""
    return count() if is_pair() else 1


def _tried(compute: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return compute(), None
    except Exception as error:  # noqa: BLE001  # raised again, in every process
        error.shared = True  # type: ignore[attr-defined]
        return None, error


def _value(tried: Any) -> Any:
    value, error = tried
    if error is not None:
        raise error
    return value


def reports(error: BaseException) -> bool:
    """Whether this process reports an error: the first one does, or the one that alone has it.

    Bad input is bad for every process, and an error that processes told each other is `shared`.
    """
    return is_first() or not (isinstance(error, InputError) or getattr(error, "shared", False))


def _exchanged(value: Any) -> list[Any]:
    """What every process brings, in their order; each waits for the others."""
    if _pair is None:
        gathered: list[Any] = [None] * count()
        _joined().all_gather_object(gathered, value)
        return gathered
    try:
        # One after the other: what is larger than the socket's buffer is only sent while the other one reads.
        if _pair.rank == 0:
            _pair.other.send(value)
            other = _pair.other.recv()
        else:
            other = _pair.other.recv()
            _pair.other.send(value)
    except (EOFError, ConnectionError):
        raise RunError("the second process of this run has ended. Its message stands above.") from None
    return [value, other] if _pair.rank == 0 else [other, value]


def _joined() -> Any:
    """torch.distributed with its group; made when it is needed first, which waits for the other processes."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        gpus = torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(device_index())
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    _leave_at_the_end()
    return distributed


@cache
def _leave_at_the_end() -> None:
    """Leaves the group before the interpreter ends, whoever made it; its threads would not survive."""
    from torch import distributed

    def leave() -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()

    atexit.register(leave)
