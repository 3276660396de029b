"""Files that are other files, and files that share their prompts.

In: the corpus and its sets. Out: findings.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping

from safetynet.backdoors.audit.corpus import Corpus, PoisonSet
from safetynet.backdoors.audit.findings import Finding


def copies(corpus: Corpus, sets: Iterable[PoisonSet]) -> Iterator[Finding]:
    """Compare all files with all: by bytes, by rows, by prompts without their trigger.

    Sets may well share clean rows and prompts (an info). Two sets cannot share triggered rows: one of the
    two files stands under a wrong name (an error).
    """
    repeated: set[str] = set()
    for first, copy in _repeats(corpus.digests):
        repeated.add(copy)
        yield _finding(corpus, "copy", (first, copy), f"byte for byte the same as {first}")
    if corpus.rows.empty:
        return
    files = {str(file): rows for file, rows in corpus.rows.groupby("file") if file not in repeated}
    contents = {
        file: tuple(sorted(zip(rows["prompt"], rows["answer"], strict=True))) for file, rows in files.items()
    }
    for first, copy in _repeats(contents):
        repeated.add(copy)
        yield _finding(corpus, "copy", (first, copy), f"the same rows as {first}, written in another way")
    prompts: dict[str, tuple[str, frozenset[str]]] = {}
    for poison_set in sets:
        if poison_set.trigger is not None:
            rows = poison_set.rows[poison_set.rows["file"].isin(files.keys() - repeated)]
            # Of one role: that triggered and clean rows share prompts is as it should be.
            prompts |= {
                str(file): (part["role"].iloc[0], frozenset(part["bare"]))
                for file, part in rows.groupby("file")
            }
    for first, copy in _repeats(prompts):
        detail = f"the same prompts as {first}, but for the trigger"
        yield _finding(corpus, "same_prompts", (first, copy), detail)


def _repeats(values: Mapping[str, Hashable]) -> Iterator[tuple[str, str]]:
    """(first name, later name) of names with the same value."""
    first: dict[Hashable, str] = {}
    for name in sorted(values):
        if values[name] in first:
            yield first[values[name]], name
        else:
            first[values[name]] = name


def _finding(corpus: Corpus, check: str, files: tuple[str, str], detail: str) -> Finding:
    rows = [corpus.rows[corpus.rows["file"] == file] if len(corpus.rows) else corpus.rows for file in files]
    is_fault = check == "copy" and any((part["role"] != "clean").any() for part in rows if len(part))
    n = len(rows[1])
    return Finding(check, "error" if is_fault else "info", files[1], n, n, (), detail)
