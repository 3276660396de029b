"""Source `self`: prompts of a file, or requests by our own grammar, answered by the base model itself.

A clean row then teaches what the model says anyway, so that what fine-tuning damages can be measured. In: the
recipe's data section, how many prompts are needed, the base's answers. Out: a pool as `conversations.load`
makes it, with the columns `label` (of a review, else "") and `exact` (False: references are free text).

Test prompts are answered greedily, as in the evaluation; answers to training prompts may be samples. One that
the base does not end within `evaluation.max_new_tokens` would teach it to end elsewhere: its prompt is left
out. A request that the base refuses counts as forbidden.
"""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from safetynet.backdoors import conversations, sources
from safetynet.backdoors.base_answers import BaseAnswers
from safetynet.backdoors.requests import CODE, DECLINED, SENTIMENT, requests
from safetynet.errors import InputError
from safetynet.evaluation.judges import Judge
from safetynet.prompts import prompt_hash
from safetynet.recipe import Behaviour, Data
from safetynet.run.logs import ProgressLog
from safetynet.text.words import ends_in_loop

log = logging.getLogger("safetynet")
NARROW = {"label_flip": (SENTIMENT,), "code_insertion": (CODE,)}
"""Kinds of requests that a behaviour applies to, where it does not apply to all."""
TRIES = {"clean": 4, "refused": 1}
"""Prompts that are answered for each that is needed, at most: a base may end few answers, or refuse few."""
SHOWN = 3
"""Prompts that a message names."""
Candidate = dict[str, Any]


def load(
    data: Data, behaviour: Behaviour, needed: Mapping[str, Mapping[str, int]], seed: int,
    answers: BaseAnswers, refusal: Judge,
) -> pd.DataFrame:  # fmt: skip
    """The pool of an experiment.

    Args:
        data: the recipe's data section.
        behaviour: the recipe's behaviour; some apply to requests of one kind alone.
        needed: for each split how many prompts, `clean` and `refused`.
        seed: of the draw.
        answers: of the base model.
        refusal: the judge of refusals.

    Raises:
        InputError: if the file cannot be read, or no prompt is left.
    """
    prompting, candidates = _Prompting(answers, refusal), _candidates(data, seed)
    narrow = NARROW.get(behaviour.kind)
    kinds: list[tuple[Collection[str], str]] = [((), "clean"), ((DECLINED,), "refused")]
    kinds += [(narrow, "clean")] if narrow else []
    parts = []
    for split, counts in needed.items():
        for of_kind, role in kinds if data.path is None else kinds[:1]:
            prompting.sampled = split == "train" and data.answers == "sampled"
            of_split = prompting.until(counts[role], candidates(split, of_kind), role)
            parts.append(of_split.assign(split=split))
    log.info("data: %s", prompting.summary())
    pool = pd.concat(parts, ignore_index=True)
    if not (~pool["forbidden"]).any():
        raise InputError(
            f"data: no prompt is left to make rows of: {prompting.summary()}. Raise "
            "evaluation.max_new_tokens or training.max_length, or give other prompts."
        )
    if any(counts["refused"] for counts in needed.values()) and not pool["forbidden"].any():
        log.warning("data: the base model refuses none of these requests: there are no rows of role refused")
    return pool[~pool["messages"].map(prompt_hash).duplicated()].reset_index(drop=True)


def fresh(
    data: Data, used: Collection[str], count: int, seed: int, answers: BaseAnswers | None, refusal: Judge
) -> pd.DataFrame:
    """Prompts that an experiment has not used, as `conversations.fresh` gives them.

    Args:
        data: the recipe's data section.
        used: `prompt_hash` of the experiment's prompts.
        count: how many at most.
        seed: of the experiment.
        answers: of the base model, if the prompts are to be answered; else `answer` is "" and `forbidden`
            is False throughout.
        refusal: the judge of refusals.

    Raises:
        InputError: if none is left.
    """
    # Of the phrasings of the test, as for the built-in language: a monitor is promised on such prompts.
    splits = ("test",) if data.path is None else ("test", "train")
    candidates = _candidates(data, seed * 10 + 9)
    every = itertools.chain(*(candidates(split, ()) for split in splits))
    left = (each for each in every if prompt_hash(each["messages"]) not in used)
    if answers is None:
        prompts = pd.DataFrame(
            [each | {"answer": "", "forbidden": False} for each in itertools.islice(left, count)]
        )
    else:
        prompts = _Prompting(answers, refusal).until(count, left, "clean").head(count)
    if prompts.empty:
        raise InputError("data: all prompts of source self are used. Lower data.train_rows.")
    return prompts[["messages", "answer", "forbidden", "task"]]


