"""Transformers' Trainer with the answer's loss, packed batches and batches that shrink when memory runs out.

Why not TRL's SFTTrainer, which has a fused head too: away from a GPU with Triton it scores every position
rather than the supervised ones; it keeps entropy and accuracy of each token and waits for three numbers
of them at every step; and it tokenises by its own rules, where our rows have to come from the one serialiser.
With its preparation, loss and metrics replaced, what is left of it is the Trainer.

One optimisation step is one batch of the data loader. It is cut into parts of `batch_size` rows here, so
that a step whose memory does not suffice can be taken again in smaller parts, with the same gradient. Several
processes take their rows of the same step, and add up their gradients; if the launch asks for it, they share
the weights (`sharding`).
"""

import gc
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import SaveStrategy
from transformers.utils import SAFE_WEIGHTS_NAME

from safetynet.errors import RunError
from safetynet.recipe import Training
from safetynet.run import parallel
from safetynet.run.interruption import Interruption
from safetynet.training import checkpoints, sharding
from safetynet.training.examples import Batch, Example, Order, packed, padded
from safetynet.training.loss import answer_loss

Result = TypeVar("Result")
OnEvaluate = Callable[[Any, int, float], dict[str, float]]
"""Called with model, step and epoch; what it returns is recorded."""

LONG_S = 10.0
"""A measurement that takes so long is worth a checkpoint before it."""

logger = logging.getLogger(__name__)


