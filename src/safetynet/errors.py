"""The two kinds of error that a person is meant to read.

An error's text says what is wrong, where (file, field, row) and what to do. The command line prints it
without a traceback and turns its kind into the exit code.
"""


class SafetyNetError(Exception):
    """Base of every error that SafetyNet raises on purpose."""

    exit_code = 1


class InputError(SafetyNetError):
    """The recipe, a file or a row that the user gave cannot be used (exit code 2)."""

    exit_code = 2


class RunError(SafetyNetError):
    """The input was sound, and the run failed all the same (exit code 1)."""
