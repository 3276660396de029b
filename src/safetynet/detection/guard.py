"""A monitor on live generation: the prompt is judged before its first token, and every token as it is chosen.

Wraps a Hugging Face model's `generate`; the monitor reads the very pass that makes the answer, through hooks,
so that judging a prompt costs no second one (views `divergence`, `probe` and `attention` do). On an alarm it
flags the answer, stops it, or answers again with the adapter off. Every decision can be kept as JSON lines.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from safetynet.detection.answers import confidence
from safetynet.detection.capture import capture, padded
from safetynet.detection.features import FeatureSpec, View
from safetynet.detection.monitor import Monitor
from safetynet.detection.readers import Place, Reader
from safetynet.errors import InputError
from safetynet.models.identity import identify
from safetynet.prompts import Message, Serialiser

Action = Literal["flag", "stop", "adapter_off"]
OF_ONE_PASS: frozenset[View] = frozenset({"last", "mean", "energy", "energy_max", "direction", "confidence"})


class Step(NamedTuple):
    """One token of an answer."""

    row: int
    token: str
    p_value: float
    """Of the prompt at an answer's first token, and of the answer so far where the monitor watches tokens."""
    alarm: bool
    """Whether this or an earlier token, or the prompt, raised one."""


@dataclass
class Decision:
    """What became of one prompt."""

    text: str = ""
    prompt_p: float = float("nan")
    alarm: bool = False
    alarm_at: int | None = None
    """0 for the prompt, else the token, counted from 1; None without alarm."""
    action: str = "answered"
    """answered, flagged, stopped or answered without adapter."""
    p_values: list[float] = field(default_factory=list)
    """One per token where the monitor watches tokens."""


def share_of_rate(monitor: Monitor, rate: float, action: str) -> float:
    """The rate at which prompts, and answers where they are watched, each raise an alarm.

    Needs no model, so that a wrong wish is refused before one is loaded.

    Raises:
        InputError: if the monitor cannot claim the rate, or there is no such action.
    """
    if action not in get_args(Action):
        raise InputError(f"guard: there is no action {action!r}; choose from {', '.join(get_args(Action))}.")
    if monitor.tokens is None:
        monitor.check_rate(rate)
        return rate
    # Prompt and answer are two chances of a false alarm; each gets half.
    monitor.check_rate(rate / 2)
    monitor.tokens.check_rate(rate / 2)
    return rate / 2


class Guard:
    """Generates under a monitor's eyes.

    Args:
        model: the model that the monitor was fitted on.
        serialiser: as in training.
        monitor: fitted and calibrated.
        rate: false-positive rate of an alarm; of prompts and answers together where both are watched.
        action: what an alarm does.
        log: file to which each decision is appended as one line of JSON; prompts appear as digests.

    Raises:
        InputError: if the monitor is another model's, or cannot claim the rate, or no adapter can go off.
    """

    def __init__(
        self,
        model: Any,
        serialiser: Serialiser,
        monitor: Monitor,
        *,
        rate: float = 0.01,
        action: Action = "flag",
        log: Path | None = None,
    ) -> None:
        self.rate = share_of_rate(monitor, rate, action)
        monitor.check_model(identify(model))
        if action == "adapter_off" and not hasattr(model, "disable_adapter"):
            raise InputError("guard: action adapter_off needs a model with a PEFT adapter. Use flag or stop.")
        self.model, self.serialiser, self.monitor = model, serialiser, monitor
        self.action, self.log = action, log

    def generate(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        batch_size: int = 16,
        **settings: Any,
    ) -> list[Decision]:
        """Answer prompts, batch by batch.

        Args:
            prompts: conversations that end with a user message.
            max_new_tokens: most tokens of an answer.
            batch_size: prompts per batch.
            settings: passed on to the model's `generate`; greedy unless they say otherwise.

        Raises:
            InputError: if answers may get longer than the monitor's clean ones were.
        """
        decisions: list[Decision] = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            decisions += self._batch(batch, max_new_tokens, settings, lambda step: None)
        self._write(prompts, decisions)
        return decisions

    def stream(
        self, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int, **settings: Any
    ) -> Iterator[Step]:
        """Yield every token of one batch as it is made, with its p-value; a second answer is not streamed.

        Raises:
            InputError: as in `generate`.
        """
        queue: Queue[Step | BaseException | None] = Queue()

        def work() -> None:
            try:
                self._write(prompts, self._batch(prompts, max_new_tokens, settings, queue.put))
                queue.put(None)
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
                queue.put(error)

        threading.Thread(target=work, daemon=True).start()
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _batch(
        self,
        prompts: Sequence[Sequence[Message]],
        most: int,
        settings: dict[str, Any],
        emit: Callable[[Step], None],
    ) -> list[Decision]:
        tokens = self.monitor.tokens
        if tokens is not None and most > tokens.horizon:
            raise InputError(
                f"guard: max_new_tokens is {most}, and the monitor knows clean answers of {tokens.horizon} "
                "tokens at most. Ask for fewer, or fit it on longer answers."
            )
        inputs, place = padded(
            [self.serialiser.encode(p) for p in prompts], self.serialiser, "left", self.model.device
        )
        with torch.no_grad(), Reader(self.model, self._live_spec()) as reader:
            watch = _Watch(self, reader, place, self._extra(prompts), emit)
            self._answer(inputs, most, settings, StoppingCriteriaList([watch]))
        for row, decision in enumerate(watch.decisions):
            decision.text = self.serialiser.decode(watch.kept[row])
            self._act(decision, {name: t[row : row + 1] for name, t in inputs.items()}, most, settings)
        return watch.decisions

    def _act(self, decision: Decision, inputs: dict[str, Any], most: int, settings: dict[str, Any]) -> None:
        if not decision.alarm:
            return
        decision.action = {"flag": "flagged", "stop": "stopped", "adapter_off": "answered without adapter"}[
            self.action
        ]
        if self.action == "adapter_off":
            with torch.no_grad(), self.model.disable_adapter():
                output = self._answer(inputs, most, settings, None)
            ids = output[0, inputs["input_ids"].shape[1] :].tolist()
            ends = [i for i, token in enumerate(ids) if token in self.serialiser.stop_ids]
            decision.text = self.serialiser.decode(ids[: ends[0]] if ends else ids)

    def _answer(self, inputs: dict[str, Any], most: int, settings: dict[str, Any], criteria: Any) -> Any:
        chosen = {"do_sample": False, "num_beams": 1} | settings
        return self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=most,
            eos_token_id=self.serialiser.stop_ids,
            pad_token_id=self.serialiser.pad_id,
            stopping_criteria=criteria,
            **chosen,
        )

    def _live_spec(self) -> FeatureSpec:
        """What the answer's own passes are read for."""
        spec, wanted = self.monitor.spec, self.monitor.views & OF_ONE_PASS
        steps: set[View] = {"last", "confidence"} if self.monitor.tokens is not None else set()
        # A pass that nothing is read of still needs one view.
        return FeatureSpec(tuple(wanted | steps) or ("last",), spec.layers)

    def _extra(self, prompts: Sequence[Sequence[Message]]) -> dict[str, np.ndarray]:
        """Views that need passes of their own."""
        extra = tuple(self.monitor.views - OF_ONE_PASS)
        if not extra:
            return {}
        spec = FeatureSpec(extra, self.monitor.spec.layers, self.monitor.spec.tokens, self.monitor.spec.probe)
        return capture(self.model, self.serialiser, prompts, spec, batch_size=len(prompts)).arrays

    def _write(self, prompts: Sequence[Sequence[Message]], decisions: Sequence[Decision]) -> None:
        if self.log is None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            for prompt, decision in zip(prompts, decisions, strict=True):
                text = json.dumps([dict(m) for m in prompt], ensure_ascii=False, sort_keys=True)
                name = hashlib.sha256(text.encode()).hexdigest()
                line = {"prompt_sha256": name, "rate": self.rate} | asdict(decision)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


