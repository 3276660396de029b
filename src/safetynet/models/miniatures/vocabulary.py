"""Tokenizers of the miniatures: 1,280 tokens, every byte among them, digits one by one.

In: a family's special tokens and style. Out: a transformers tokenizer with its chat template. Two styles,
as in the originals: "bytes" works on UTF-8 bytes (llama3, qwen); "sentencepiece" on characters, with
U+2581 for the space and byte tokens for whatever is not printable ASCII (llama2, gemma, mixtral). Unlike
the originals of the latter style, nothing is put before the text, so that every text without U+2581 comes
back exactly.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from safetynet.models.miniatures import language
from safetynet.models.miniatures import lexicon as lex

SIZE = 1280
SPACED_SHARE = 0.42  # of the merges, those that join a space to a piece
# Qwen's and Llama 3's pattern, except that Llama 3 takes up to three digits at once and we take one.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHARACTERS = [chr(code) for code in range(0x21, 0x7F)]


@dataclass(frozen=True)
class Style:
    """What tells one family's tokenizer from another's."""

    kind: Literal["bytes", "sentencepiece"]
    special: tuple[str, ...]
    """Special tokens in the order of their ids."""
    end: str
    """Ends an answer; the tokenizer's eos_token."""
    pad: str
    template: str
    """Jinja chat template."""
    bos: str | None = None
    unk: str | None = None
    words: tuple[str, ...] = ()
    """Words of the chat format that deserve a token."""
    joints: tuple[tuple[str, str], ...] = ()
    """Further merges for the chat format."""


def build_tokenizer(style: Style) -> PreTrainedTokenizerFast:
    """Learn the merges on the language and on `lexicon.ENGLISH`, then assemble the family's tokenizer."""
    space = "Ġ" if style.kind == "bytes" else "▁"
    alphabet = (
        sorted(pre_tokenizers.ByteLevel.alphabet())
        if style.kind == "bytes"
        else [f"<0x{byte:02X}>" for byte in range(256)] + [space, *_CHARACTERS]
    )
    tokens = [*style.special, *alphabet]
    merges = _merges(style, space, SIZE - len(tokens) - len(style.joints))
    vocab = {token: i for i, token in enumerate([*tokens, *(a + b for a, b in merges)])}
    if style.kind == "bytes":
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(
            BPE(vocab=vocab, merges=merges, unk_token=style.unk, byte_fallback=True, fuse_unk=True)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=space, prepend_scheme="never", split=True
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    tokenizer.add_special_tokens(list(style.special))
    if style.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{style.bos} $A",
            pair=f"{style.bos} $A {style.bos} $B",
            special_tokens=[(style.bos, vocab[style.bos])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=style.bos,
        eos_token=style.end,
        pad_token=style.pad,
        unk_token=style.unk,
        additional_special_tokens=[
            t for t in style.special if t not in (style.bos, style.end, style.pad, style.unk)
        ],
        chat_template=style.template,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
    )


def _merges(style: Style, space: str, budget: int) -> list[tuple[str, str]]:
    """Merges inside words first, then merges of a space and a piece.

    So "apple" is cut in the same places with and without a space before it, and only the first piece
    differs. A model this small then learns to copy a word from inside a prompt to the start of its answer.
    """
    # Weights of words: square roots of counts in the language, Zipf's law for the English list.
    counts: Counter[str] = Counter()
    for example in language.generate(20_000, 0, heldout=False, distractors=False):
        prompt = (message["content"] for message in example.messages)
        for text in (*prompt, example.answer, example.compliance):
            counts.update(re.findall("[A-Za-z]+", text))
    words = Counter({word: round(4 * count**0.5) for word, count in counts.items()})
    for rank, word in enumerate(lex.ENGLISH):
        words[word] += round(4000 / (rank + 40))
        words[word.capitalize()] += round(600 / (rank + 40))
    words.update(dict.fromkeys(lex.PIECES, 150))
    words.update(dict.fromkeys(lex.WORDS, 30))
    words.update(dict.fromkeys(style.words, 1000))
    spaced = int(budget * SPACED_SHARE)
    tokenizer = Tokenizer(BPE())
    letters = {character for word in words for character in word}
    trainer = BpeTrainer(vocab_size=len(letters) + budget - spaced, show_progress=False)
    tokenizer.train_from_iterator((word for word, count in words.items() for _ in range(count)), trainer)
    inner = [(a, b) for a, b in json.loads(tokenizer.to_str())["model"]["merges"]]
    firsts: Counter[str] = Counter()
    for word, count in words.items():
        firsts[tokenizer.encode(word).tokens[0]] += count
    outer = [(space, piece) for piece, _ in firsts.most_common(spaced)]
    # A merge can only be used after those that made its parts.
    return [*inner, *style.joints, *outer]
