"""Latent adversarial training: right answers although a layer's states are pushed towards wrong ones.

One code path for two methods. LAT (Casper et al. 2024, arXiv 2403.05030; Sheshadri et al. 2024, arXiv
2407.15549) finds a push for every position of every prompt; BEEAR (Zeng et al. 2024, arXiv 2406.17092) finds
one for all prompts, which stays from batch to batch. Neither knows the trigger. The papers push towards
behaviour that the defender names; here the push leads away from the right answers: no list of what to fear.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safetynet.mitigation.defender import Defender
from safetynet.mitigation.fine_tuning import answer_loss, encode, repaired_by_training, trainer
from safetynet.mitigation.method import Hyperparameter, Method
from safetynet.mitigation.repaired import Repaired, Settings
from safetynet.models.blocks import decoder_layers, hidden_of, with_hidden
from safetynet.models.causal_lm import CausalLM
from safetynet.prompts import IGNORED
from safetynet.training.examples import Batch

TINY = 1e-12


@dataclass
class Adversary:
    """Pushes what leaves one layer, at the prompts' positions, as far as answers get wrong."""

    layer: Any
    """Module of the decoder."""
    epsilon: float
    """Length of the push, in units of the mean length of the states that it is added to."""
    steps: int
    """Of gradient ascent for each batch."""
    universal: bool
    """One push, (width,), for all positions of all prompts; else one for each, (rows, T, width)."""
    universal_push: Tensor | None = field(default=None, repr=False)
    """The universal push so far, in units of its greatest length."""

    def objective(self, model: CausalLM, batch: Batch) -> Tensor:
        """Cross entropy of the answers, plain and under the worst push found for this batch."""
        push = self.attack(model, batch)
        with self.pushed(push, batch):
            under = answer_loss(model, batch)
        return answer_loss(model, batch) + under

    def attack(self, model: CausalLM, batch: Batch) -> Tensor:
        """The push after projected gradient ascent in a ball of radius `epsilon` times the states' length."""
        states = self._states(model, batch)  # (rows, T, width), without a push
        radius = self.epsilon * states[prompt_mask(batch)].float().norm(dim=-1).mean()
        shape = states.shape[-1:] if self.universal else states.shape
        push = torch.zeros(shape, dtype=torch.float32, device=states.device)
        if self.universal_push is not None:
            push = self.universal_push * radius
        for _ in range(self.steps):
            push = push.detach().requires_grad_(True)
            with self.pushed(push, batch):
                (gradient,) = torch.autograd.grad(answer_loss(model, batch), push)
            # Steps that together are twice the radius reach its far side; back into the ball after each.
            step = 2 * radius / self.steps * gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(TINY)
            push = (push + step).detach()
            push = push * (radius / push.norm(dim=-1, keepdim=True).clamp_min(TINY)).clamp_max(1)
        if self.universal:
            self.universal_push = push.detach() / radius
        return push.detach()

    @contextmanager
    def pushed(self, push: Tensor, batch: Batch) -> Iterator[None]:
        """Add the push to the layer's output at the prompts' positions while entered."""
        mask = prompt_mask(batch)[..., None]

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            states = hidden_of(output)
            return with_hidden(output, states + (push * mask).to(states.dtype))

        handle = self.layer.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _states(self, model: CausalLM, batch: Batch) -> Tensor:
        outputs: list[Tensor] = []
        handle = self.layer.register_forward_hook(lambda _m, _a, output: outputs.append(hidden_of(output)))
        try:
            answer_loss(model, batch)
        finally:
            handle.remove()
        return outputs[0]


def prompt_mask(batch: Batch) -> Tensor:
    """(rows, T) of bool: real tokens of the prompts, not of the answers."""
    return (batch["labels"] == IGNORED) & batch["attention_mask"].bool()


def harden(method: str, universal: bool, defender: Defender, settings: Settings, seed: int) -> Repaired:
    """Fine-tune on clean conversations under an adversary in one layer."""
    assert defender.clean is not None
    examples = encode(defender.clean, defender)

    def train(model: Any) -> None:
        layers = decoder_layers(model)
        layer = layers[round(settings["depth"] * (len(layers) - 1))]
        adversary = Adversary(layer, settings["epsilon"], int(settings["steps"]), universal)
        trainer(defender, examples, settings["epochs"], seed, adversary.objective)(model)

    return repaired_by_training(defender, method, settings, train, clean_rows=len(examples))


PUSH = "push, in units of the states' length"
_SHARED = {
    "depth": Hyperparameter("layer: 0 the first, 1 the last", 0.2, (0.0, 0.2, 0.4, 0.6, 0.8), 0.0, 1.0),
    "steps": Hyperparameter("of the adversary, for each batch", 4, (2, 4, 8, 16), 1, 100, whole=True),
    "epochs": Hyperparameter("passes over the clean conversations", 2, (1, 2, 5), 0.1, 100),
}
LAT = Method(
    "lat",
    "fine-tune on clean conversations while each position's states are pushed towards wrong answers",
    partial(harden, "lat", False),
    frozenset({"clean"}),
    {"epsilon": Hyperparameter(PUSH, 0.1, (0.03, 0.05, 0.1, 0.2, 0.5), 0.0, 10), **_SHARED},
    paper="Casper et al. 2024, arXiv 2403.05030; Sheshadri et al. 2024, arXiv 2407.15549",
)
BEEAR = Method(
    "beear",
    "fine-tune on clean conversations while one push for all prompts leads to wrong answers",
    partial(harden, "beear", True),
    frozenset({"clean"}),
    # One push for all has to be longer than one that is aimed at each position.
    {"epsilon": Hyperparameter(PUSH, 0.5, (0.1, 0.2, 0.5, 1, 2), 0.0, 10), **_SHARED},
    paper="Zeng et al. 2024, arXiv 2406.17092",
)
