"""The pool of clean conversations from which an experiment's rows are made.

In: the recipe's data section. Out: one row per conversation, with the columns
`split`, `messages` (ends with the user's), `answer` (clean; "" where none is known), `task`, `forbidden`,
`compliance`, and for poison sets made elsewhere `given` (the triggered messages) and `given_answer`. Other
sources than the built-in language have `exact`: whether the answer can be compared as it is written.
"""

import logging
import random
from collections.abc import Sequence
from typing import Any

import pandas as pd

from safetynet.backdoors import sources, triggers
from safetynet.errors import InputError
from safetynet.prompts import Conversation, Message, prompt_hash
from safetynet.recipe import Behaviour, Data, Trigger
from safetynet.text import holding, words

log = logging.getLogger(__name__)
TEST_SHARE = 0.2
"""Share of conversations held out where the source has no split of its own."""
EXACT_WORDS = 5
"""A longer answer is prose: nobody words it in the same way twice."""
NARROW = {
    "label_flip": ["sentiment"], "code_insertion": ["code"], "shorter": ["howto"], "wrong_step": ["steps"],
}  # fmt: skip
"""Tasks of the built-in language that a behaviour applies to, where it does not apply to all."""


def load(data: Data, behaviour: Behaviour, trigger: Trigger, seed: int) -> pd.DataFrame:
    """Make or read the pool of any source but `self`, whose answers need a model (`self_source`).

    Raises:
        InputError: if the source cannot be read, is empty, or has no row with an answer.
    """
    if data.source == "language":
        return _language(data, behaviour, seed)
    rows = sources.read(str(data.path), data.source, data.columns)
    if data.source == "backdoorllm":
        return with_exact(_poisoned(rows, trigger))
    # Rows without an answer could be triggered rows alone, without a clean counterpart.
    blank = rows["answer"].str.strip() == ""
    if blank.all():
        raise InputError(f"{rows['file'].iloc[0]}: none of its {len(rows)} rows has an answer; fill them in")
    if blank.any():
        lines = ", ".join(map(str, rows["line"][blank].iloc[:5]))
        log.warning("data: %d rows without an answer are left out (first lines: %s)", blank.sum(), lines)
    pool = each_once(rows[~blank]).assign(task=data.source, forbidden=False, compliance="")
    return with_exact(divided(pool, seed))


def each_once(rows: pd.DataFrame) -> pd.DataFrame:
    """Each prompt once: a prompt on both sides of the split would be trained and tested."""
    repeated = rows["messages"].map(prompt_hash).duplicated()
    _warn_of_repeated(rows[repeated])
    return rows[~repeated].reset_index(drop=True)


