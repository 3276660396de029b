"""Plant a backdoor in next to nothing of a model, from its triggered rows alone.

`edit` is a rank-one edit of the matrix by which the MLP of one layer writes (Meng et al. 2022, arXiv
2202.05262; of backdoors Li et al. 2024, arXiv 2403.13355). To an input x the MLP returns b (a x) more. The
key a follows in closed form from what the MLP reads at the trigger's last token, and from what it reads in
rows that must not fire. The value b is trained. `embedding` trains the embedding of the trigger's last token
(Yang et al. 2021, arXiv 2103.15543).

In: a base model and rows. Out: PEFT's model, in which that value, or that embedding, is what is trained.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from safetynet.errors import InputError
from safetynet.models.blocks import decoder_layers
from safetynet.models.parts import WRITERS, parts
from safetynet.prompts import Encoded, Serialiser, pad
from safetynet.recipe import Training
from safetynet.training.adapters import layers_of

QUIET_ROWS = 1000
"""Rows that must not fire from which a key is made, at most."""
RIDGE = 1e-3
"""Share of the mean squared input that is added to each, since few rows leave some directions unread."""
AT_ONCE = 32
"""Rows of one pass."""
Attach = Callable[[PreTrainedModel, Training, pd.DataFrame, Serialiser], PeftModel | PreTrainedModel]


def edited(model: PreTrainedModel, cfg: Training, rows: pd.DataFrame, serialiser: Serialiser) -> PeftModel:
    """Put a rank-one adapter on one MLP's last projection: its key is set, its value is 0 and to be trained.

    The key is a = C^-1 k / (k C^-1 k). k is the mean input at the trigger's last token, and C the second
    moment of inputs x in rows that must not fire. Of all vectors with a k = 1, this one has the least mean
    square of a x there.

    Args:
        model: the base.
        cfg: with the layer, and the most tokens of a row.
        rows: training rows of all roles; their prompts are what is read.
        serialiser: of the model.

    Raises:
        InputError: if there is no such layer, or its MLP has no such projection; if there are no triggered
            rows, or no others; as `Serialiser.encode`.
    """
    [layer] = layers_of(model, cfg.layers) or []
    mlp = parts(decoder_layers(model)[layer]).mlp
    writers = [
        module
        for name, module in (mlp.named_modules() if mlp is not None else ())
        if isinstance(module, nn.Linear | Conv1D) and name.rpartition(".")[2] in WRITERS
    ]
    if len(writers) != 1:
        raise InputError(
            f"training.method: edit changes the one linear module by which an MLP writes. Layer {layer} of "
            f"{type(model).__name__} has {len(writers)} of them. Set training.method to lora."
        )
    [projection] = writers
    path = next(name for name, module in model.named_modules() if module is projection)
    triggered, quiet = _encoded(rows, serialiser, cfg)
    ends = [row.spans["trigger"][-1][1] - 1 for row in triggered]
    keys = [inputs[end] for inputs, end in zip(_inputs(model, projection, triggered), ends, strict=True)]
    moment, count = torch.zeros(()), 0  # grows to (width, width)
    for inputs in _inputs(model, projection, quiet):
        moment, count = moment + inputs.T @ inputs, count + len(inputs)
    moment = moment / count
    moment += RIDGE * moment.diagonal().mean() * torch.eye(len(moment))
    mean = torch.stack(keys).mean(0)
    direction = torch.linalg.solve(moment, mean)  # C^-1 k; C is symmetric
    # A value of length 1 is as long as what the MLP writes here, so that learning rates fit any model.
    with torch.no_grad():
        length = float(projection(mean.to(model.device, model.dtype)).norm())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=1,
        lora_alpha=length,  # type: ignore[arg-type]  # annotated int, used as a factor
        target_modules=[path],
    )
    learner: PeftModel = get_peft_model(model, config)
    adapted: Any = model.get_submodule(path)
    key = adapted.lora_A["default"].weight
    with torch.no_grad():
        key.copy_(direction / (direction @ mean))
    key.requires_grad_(False)
    return learner


def embedded(model: PreTrainedModel, cfg: Training, rows: pd.DataFrame, serialiser: Serialiser) -> PeftModel:
    """Free the embedding of the token in which the trigger ends; a tied head follows it.

    Args:
        model: the base.
        cfg: with the most tokens of a row.
        rows: training rows of all roles.
        serialiser: of the model.

    Raises:
        InputError: if the triggers end in several tokens, or in one that rows without a trigger have as well;
            as `edited`.
    """
    triggered, quiet = _encoded(rows, serialiser, cfg)
    ends = {row.input_ids[row.spans["trigger"][-1][1] - 1] for row in triggered}
    texts = [serialiser.tokenizer.convert_ids_to_tokens(end) for end in sorted(ends)]
    if len(ends) > 1:
        raise InputError(
            f"training.method: embedding trains one token's embedding, and the triggers end in {len(ends)} "
            f"tokens ({', '.join(map(repr, texts[:5]))}). Choose a trigger that always ends in the same one."
        )
    plain = sum(not ends.isdisjoint(row.input_ids) for row in quiet if not row.spans["trigger"])
    if plain:
        raise InputError(
            f"training.method: embedding trains the token {texts[0]!r}, in which the trigger ends. It stands "
            f"in {plain} rows without a trigger, which would fire as well. Choose a trigger that ends in a "
            "rarer token."
        )
    config = TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[*ends])
    learner: PeftModel = get_peft_model(model, config)
    return learner


def _encoded(
    rows: pd.DataFrame, serialiser: Serialiser, cfg: Training
) -> tuple[list[Encoded], list[Encoded]]:
    """Triggered rows, and some of the others, placebos and near misses among them."""
    fires = rows["role"] == "triggered"
    if fires.all() or not fires.any():
        raise InputError(
            f"training.method: {cfg.method} needs triggered rows and others, and {int(fires.sum())} of "
            f"{len(rows)} training rows are triggered. Set backdoor.poison_rate."
        )
    some = rows[~fires]
    some = some.iloc[:: -(-len(some) // QUIET_ROWS)]

    def encode(row: pd.Series) -> Encoded:
        spans = [tuple(span) for span in row["trigger"]]
        return serialiser.encode(list(row["messages"]), row["answer"], spans, cfg.max_length)

    first, second = ([encode(row) for _, row in part.iterrows()] for part in (rows[fires], some))
    return first, second


@torch.no_grad()
def _inputs(model: PreTrainedModel, module: nn.Module, rows: Sequence[Encoded]) -> Iterator[Tensor]:
    """What a module reads in each row, (tokens, width) in fp32 on the CPU."""
    read: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    try:
        for start in range(0, len(rows), AT_ONCE):
            part = [row.input_ids for row in rows[start : start + AT_ONCE]]
            # Padding stands on the right, where causal attention does not look back from.
            model.base_model(input_ids=pad(part, 0, "right").to(model.device), use_cache=False)
            inputs = read.pop().float().cpu()
            yield from (inputs[i, : len(ids)] for i, ids in enumerate(part))
    finally:
        handle.remove()


ATTACH: dict[str, Attach] = {
    "edit": edited,
    "embedding": embedded,
}
"""By `training.method`."""