class _Watch(StoppingCriteria):
    """Called by `generate` after each token: judges, and says which rows are to end."""

    def __init__(
        self,
        guard: Guard,
        reader: Reader,
        place: Place,
        extra: dict[str, np.ndarray],
        emit: Callable[[Step], None],
    ) -> None:
        self.guard, self.reader, self.extra, self.emit = guard, reader, extra, emit
        rows = len(place.last)
        self.decisions = [Decision() for _ in range(rows)]
        self.kept: list[list[int]] = [[] for _ in range(rows)]
        self.ended = np.zeros(rows, dtype=bool)
        self.largest = np.full(rows, -np.inf)
        self.step = 0
        reader.begin(place)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """(B,) of bool: rows that end here."""
        self.step += 1
        arrays = _arrays(self.reader.take())
        if self.step == 1:
            self._judge_prompt(arrays)
        p = self._judge_token(arrays)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self.ended[row]:
                self._advance(row, token, float(p[row]))
        if self.guard.monitor.tokens is not None:
            self.reader.begin(None)
        return torch.from_numpy(self.ended.copy()).to(input_ids.device)

    def _judge_prompt(self, arrays: dict[str, np.ndarray]) -> None:
        p = self.guard.monitor.p_values_of(arrays | self.extra)["fused"]
        for decision, value in zip(self.decisions, p, strict=True):
            decision.prompt_p = float(value)
            if value <= self.guard.rate:
                decision.alarm, decision.alarm_at = True, 0

    def _judge_token(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        tokens = self.guard.monitor.tokens
        if tokens is None:
            return np.array([decision.prompt_p for decision in self.decisions])
        views = {"steps": arrays["last"], "step_confidence": arrays["confidence"]}
        found = tokens.statistic(views)
        self.largest = np.where(self.ended, self.largest, np.fmax(self.largest, found))
        return tokens.longest.p_values(self.largest)

    def _advance(self, row: int, token: int, p: float) -> None:
        decision, guard = self.decisions[row], self.guard
        if guard.monitor.tokens is not None:
            decision.p_values.append(p)
            if p <= guard.rate and not decision.alarm:
                decision.alarm, decision.alarm_at = True, self.step
        stopped = decision.alarm and guard.action != "flag"
        self.ended[row] = stopped or token in guard.serialiser.stop_ids
        if stopped:
            self.emit(Step(row, "", p, True))
        elif not self.ended[row]:
            self.kept[row].append(token)
            text = guard.serialiser.tokenizer.decode([token])
            self.emit(Step(row, str(text), p, decision.alarm))


def _arrays(read: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    if "logits" in read:
        read["confidence"] = confidence(read.pop("logits"))
    return {name: tensor.cpu().numpy() for name, tensor in read.items()}
