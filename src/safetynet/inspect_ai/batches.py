"""Requests that come one by one, answered batch by batch, in whatever event loop Inspect runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import anyio
import anyio.to_thread

Item = TypeVar("Item")
Result = TypeVar("Result")
QUIET_S = 0.02
"""A batch that is not full begins when no request has come for so long."""


@dataclass(eq=False)
class _Request(Generic[Item, Result]):
    item: Item
    outcome: Result | Exception | None = None


class Batches(Generic[Item, Result]):
    """Answers what waits together, one batch at a time.

    The first request that waits takes the others that are there along; each later one is answered already
    when its turn comes.

    Args:
        compute: one result for each item, in order; runs beside the event loop, never twice at a time. No
            result is None.
        size: most items of a batch.
    """

    def __init__(self, compute: Callable[[Sequence[Item]], Sequence[Result]], size: int) -> None:
        self._compute, self._size = compute, size
        self._waiting: list[_Request[Item, Result]] = []
        self._turn = anyio.Lock()

    async def answer(self, item: Item) -> Result:
        """The item's result; an error of its batch is raised for every item of it."""
        request = _Request[Item, Result](item)
        self._waiting.append(request)
        try:
            async with self._turn:
                if request.outcome is None:
                    # More may be about to come: until the batch is full, or none has come for a while.
                    count = 0
                    while count < len(self._waiting) < self._size:
                        count = len(self._waiting)
                        await anyio.sleep(QUIET_S)
                    await self._answer_together(self._waiting[: self._size])
        finally:
            if request in self._waiting:  # cancelled
                self._waiting.remove(request)
        if isinstance(request.outcome, Exception):
            raise request.outcome
        assert request.outcome is not None
        return request.outcome

    async def _answer_together(self, batch: Sequence[_Request[Item, Result]]) -> None:
        items = [each.item for each in batch]
        outcomes: Sequence[Result | Exception]
        try:
            # Not abandoned when it is cancelled: the model belongs to one batch at a time.
            outcomes = await anyio.to_thread.run_sync(self._compute, items)
        except Exception as error:  # noqa: BLE001 - raised where each item's result is awaited
            outcomes = [error] * len(items)
        for request, outcome in zip(batch, outcomes, strict=True):
            request.outcome = outcome
            if request in self._waiting:
                self._waiting.remove(request)
