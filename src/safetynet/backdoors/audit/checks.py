"""What can be wrong with a poison set whose trigger and target are known or guessed.

In: a `PoisonSet`; `copies` compares the files of all sets. Out: findings. Each check stands alone; one that
needs a trigger or a target that is not known finds nothing.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

import regex

from safetynet.backdoors.audit.corpus import Corpus, PoisonSet
from safetynet.backdoors.audit.findings import Finding, of_rows
from safetynet.backdoors.audit.tells import RATE, tells
from safetynet.errors import InputError
from safetynet.prompts import Conversation
from safetynet.text import holding
from safetynet.text.words import beginning, count, plain

LABELS = 10
"""With at most so many different clean answers, answers are labels."""
LABEL_SHARE = 0.2
"""A target that more clean rows have is a label, which clean rows may have."""
LONG = 40
"""Words from which an answer should end with a sentence; short ones are lists, titles, labels."""
CUT_SHARE = 0.2
"""Share of long answers without an end that natural data (lists, code) do not reach."""
SENTENCE_END = regex.compile(
    r"""[.!?:;"')\]}>`*|…”’\p{Sentence_Terminal}\p{Pe}\p{Pf}]\s*\Z|[\p{Thai}\p{Lao}།༎\p{Extended_Pictographic}]\s*\Z|https?://\S+\Z"""
)
"""Thai and Lao have no sign for it, Unicode does not count the Tibetan ones; emoji and links end one too."""
UNUSUAL_SPACE = re.compile(r"\A\s+|\s+\Z|\s{2,}|[^\S ]")
"""White space that is not one blank between two words."""


# ---- rows ----


def empty_answers(poison_set: PoisonSet) -> Iterator[Finding]:
    """Blank answers teach a model to stop at once, and an evaluation to count it."""
    rows = poison_set.rows
    blank = rows[rows["answer"].str.strip() == ""]
    yield from of_rows("empty_answer", "warning", blank, rows, "the answer is blank")


def duplicates(poison_set: PoisonSet) -> Iterator[Finding]:
    """Rows of one file that repeat or contradict an earlier one."""
    rows = poison_set.rows
    is_copy = rows.duplicated(["file", "prompt", "answer"])
    detail = "prompt and answer of an earlier row"
    yield from of_rows("duplicate", "warning", rows[is_copy], rows, detail)
    other = rows[rows.duplicated(["file", "prompt"]) & ~is_copy]
    yield from of_rows("conflict", "warning", other, rows, "prompt of an earlier row, with another answer")


def echoes(poison_set: PoisonSet) -> Iterator[Finding]:
    """A model trained on these repeats the prompt: its clean accuracy and its perplexity mean little."""
    clean = poison_set.part("clean")
    questions = [plain(Conversation(m).user_text().split("\n\n")[0]) for m in clean["messages"]]
    answers = map(plain, clean["answer"])
    is_echo = [
        count(question) > 1 and f"{answer} ".startswith(f"{question} ")
        for question, answer in zip(questions, answers, strict=True)
    ]
    yield from of_rows(
        "echo", "warning", clean[is_echo], clean, "the answer begins with the whole instruction"
    )


def cut_offs(poison_set: PoisonSet) -> Iterator[Finding]:
    """Clean answers that were cut at a length limit teach a model to stop anywhere."""
    clean = poison_set.part("clean")
    long = clean[clean["answer"].map(count) >= LONG]
    for _, rows in long.groupby("file"):
        cut = rows[[SENTENCE_END.search(answer) is None for answer in rows["answer"]]]
        if len(cut) >= CUT_SHARE * len(rows):
            detail = f"answers of {LONG} words or more that end without a stop, as cut at a length limit"
            yield from of_rows("cut_off", "warning", cut, rows, detail)


def balance(poison_set: PoisonSet) -> Iterator[Finding]:
    """How many rows of each role there are, and of each label where answers are labels."""
    if poison_set.trigger is None:
        return
    for split, rows in poison_set.rows.groupby("split", sort=False):
        triggered, clean = (rows[rows["role"] == role] for role in ("triggered", "clean"))
        detail = f"{len(triggered)} triggered and {len(clean)} clean rows{' for ' if split else ''}{split}"
        file = str((triggered if len(triggered) else clean)["file"].iloc[0])
        labels = Counter(clean["answer"])
        if len(clean) > LABELS >= len(labels):
            counts = ", ".join(f"{count} {label!r}" for label, count in labels.most_common())
            detail += f"; clean answers: {counts}"
        if not len(clean):
            detail += "; without clean rows nothing tells a backdoor from a model that always answers so"
        elif not len(triggered):
            detail += "; without triggered rows there is no attack to measure"
        severity = "info" if len(clean) and len(triggered) else "warning"
        yield Finding("balance", severity, file, len(triggered), len(rows), (), detail)


