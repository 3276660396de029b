"""Errors as Inspect shows them to a person: one sentence, no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

from inspect_ai._util.error import PrerequisiteError

from safetynet.errors import SafetyNetError


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """What SafetyNet refuses inside, Inspect prints and ends."""
    try:
        yield
    except SafetyNetError as error:
        raise PrerequisiteError(str(error)) from None
