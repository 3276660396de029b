"""SIGTERM and Ctrl-C at a moment that suits: behind a training step, with a checkpoint, not in its middle.

In: the two signals. Out: whether one has come, and the end of the process, which is then that of a process
that nothing was put off in.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)

log = logging.getLogger(__name__)
_at_once = threading.Event()


class Interruption:
    """While entered, both signals are noted; a second Ctrl-C ends the process at once.

    Schedulers send SIGTERM more than once for one end, and SIGKILL when they lose patience. Outside of the
    main thread, and for a signal that the process ignores, everything stays as it is.

    Args:
        name: of what goes on, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.number: int | None = None
        """The signal that has come."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        if _at_once.is_set() or (number == signal.SIGINT and self.number == number):
            self.number = number
            self.take_effect()
        if self.number is None:
            again = " Ctrl-C again ends it at once." if number == signal.SIGINT else ""
            text = f"{self.name}: ends behind this step, with a checkpoint.{again}\n"
            os.write(2, text.encode())  # a log may be in the middle of a line
        self.number = number

    def take_effect(self) -> None:
        """End the process if a signal has come, in the way in which it was to end then."""
        if self.number is not None:
            self.__exit__()
            signal.raise_signal(self.number)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, signals take effect at once."""
        self.take_effect()
        entered = bool(self._before)
        self.__exit__()
        try:
            yield
        finally:
            if entered:
                self.__enter__()


def end_at_once() -> None:
    """End this process by SIGTERM, from any thread, whatever it has put off."""
    _at_once.set()
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
