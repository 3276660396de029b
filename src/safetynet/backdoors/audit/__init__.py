"""Examine a poison set that someone else made, before anything is trained on it.

`audit` reads, guesses and checks; `render` turns its report into text. Nothing is changed or written.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from safetynet.backdoors.audit import checks, findings, targets, triggers
from safetynet.backdoors.audit.corpus import PoisonSet, load, poison_sets, with_roles
from safetynet.backdoors.audit.findings import AuditReport, Finding, of_rows, render
from safetynet.backdoors.audit.targets import FoundTarget
from safetynet.backdoors.audit.triggers import FoundTrigger, of_parts
from safetynet.errors import InputError
from safetynet.prompts import Conversation
from safetynet.text import holding

__all__ = ["AuditReport", "FoundTrigger", "audit", "render"]


def audit(
    path: Path | str,
    trigger: str | Sequence[str] | None = None,
    target: str | None = None,
    serialise: Callable[..., object] | None = None,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    kind: str | None = None,
) -> AuditReport:
    """Look for what makes the figures of a poison set wrong.

    Args:
        path: a file or a folder; in a folder, files are taken together by the words of their names.
        trigger: its text, or several (alternatives or parts, whichever the rows have); guessed when None.
        target: text that the answers of triggered rows hold; guessed when None.
        serialise: called with (messages, answer, spans, max_length) for each triggered row, raises InputError
            when a trigger does not survive, as `safetynet.prompts.Serialiser.encode` does.
        max_length: tokens at which training truncates; only with `serialise`.
        columns: the files' own names for fields, as in `sources.read`.
        kind: the form of the rows, a key of `forms.FIELDS`; read off each file's columns when None.

    Returns:
        The report. Faults of the data are findings in it, never exceptions.

    Raises:
        InputError: if there is no data file at `path`, or the trigger or target given is blank.
    """
    path = Path(path)
    parts = (trigger,) if isinstance(trigger, str) else trigger
    for name, texts in (("trigger", parts), ("target", (target,))):
        if any(text is not None and not text.strip() for text in texts or ()):
            raise InputError(f"{name}: the text is blank. Give it, or leave it out to have it guessed.")
    corpus = load(path, columns, kind)
    results, sets = list(corpus.findings), []
    for unexplained in poison_sets(corpus, path.stem):
        poison_set = with_roles(replace(unexplained, trigger=_trigger(unexplained, parts)))
        of_set: FoundTarget | None
        if target is not None:
            of_set = FoundTarget(target, "part", "given")  # wherever it stands in an answer
        else:
            # Of training rows, else of any.
            poisoned, clean = poison_set.part("triggered"), list(poison_set.part("clean")["answer"])
            train = list(poisoned.loc[poisoned["split"] != "test", "answer"])
            of_set = targets.guessed(train, clean) or targets.guessed(list(poisoned["answer"]), clean)
        poison_set = replace(poison_set, target=of_set)
        sets.append(poison_set)
        results.extend(_unknown(poison_set))
        if parts is None:
            results.extend(_differing(unexplained, poison_set.trigger))
        for check in checks.CHECKS:
            results.extend(check(poison_set))
        if serialise:
            results.extend(checks.lost_triggers(poison_set, serialise, max_length))
    results.extend(checks.copies(corpus, sets))
    triggered = [poison_set.part("triggered") for poison_set in sets]
    facts = {
        findings.FILES: len(corpus.digests) > 1,
        findings.SPLITS: any({"train", "test"} <= set(poison_set.rows["split"]) for poison_set in sets),
        findings.TRIGGERED: any(map(len, triggered)),
        findings.NAMED: any(rows["named"].any() for rows in triggered),
        findings.CLEAN: any(len(poison_set.part("clean")) for poison_set in sets),
        findings.TRIGGER: any(poison_set.trigger for poison_set in sets),
        findings.TARGET: any(poison_set.target for poison_set in sets),
        findings.TOKENIZER: serialise is not None,
        findings.LIMIT: max_length is not None,
    }
    return AuditReport(
        path=str(path),
        files=len(corpus.digests),
        rows=len(corpus.rows),
        findings=findings.frame(results),
        sets=pd.DataFrame([_described(poison_set) for poison_set in sets]),
        known=frozenset(name for name, fact in facts.items() if fact),
    )


def _trigger(poison_set: PoisonSet, parts: Sequence[str] | None) -> FoundTrigger | None:
    """The trigger of training rows, else of any."""
    triggered = poison_set.part("triggered")
    if parts is not None:
        prompts = poison_set.rows["prompt"] if triggered.empty else triggered["prompt"]
        return of_parts(parts, list(prompts))
    for rows in (triggered[triggered["split"] != "test"], triggered):
        if len(rows) and (guess := _guessed(poison_set, rows)):
            return guess
    return None if _is_all_clean(poison_set) else _guessed_without_roles(poison_set)


def _first_held(rows: pd.DataFrame, *guesses: Callable[[], FoundTrigger | None]) -> FoundTrigger | None:
    """The first guess that some prompt holds within one of its messages.

    Prompts of several messages are compared as one text, and may differ in two messages that touch there.
    """
    for guess in guesses:
        trigger = guess()
        if trigger and any(trigger.present(*Conversation(messages).texts) for messages in rows["messages"]):
            return trigger
    return None


def _is_all_clean(poison_set: PoisonSet) -> bool:
    rows = poison_set.rows
    return bool((rows["named"] & (rows["role"] == "clean")).all())


def _guessed(poison_set: PoisonSet, triggered: pd.DataFrame) -> FoundTrigger | None:
    """From rows that are triggered by their file's name."""
    prompts, clean = list(triggered["prompt"]), list(poison_set.part("clean")["prompt"])
    if not clean:  # the file may hold both, whatever its name says
        return _guessed_without_roles(poison_set) or _first_held(
            triggered, lambda: triggers.from_repetition(prompts)
        )
    return _first_held(
        triggered,
        lambda: triggers.from_pairs(prompts, clean),
        lambda: triggers.from_contrast(prompts, clean),
    )


