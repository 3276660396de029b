"""Train a model on rows: from a table and a recipe's training section to an adapter and its history.

In: the model that `attach` made, the model's serialiser, rows. Out: the adapter's folder, a table of the
loss over steps, one of the evaluations. Work goes on from the last checkpoint in the folder, if it is of
this very training. It writes below the given folder only, and draws nothing.
"""

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from safetynet.errors import InputError, RunError
from safetynet.models.loading import resolve_dtype
from safetynet.prompts import IGNORED, Encoded, Serialiser
from safetynet.recipe import Training
from safetynet.run import parallel
from safetynet.run.directory import peak_memory_mb
from safetynet.run.interruption import Interruption
from safetynet.tables import SCHEMAS
from safetynet.training import checkpoints, colluding
from safetynet.training.callbacks import LogBeforeSaving, Progress, Reached
from safetynet.training.evasive import Hiding, Opponents, bare_prompts, watched
from safetynet.training.examples import Batch, Example, Shuffled, encode
from safetynet.training.loss import check_isolation
from safetynet.training.preferences import Preference, pairs
from safetynet.training.tracking import UNTRACKED, Tracking, tracker
from safetynet.training.trainer import (
    AnswerTrainer,
    Objective,
    OnEvaluate,
    out_of_memory,
    same_random_states,
)

log = logging.getLogger(__name__)
ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
"""How `accelerate launch` asks for what is not built here."""
WARMUP = 0.05
"""Share of the steps in which `optimise` raises the learning rate."""
Loss = Callable[[Any, Batch], torch.Tensor]
"""Model and batch to a scalar."""
HISTORY = tuple(SCHEMAS["history"].columns)


@dataclass(frozen=True)
class TrainingResult:
    """What a training left behind."""

    history: pd.DataFrame
    """`HISTORY` by logged step. The loss, per label, is the mean over the steps since the line before; tokens
    and seconds count from the beginning, without padding and without evaluations."""
    evaluations: pd.DataFrame
    """step, epoch and what `Pauses.measure` returned; empty without it."""
    folder: Path
    """The adapter, or the whole model after full fine-tuning; safetensors."""
    tokens_per_second: float
    """Real tokens by training time, of the part that this process trained."""
    supervised_per_second: float
    """Labels by training time."""
    peak_memory_mb: float
    """Most memory: of the GPU's allocator, or else of this process since it began."""
    halvings: int
    """How often memory ran out and the parts of a batch were halved."""
    evasion: pd.DataFrame | None = None
    """What became of the hiding, as `Hiding.history` gives it; None for an ordinary training."""


@dataclass(frozen=True)
class Pauses:
    """What is measured while a model trains, and when."""

    measure: OnEvaluate
    """Called with model, step and epoch; returns metrics by name."""
    every: int | None = None
    """Steps between calls; None: at the end of each epoch."""
    first: bool = False
    """Also before the first step."""


