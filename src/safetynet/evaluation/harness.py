"""A loaded model as lm-evaluation-harness asks it, with answers that outlive an interruption.

In: requests of the harness. Out: the model's answers to them. Imported by `utility` when tasks are measured,
since the harness is an extra and takes seconds to import.
"""

import copy
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from safetynet.run.directory import digest
from safetynet.run.finished import EVERY_S


class Answers:
    """Answers by request, as the harness reports them one by one; a file keeps them, a line for each.

    (The harness's own cache is a file of pickles, which a run of somebody else must not bring.)

    Args:
        path: of the file; None keeps the answers in memory alone.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._answers: dict[str, Any] = {}
        self._unwritten: list[str] = []
        self._written = time.monotonic()
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # an interrupted write has cut the last line
                    key, answer = json.loads(line)
                    self._answers[key] = answer

    def add_partial(self, kind: str, request: Iterable[Any], answer: Any) -> None:
        """Keep an answer; the name is the one by which the harness calls it."""
        key = digest([kind, *request])
        self._answers[key] = answer
        self._unwritten.append(json.dumps([key, answer]))
        if time.monotonic() - self._written >= EVERY_S:
            self.write()

    def get(self, kind: str, request: Iterable[Any]) -> Any:
        """The answer to a request; None where there is none yet."""
        return self._answers.get(digest([kind, *request]))

    def write(self) -> None:
        """Bring to disk what is not there yet."""
        if self.path is not None and self._unwritten:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # The line break comes first, so that a line that was cut ends there.
                file.writelines(f"\n{line}" for line in self._unwritten)
        self._unwritten.clear()
        self._written = time.monotonic()


class HarnessModel(HFLM):
    """A model that is loaded already; it answers no request twice, except by samples.

    Args:
        model: a causal LM of transformers, with or without a PEFT adapter; it leaves as it came.
        tokenizer: of the model.
        batch_size: requests at a time.
        answers: where answers are kept.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, answers: Answers) -> None:
        # HFLM ties head and embeddings by the configuration, also where a model has a head of its own.
        model.tie_weights = lambda: None
        try:
            super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        finally:
            del model.tie_weights
        self.answers = answers
        self.set_cache_hook(answers)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """As HFLM."""
        return self._answered("loglikelihood", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """As HFLM."""
        return self._answered("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """As HFLM."""
        return self._answered("generate_until", requests, super().generate_until)

    def _answered(
        self, kind: str, requests: Sequence[Any], ask: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        """Answers that are there, and the model's to all other requests, in batches as HFLM makes them."""
        answers = []
        for request in requests:
            # A sample that is taken from a file would be the same each time.
            is_sampled = any(isinstance(part, dict) and part.get("do_sample", False) for part in request.args)
            answers.append(None if is_sampled else self.answers.get(kind, request.args))
        places = [place for place, answer in enumerate(answers) if answer is None]
        if places:
            for place, answer in zip(places, ask([requests[place] for place in places]), strict=True):
                answers[place] = answer
        return answers