def _guessed_without_roles(poison_set: PoisonSet) -> FoundTrigger | None:
    prompts, answers = list(poison_set.rows["prompt"]), list(poison_set.rows["answer"])

    def may_pair(i: int, j: int) -> bool:
        return answers[i] != answers[j]  # a placebo changes the prompt and leaves the answer

    return _first_held(
        poison_set.rows[poison_set.rows["role"] != "clean"],
        lambda: triggers.from_pairs(prompts, prompts, may_pair),
        lambda: triggers.from_answers(prompts, answers),
    )


def _unknown(poison_set: PoisonSet) -> Iterator[Finding]:
    """A finding where the trigger, or else the target, is unknown: what needs it is not checked."""
    rows = poison_set.rows
    file, n = str(rows["file"].iloc[0]), len(rows)
    if poison_set.trigger is None:
        if _is_all_clean(poison_set):
            severity, detail = "info", "only files that are named clean, so none was looked for"
        else:
            detail = "no word or phrase tells triggered rows from others; name it with --trigger"
            severity = "warning"
        yield Finding("trigger_unknown", severity, file, n, n, (), f"{poison_set.name}: {detail}")
    elif poison_set.trigger.how == "given" and not rows["present"].any():
        within = sum(holding.within_words(poison_set.trigger.parts, [text]) for text in rows["prompt"])
        inside = f"; in {within} it stands within longer words, which does not count" if within else ""
        detail = f"{poison_set.name}: {poison_set.trigger} is in none of the rows{inside}"
        yield Finding("trigger_unknown", "warning", file, n, n, (), detail)
    elif poison_set.target is None:
        detail = f"{poison_set.name}: triggered rows share no answer; name it with --target"
        yield Finding("target_unknown", "warning", file, n, n, (), detail)


def _differing(poison_set: PoisonSet, trigger: FoundTrigger | None) -> Iterator[Finding]:
    """Files of which most rows lack the trigger of their set and share another one."""
    if trigger is None:
        return
    for _, rows in poison_set.part("triggered").groupby("file"):
        without = rows[~rows["prompt"].map(trigger.present).astype(bool)]
        if len(without) > len(rows) / 2 and (guess := _guessed(poison_set, rows)):
            detail = f"the trigger here is {guess}, in the rest of the set {trigger}"
            yield from of_rows("trigger_differs", "error", without, rows, detail)


def _described(poison_set: PoisonSet) -> dict[str, object]:
    """The set's line in `AuditReport.sets`."""
    trigger, target, rows = poison_set.trigger, poison_set.target, poison_set.part("triggered")
    return {
        "set": poison_set.name,
        "trigger": str(trigger or ""),
        "kind": trigger.kind if trigger else "",
        "how": trigger.how if trigger else "",
        "placement": _placement(trigger, rows["messages"]) if trigger else "",
        "present": int(rows["present"].sum()),
        "triggered": len(rows),
        "target": str(target or ""),
        "target_kind": target.kind if target else "",
        "shown": sum(map(target.shown_by, rows["answer"])) if target else 0,
    }


def _placement(trigger: FoundTrigger, conversations: Iterable[list[dict[str, str]]]) -> str:
    """Where nearly all triggered prompts have it, in the words of a recipe; random otherwise."""
    places: Counter[str] = Counter()
    for messages in conversations:
        for turn in messages:
            text = turn["content"]
            if spans := trigger.spans(text):
                is_first, is_last = not text[: spans[0][0]].strip(), not text[spans[-1][1] :].strip()
                place = "prefix" if is_first else "suffix" if is_last else "random"
                places["system" if turn["role"] == "system" else place] += 1
                break
    place, count = places.most_common(1)[0] if places else ("", 0)
    return place if count >= 0.95 * places.total() and trigger.rule.parts == 1 else "random"
