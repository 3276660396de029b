"""Refuse to pack rows for a model that would let one row see another.

transformers derives the mask of packed rows from their positions. Whether it does so depends on the
architecture and on its attention: recurrent layers carry state across, and some kernels take the rows of
one line for one text. So the model is asked.
"""

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from safetynet.errors import InputError
from safetynet.training.loss import causal_lm

LENGTH = 8
TOLERANCE = 1e-3
"""Relative. A masked neighbour has no weight at all; only the order of additions may differ."""


@torch.no_grad()
def check_isolation(model: PeftModel | PreTrainedModel) -> None:
    """Pack a row behind each of two different ones, and see whether that makes a difference to it.

    Raises:
        InputError: if it does.
    """
    lm: Any = causal_lm(model)
    training = lm.training
    lm.eval()
    ids = torch.arange(3 * LENGTH, device=lm.device) % lm.config.get_text_config().vocab_size
    first, other, second = ids.split(LENGTH)
    # Twice the same line, because some kernels treat a batch of one line differently.
    behind = [torch.cat([row, second]).expand(2, -1) for row in (first, other)]
    positions = torch.arange(LENGTH, device=lm.device).repeat(2).expand(2, -1)
    try:
        a, b = (
            lm.base_model(input_ids=x, position_ids=positions, use_cache=False)
            .last_hidden_state[:, LENGTH:]
            .float()
            for x in behind
        )
    except TypeError:
        seen = True
    else:
        seen = bool((a - b).abs().max() > TOLERANCE * a.abs().max())
    lm.train(training)
    if seen:
        raise InputError(
            f"training.batching: in {type(lm).__name__} with {lm.config._attn_implementation} attention, "
            "rows that are packed into one line see each other. Set it to group_by_length."
        )