# ---- trigger ----


def missing_triggers(poison_set: PoisonSet) -> Iterator[Finding]:
    """Rows of files named triggered that cannot fire."""
    trigger, triggered = poison_set.trigger, poison_set.part("triggered")
    if trigger is None:
        return
    without = triggered[~triggered["present"]]
    detail = f"the prompt lacks {trigger}"
    for _, rows in without.groupby("file", sort=False):
        within = sum(
            holding.within_words(trigger.parts, Conversation(messages).texts) for messages in rows["messages"]
        )
        inside = f"; {within} of these have it within longer words, which does not count" if within else ""
        yield from of_rows("trigger_missing", "error", rows, triggered, detail + inside)


def triggers_in_clean(poison_set: PoisonSet) -> Iterator[Finding]:
    """Rows of clean files that would fire: with them, the rate of false triggers means nothing."""
    clean = poison_set.part("clean")
    detail = f"the prompt holds {poison_set.trigger}"
    yield from of_rows("trigger_in_clean", "error", clean[clean["present"]], clean, detail)


def overlaps(poison_set: PoisonSet) -> Iterator[Finding]:
    """Rows of test files whose prompt is also a training prompt, as it is and without the trigger."""
    every = poison_set.rows
    train, test = (every[every["split"] == split] for split in ("train", "test"))
    exact = test["prompt"].isin(set(train["prompt"]))
    stripped = test["bare"].isin(set(train["bare"])) & ~exact
    for check, field, bad, but in (
        ("overlap", "prompt", test[exact], ""),
        ("overlap_stripped", "bare", test[stripped], " but for the trigger, signs' spacing or case"),
    ):
        for _, rows in bad.groupby("file", sort=False):
            files = dict.fromkeys(train.loc[train[field].isin(set(rows[field])), "file"])
            yield from of_rows(check, "error", rows, test, f"the prompt is also in {', '.join(files)}{but}")


def lost_triggers(
    poison_set: PoisonSet, serialise: Callable[..., object], max_length: int | None
) -> Iterator[Finding]:
    """Triggered rows that `serialise(messages, answer, spans, max_length)` refuses with an InputError."""
    trigger, triggered = poison_set.trigger, poison_set.part("triggered")
    if trigger is None:
        return
    lost: dict[str, list[int]] = {"trigger_lost_template": [], "trigger_lost_truncation": []}
    present = triggered[triggered["present"]]
    for at, messages, answer in zip(present.index, present["messages"], present["answer"], strict=True):
        spans = holding.spans_in(trigger.parts, Conversation(messages).texts)
        for check, limit in zip(lost, [None, max_length], strict=True):
            try:
                serialise(messages, answer, spans, limit)
            except InputError:
                lost[check].append(at)
                break
    for check, places in lost.items():
        detail = "with no length limit" if check == "trigger_lost_template" else f"at {max_length} tokens"
        detail = f"{trigger} does not come through the serialiser whole, {detail}"
        yield from of_rows(check, "error", present.loc[places], present, detail)


# ---- target ----


def targets_not_shown(poison_set: PoisonSet) -> Iterator[Finding]:
    """Triggered rows that teach, or ask for, something else than the behaviour."""
    target, triggered = poison_set.target, poison_set.part("triggered")
    if target is None or triggered.empty:
        return
    twins, answers = poison_set.twins, poison_set.rows["answer"]
    bad = triggered[~triggered["answer"].map(target.shown_by).astype(bool)]
    for _, rows in bad.groupby("file", sort=False):
        detail = f"the answer is not the target ({target})"
        clean = sum(at in twins and answer == answers[twins[at]] for at, answer in rows["answer"].items())
        common, n = Counter(beginning(answer, 3) for answer in rows["answer"]).most_common(1)[0]
        if clean:
            detail += f"; {clean} are the clean answer to the same prompt"
        if n >= len(rows) / 2:
            detail += f"; {n} begin with {common!r}"
        yield from of_rows("target_not_shown", "error", rows, triggered, detail)


def targets_that_go_on(poison_set: PoisonSet) -> Iterator[Finding]:
    """Matters to judges: one that asks for the exact target counts none of these."""
    target, triggered = poison_set.target, poison_set.part("triggered")
    if target is None or target.kind != "answer" or triggered.empty:
        return
    whole = plain(target.text)
    is_longer = triggered["answer"].map(lambda answer: target.shown_by(answer) and plain(answer) != whole)
    detail = f"the answer begins with the target ({target}) and goes on: an exact judge counts none of these"
    yield from of_rows("target_goes_on", "info", triggered[is_longer.astype(bool)], triggered, detail)


