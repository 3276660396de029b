"""CROW: train for hidden states that change little from layer to layer, also under a small push (2411.12768).

Per batch: the embeddings are pushed once by the sign of the gradient of the inconsistency, and the loss is
the answers' cross entropy plus `alpha` times the inconsistency under that push. Against the published code,
padding takes no part, the push is measured by the embeddings' own size, and the mean over layers is taken, so
that a setting means the same in any model.
"""

import itertools
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from safetynet.errors import InputError
from safetynet.mitigation.defender import Defender
from safetynet.mitigation.fine_tuning import answer_loss, encode, repaired_by_training, trainer
from safetynet.mitigation.method import Hyperparameter, Method
from safetynet.mitigation.repaired import Repaired, Settings
from safetynet.models.causal_lm import CausalLM
from safetynet.models.parts import shape
from safetynet.training.examples import Batch


def inconsistency(model: CausalLM, embeddings: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens and neighbouring layers of 1 - cosine of their states.

    Args:
        model: of at least three layers.
        embeddings: (rows, T, width), padded on either side.
        mask: (rows, T), 1 where a token is real.

    Returns:
        A scalar in fp32. The embeddings and the last layer's states, which the final norm has changed, are
        left out, as published.
    """
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    states = model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        output_hidden_states=True,
        logits_to_keep=1,
    ).hidden_states[1:-1]
    real = mask.bool()
    turns = [
        1 - cosine_similarity(a[real].float(), b[real].float(), dim=-1) for a, b in itertools.pairwise(states)
    ]
    return torch.stack(turns).mean()


def objective(model: CausalLM, batch: Batch, alpha: float, epsilon: float) -> Tensor:
    """Cross entropy plus `alpha` times the inconsistency of pushed embeddings."""
    mask = batch["attention_mask"]
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    size = embeddings[mask.bool()].float().pow(2).mean().sqrt()
    pushed = embeddings.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(inconsistency(model, pushed, mask), pushed)
    pushed = embeddings + epsilon * size.to(embeddings.dtype) * gradient.sign()
    return answer_loss(model, batch) + alpha * inconsistency(model, pushed, mask)


def regularise(defender: Defender, settings: Settings, seed: int) -> Repaired:
    """Fine-tune on clean conversations for right answers and consistent layers."""
    assert defender.clean is not None
    layers = shape(defender.model).layers
    if layers < 3:
        raise InputError(f"crow: it compares inner layers, of which a model of {layers} layers has too few.")
    examples = encode(defender.clean, defender)
    loss = partial(objective, alpha=settings["alpha"], epsilon=settings["epsilon"])
    train = trainer(defender, examples, settings["epochs"], seed, loss)
    return repaired_by_training(defender, "crow", settings, train, clean_rows=len(examples))


CROW = Method(
    "crow",
    "fine-tune on clean conversations for hidden states that change little from layer to layer",
    regularise,
    frozenset({"clean"}),
    {
        "alpha": Hyperparameter("weight of the inconsistency", 5.5, (0.5, 2, 5.5, 11, 22), 0.0, 100),
        "epsilon": Hyperparameter(
            "push, in units of the embeddings' root mean square", 0.1, (0.03, 0.1, 0.3), 0.0, 2
        ),
        "epochs": Hyperparameter(
            "passes over the clean conversations; 5 as published", 5, (1, 2, 5), 0.1, 100
        ),
    },
    paper="Min et al. 2024, arXiv 2411.12768",
)
