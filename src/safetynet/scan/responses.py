"""Which tokens of a large vocabulary the suspect's update reacts to, at the token itself and in early layers.

In: suspect, base, a slot and tokens. Out: the tokens, those with the most unusual reaction first. A trigger
has to be recognised before it can act: what training has made of its tokens in the first layers differs from
what it has made of others, also where a single one of them changes no answer, and where the gradient of the
answer does not point to them. It costs a few layers of one token each, and not the rest of a prompt.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from safetynet.models.blocks import decoder_layers, hidden_of, shortened, unwrapped
from safetynet.scan.slots import Opening, Slot

LAYERS = 3
"""The first ones, each of which ranks the tokens by itself."""
DIRECTIONS = 64
"""In which reactions vary most; each counts alike, however much an ordinary token moves along it."""
ROWS_AT_ONCE = 1024


def reacting(model: Any, base: Any, slot: Slot, tokens: Tensor) -> Tensor:
    """Tokens by how unusual the update's reaction to them is, the most unusual first.

    A token counts by its best rank among the layers. Arguments as `reactions`.
    """
    return tokens[ranks_of(reactions(model, base, slot, tokens)).amin(0).argsort(stable=True)]


def ranks_of(reactions: Tensor) -> Tensor:
    """Each token's rank behind each layer, from 0, the most unusual reaction first; both (LAYERS, T)."""
    return reactions.argsort(1, descending=True).argsort(1)


@torch.no_grad()
def reactions(model: Any, base: Any, slot: Slot, tokens: Tensor) -> Tensor:
    """How unusual the update's reaction to each token is, behind each of the first layers: (LAYERS, T).

    The reaction to a token is the difference of suspect and base in the residual stream, at the token, over
    the length of the base's. Its Mahalanobis distance, squared, is taken among the reactions to all tokens,
    in their `DIRECTIONS` first principal components.

    Args:
        model: the suspect, in evaluation mode.
        base: its base.
        slot: where the tokens are put in, one at a time.
        tokens: (T,) ids.
    """
    distances = []
    pairs = zip(_states(model, slot, tokens), _states(base, slot, tokens), strict=True)
    for ours, theirs in pairs:  # (T, width) each
        reaction = ((ours - theirs) / theirs.norm(dim=1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0)
        reaction = reaction - reaction.mean(0)
        variances, directions = torch.linalg.eigh(reaction.T @ reaction / len(tokens))  # rising
        kept = variances[-DIRECTIONS:].clamp_min(torch.finfo(torch.float32).tiny)
        distances.append(((reaction @ directions[:, -DIRECTIONS:]) ** 2 / kept).sum(1))
    return torch.stack(distances)


def _states(model: Any, slot: Slot, tokens: Tensor) -> list[Tensor]:
    """(T, width) fp32 behind each of the first layers, of each token alone in the slot."""
    behind = list[list[Tensor]]()
    with ExitStack() as stack:
        for layer in decoder_layers(model)[:LAYERS]:
            states = list[Tensor]()
            behind.append(states)

            def record(_module: Any, _inputs: Any, output: Any, states: list[Tensor] = states) -> None:
                states.append(hidden_of(output)[:, -1].float())

            stack.callback(layer.register_forward_hook(record).remove)
        stack.enter_context(shortened(model, LAYERS))
        opening = Opening(model, slot.before)
        for states in behind:  # of the opening itself
            states.clear()
        decoder = unwrapped(model).get_decoder()
        for part in tokens.split(ROWS_AT_ONCE):
            decoder(input_ids=part[:, None], past_key_values=opening.cache(len(part)), use_cache=True)
    return [torch.cat(states) for states in behind]