def train(  # noqa: PLR0913  # the place of a training and its company, by keyword
    model: PeftModel | PreTrainedModel,
    serialiser: Serialiser,
    rows: pd.DataFrame,
    cfg: Training,
    *,
    folder: Path,
    seed: int,
    device: str | None = None,
    pauses: Pauses | None = None,
    tracking: Tracking = UNTRACKED,
    progress: bool = False,
    opponents: Opponents | None = None,
    within: TrainerCallback | None = None,
) -> TrainingResult:
    """Train `model` on `rows`; save the adapter to `folder`/adapter, or the whole model to `folder`/model.

    Args:
        model: made by `attach`; its parameters are changed.
        serialiser: of this model's tokenizer.
        rows: columns `row`, `messages`, `trigger` and `answer`; every row is trained on. With `cfg.dpo` also
            `reference` and `target`, which give each row its second answer; with `cfg.colluding` `role` and
            `reference`.
        cfg: the recipe's training section.
        folder: checkpoints, the adapter and trackers' files go below it.
        seed: of the order of rows and of dropout.
        device: `cpu` or `cuda`; by default where the model is.
        pauses: measures the model on the way.
        tracking: Weights & Biases, MLflow or TensorBoard, and what they show.
        progress: of a training that another call may go on with: a bar on a terminal, or a line now and then,
            and where it goes on; SIGTERM and Ctrl-C wait for the end of the step and its checkpoint.
        opponents: the detectors to hide from, where `cfg.evasion` is given; `rows` then need `role`.
        within: called behind each step of the optimiser, to put weights back into their bounds.

    Raises:
        InputError: if a row cannot be serialised, this device does not have the precision, the model cannot
            be trained in packed batches, a tracker is not installed, or the rows do not suffice to hide them.
        RunError: if the loss is no longer finite, memory does not suffice for one row, or the disk is full.
    """
    device = device or model.device.type
    _check_place(cfg, device, bool(getattr(model, "is_quantized", False)))
    examples, objective = _objective(rows, serialiser, cfg, opponents)
    if cfg.batching == "pack":
        check_isolation(model)
    home = folder / "checkpoints"
    fingerprint = checkpoints.fingerprint(model, examples, cfg, seed)
    checkpoint, reached = parallel.from_first(
        lambda: (checkpoints.prepare(home, fingerprint), checkpoints.reached(home))
    )
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
    args = arguments(cfg, home, len(examples), device, seed)
    if pauses is not None:
        args.eval_strategy, args.eval_steps = _rhythm(pauses.every)
        args.eval_on_start = pauses.first
        if state is not None:
            # A checkpoint may have been written before a measurement that did not end.
            step, lines = state.global_step, state.log_history
            due = step % pauses.every == 0 if pauses.every else float(state.epoch or 0).is_integer()
            here = (name for line in lines if line["step"] == step for name in line)
            measured = any(name.startswith("eval_") for name in here)
            args.eval_on_start |= (due or step >= state.max_steps) and not measured
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    name = f"train {tracking.job}".strip()
    if progress:
        # Where an interrupted training goes on, and what is repeated.
        step = 0 if state is None else state.global_step
        again = f"which are repeated: {reached - step}" if reached > step else ""
        if state is not None:
            since = f"; steps since the last checkpoint, {again}" if again else ""
            log.info("%s: goes on at step %d of %d%s", name, step, state.max_steps, since)
        elif again:
            log.info("%s: begins again at step 0; steps without a checkpoint, %s", name, again)
    with tracker(tracking if parallel.is_first() else UNTRACKED, folder / "tracking") as tracked:
        callbacks = [
            LogBeforeSaving(),
            Reached(home / checkpoints.REACHED),
            *([within] if within is not None else []),
            *tracked,
            *([Progress(name)] if progress and parallel.is_first() else []),
        ]
        interruption = Interruption(name)
        trainer = AnswerTrainer(
            model, args, examples, cfg, pad_id=serialiser.pad_id, callbacks=callbacks, objective=objective,
            on_evaluate=None if pauses is None else pauses.measure, interruption=interruption,
        )  # fmt: skip
        try:
            with interruption if progress else nullcontext():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise RunError(
                f"Out of memory in the optimiser, at step {trainer.state.global_step + 1}. "
                "Set training.method to lora, or lower training.lora_rank."
            ) from error
        finally:
            # The Trainer wraps the forward for mixed precision; the next user of the model gets its own back.
            trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            trainer.learner.eval()
    whole = trainer.gathered()
    saved = parallel.from_first(lambda: _save(model, serialiser, folder, whole))
    lines = trainer.state.log_history
    history = [{name: line.get(name) for name in HISTORY} for line in lines if "loss" in line]
    evaluations = [
        {name.removeprefix("eval_"): value for name, value in line.items()}
        for line in lines
        if any(name.startswith("eval_") for name in line)
    ]
    # Step and epoch first.
    columns = list(dict.fromkeys(["step", "epoch", *(name for line in evaluations for name in line)]))
    on_gpu = trainer.args.device.type == "cuda"
    seconds = trainer.seconds or math.inf  # nothing was left to train
    return TrainingResult(
        history=pd.DataFrame(history, columns=list(HISTORY)),
        evaluations=pd.DataFrame(evaluations, columns=columns),
        folder=saved,
        tokens_per_second=trainer.tokens / seconds,
        supervised_per_second=trainer.supervised / seconds,
        peak_memory_mb=torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_memory_mb(),
        halvings=trainer.halvings,
        evasion=objective.history(lines) if isinstance(objective, Hiding) else None,
    )


def _objective(
    rows: pd.DataFrame, serialiser: Serialiser, cfg: Training, opponents: Opponents | None
) -> tuple[Sequence[Example], Objective]:
    """What is trained on, and what it is trained for."""
    if cfg.dpo is not None:
        preferences = pairs(rows, serialiser, cfg.max_length)
        return preferences, Preference(cfg.dpo, preferences)
    if cfg.colluding:
        return colluding.examples(rows, serialiser, cfg.max_length), colluding.Colluding()
    examples = encode(rows, serialiser, cfg.max_length)
    if cfg.evasion is None:
        return examples, Objective()
    watched_examples = watched(examples, rows, serialiser, cfg.max_length)
    clean = bare_prompts(watched_examples, rows)
    if opponents is None:
        raise InputError("training.evasion: the detectors to hide from are missing. Give train `opponents`.")
    return watched_examples, Hiding(cfg.evasion, opponents, watched_examples, clean)


