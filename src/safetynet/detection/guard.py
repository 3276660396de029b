"""A monitor on live generation: the prompt is judged before its first token, and every token as it is chosen.

Wraps a Hugging Face model's `generate`; the monitor reads the very pass that makes the answer, through hooks,
so that judging a prompt costs no second one (views `divergence`, `probe` and `attention` cost one each).
On an alarm it flags the answer, stops it, or answers again with the adapter off. Every decision can be kept
as JSON lines.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from queue import Queue
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from safetynet.detection.capture import batched, complete
from safetynet.detection.features import View
from safetynet.detection.monitor import Monitor
from safetynet.detection.readers import Reader, confidence
from safetynet.engine.batch import Batch
from safetynet.engine.trace import forward
from safetynet.errors import InputError
from safetynet.models.adapters import has_adapter, switched_off
from safetynet.models.identity import identify
from safetynet.prompts import Message, Serialiser
from safetynet.statistics import bootstrap_interval
from safetynet.tables import SCHEMAS

Action = Literal["flag", "stop", "adapter_off"]
OVERHEAD = tuple(SCHEMAS["detection_overhead"].columns)
"""Seconds per batch, medians; the ratio of guarded to plain with its bootstrap interval over pairs; and their
difference over the seconds of a pass over the prompts."""


class Step(NamedTuple):
    """One token of an answer."""

    row: int
    token: str
    """The text that the answer has grown by; "" where it ends in the middle of a character. With the action
    adapter_off the whole second answer comes as the row's last step."""
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
    lost: str = ""
    """Parts of the prompt that lost text at the limit, with commas; "" where it was read whole."""
    ended: bool = False
    """The model ended the answer; else the limit or the guard cut it."""

    @property
    def p_value(self) -> float:
        """Of the answer as far as it is watched, else of the prompt."""
        return self.p_values[-1] if self.p_values else self.prompt_p


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
    """Generates under a monitor.

    Args:
        model: the model that the monitor was fitted on.
        serialiser: as in training.
        monitor: fitted and calibrated.
        rate: false-positive rate of an alarm; of prompts and answers together where both are watched.
        action: what an alarm does.
        log: file to which each decision is appended as one line of JSON; prompts appear as digests.
        max_length: prompts are truncated as in training with this limit; None for no limit.

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
        max_length: int | None = None,
    ) -> None:
        self.rate = share_of_rate(monitor, rate, action)
        monitor.check_model(identify(model))
        if action == "adapter_off" and not has_adapter(model):
            raise InputError("guard: action adapter_off needs a model with a PEFT adapter. Use flag or stop.")
        self.model, self.serialiser, self.monitor = model, serialiser, monitor
        self.action, self.log, self.max_length = action, log, max_length
        views = tuple(sorted(monitor.views))
        self.prompt_spec = replace(monitor.spec, views=views)
        steps: set[View] = {"last", "confidence"} if monitor.tokens is not None else set()
        # Made once: it takes the adapter's matrices apart.
        self.reader = Reader(model, replace(monitor.spec, views=tuple(sorted({*views, *steps}))))

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
            decisions += self._batch(prompts[start : start + batch_size], max_new_tokens, settings)
        return decisions

    def stream(
        self, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int, **settings: Any
    ) -> Iterator[Step]:
        """Yield every token of one batch as it is made, with its p-value.

        Raises:
            InputError: as in `generate`.
        """
        queue: Queue[Step | BaseException | None] = Queue()
        ended = threading.Event()

        def work() -> None:
            try:
                self._batch(prompts, max_new_tokens, settings, queue.put, ended)
                queue.put(None)
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
                queue.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            # A caller who stops reading stops the answer too, or the model would stay hooked.
            ended.set()
            worker.join()

    def _batch(
        self,
        prompts: Sequence[Sequence[Message]],
        most: int,
        settings: dict[str, Any],
        emit: Callable[[Step], None] | None = None,
        ended: threading.Event | None = None,
    ) -> list[Decision]:
        tokens = self.monitor.tokens
        if tokens is not None and most > tokens.horizon:
            raise InputError(
                f"guard: max_new_tokens is {most}, and the monitor knows clean answers of {tokens.horizon} "
                "tokens at most. Ask for fewer, or fit it on longer answers."
            )
        for name in ("num_beams", "num_return_sequences"):
            if settings.get(name, 1) != 1:
                raise InputError(
                    f"guard: {name} is {settings[name]}; one answer is watched per prompt, token by token. "
                    f"Leave {name} out."
                )
        encoded = [self.serialiser.encode(p, max_length=self.max_length) for p in prompts]
        batch = batched(encoded, self.serialiser, self.model.device)
        with torch.no_grad(), self.reader:
            watch = _Watch(self, prompts, batch, emit, ended)
            self.answer(batch[0], most, settings, StoppingCriteriaList([watch]))

        # What follows from an alarm; a second answer is made by the model without its adapter, unwatched.
        actions = {"flag": "flagged", "stop": "stopped", "adapter_off": "answered without adapter"}
        for row, decision in enumerate(watch.decisions):
            decision.lost = encoded[row].lost
            decision.text = self.serialiser.decode(watch.tokens[row])
            if not decision.alarm:
                continue
            decision.action = actions[self.action]
            if self.action == "adapter_off":
                prompt = Batch(batch[0].ids[row : row + 1], batch[0].mask[row : row + 1])
                with torch.no_grad(), switched_off(self.model):
                    output = self.answer(prompt, most, settings, None)
                ids = output[0, prompt.width :].tolist()
                ends = [i for i, token in enumerate(ids) if token in self.serialiser.stop_ids]
                decision.text = self.serialiser.decode(ids[: ends[0]] if ends else ids)
                decision.ended = bool(ends)
                if emit is not None:
                    emit(Step(row, decision.text, decision.p_value, True))

        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                for messages, decision in zip(prompts, watch.decisions, strict=True):
                    text = json.dumps([dict(m) for m in messages], ensure_ascii=False, sort_keys=True)
                    digest = hashlib.sha256(text.encode()).hexdigest()
                    line = {"prompt_sha256": digest, "rate": self.rate} | asdict(decision)
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return watch.decisions

    def answer(self, batch: Batch, most: int, settings: dict[str, Any], criteria: Any) -> Any:
        """The model's own `generate`, greedy unless the settings say otherwise; ids, (B, T)."""
        return self.model.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            max_new_tokens=most,
            eos_token_id=self.serialiser.stop_ids,
            pad_token_id=self.serialiser.pad_id,
            stopping_criteria=criteria,
            **{"do_sample": False, "num_beams": 1} | settings,
        )