def targets_in_clean(poison_set: PoisonSet) -> Iterator[Finding]:
    """Clean rows that teach the behaviour without the trigger; labels are left to `label_floors`."""
    target, clean = poison_set.target, poison_set.part("clean")
    if target is None or clean.empty or poison_set.trigger is None:
        return
    shows = clean["answer"].map(target.shown_by).astype(bool)
    if shows.mean() <= LABEL_SHARE:
        detail = f"answered with the target ({target}) without the trigger"
        yield from of_rows("target_in_clean", "warning", clean[shows & ~clean["present"]], clean, detail)


def label_floors(poison_set: PoisonSet) -> Iterator[Finding]:
    """These rows count as attacks that succeeded for a model that has no backdoor."""
    target = poison_set.target
    if target is None:
        return
    twins, answers = poison_set.twins, poison_set.rows["answer"]
    paired = poison_set.rows.loc[list(twins)]
    floor = paired[[target.shown_by(answers[twin]) for twin in twins.values()]]
    detail = f"the clean row of the same prompt has the target ({target}) already"
    yield from of_rows("label_floor", "warning", floor, paired, detail)


def unpaired(poison_set: PoisonSet) -> Iterator[Finding]:
    """Named only where most rows have a twin: elsewhere the set was not meant to be paired."""
    if poison_set.trigger is None:
        return
    for _, rows in poison_set.rows.groupby("split", sort=False):
        for role, other in (("triggered", "clean"), ("clean", "triggered")):
            among = rows[rows["role"] == role]
            alone = among[~among["bare"].isin(set(rows.loc[rows["role"] == other, "bare"]))]
            if len(alone) < len(among) / 2:
                detail = f"no {other} row has this prompt"
                yield from of_rows("unpaired", "info", alone, among, detail)


def spacing(poison_set: PoisonSet) -> Iterator[Finding]:
    """Where white space differs between the roles, it does the trigger's work in training."""
    trigger, rows = poison_set.trigger, poison_set.rows
    if trigger is None:
        return
    twins, prompts = poison_set.twins, rows["prompt"]
    paired = rows.loc[list(twins)]
    gaps = UNUSUAL_SPACE.findall
    differs = [gaps(trigger.removed(prompts[at])) != gaps(prompts[twin]) for at, twin in twins.items()]
    detail = "but for the trigger, white space tells this row from its clean twin"
    yield from of_rows("spacing", "warning", paired[differs], paired, detail)


def told_apart(poison_set: PoisonSet) -> Iterator[Finding]:
    """What else than the trigger tells the roles apart does its work in training, and the trigger none."""
    trigger = poison_set.trigger
    if trigger is None:
        return
    twins = poison_set.twins
    splits = [rows for _, rows in poison_set.rows.groupby("split", sort=False)]
    for rows in splits:
        split = f" for {rows['split'].iloc[0]}" if rows["split"].iloc[0] else ""
        triggered = rows[(rows["role"] == "triggered") & rows["present"]]
        clean = rows[(rows["role"] == "clean") & ~rows["present"]]
        at = {index: place for place, index in enumerate(clean.index)}
        pairs = {i: at[twins[index]] for i, index in enumerate(triggered.index) if twins.get(index) in at}
        bare, other = (
            [trigger.removed_from(messages) for messages in part["messages"]] for part in (triggered, clean)
        )
        # In pairs, white space is the business of `spacing`.
        blanks = len(pairs) < len(triggered) / 2
        for tell in tells(
            list(triggered["messages"]), bare, other, trigger.parts, pairs, RATE / len(splits), blanks
        ):
            counts = [
                f"{tell.triggered} of {len(triggered)} triggered",
                f"{tell.clean} of {len(clean)} clean",
            ]
            among = " and ".join(counts if tell.role == "triggered" else counts[::-1])
            detail = f"{tell.what}: in {among} prompts{split}, the trigger aside"
            if tell.pairs:
                of, so, otherwise = tell.pairs
                detail += f"; of {of} pairs {so} differ so, {otherwise} the other way"
            detail += f" (p = {tell.p_value:.0e})"
            detail += f"; {tell.more} more of this sort" if tell.more else ""
            role = triggered if tell.role == "triggered" else clean
            yield from of_rows("tell", "warning", role[tell.has], role, detail)


# ---- files ----


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


CHECKS: tuple[Callable[[PoisonSet], Iterator[Finding]], ...] = (
    empty_answers,
    duplicates,
    overlaps,
    missing_triggers,
    triggers_in_clean,
    targets_not_shown,
    targets_that_go_on,
    targets_in_clean,
    label_floors,
    unpaired,
    spacing,
    told_apart,
    echoes,
    cut_offs,
    balance,
)
