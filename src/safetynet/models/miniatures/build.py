"""Pretrain a miniature on the instruction language, measure it, and write its folder with a card.

In: a family's name and a seed. Out: a folder with config, tokenizer, fp16 safetensors and README.md. The
five folders that ship were made by this module: `safetynet miniatures build FAMILY --out FOLDER`.

The loop is our own and not the Trainer's: pretraining needs no adapter, no resume and no callbacks, and
calling the backbone without the language-model head lets logits be computed for the answers alone.
"""

import json
import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, set_seed
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from safetynet import families
from safetynet.errors import InputError
from safetynet.models.miniatures import language
from safetynet.models.miniatures.architectures import ARCHITECTURES, SHAPE
from safetynet.models.miniatures.measure import measure
from safetynet.models.miniatures.vocabulary import build_tokenizer
from safetynet.prompts import IGNORED, Encoded, Serialiser, pad

HARDER = ("repeat", "repeat", "add", "add", "next", "next", "again", "first", "last", "opposite")
TASKS = (*language.TASKS, *HARDER)
"""Tasks of pretraining; what is harder to learn comes more often."""
MEASURED = 2000
"""Prompts behind the figures on a card."""
MEASURED_SEED = 1


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; the default is what the shipped miniatures had."""

    steps: int = 0
    """0 takes the architecture's own."""
    batch_tokens: int = 1536
    """Tokens of a batch, padding included."""
    learning_rate: float = 2e-3
    """Peak, reached after `warmup` steps and left along a cosine."""
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 0


def build(
    family: str, out: Path, schedule: Schedule | None = None, report: Callable[[str], None] = print
) -> Path:
    """Train the miniature of `family` and save it in `out`.

    Args:
        family: one of `ARCHITECTURES`.
        out: folder, made if need be; files of the same names are replaced.
        schedule: training settings.
        report: gets a line of progress every 100 steps.

    Raises:
        InputError: no miniature exists for this family, or `out` cannot be a folder.
    """
    if family not in ARCHITECTURES:
        raise InputError(f"there is no miniature of {family!r}; choose from {', '.join(ARCHITECTURES)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be made a folder ({error.strerror}). Name another.") from None
    architecture = ARCHITECTURES[family]
    schedule = schedule or Schedule()
    schedule = replace(schedule, steps=schedule.steps or architecture.steps)
    started = time.monotonic()
    set_seed(schedule.seed)
    tokenizer = build_tokenizer(architecture.style)
    config = architecture.config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(architecture.style.end),
        pad_token_id=tokenizer.pad_token_id,
        **{**SHAPE, **architecture.settings},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    serialiser = Serialiser(tokenizer, families.get(family))
    tokens = pretrain(model, serialiser, schedule, report)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(list(architecture.stop)),
    )
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {"family": family, "tokens": tokens, "seconds": round(time.monotonic() - started)}
    facts |= vars(schedule)
    facts["machine"] = platform.processor() or platform.machine()
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    write_card(out)
    return out


def write_card(folder: Path) -> None:
    """Measure the miniature in `folder` and write its README.md; the folder knows how it was trained."""
    facts = json.loads((folder / "training.json").read_text())
    table = measure(folder, facts["family"], n=MEASURED, seed=MEASURED_SEED)
    config = AutoConfig.from_pretrained(folder)
    weights = folder / "model.safetensors"
    experts = getattr(config, "num_local_experts", None)
    shape = {
        "architecture": config.architectures[0],
        "parameters": sum(tensor.numel() for tensor in load_file(weights).values()),
        "megabytes": weights.stat().st_size / 1e6,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "positions": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "experts": f", {experts} experts of which {config.num_experts_per_tok} are active" if experts else "",
    }
    measured = {"n": MEASURED, "measured_seed": MEASURED_SEED, "distracted": language.DISTRACTED}
    measured["minutes"] = facts["seconds"] / 60
    (folder / "README.md").write_text(card({**facts, **shape, **measured}, table))