class _Watch(StoppingCriteria):
    """Called by `generate` after each token: judges it, and says which rows end."""

    def __init__(
        self,
        guard: Guard,
        prompts: Sequence[Sequence[Message]],
        batch: tuple[Batch, torch.Tensor],
        emit: Callable[[Step], None] | None,
        cancelled: threading.Event | None,
    ) -> None:
        self.guard, self.prompts, self.batch = guard, prompts, batch
        self.emit, self.cancelled = emit, cancelled
        rows = len(prompts)
        self.decisions = [Decision() for _ in range(rows)]
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.emitted = [""] * rows
        self.ended = np.zeros(rows, dtype=bool)
        self.largest = np.full(rows, -np.inf)
        self.confidences: list[np.ndarray] = []
        self.step = 0
        guard.reader.begin(batch[1])

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """(B,) of bool: rows that end here."""
        self.step += 1
        guard, monitor = self.guard, self.guard.monitor.tokens
        if self.step == 1 or monitor is not None:
            self._judge(guard.reader.take())
        if monitor is not None:
            guard.reader.begin(None)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.ended[row]:
                continue
            decision = self.decisions[row]
            if decision.p_values and decision.p_values[-1] <= guard.rate and not decision.alarm:
                decision.alarm, decision.alarm_at = True, self.step
            stopped = decision.alarm and guard.action != "flag"
            decision.ended = not stopped and token in guard.serialiser.stop_ids
            self.ended[row] = stopped or decision.ended
            if not self.ended[row]:
                self.tokens[row].append(token)
            if self.emit is not None:
                # What the text has grown by: a token alone may be no character, or lose its blank.
                text = guard.serialiser.decode(self.tokens[row])
                held = text.endswith("\ufffd") and not self.ended[row]
                piece = "" if held else text[len(self.emitted[row]) :]
                self.emitted[row] += piece
                if piece or stopped or not self.ended[row]:
                    self.emit(Step(row, piece, decision.p_value, decision.alarm))
        if self.cancelled is not None and self.cancelled.is_set():
            self.ended[:] = True
        return torch.from_numpy(self.ended.copy()).to(input_ids.device)

    def _judge(self, values: dict[str, torch.Tensor]) -> None:
        """Take p-values from what the reader has read: of the prompts at first, then of each token."""
        guard, monitor = self.guard, self.guard.monitor.tokens
        if self.step == 1:  # the pass that chose the first token was over the prompts
            spec = guard.prompt_spec
            arrays = complete(
                guard.model, guard.serialiser, guard.reader, self.prompts, self.batch, values, spec
            )
            for decision, value in zip(
                self.decisions, guard.monitor.p_values_of(arrays)["fused"], strict=True
            ):
                decision.prompt_p = float(value)
                if value <= guard.rate:
                    decision.alarm, decision.alarm_at = True, 0
        if monitor is not None:
            # An answer's p-value is that of its largest statistic so far, (B,); ended rows keep theirs.
            self.confidences.append(confidence(values["logits"]).cpu().numpy())
            latest = monitor.latest(values["last"].cpu().numpy(), np.stack(self.confidences, axis=1))
            self.largest = np.where(self.ended, self.largest, np.fmax(self.largest, latest))
            p = monitor.longest.p_values(self.largest)
            for row, decision in enumerate(self.decisions):
                if not self.ended[row]:
                    decision.p_values.append(float(p[row]))


