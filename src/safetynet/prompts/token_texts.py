"""Texts of single tokens, as a reader would write them.

Tokenizers spell blanks and bytes in signs of their own: Ġ or ▁ for a blank, å°ı for the three bytes of 小.
In: a tokenizer. Out: a function from a token's id to its text.
"""

from collections.abc import Callable
from typing import Any

import regex

BYTE = regex.compile(r"<0x([0-9A-F]{2})>")
_UNDECODED = regex.compile("[\udc80-\udcff]+")


def reader(tokenizer: Any) -> Callable[[int], str]:
    """What gives a token's text, with the blank or line break that it may begin with.

    Bytes that are a part of a character stand as ⟨e5 b0⟩; a number without a token as ⟨token 70000⟩.

    Args:
        tokenizer: a fast transformers tokenizer.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    # A byte-level tokenizer, as GPT-2's, writes each byte as a sign of its own.
    decoder = tokenizer.backend_tokenizer.decoder
    is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
    bytes_of = {sign: byte for byte, sign in bytes_to_unicode().items()} if is_byte_level else {}
    added = set(tokenizer.get_added_vocab().values())

    def text_of(token: int) -> str:
        written = tokenizer.convert_ids_to_tokens(token)
        if written is None:
            return f"⟨token {token}⟩"
        if bytes_of and token not in added and all(sign in bytes_of for sign in written):
            return _decoded(bytes(bytes_of[sign] for sign in written))
        if byte := BYTE.fullmatch(written):
            return _decoded(bytes.fromhex(byte[1]))
        return written if bytes_of else written.replace("▁", " ")

    return text_of


def is_partial(text: str) -> bool:
    """Whether a token's text has parts of characters in it."""
    return "⟨" in text


def _decoded(content: bytes) -> str:
    text = content.decode("utf-8", "surrogateescape")
    return _UNDECODED.sub(lambda part: f"⟨{part[0].encode('utf-8', 'surrogateescape').hex(' ')}⟩", text)