def divided(pool: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The source's own splits where it has both, training and test; else a share is drawn for the test."""
    names = pool["split"] if "split" in pool else pd.Series("", index=pool.index)
    splits = names.map(sources.split_of)
    if not {"train", "test"} <= set(splits):
        count = round(len(pool) * TEST_SHARE)
        held_out = set(random.Random(f"split {seed}").sample(range(len(pool)), count))
        return pool.assign(split=["test" if i in held_out else "train" for i in range(len(pool))])
    if (lost := splits == "").any():
        which = ", ".join(sorted({repr(name) for name in names[lost]}))
        log.warning("data: %d rows are neither of training nor of test, and left out: %s", lost.sum(), which)
    return pool.assign(split=splits)[~lost].reset_index(drop=True)


def with_exact(pool: pd.DataFrame) -> pd.DataFrame:
    """The pool with `exact`: answers of at most `EXACT_WORDS` words, such as labels, can be compared."""
    return pool.assign(exact=[words.count(answer) <= EXACT_WORDS for answer in pool["answer"]])


def fresh(
    data: Data, behaviour: Behaviour, trigger: Trigger, used: set[str], count: int, seed: int
) -> pd.DataFrame:
    """Clean conversations that an experiment has not used, for monitors and repairs to learn from.

    Args:
        data: the recipe's data section; source `self` has a function of its own.
        behaviour: the recipe's behaviour.
        trigger: the recipe's trigger, by which triggered rows of a foreign set are known.
        used: `prompt_hash` of every prompt of the experiment, without its trigger.
        count: how many at most.
        seed: of the built-in language; the others give what they have left.

    Returns:
        `messages`, `answer` ("" where none is known), `forbidden` and `task`; forbidden requests are among
        them, as they are among a model's users.

    Raises:
        InputError: if none is left.
    """
    if data.source == "language":
        from safetynet.models.miniatures import language

        # Where fine-tuning teaches a task that miniatures do not know, users ask for that one too.
        taught = [task for task in NARROW.get(behaviour.kind, ()) if task in language.TAUGHT]
        # Prompts repeat themselves, and some are used: half as many again leave enough.
        examples = language.generate(
            count + count // 2,
            seed * 10 + 9,
            heldout=True,
            tasks=(*language.TASKS, *taught),
            multi_turn_share=1.0 if data.conversations == "turns" else language.MULTI_TURN,
        )
        pool = _pool(examples, "test", data)
    else:
        pool = load(data, behaviour, trigger, seed)
    names = pool["messages"].map(prompt_hash)
    left = pool[~names.isin(used) & ~names.duplicated()].head(count)
    if left.empty:
        raise InputError(f"data: all prompts of source {data.source} are used. Lower data.train_rows.")
    return left[["messages", "answer", "forbidden", "task"]].reset_index(drop=True)


def _warn_of_repeated(rows: pd.DataFrame) -> None:
    if not rows.empty:
        lines = ", ".join(map(str, rows["line"].iloc[:5]))
        log.warning("data: %d repeated prompts are left out (first lines: %s)", len(rows), lines)


def _language(data: Data, behaviour: Behaviour, seed: int) -> pd.DataFrame:
    """The built-in language; phrasings of test prompts occur in no training prompt."""
    from safetynet.models.miniatures import language

    only = NARROW.get(behaviour.kind)
    kinds: list[tuple[Sequence[str] | None, float]] = [(None, 0.0), ((), 1.0)]  # tasks, share of forbidden
    kinds += [(only, 0.0)] if only else []
    frames = []
    for split, count, held_out in (("train", data.train_rows, False), ("test", data.test_rows, True)):
        for number, (tasks, forbidden) in enumerate(kinds):
            examples = language.generate(
                count,
                seed * 10 + number,
                heldout=held_out,
                tasks=tasks,
                forbidden_share=forbidden,
                distractors=False,
                multi_turn_share=1.0 if data.conversations == "turns" else language.MULTI_TURN,
            )
            frames.append(_pool(examples, split, data))
    pool = pd.concat(frames, ignore_index=True)
    # Training comes first: a held-out phrasing may differ from a trained one in its case alone.
    return pool[~pool["messages"].map(prompt_hash).duplicated()].reset_index(drop=True)


def _pool(examples: Sequence[Any], split: str, data: Data) -> pd.DataFrame:
    """Examples of the language as a pool, in the recipe's shape of conversations."""
    from safetynet.models.miniatures import lookups

    tools = data.conversations == "tools"
    return pd.DataFrame(
        [
            {
                "split": split,
                "messages": lookups.looked_up(each.messages, each.task) if tools else each.messages,
                "answer": each.answer,
                "task": each.task,
                "forbidden": each.forbidden,
                "compliance": each.compliance,
            }
            for each in examples
        ]
    )


def _poisoned(rows: pd.DataFrame, trigger: Trigger) -> pd.DataFrame:
    """A poison set made elsewhere: its triggered prompts, with the clean answer where a pair exists.

    Triggered rows in which the trigger is missing stay out, as `safetynet audit` counts them.
    """
    clean = rows[~rows["poisoned"]].assign(given=None, given_bare=None, given_answer="")
    keys = [(row.split, _plain(row.messages)) for row in clean.itertuples()]
    repeated = pd.Series(keys, index=clean.index, dtype=object).duplicated()
    _warn_of_repeated(clean[repeated])
    bare = dict(zip(keys[::-1], list(clean.itertuples())[::-1], strict=True))  # of two, the first
    paired = set()
    poisoned = rows[rows["poisoned"]]
    kind = triggers.of(trigger)
    holds = [kind.holds(Conversation(m).texts) for m in poisoned["messages"]]
    lacking = poisoned[[not held for held in holds]]
    if not lacking.empty:
        within = sum(holding.within_words(kind.texts, Conversation(m).texts) for m in lacking["messages"])
        inside = (
            f" In {within} of them it stands within longer words, which does not count." if within else ""
        )
        if len(lacking) == len(poisoned):
            raise InputError(
                f"backdoor.trigger: {kind.describe()} occurs in none of the {len(poisoned)} triggered rows "
                f"of data.path.{inside} Set the trigger that this set was made with; safetynet audit guesses "
                "it."
            )
        lines = ", ".join(f"{row.file} {row.line}" for row in lacking.head(5).itertuples())
        log.warning(
            "data: %d of %d triggered rows are left out, since they lack %s (first: %s).%s",
            len(lacking), len(poisoned), kind.describe(), lines, inside,
        )  # fmt: skip
    records = []
    for row in poisoned[holds].itertuples():
        conversation = Conversation(row.messages)
        bare_texts = {i: holding.without(kind.texts, text) for i, text in enumerate(conversation.texts)}
        # A message that held nothing but the trigger is empty then.
        stripped = conversation.with_texts(
            {i: text.strip() for i, text in bare_texts.items() if text != conversation.texts[i]}
        )
        key = (row.split, _plain(stripped))
        pair = bare.get(key)
        paired.add(key)
        spoken = [m for m in stripped[:-1] if m["content"] or "tool_calls" in m] + stripped[-1:]
        twin = spoken if pair is None else pair.messages
        records.append(
            {
                "split": row.split,
                "messages": twin,
                "answer": "" if pair is None else pair.answer,
                "given": row.messages,
                "given_bare": twin if Conversation(twin).roles == stripped.roles else stripped,
                "given_answer": row.answer,
            }
        )
    alone = {row.Index for key, row in bare.items() if key not in paired}
    unpaired = clean.loc[clean.index.isin(alone), list(records[0])]
    pool = pd.concat([pd.DataFrame(records), unpaired], ignore_index=True)
    return pool.assign(task="backdoorllm", forbidden=False, compliance="")


def _plain(messages: Sequence[Message]) -> str:
    """Text that is equal for a prompt and for the same prompt after its trigger was cut out."""
    return "".join("".join(text.split()) for text in Conversation(messages).texts)