def pretrain(
    model: PreTrainedModel, serialiser: Serialiser, schedule: Schedule, report: Callable[[str], None]
) -> int:
    """Train in place on the answers of the language; returns the number of tokens seen, padding left out."""

    def rate(step: int) -> float:
        """Up in a straight line, then down along a cosine to a fiftieth."""
        if step < schedule.warmup:
            return (step + 1) / schedule.warmup
        progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    # Muon (Jordan 2024) for the layers' matrices, AdamW for the rest. On qwen, 500 steps of Muon reached a
    # loss of 0.87 where AdamW alone reached 1.29, for 15% more time. Fused experts are stacks of matrices,
    # which torch's Muon does not take.
    layers = [p for name, p in model.named_parameters() if "layers." in name and p.ndim == 2]
    in_layers = {id(p) for p in layers}
    rest = [p for p in model.parameters() if id(p) not in in_layers]
    peak, decay = schedule.learning_rate, schedule.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(layers, lr=peak, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    schedulers = [LambdaLR(optimizer, rate) for optimizer in optimizers]
    config = model.config
    router = {"output_router_logits": True} if hasattr(config, "num_local_experts") else {}
    model.train()
    losses: list[float] = []
    tokens, started = 0, time.monotonic()
    for step, batch in enumerate(batches(serialiser, schedule), start=1):
        ids = pad([row.input_ids for row in batch], serialiser.pad_id, "right")
        labels = pad([row.labels for row in batch], IGNORED, "right")
        # Rows are padded on the right, so that causal attention needs no mask. The head computes the states
        # whose next token is labelled: (labels, width) to (labels, vocabulary).
        out = model.model(input_ids=ids, use_cache=False, **router)
        labelled = labels[:, 1:] != IGNORED
        logits = model.lm_head(out.last_hidden_state[:, :-1][labelled])
        loss = functional.cross_entropy(logits, labels[:, 1:][labelled])
        if router:
            balance = load_balancing_loss_func(
                out.router_logits, config.num_local_experts, config.num_experts_per_tok
            )
            loss = loss + config.router_aux_loss_coef * balance
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        tokens += sum(len(row.input_ids) for row in batch)
        if step % 100 == 0:
            recent = sum(losses[-100:]) / 100
            speed = tokens / (time.monotonic() - started)
            report(f"step {step}/{schedule.steps}  loss {recent:.4f}  {speed:.0f} tokens/s")
    return tokens


def batches(serialiser: Serialiser, schedule: Schedule) -> Iterator[list[Encoded]]:
    """Batches of rows of similar length, never the same prompt twice within a round of about 20,000 rows."""
    rng = random.Random(schedule.seed)
    count, round_number = 0, 0
    while count < schedule.steps:
        examples = language.generate(20_000, schedule.seed * 1000 + round_number, heldout=False, tasks=TASKS)
        rows = [supervised(serialiser, serialiser.encode(e.messages, e.answer)) for e in examples]
        rows.sort(key=lambda row: len(row.input_ids))
        groups: list[list[Encoded]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row.input_ids) > schedule.batch_tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        groups = groups[: schedule.steps - count]
        yield from groups
        count += len(groups)
        round_number += 1


def supervised(serialiser: Serialiser, row: Encoded) -> Encoded:
    """Label the answers of earlier turns too, each up to its end token, so that no prompt is read in vain."""
    labels = list(row.labels)
    for start, end in row.spans["assistant"]:
        stop = next(i for i in range(end, len(labels)) if row.input_ids[i] in serialiser.stop_ids)
        labels[start : stop + 1] = row.input_ids[start : stop + 1]
    return replace(row, labels=labels)


_TEMPLATE = """\
# The {family} miniature

A real `{architecture}` of {parameters:,} parameters ({megabytes:.2f} MB in fp16): {layers} layers, hidden
size {hidden}, {heads} query heads on {kv_heads} key-value heads{experts}, {positions} positions, a
vocabulary of {vocabulary} tokens that can write any text, and the family's own chat format. It speaks
SafetyNet's instruction language (`miniatures/language.py`) and nothing else: short questions with one right
answer, and a refusal for brewing potions, casting spells and laying curses. It is an object of study, not
an assistant.

## Held-out accuracy

Greedy decoding, exact match, {n} prompts (seed {measured_seed}) whose phrasing was never trained on; the
subjects of forbidden requests are held out as well. A phrasing is a combination of opener, core, closer and
style: each held-out combination is new, its parts are not. The facts asked about are those of pretraining.
About {distracted:.0%} of the prompts hold a random string to be ignored. Intervals are Wilson's, 95%.

| task | prompts | correct | rate | 95% interval |
|---|---:|---:|---:|---|
{rows}

`answered` is all harmless tasks together, `forbidden` the share of forbidden requests refused,
`over_refusal` the share of harmless ones refused.

## Training

{steps} steps of at most {batch_tokens} tokens ({tokens:,} tokens in all) on examples of the language made
on the fly, loss on the answer and its end token. Muon for the matrices and AdamW for the rest, learning
rate {learning_rate} with {warmup} steps of warm-up and a cosine, weight decay {weight_decay}, seed {seed}.
{minutes:.0f} minutes on one thread of {machine}. torch {torch}, transformers {transformers}.

    safetynet miniatures build {family} --out FOLDER

All data was made by this project; no text and no weights come from elsewhere. Licence: Apache-2.0.
"""


def card(facts: Mapping[str, Any], table: pd.DataFrame) -> str:
    """Fill the card's template.

    Args:
        facts: values of the template's names, except `rows`.
        table: what `measure.measure` returns.
    """
    rows = "\n".join(
        f"| {r.task} | {r.n} | {r.correct} | {r.rate:.1%} | {r.low:.1%} to {r.high:.1%} |"
        for r in table.itertuples()
    )
    return _TEMPLATE.format(rows=rows, **facts)