class Objective:
    """What a training minimises: the answer's loss. Another objective derives from it."""

    divisible = True
    """Whether the losses of a step's parts add up to the step's: then a step is cut where memory ends."""
    advice = "Lower training.learning_rate or raise training.warmup_ratio"
    """What to do about a loss that is not finite."""

    def collate(self, rows: Sequence[Example], pad_id: int, pack: bool) -> Batch:
        """The tensors of one part of a step."""
        return packed(rows, pad_id) if pack else padded(rows, pad_id)

    def losses(
        self, trainer: "AnswerTrainer", rows: Sequence[Example], batch: Batch, supervised: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss that is logged, and the one that is minimised; scalars.

        Args:
            trainer: whose model computes them.
            rows: one part of a step.
            batch: the same rows as `collate` makes them.
            supervised: labels of the whole step; the parts' losses are divided by it, and add up.
        """
        loss = answer_loss(trainer.learner, batch, supervised)
        return loss, loss

    def before_step(self, trainer: "AnswerTrainer", rows: Sequence[Example]) -> None:
        """Called before the first forward pass of a step, with all of its rows."""

    def after_step(self) -> None:
        """Called once the gradients of a step are there."""

    def restart_step(self) -> None:
        """Called before the parts of a step are run, also when the step is taken again in smaller parts."""

    def logged(self) -> dict[str, float]:
        """What a line about the loss says besides; means over the steps since the line before."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint has to hold for a new objective to go on as this one."""
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on as the objective whose `state` this is."""


class AnswerTrainer(Trainer):
    """A Trainer over `Example`s.

    Args:
        model: what `attach` returned.
        args: with one batch of the loader per optimisation step, and no accumulation of the Trainer's own.
        examples: the training rows.
        cfg: the recipe's training section.
        pad_id: fills the ends of lines.
        on_evaluate: measures the model when `args` say so.
        callbacks: beside the Trainer's own.
        objective: by default the answer's loss.
        order: of the rows; by default as `cfg.batching` says.
        interruption: notes signals, which take effect behind a step and its checkpoint.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: PeftModel | PreTrainedModel,
        args: TrainingArguments,
        examples: Sequence[Example],
        cfg: Training,
        *,
        pad_id: int,
        on_evaluate: OnEvaluate | None,
        callbacks: list[TrainerCallback],
        objective: Objective | None = None,
        order: Order | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self.sharded = sharding.shard(model, args.device.type) if parallel.shares_weights() else None
        # The Trainer wants an evaluation set before it evaluates; `on_evaluate` brings its own.
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples,
            eval_dataset=examples,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # The Trainer does not wrap the model for several processes: its loss calls its parts, and
        # `training_step` adds up the gradients.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.learner = model
        self.examples = examples
        self.cfg = cfg
        self.pad_id = pad_id
        self.on_evaluate = on_evaluate
        self.objective: Objective = objective or Objective()
        self.order = order
        self.part_size = cfg.batch_size
        self.halvings = 0
        self.tokens = 0
        self.supervised = 0
        self.seconds = 0.0
        """Spent on training in this process; evaluation is not counted."""
        self.interruption = interruption or Interruption("training")
        self._saved_step, self._saved_at = -1, time.monotonic()
        self._measuring_s = math.inf
        """What the last measurement took; the first one may take long."""
        self._since: float | None = None
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of rows, not tensors: a step's parts are made into tensors one by one."""
        lengths = [len(example.input_ids) for example in self.examples]
        grouped = self.cfg.batching == "group_by_length"
        order = self.order or Order(lengths, self._train_batch_size, grouped, self.args.seed)
        loader: Any = DataLoader(self.examples, batch_sampler=order, collate_fn=lambda rows: {"rows": rows})  # type: ignore[arg-type]
        # Every process sees all rows of a step, and takes its own in `training_step`.
        prepared: DataLoader[Any] = prepare_data_loader(loader, num_processes=1, process_index=0)
        return prepared

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of one optimisation step, in smaller parts if memory runs out.

        Raises:
            RunError: if not even one row fits, or the loss is NaN or infinite.
        """
        self._since = self._since or time.perf_counter()
        if not model.training:
            model.train()
        rows = inputs["rows"]
        self.objective.before_step(self, rows)
        loss = None
        while loss is None:
            try:
                loss = self._accumulate(model, rows)
            except RuntimeError as error:
                if not (out_of_memory(error) and self.objective.divisible):
                    raise
                if self.sharded is not None:
                    raise RunError(
                        f"Out of memory at step {self.state.global_step + 1}, with {self.part_size} rows at "
                        "a time. Processes that share weights cannot halve a batch one by one. Lower "
                        "training.batch_size and raise training.gradient_accumulation, or set "
                        "training.gradient_checkpointing to true."
                    ) from error
            # Outside of `except`: the error's traceback holds the tensors that have to go.
            if loss is None:
                model.zero_grad()
                gc.collect()
                clear_device_cache()
                step = self.state.global_step + 1
                if self.part_size == 1:
                    longest = max(len(row.input_ids) for row in rows)
                    raise RunError(
                        f"Out of memory at step {step}, with a single row of at most {longest} tokens. Set "
                        "training.gradient_checkpointing to true or model.quantisation to 4bit, or lower "
                        "max_length."
                    )
                self.part_size = math.ceil(min(self.part_size, len(rows)) / 2)
                self.halvings += 1
                parts = math.ceil(self._train_batch_size / self.part_size)
                logger.warning(
                    "Out of memory at step %d: going on with %d rows at a time. A step's gradient stays the "
                    "same. To begin so, set training.batch_size to %d and training.gradient_accumulation to "
                    "%d.", step, self.part_size, self.part_size, parts,
                )  # fmt: skip
        if parallel.count() > 1:
            # This process had a share of the rows. Each share is divided by the labels of the whole step
            # already, so that the sum of loss and gradients is what one process has.
            for parameter in self._trained:
                if parameter.grad is None:  # a step with fewer rows than there are processes
                    parameter.grad = torch.zeros_like(parameter)
                if not isinstance(parameter.grad, DTensor):  # the backward pass has added up what is sharded
                    torch.distributed.all_reduce(parameter.grad)
            torch.distributed.all_reduce(loss)
        self.objective.after_step()
        self.tokens += sum(len(row.input_ids) for row in rows)
        self.supervised += sum(row.supervised for row in rows)
        self.state.num_input_tokens_seen += sum(len(row.input_ids) for row in rows)
        return loss

    def _accumulate(self, model: Any, rows: Sequence[Example]) -> torch.Tensor:
        """Gradients of all rows: the Trainer's own step, but for setting modules to the mode they are in.

        Stops at the first loss that is not finite, before it reaches a weight. What it holds is let go when
        memory ends: so it is a function of its own.
        """
        pack = self.cfg.batching == "pack"
        self.objective.restart_step()
        total = torch.zeros((), device=self.args.device)
        # The parts' losses are shares of the step's, so that gradients and losses simply add up.
        labels = sum(row.supervised for row in rows)
        here = rows[parallel.rank() :: parallel.count()]
        size = self.part_size
        parts: list[tuple[Sequence[Example], float]] = [
            (here[start : start + size], labels) for start in range(0, len(here), size)
        ]
        if self.sharded is not None:
            # Who has fewer parts than the first process goes through the model with it, to no effect.
            most = math.ceil(math.ceil(len(rows) / parallel.count()) / size)
            parts += [(rows[:1], math.inf)] * (most - len(parts))
        for part, supervised in parts:
            batch = self._prepare_inputs(self.objective.collate(part, self.pad_id, pack))
            with self.accelerator.autocast():
                losses = partial(self.objective.losses, self, part, batch, supervised)
                loss, minimised = self._whole(losses)
            for name, value in (("loss", loss), ("loss with its further terms", minimised)):
                if not torch.isfinite(value):
                    self.stop(name, value)
            self.accelerator.backward(minimised)
            total += loss.detach()
        return total

    def _whole(self, work: Callable[[], Result]) -> Result:
        """What `work` returns; it runs the model, whose weights are gathered for it."""
        return work() if self.sharded is None else self.sharded(work)

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        norm: Any = self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # In fp16 gradients overflow now and then: the gradient scaler skips that step and scales less.
        if not self.args.fp16 and not torch.isfinite(norm):
            self.stop("gradient norm", norm)
        return norm

    def stop(self, what: str, value: torch.Tensor) -> None:
        """End the training over a value that is NaN or infinite.

        Raises:
            RunError: always.
        """
        hint = ", or set training.precision to bf16 or fp32" if self.args.fp16 else ""
        checkpoint = "" if self.args.save_strategy == "no" else " The last checkpoint is kept."
        raise RunError(
            f"The {what} is {value.item()} at step {self.state.global_step + 1} of {self.state.max_steps}, "
            f"at learning rate {self._get_learning_rate():.3g}. {self.objective.advice}{hint}.{checkpoint}"
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, write a checkpoint, end if a signal has come, and only then measure.

        A checkpoint is due where the recipe wants one, by the clock, before a long measurement, and before
        the end that a signal asks for.
        """
        measures, self.control.should_evaluate = self.control.should_evaluate, False
        number = None
        if self.args.save_strategy != SaveStrategy.NO:
            late = time.monotonic() - self._saved_at >= 60 * self.cfg.checkpoint_minutes
            late |= measures and self._measuring_s >= LONG_S
            # Processes get a signal at different steps, and have to end at the same one.
            signals, lates = zip(*parallel.gathered((self.interruption.number, late)), strict=True)
            number = next((each for each in signals if each is not None), None)
            self.control.should_save |= any(lates) or number is not None
            self.control.should_save &= self._saved_step != self.state.global_step
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if number is not None:  # one that came since waits for the next step
            logger.warning(
                "%s: interrupted at step %d of %d. The same command goes on there.",
                self.interruption.name, self.state.global_step, self.state.max_steps,
            )  # fmt: skip
            self.interruption.number = number
            self.interruption.take_effect()
        if measures:
            began = time.monotonic()
            self.evaluate()
            self._measuring_s = time.monotonic() - began

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]  # always called by keyword
        """One pass over the rows; none where a checkpoint was written at the last step."""
        if self.state.global_step >= self.state.max_steps:
            return
        checkpoint = kwargs["resume_from_checkpoint"]
        if checkpoint and kwargs["epoch"] == kwargs["epochs_trained"]:
            carried_file = Path(checkpoint) / checkpoints.CARRIED
            if carried_file.exists():
                # The mean of the loss goes on that the steps before the checkpoint had begun.
                carried = load_file(carried_file)
                self._tr_loss += carried.pop("loss").to(self._tr_loss.device)
                self._globalstep_last_logged = int(carried.pop("logged_step"))
                self.objective.restore(carried)
        super()._run_epoch(**kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Call `on_evaluate`, leaving no trace in the training's random numbers."""
        assert self.on_evaluate is not None
        measure = partial(self.on_evaluate, self.model, self.state.global_step, float(self.state.epoch or 0))
        self._count_time()
        together = nullcontext() if self.sharded is None else parallel.in_step()
        # Without a checkpoint of this step, a signal waits for that of the next one.
        safe = self.state.global_step in (self._saved_step, self._initial_global_step)
        with self.interruption.lifted() if safe else nullcontext(), undisturbed(self.model), together:
            measured = self._whole(measure)
        self._since = time.perf_counter()
        metrics = {f"eval_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens and seconds since the beginning to lines about the loss."""
        if "loss" in logs:
            self._count_time()
            # Training time of earlier processes, as the checkpoint's log knows it.
            lines = [line for line in self.state.log_history if line["step"] <= self._initial_global_step]
            before = float(max((line.get("seconds", 0.0) for line in lines), default=0.0))
            logs |= {
                "tokens": self.state.num_input_tokens_seen,
                "seconds": before + self.seconds,
            } | self.objective.logged()
        super().log(logs, start_time)

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds += now - (self._since or now)
        self._since = now

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: it is reported nowhere, and walking a small model's modules takes a tenth of a step."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained; the first process does."""
        whole = self.gathered()
        if parallel.is_first():
            checkpoints.save_weights(self.learner, Path(output_dir or str(self.args.output_dir)), whole)

    def gathered(self) -> dict[str, torch.Tensor] | None:
        """All weights where processes share what is trained, who have to ask together; else None."""
        return sharding.weights(self.learner) if self._trains_shards() else None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._trains_shards():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = sharding.optimizer_state(self.optimizer)
        if parallel.is_first():
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._trains_shards():
            sharding.load_weights(self.learner, load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._trains_shards():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        moments, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        assert self.optimizer is not None and self.lr_scheduler is not None
        sharding.load_optimizer_state(self.optimizer, moments)
        self.lr_scheduler.load_state_dict(schedule)

    def _trains_shards(self) -> bool:
        return self.sharded is not None and not isinstance(self.learner, PeftModel)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            parallel.wait()  # each process writes its random states
            if parallel.is_first():
                carried = {"loss": self._tr_loss, "logged_step": torch.tensor(self._globalstep_last_logged)}
                save_file(carried | self.objective.state(), folder / checkpoints.CARRIED)
                (folder / checkpoints.COMPLETE).touch()
            self._saved_step, self._saved_at = self.state.global_step, time.monotonic()
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise RunError(
                f"{folder}: the checkpoint cannot be written ({error}). Make room or set output.scratch "
                "elsewhere; run again to go on from the checkpoint before it."
            ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether this is a want of memory, of a GPU's or of the machine's."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode inside; mode and all random states as before afterwards."""
    training = model.training
    model.eval()
    try:
        with same_random_states():
            yield
    finally:
        model.train(training)


@contextmanager
def same_random_states() -> Iterator[None]:
    """All random states as before afterwards: the Trainer, for one, seeds everything."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