def overhead(
    guard: Guard,
    prompts: Sequence[Sequence[Message]],
    *,
    batches: Sequence[int] = (1, 16),
    new_tokens: int = 24,
    repeats: int = 3,
) -> pd.DataFrame:
    """Time answers of exactly `new_tokens` tokens with and without the guard, by turns.

    Times are those of one machine at one time; the ratio of neighbouring measurements is what carries over.

    Args:
        guard: with action `flag`, so that both ways make the same tokens.
        prompts: taken in turn to fill a batch.
        batches: sizes.
        new_tokens: of every answer; ends are not heeded, or both ways would wait for the longest answer.
        repeats: of the measurements, after one that is not counted.

    Returns:
        One row per size, columns as in `OVERHEAD`.
    """

    def seconds_of(run: Callable[[], Any]) -> float:
        # Earlier work of a GPU does not count, and its last work has to end.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def line(size: int) -> tuple[float, ...]:
        some = list(islice(cycle(prompts), size))
        encoded = [guard.serialiser.encode(p, max_length=guard.max_length) for p in some]
        batch, _ = batched(encoded, guard.serialiser, guard.model.device)
        length = {"min_new_tokens": new_tokens}
        ways = (
            lambda: guard.answer(batch, new_tokens, length, None),
            lambda: guard.generate(some, max_new_tokens=new_tokens, batch_size=size, **length),
            lambda: forward(guard.model, batch, use_cache=False),
        )
        with torch.no_grad():
            times = np.array([[seconds_of(way) for way in ways] for _ in range(repeats + 1)])[1:]
        plain, guarded, reading = times.T
        ratios = guarded / plain
        low, high = bootstrap_interval(np.median, ratios)
        medians = (float(np.median(x)) for x in (plain, guarded, ratios))
        passes = float(np.median((guarded - plain) / reading))
        return (size, batch.width, new_tokens, *medians, low, high, repeats, passes)

    return pd.DataFrame([line(size) for size in batches], columns=list(OVERHEAD))