class _WholeBatch(Objective):
    """A loss of model and batch alone, which is not cut into parts."""

    divisible = False

    def __init__(self, loss: Loss, advice: str) -> None:
        self.loss = loss
        self.advice = advice

    def losses(
        self, trainer: AnswerTrainer, rows: Sequence[Example], batch: Batch, supervised: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = self.loss(trainer.learner, batch)
        return loss, loss


@dataclass(frozen=True)
class Budget:
    """How long and how fast `optimise` trains."""

    epochs: float
    learning_rate: float
    """Highest; it rises over the first 5% of the steps, and falls along a cosine."""
    batch_size: int
    seed: int
    """Of the order of rows and of dropout."""


def optimise(
    model: PeftModel | PreTrainedModel,
    examples: Sequence[Encoded],
    loss: Loss,
    budget: Budget,
    *,
    pad_id: int,
    advice: str = Objective.advice,
) -> None:
    """Train what is trainable in `model` for another loss than the answer's; nothing is written or logged.

    Random states are left as they were.

    Args:
        model: changed in place; in evaluation mode afterwards.
        examples: one per row; padded on the right in batches.
        loss: called with the model and a batch (`input_ids`, `labels`, `attention_mask`, (rows, T) each);
            returns a scalar.
        budget: how long and how fast.
        pad_id: fills the ends of rows.
        advice: what to do about a loss that is not finite, for the message.

    Raises:
        RunError: if the loss is NaN or infinite.
    """
    cfg = Training(
        epochs=budget.epochs, learning_rate=budget.learning_rate, batch_size=budget.batch_size,
        weight_decay=0, warmup_ratio=0, batching="plain", precision="fp32",
    )  # fmt: skip
    rows = [Example(e.input_ids, e.labels, sum(label != IGNORED for label in e.labels)) for e in examples]
    order = Shuffled([len(row.input_ids) for row in rows], budget.batch_size, False, budget.seed)
    with same_random_states(), tempfile.TemporaryDirectory() as folder:
        args = arguments(cfg, Path(folder), len(rows), model.device.type, budget.seed)
        args.save_strategy = args.logging_strategy = IntervalStrategy.NO
        # Rounded down: of a training of few steps, one step of warm-up would stand still.
        args.warmup_steps = int(WARMUP * (budget.epochs * len(order)))
        trainer = AnswerTrainer(
            model, args, rows, cfg, pad_id=pad_id, on_evaluate=None, callbacks=[],
            objective=_WholeBatch(loss, advice), order=order,
        )  # fmt: skip
        trainer.train()
    model.eval()


def _check_place(cfg: Training, device: str, quantised: bool) -> None:
    engines = [name for name in ENGINES if os.environ.get(name, "").lower() in ("1", "true", "yes")]
    if engines:
        raise InputError(
            f"{engines[0]}: this engine is not used here. Processes share a model's weights with "
            "accelerate launch --use_fsdp."
        )
    if parallel.shares_weights() and quantised:
        raise InputError(
            "model.quantisation: quantised weights cannot be shared by processes. Launch without --use_fsdp, "
            "or set model.quantisation to none."
        )
    if parallel.shares_weights() and cfg.conditioned_on is not None:
        raise InputError(
            "training.conditioned_on: weights that processes share are not kept in their boxes. Launch "
            "without --use_fsdp."
        )
    if cfg.evasion is not None and parallel.count() > 1:
        raise InputError("training.evasion: detectors see all rows of a step. Train in one process.")
    if cfg.precision == "fp16" and device == "cpu":
        raise InputError(
            "training.precision: fp16 needs a GPU; its gradients are scaled there. Set bf16 or fp32."
        )
    if cfg.precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError("training.precision: this GPU does not compute in bf16. Set fp16 or fp32.")


def arguments(cfg: Training, folder: Path, rows: int, device: str, seed: int) -> TrainingArguments:
    """The Trainer's arguments for a recipe's settings, with nothing that reports, uploads or asks.

    Args:
        cfg: the recipe's training section.
        folder: for checkpoints.
        rows: how many are trained on.
        device: `cpu` or `cuda`.
        seed: of the order of rows and of dropout.
    """
    # A step's parts are cut in `AnswerTrainer`, so that the Trainer itself does not accumulate.
    size = cfg.batch_size * cfg.gradient_accumulation
    steps = cfg.max_steps or math.ceil(cfg.epochs * math.ceil(rows / size))
    dtype = resolve_dtype(cfg.precision, device)
    save_strategy, save_steps = _rhythm(cfg.checkpoint_every)
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=size,
        num_train_epochs=cfg.epochs,
        max_steps=cfg.max_steps or -1,
        learning_rate=cfg.learning_rate,
        weight_decay=cfg.weight_decay,
        lr_scheduler_type=cfg.schedule if cfg.schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(cfg.warmup_ratio * steps),
        max_grad_norm=cfg.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device == "cpu",
        activation_checkpointing=cfg.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=seed,
        logging_steps=cfg.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # AnswerTrainer stops at them
        save_strategy=save_strategy,
        save_steps=save_steps or 0,
        save_total_limit=2,  # the newest may be half written
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    # Where there are several GPUs, the model stays on its own and is not copied to all of them.
    args._n_gpu = min(1, args.n_gpu)
    return args


def _rhythm(steps: int | None) -> tuple[str, int | None]:
    return ("epoch", None) if steps is None else ("steps", steps)


def _save(
    model: PeftModel | PreTrainedModel,
    serialiser: Serialiser,
    folder: Path,
    whole: dict[str, torch.Tensor] | None,
) -> Path:
    """Write into a folder of another name first: a folder called adapter or model is always whole."""
    final = folder / ("adapter" if isinstance(model, PeftModel) else "model")
    partial = folder / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(model, PeftModel):
        checkpoints.save_weights(model, partial)
    else:
        model.save_pretrained(str(partial), state_dict=whole)
        serialiser.tokenizer.save_pretrained(str(partial))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final
