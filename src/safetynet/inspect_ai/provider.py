"""A run's models for any evaluation in Inspect: `--model safetynet/RUN`, if wished under the run's guard.

Prompts are serialised as in training and answered greedily, batch by batch, by the code that
`safetynet evaluate` uses. Under a guard each decision stands in the log as an event of the sample.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inspect_ai.log import transcript
from inspect_ai.model import (
    ChatMessage,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    StopReason,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from safetynet.detection import stage as detection
from safetynet.detection.guard import Decision
from safetynet.errors import InputError
from safetynet.evaluation.generation import continuations
from safetynet.experiment import BACKDOORED, Experiment
from safetynet.inspect_ai.batches import Batches
from safetynet.inspect_ai.messages import as_conversation, in_a_sentence
from safetynet.prompts.serialiser import TriggerSpan
from safetynet.run.stage import MITIGATE

log = logging.getLogger("safetynet")
REPAIRED = "repaired"
UNHEEDED = ("top_p", "top_k", "seed", "stop_seqs", "frequency_penalty", "presence_penalty", "logit_bias")
"""Settings of an evaluation that change nothing here, with which the person is warned."""
IMPOSSIBLE = {"num_choices": (None, 1), "logprobs": (None, False), "response_schema": (None,)}
"""Settings that cannot be met, and their values that ask for nothing."""


@dataclass(frozen=True)
class Prompt:
    """One request."""

    messages: list[dict[str, str]]
    trigger: list[TriggerSpan]
    """Spans that truncation spares; known of a run's rows alone."""
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """What became of it."""

    text: str
    stop_reason: StopReason
    decision: Decision | None = None
    """The guard's."""


class SafetyNetAPI(ModelAPI):
    """One model of a run.

    Args:
        model_name: the run's folder.
        base_url: of other providers; ignored.
        api_key: of other providers; ignored.
        config: of the model.
        serve: backdoored, clean_twin, base, or repaired, which mitigation saved.
        step: the trained model as it was after so many steps.
        guard: what an alarm of the run's monitor does: flag, stop or adapter_off; None for no guard.
        fpr: false-positive rate of an alarm.
        batch_size: most prompts that are answered together; None: as the run's evaluation has it.
        unknown: refused.
    """

    def __init__(  # noqa: PLR0913 - Inspect's own arguments, and ours
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - as Inspect declares it; never changed
        *,
        serve: str = BACKDOORED,
        step: int | None = None,
        guard: str | None = None,
        fpr: float = 0.01,
        batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        with in_a_sentence():
            if unknown:
                raise InputError(
                    f"-M {next(iter(unknown))}: there is no such option; there are serve, step, guard, fpr "
                    "and batch_size."
                )
            if batch_size is not None and batch_size < 1:
                raise InputError(f"-M batch_size={batch_size}: give at least 1.")
            experiment = Experiment.find(Path(model_name))
            self._max_new_tokens = experiment.recipe.evaluation.max_new_tokens
            size = batch_size or experiment.recipe.evaluation.batch_size
            self._answer = _answering(experiment, size, serve, step, guard, fpr)
        self._size, self._which = size, f"{serve} {step} {guard} {fpr}"
        self._batches = Batches(self._answer_batch, size)
        self._warned: set[str] = set()

    async def generate(
        self,
        input: list[ChatMessage],  # noqa: A002 - Inspect's name
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer one prompt, together with others that wait.

        Raises:
            InputError: for tools, content that is no text, and settings that cannot be met.
        """
        if tools:
            raise InputError(
                f"tools: {tools[0].name} is offered, and calls are not read here. Evaluate without tools."
            )
        for name, nothing in IMPOSSIBLE.items():
            if getattr(config, name) not in nothing:
                raise InputError(f"{name}: this provider gives one answer, as text alone. Leave {name} out.")
        # A temperature of 0 asks for what is given.
        sampled = ["temperature"] if config.temperature else []
        unheeded = [*sampled, *(name for name in UNHEEDED if getattr(config, name) is not None)]
        for name in set(unheeded) - self._warned:
            self._warned.add(name)
            log.warning("%s: %s is not heeded; every answer is the model's greedy one", self.model_name, name)
        messages, trigger = as_conversation(input)
        prompt = Prompt(messages, trigger, config.max_tokens or self._max_new_tokens)
        answer = await self._batches.answer(prompt)
        if answer.decision is not None:
            decision = {name: value for name, value in asdict(answer.decision).items() if name != "text"}
            transcript().info({**decision, "p_value": answer.decision.p_value}, source="safetynet guard")
        return ModelOutput.from_content(self.model_name, answer.text, answer.stop_reason)

    def max_connections(self) -> int:
        """Two batches: one waits while the other is answered."""
        return 2 * self._size

    def connection_key(self) -> str:
        """Each model has connections of its own."""
        return f"{self.model_name} {self._which}"

    def _answer_batch(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answers in order; prompts of one limit go together."""
        answers: dict[int, Answer] = {}
        for most in sorted({prompt.max_new_tokens for prompt in prompts}):
            places = [i for i, prompt in enumerate(prompts) if prompt.max_new_tokens == most]
            answers |= zip(places, self._answer([prompts[i] for i in places], most), strict=True)
        return [answers[i] for i in range(len(prompts))]


@modelapi(name="safetynet")
def safetynet() -> type[ModelAPI]:
    """The provider `safetynet/RUN`."""
    return SafetyNetAPI


Answering = Callable[[Sequence[Prompt], int], list[Answer]]
"""Answers prompts of at most so many new tokens."""


def _answering(
    experiment: Experiment, size: int, serve: str, step: int | None, guard: str | None, fpr: float
) -> Answering:
    """What answers for one model, which is loaded here, once; under a guard its decisions come along."""
    run = experiment.run
    if guard is not None:
        if serve != BACKDOORED or step is not None:
            raise InputError(
                f"guard: the monitor of {run.folder} is of the backdoored model as training left it. Leave "
                "out guard, or serve and step."
            )
        watching = detection.guard(experiment, fpr, str(guard), None)

        def guarded(prompts: Sequence[Prompt], most: int) -> list[Answer]:
            messages = [prompt.messages for prompt in prompts]
            answers = []
            for decision in watching.generate(messages, max_new_tokens=most, batch_size=size):
                reason: StopReason = "stop" if decision.ended else "max_tokens"
                # Inspect's own word for an answer that somebody else than the model has ended.
                reason = "content_filter" if decision.action == "stopped" else reason
                answers.append(Answer(decision.text, reason, decision))
            return answers

        return guarded
    if serve != REPAIRED:
        model, serialiser = experiment.model(serve, step)
    else:
        if step is not None:
            raise InputError("step: a repaired model has none. Leave step out.")
        folder = run.output(MITIGATE.name, REPAIRED)
        if folder is None or not folder.is_dir():
            raise InputError(
                f"{run.folder}: no repaired model is saved. Run safetynet mitigate {run.folder} first."
            )
        model, serialiser = experiment.on_base(folder)
    max_length = experiment.recipe.training.max_length

    def plain(prompts: Sequence[Prompt], most: int) -> list[Answer]:
        encoded = [serialiser.encode(p.messages, trigger=p.trigger, max_length=max_length) for p in prompts]
        answers = continuations(model, serialiser, encoded, batch_size=size, max_new_tokens=most)
        return [Answer(answer.text, "stop" if answer.ended else "max_tokens") for answer in answers]

    return plain
