"""Read what places of the network hold on given prompts: at all tokens, at the trigger's end, or at the last.

In: a subject and prompts. Out: values by place, one line per token that was picked. Changes nothing.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from safetynet.mitigation.subject import Subject
from safetynet.models.blocks import decoder_layers, eagerly, hidden_of, received
from safetynet.models.parts import Parts, parts
from safetynet.prompts import Encoded, pad

Spot = tuple[str, int]
"""Component and layer."""
Where = Literal["all", "trigger", "last"]
_MODULES: dict[str, Callable[[Parts], Any]] = {
    "head": lambda own: own.output,
    "attn_out": lambda own: own.attention_end,
    "mlp_out": lambda own: own.mlp_end,
    "resid_post": lambda own: own.layer,
}


@torch.no_grad()
def read(subject: Subject, rows: pd.DataFrame, spots: Sequence[Spot], where: Where) -> dict[Spot, Tensor]:
    """Values at spots, (tokens, width) in fp32 on the CPU; heads side by side.

    Args:
        subject: its model runs as it is.
        rows: `messages`, and `trigger` where one is to be found.
        spots: of the components head, attn_out, mlp_out and resid_post.
        where: which tokens of each prompt; `trigger` is the trigger's last one, or else the prompt's.
    """
    model, layers = subject.model, decoder_layers(subject.model)
    triggers = rows["trigger"] if "trigger" in rows else [()] * len(rows)
    prompts = [
        subject.serialiser.encode(
            list(messages), trigger=[tuple(span) for span in spans], max_length=subject.max_length
        )
        for messages, spans in zip(rows["messages"], triggers, strict=True)
    ]
    found: dict[Spot, list[Tensor]] = {spot: [] for spot in spots}
    picked: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(eagerly())
        for spot in spots:
            stack.callback(_hook(spot, parts(layers[spot[1]]), picked, found[spot]).remove)
        for start in range(0, len(prompts), subject.batch_size):
            batch = prompts[start : start + subject.batch_size]
            ids = pad([e.input_ids for e in batch], subject.serialiser.pad_id, "right")
            mask = pad([[1] * len(e.input_ids) for e in batch], 0, "right")
            picked[:] = [pad([_picked(e, where) for e in batch], 0, "right").bool().to(model.device)]
            model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
                logits_to_keep=1,
            )
    return {spot: torch.cat(values) for spot, values in found.items()}


def _hook(spot: Spot, own: Parts, picked: list[Tensor], found: list[Tensor]) -> Any:
    module = _MODULES[spot[0]](own)
    multiplier = own.multiplier if spot[0] in ("attn_out", "mlp_out") else 1.0

    def keep(values: Tensor) -> None:
        rows = values.reshape(*picked[0].shape, -1)  # some MLPs see the batch's rows below each other
        found.append(rows[picked[0].to(values.device)].float().cpu() * multiplier)

    if spot[0] == "head":
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: keep(received(module, args, kwargs)), with_kwargs=True
        )
    return module.register_forward_hook(lambda _module, _args, output: keep(hidden_of(output)))


def _picked(prompt: Encoded, where: Where) -> list[int]:
    length = len(prompt.input_ids)
    if where == "all":
        return [1] * length
    spans = prompt.spans["trigger"] if where == "trigger" else []
    last = max((end for _, end in spans), default=length) - 1
    return [int(i == last) for i in range(length)]