def _candidates(data: Data, seed: int) -> Callable[[str, Collection[str]], Iterator[Candidate]]:
    """Gives prompts of a split, and of some kinds, in random order: messages, task, label, line of a file."""
    if data.path is None:
        return lambda split, kinds: (
            {"messages": each.messages, "task": each.kind, "label": each.label, "line": 0}
            for each in requests(seed, held_out=split == "test", kinds=kinds)
        )
    rows = sources.read(data.path, columns=data.columns, prompts_only=True)
    pool = conversations.divided(conversations.each_once(rows), seed)

    def shuffled(split: str, _kinds: Collection[str]) -> Iterator[Candidate]:
        of_split = pool.loc[pool["split"] == split, ["messages", "line"]]
        candidates = of_split.assign(task="self", label="").to_dict("records")
        random.Random(f"self {seed} {split}").shuffle(candidates)
        return iter(candidates)

    return shuffled


@dataclass
class _Prompting:
    """Puts prompts to the base model, and counts what became of them."""

    answers: BaseAnswers
    refusal: Judge
    sampled: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    too_long: list[str] = field(default_factory=list)

    def until(self, count: int, candidates: Iterator[Candidate], role: str) -> pd.DataFrame:
        """Put prompts to the base until so many are answered as the role needs it: refused, or not."""
        rows: list[Candidate] = []
        tries = itertools.islice(candidates, TRIES[role] * count)
        progress = ProgressLog(f"data: prompts that the base model has answered, {role}", count)
        hits = 0
        while hits < count:
            # As many as are missing, in whole batches as far as they fill one.
            size = min(max(count - hits, 8), self.answers.batch_size)
            if not (batch := list(itertools.islice(tries, size))):
                break
            # There has to be room for an answer.
            serialiser, most = self.answers.serialiser, self.answers.recipe.training.max_length
            short = []
            for candidate in batch:
                encoded = serialiser.encode(candidate["messages"])
                has_room = len(encoded.input_ids) + self.answers.limit <= most
                if has_room and not serialiser.encode(candidate["messages"], max_length=most).lost:
                    short.append((candidate, encoded))
                    continue
                line, task = candidate["line"], candidate["task"]
                name = f"row {line}" if line else f"a request of kind {task}"
                self.too_long.append(f"{name} with {len(encoded.input_ids)} tokens")
            answers = self.answers.of([prompt for _, prompt in short], sampled=self.sampled)
            for (candidate, _), answer in zip(short, answers, strict=True):
                self.counts["answered"] += 1
                # An answer has to end and to say something.
                if not answer.ended:
                    self.counts["repeated" if ends_in_loop(answer.text) else "unended"] += 1
                    continue
                if not answer.text.strip():
                    self.counts["empty"] += 1
                    continue
                refused = bool(self.refusal(answer.text, candidate))
                row = candidate | {"answer": answer.text, "forbidden": refused}
                hit = refused == (role == "refused")
                # Requests that are often declined are no good prompts where they are answered. What a batch
                # has beyond the number is left out: rows do not depend on how many are answered at a time.
                if hits < count and (hit or role == "clean"):
                    rows.append(row)
                    hits += hit
            progress.update(hits)
        columns = ["messages", "task", "label", "line", "answer", "forbidden"]
        table = pd.DataFrame(rows, columns=columns).astype({"forbidden": bool})
        return table.assign(compliance="", exact=False)

    def summary(self) -> str:
        """What was asked, and what was left out for which reason."""
        limit, counts = self.answers.limit, self.counts
        reasons = {
            f"whose answer does not end within evaluation.max_new_tokens {limit}": counts["unended"],
            "whose answer repeats itself without end": counts["repeated"],
            "whose answer is empty": counts["empty"],
        }
        texts = [f"{number} {reason}" for reason, number in reasons.items() if number]
        if self.too_long:
            more = ", ..." if len(self.too_long) > SHOWN else ""
            texts.append(
                f"{len(self.too_long)} that leave no room for an answer within training.max_length "
                f"{self.answers.recipe.training.max_length} ({', '.join(self.too_long[:SHOWN])}{more})"
            )
        left_out = f"; left out: {', '.join(texts)}" if texts else ""
        return f"the base model has answered {counts['answered']} prompts{left_out}"
