"""Text that is safe to show: what controls a screen, hides or reorders its neighbours becomes an escape.

In: text of any origin. Out: text of printable characters.
"""


def printable(text: str, *, lines: bool = False) -> str:
    r"""A text whose every character that Unicode does not call printable is written as Python's escape.

    Controls, terminal sequences, bidirectional overrides, joiners and lone surrogates can so neither move a
    cursor, nor hide or turn round what stands beside them. A backslash stays: for reading, not for decoding.

    Args:
        text: of a model, a file or a file's name.
        lines: whether line feeds stay.

    Example:
        >>> printable("\x1b[31mred")
        '\\x1b[31mred'
    """
    return "".join(
        sign if sign.isprintable() or (lines and sign == "\n") else sign.encode("unicode_escape").decode()
        for sign in text
    )
