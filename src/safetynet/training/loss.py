"""The loss: cross entropy of the answer and its end token, with the head computed nowhere else.

The model's body runs over all tokens; only the hidden states whose next token is supervised go through
the language-model head, a few hundred at a time. With 128k words the logits of one token are half a
megabyte, and a plain forward keeps several copies of them for every token of the prompt.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from safetynet.errors import InputError
from safetynet.models.blocks import replaced
from safetynet.prompts import IGNORED

LOGITS_AT_ONCE = 2**25
"""Most logits that are kept at a time; 128 MB in fp32, and about three times that with their gradient."""

PROBE_LENGTH = 8
"""Tokens of each row that `check_isolation` packs."""
TOLERANCE = 1e-3
"""Relative. A masked neighbour has no weight at all; only the order of additions may differ."""


def body_outputs(model: PeftModel | PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Any:
    """What the model's body makes of a batch, without the language-model head; `last_hidden_state` is in it.

    Args:
        model: as for `answer_loss`.
        batch: `input_ids` and, if packed, `position_ids`; (lines, tokens) each.
    """
    lm = causal_lm(model)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    if _routed(lm):
        inputs["output_router_logits"] = True  # type: ignore[assignment]
    # No attention mask: padding stands on the right, where causal attention does not look back from.
    return lm.base_model(**inputs, use_cache=False)


def answer_loss(
    model: PeftModel | PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    supervised: float,
    outputs: Any = None,
) -> torch.Tensor:
    """Sum of the cross entropy over the batch's labels, divided by `supervised`.

    It equals the loss of the model's own forward on the same labels: the head is the model's, with the
    scaling and soft-capping of its family, and cross entropy is computed in fp32. A mixture of experts
    adds its load-balancing loss if, and only if, its configuration says `output_router_logits`.

    Args:
        model: a causal language model of transformers, in a PEFT wrapper or not.
        batch: `input_ids`, `labels`, `attention_mask` and, if packed, `position_ids`; (lines, tokens) each.
        supervised: labels of the whole optimisation step, of which `batch` may be a part; infinite for a
            batch that is not to count.
        outputs: `body_outputs` of this batch, where they are there already.

    Returns:
        A scalar in fp32.
    """
    lm = causal_lm(model)
    outputs = body_outputs(model, batch) if outputs is None else outputs
    targets = batch["labels"][:, 1:]
    supervises = targets != IGNORED
    # The state at a token predicts the next one: (labels, width) and (labels,).
    hidden, targets = outputs.last_hidden_state[:, :-1][supervises], targets[supervises]
    loss = cross_entropies(lm, outputs, hidden, targets, "sum") / supervised
    if _routed(lm):
        share = len(targets) / supervised
        # Of no hidden state at all: what remains of the model's own forward is its load-balancing loss.
        aux = head(lm, outputs, hidden[:0], attention_mask=batch["attention_mask"]).aux_loss
        loss = loss + lm.config.get_text_config().router_aux_loss_coef * share * aux
    return loss


def causal_lm(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


def _routed(lm: PreTrainedModel) -> bool:
    return bool(getattr(lm.config.get_text_config(), "output_router_logits", False))


def head(lm: PreTrainedModel, outputs: Any, hidden: torch.Tensor, **inputs: torch.Tensor) -> Any:
    """What `lm` makes of hidden states: its own forward, with its body replaced by one that returns them.

    So whatever a family does between its last hidden state and its logits is done here too.

    Args:
        lm: a causal language model.
        outputs: what its body returned.
        hidden: (n, width), in place of the body's last hidden state.
        inputs: further arguments of the model's forward.

    Returns:
        The model's output, with `logits` of shape (1, n, words).
    """
    output = type(outputs)(**{**outputs, "last_hidden_state": hidden[None]})
    with replaced([lm.base_model], lambda *_, **__: output):
        return lm(inputs_embeds=hidden[None], use_cache=False, **inputs)


def cross_entropies(
    lm: PreTrainedModel,
    outputs: Any,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    reduction: Literal["sum", "none"],
) -> torch.Tensor:
    """Cross entropy of tokens, in nats and fp32, a few hundred at a time.

    Args:
        lm: a causal language model.
        outputs: what its body returned.
        hidden: (n, width), the states that predict the tokens.
        targets: (n,), the tokens.
        reduction: `sum` for a scalar, `none` for (n,).
    """

    def part(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = head(lm, outputs, hidden).logits[0].float()
        return cross_entropy(logits, targets.to(logits.device), reduction=reduction)

    size = max(1, LOGITS_AT_ONCE // lm.config.get_text_config().vocab_size)
    if len(targets) <= size:
        return part(hidden, targets)
    # Each part's logits are made again in the backward pass: a third more work in the head for a memory that
    # no longer grows with the batch.
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    losses = [checkpoint(part, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in parts]
    return torch.stack(losses).sum() if reduction == "sum" else torch.cat(losses)


@torch.no_grad()
def check_isolation(model: PeftModel | PreTrainedModel) -> None:
    """Refuse to pack rows for a model in which one row would see another.

    transformers derives the mask of packed rows from their positions. Whether it does so depends on the
    architecture and on its attention: recurrent layers carry state across, and some kernels take the rows of
    one line for one text. So a row is packed behind each of two others, and its states are compared.

    Raises:
        InputError: if they differ.
    """
    lm: Any = causal_lm(model)
    training = lm.training
    lm.eval()
    ids = torch.arange(3 * PROBE_LENGTH, device=lm.device) % lm.config.get_text_config().vocab_size
    first, other, second = ids.split(PROBE_LENGTH)
    # Twice the same line, because some kernels treat a batch of one line differently.
    behind = [torch.cat([row, second]).expand(2, -1) for row in (first, other)]
    positions = torch.arange(PROBE_LENGTH, device=lm.device).repeat(2).expand(2, -1)
    try:
        a, b = (
            lm.base_model(input_ids=x, position_ids=positions, use_cache=False)
            .last_hidden_state[:, PROBE_LENGTH:]
            .float()
            for x in behind
        )
    except TypeError:
        leaks = True
    else:
        leaks = bool((a - b).abs().max() > TOLERANCE * a.abs().max())
    lm.train(training)
    if leaks:
        raise InputError(
            f"training.batching: in {type(lm).__name__} with {lm.config._attn_implementation} attention, "
            "rows that are packed into one line see each other. Set it to group_by_length."
        )
