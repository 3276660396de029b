"""The base model's own answers, greedy or sampled, kept below the results folder for all of its runs.

    results/.answers/{digest}/*.parquet     one file per batch: key of the prompt, answer, ended

In: prompts. Out: an answer to each. The digest is that of the base model, its precision, the limit of an
answer and whether it is a sample; a prompt's key is that of its token ids, template and date included. Every
batch is on disk before the next one begins, and one process at a time answers: others wait, and then find its
answers.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
from filelock import FileLock

from safetynet.evaluation.generation import Continuation, continuations
from safetynet.models import loading
from safetynet.prompts import Encoded, Serialiser
from safetynet.recipe import Recipe
from safetynet.run import parallel
from safetynet.run.directory import digest, write_atomically

log = logging.getLogger("safetynet")
FOLDER = ".answers"
"""Below the results folder; no model's folder can have this name."""


def folder_of(recipe: Recipe, decisive: Mapping[str, object]) -> Path:
    """Where answers of a recipe's base model lie for all runs of its results folder.

    Args:
        recipe: of the run.
        decisive: all that decides about the answers, beside what is asked.
    """
    return recipe.output.results / FOLDER / digest(decisive)[:16]


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold a folder of answers, which is made: other runs wait, and then find the answers."""
    folder.mkdir(parents=True, exist_ok=True)
    # Of several processes that work together the first one holds the lock for all.
    with FileLock(folder / ".lock") if parallel.is_first() else nullcontext():
        yield


@dataclass
class BaseAnswers:
    """What the base model of a recipe answers; it is loaded for the first prompt that is new."""

    recipe: Recipe
    load: Callable[[], loading.LoadedModel]
    _answers: dict[Path, dict[str, Continuation]] = field(default_factory=dict, init=False)
    """By folder and key: what was read or made so far."""
    _read: set[Path] = field(default_factory=set, init=False)
    """Files that were read or written so far."""

    @cached_property
    def serialiser(self) -> Serialiser:
        """Of the base model; it needs no weights."""
        return loading.load_serialiser(self.recipe.model, self.recipe.training.truncation)

    @property
    def limit(self) -> int:
        """Most tokens of an answer: the evaluation's, so that the base gives the same answers there."""
        return self.recipe.evaluation.max_new_tokens

    @property
    def batch_size(self) -> int:
        """Prompts that are answered at a time."""
        return self.recipe.evaluation.batch_size * parallel.count()

    def of(self, prompts: Sequence[Encoded], *, sampled: bool = False) -> list[Continuation]:
        """Answers to prompts, in their order; those that no run of the results folder knows are made now.

        Args:
            prompts: serialised.
            sampled: one sample of the model's distribution, instead of its likeliest tokens.

        Raises:
            InputError: if the base model cannot be loaded.
            RunError: if a single prompt does not fit in memory, or the answers cannot be written.
        """
        model, training = self.recipe.model, self.recipe.training
        decisive = {
            "model": loading.fingerprint(model),
            "quantisation": model.quantisation,
            "numbers": str(loading.resolve_dtype(training.precision, loading.device_of(model))),
            "limit": self.limit,
            "sampled": sampled,
        }
        folder = folder_of(self.recipe, decisive)
        answers = self._answers.setdefault(folder, {})
        keys = [digest(prompt.input_ids)[:32] for prompt in prompts]
        if not answers.keys() >= set(keys):
            answers |= self._on_disk(folder)
        if answers.keys() >= set(keys):
            return [answers[key] for key in keys]
        with one_at_a_time(folder):
            answers |= self._on_disk(folder)  # another run may have made them meanwhile
            new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in answers}
            longest_first = sorted(new, key=lambda key: len(new[key].input_ids), reverse=True)
            for start in range(0, len(longest_first), self.batch_size):
                batch = longest_first[start : start + self.batch_size]
                continued = continuations(
                    self._base.model,
                    self.serialiser,
                    [new[key] for key in batch],
                    batch_size=self.recipe.evaluation.batch_size,
                    max_new_tokens=self.limit,
                    seed=0 if sampled else None,
                )
                # Each batch is written before the next one begins.
                table = pd.DataFrame(continued, columns=list(Continuation._fields)).assign(key=batch)
                path = folder / f"{digest(batch)[:16]}.parquet"
                write_atomically(path, partial(table.to_parquet, index=False))
                self._read.add(path)
                answers |= dict(zip(batch, continued, strict=True))
        return [answers[key] for key in keys]

    def _on_disk(self, folder: Path) -> dict[str, Continuation]:
        """Answers in files that were not read yet; the first of several processes reads them for all."""

        def read() -> dict[str, Continuation]:
            answers: dict[str, Continuation] = {}
            for path in sorted({*folder.glob("[!.]*.parquet")} - self._read):
                table = pd.read_parquet(path)
                continued = map(Continuation, table["text"], table["ended"].astype(bool))
                answers |= dict(zip(table["key"], continued, strict=True))
                self._read.add(path)
            return answers

        return parallel.from_first(read)

    @cached_property
    def _base(self) -> loading.LoadedModel:
        return self.load()
