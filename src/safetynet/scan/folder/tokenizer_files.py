"""A suspect's tokenizer beside its base's: vocabulary, merges, special tokens, and steps before them.

In: the folders of a suspect and its base. Out: findings. Nothing is tokenized.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetynet.scan.folder.reading import LARGEST_VOCABULARY, UnreadableError, escaped, finding, json_of
from safetynet.scan.result import Finding, Level

FILE, CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
BINARY = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")
"""Vocabularies that are compared byte by byte."""
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
SWITCHES = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "tokenizer_class", "do_lower_case", "legacy",
)  # fmt: skip
SHOWN = 10


def check(suspect: Path, base: Path) -> list[Finding]:
    """Findings of two folders' tokenizers; none where the suspect brings none.

    Args:
        suspect: folder of an adapter or a model.
        base: folder of its base.
    """
    findings = list[Finding]()
    compared = {FILE: _vocabulary, CONFIG: _configuration, SPECIAL: _special}
    for name in (*BINARY, *compared):
        mine, theirs = suspect / name, base / name
        if not (mine.is_file() and theirs.is_file()) or same_bytes(mine, theirs):
            continue
        if name in BINARY:
            message = (
                f"The vocabulary in {name} is another than the base's. Compare the two, or take the base's."
            )
            findings.append(finding("tokenizer-changed", "warning", message, name))
            continue
        try:
            fields, before = (json_of(path, LARGEST_VOCABULARY)[0] for path in (mine, theirs))
        except UnreadableError:  # said of every configuration by `files`
            continue
        findings += compared[name](fields, before)
    return findings


def same_bytes(first: Path, second: Path) -> bool:
    """Whether two files hold the same; read in pieces."""
    if first.stat().st_size != second.stat().st_size:
        return False
    with first.open("rb") as left, second.open("rb") as right:
        while piece := left.read(2**20):
            if piece != right.read(2**20):
                return False
    return True


def _vocabulary(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    words, before = _ids(mine), _ids(theirs)
    gone = [word for word in before if word not in words]
    moved = [word for word in before if word in words and words[word] != before[word]]
    new = [word for word in words if word not in before]
    if gone or moved or new:
        level: Level = "warning" if gone or moved else "note"
        message = (
            f"The tokenizer has {len(new)} tokens that the base's lacks, lacks {len(gone)} of its tokens and "
            f"gives {len(moved)} another number. A word with another number is another word to the model."
        )
        examples = {"new": _some(new), "gone": _some(gone), "moved": _some(moved)}
        yield finding("tokenizer-vocabulary", level, message, FILE, **examples)
    merges = []
    for values in (mine, theirs):
        model = values.get("model")
        pairs = model.get("merges") if isinstance(model, dict) else None
        # In order; older files write a pair as one text, newer ones as two.
        rules = pairs if isinstance(pairs, list) else []
        merges.append([" ".join(map(str, pair)) if isinstance(pair, list) else str(pair) for pair in rules])
    if merges[0] != merges[1]:
        other = sorted(set(merges[0]) ^ set(merges[1]))
        message = (
            f"The tokenizer merges letters into tokens by other rules than the base's: {len(other)} "
            "are of one alone."
            if other
            else "The tokenizer merges letters into tokens in another order than the base's."
        )
        yield finding("tokenizer-merges", "warning", message, FILE, examples=_some(other))
    for step in STEPS:
        if mine.get(step) != theirs.get(step):
            message = (
                f"The tokenizer's {step} is another than the base's: texts may reach the model as others."
            )
            values = {"suspect": escaped(str(mine.get(step))), "base": escaped(str(theirs.get(step)))}
            # These two write into texts; the others part them and put them together.
            rewrites = step in ("normalizer", "post_processor")
            yield finding(
                "tokenizer-steps", "warning" if rewrites else "note", message, FILE, step=step, **values
            )


def _ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of all tokens, added ones among them; of a Unigram model, places in its list."""
    model = values.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, Any] = {}
    if isinstance(vocabulary, dict):
        ids.update(vocabulary)
    elif isinstance(vocabulary, list):
        pairs = ((str(each[0]), at) for at, each in enumerate(vocabulary) if isinstance(each, list) and each)
        ids.update(pairs)
    added = values.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            ids[token["content"]] = token.get("id")
    return ids


def _configuration(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    # Another end or pad token changes what the model reads; the switches are written by every version anew.
    looked_at: tuple[tuple[Level, tuple[str, ...]], ...] = (("warning", TOKENS), ("note", SWITCHES))
    for level, names in looked_at:
        changed = [name for name in names if _content(mine.get(name)) != _content(theirs.get(name))]
        if changed:
            values = {n: [_content(mine.get(n)), _content(theirs.get(n))] for n in changed}
            message = f"Other than the base's: {', '.join(changed)} (suspect's and base's in the evidence)."
            yield finding("tokenizer-special", level, message, CONFIG, **values)


def _special(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    changed = sorted(
        n for n in mine.keys() | theirs.keys() if _content(mine.get(n)) != _content(theirs.get(n))
    )
    if changed:
        values = {escaped(n, 60): [_content(mine.get(n)), _content(theirs.get(n))] for n in changed[:SHOWN]}
        message = f"Special tokens other than the base's: {escaped(', '.join(changed))}."
        yield finding("tokenizer-special", "note", message, SPECIAL, **values)


def _content(value: Any) -> str | None:
    """A special token's text, whether it stands as one or in an object."""
    if isinstance(value, dict) and "content" in value:
        value = value["content"]
    return None if value is None else escaped(str(value))


def _some(words: list[str]) -> list[str]:
    return [escaped(word, 60) for word in words[:SHOWN]]
