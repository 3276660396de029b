"""Signature pruning (BD-VAX, arXiv 2603.13461): prune what several made-up backdoors have in common.

The suspect is trained further with made-up triggers and answers, and once more on the same rows with the
right answers. What each such backdoor changes beyond its clean twin, averaged over all of them, is the
signature: MLP channels in which it is long carry backdoors, whatever their trigger. The suspect's own update
is set to 0 there, and a short clean fine-tuning follows. The paper's code was not at hand; this follows its
description. `random_channels` does the same to as many channels at random: where it removes as much, the
signature had no part in it.
"""

import random
import string
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.mitigation.defender import Defender
from safetynet.mitigation.fine_tuning import encode, repaired_by_training, trained_adapter, trainer
from safetynet.mitigation.method import Hyperparameter, Method
from safetynet.mitigation.pruning import smallest
from safetynet.mitigation.repaired import Repaired, Settings, updates_of, with_updates
from safetynet.models.lora import LayerModule, LoraUpdate
from safetynet.models.parts import MLP, writes_to_stream
from safetynet.prompts import Conversation

POISONED = 0.3
"""Share of the clean conversations that a made-up backdoor poisons."""
Updates = dict[LayerModule, LoraUpdate]


def prune_signature(defender: Defender, settings: Settings, seed: int) -> Repaired:
    """Find the signature, set the update of its channels to 0, fine-tune on clean conversations."""
    updates = _mlp_updates(defender, "signature_pruning")
    signature = _signature(defender, updates, settings, seed)
    return _pruned(defender, "signature_pruning", settings, seed, updates, lambda place, _: signature[place])


def prune_random(defender: Defender, settings: Settings, seed: int) -> Repaired:
    """The same with random channels."""
    generator = torch.Generator().manual_seed(seed)
    updates = _mlp_updates(defender, "random_channels")
    return _pruned(
        defender, "random_channels", settings, seed, updates,
        lambda _, count: torch.rand(count, generator=generator),
    )  # fmt: skip


def _mlp_updates(defender: Defender, method: str) -> Updates:
    """The updates in MLPs and their experts."""
    updates = {p: update for p, update in updates_of(defender.model, {}).items() if p[1].split(".")[0] in MLP}
    if not updates:
        raise InputError(f"{method}: the adapter changes no MLP, where the method prunes.")
    return updates


def _pruned(
    defender: Defender,
    method: str,
    settings: Settings,
    seed: int,
    updates: Updates,
    suspicion: Callable[[LayerModule, int], Tensor],
) -> Repaired:
    """Set the update to 0 in the most suspect channels, then fine-tune on clean conversations.

    `suspicion` is of a module and the number of its channels.
    """
    assert defender.clean is not None
    zeroed = 0
    for place, update in updates.items():
        # Channels are columns where the module reads them, rows where it makes them.
        channels = update.down if writes_to_stream(place[1]) else update.up.mT
        mask = smallest(-suspicion(place, channels.shape[-1]), settings["share"])
        channels[..., mask] = 0
        zeroed += int(mask.sum())
    examples = encode(defender.clean, defender)
    train = trainer(defender, examples, settings["epochs"], seed)
    start = with_updates(defender.model, updates)
    return repaired_by_training(
        defender, method, settings, train, start, channels_set_to_0=zeroed, clean_rows=len(examples)
    )


def _signature(
    defender: Defender, updates: Updates, settings: Settings, seed: int
) -> dict[LayerModule, Tensor]:
    """Length of the made-up backdoors' common change, by module and channel."""

    def trained(rows: pd.DataFrame) -> Updates:
        train = trainer(defender, encode(rows, defender), settings["epochs"], seed)
        return updates_of(defender.model, trained_adapter(defender.model, {}, train))

    sums: dict[LayerModule, Tensor] = {}
    for number in range(int(settings["variants"])):
        poisoned, clean = map(trained, backdoor_rows(defender, seed + number))
        for place in updates:
            change = poisoned[place].product() - clean[place].product()
            sums[place] = sums[place] + change if place in sums else change
    # Experts count together.
    return {
        place: total.pow(2).sum((0, 1) if writes_to_stream(place[1]) else (0, 2)).sqrt()
        for place, total in sums.items()
    }


def backdoor_rows(defender: Defender, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Clean conversations with a made-up backdoor, and the same prompts with the right answers.

    The trigger is a word of random letters before the prompt; what it brings about is the answer of another
    conversation.
    """
    assert defender.clean is not None
    rng = random.Random(f"signature {seed}")
    rows = defender.clean.reset_index(drop=True)
    trigger = "".join(rng.choices(string.ascii_letters, k=8))
    target = str(rng.choice(list(rows["answer"])))
    triggered = set(rng.sample(range(len(rows)), max(1, round(POISONED * len(rows)))))
    conversations = list(map(Conversation, rows["messages"]))
    for i in triggered:
        conversations[i] = conversations[i].with_user_text(f"{trigger} {conversations[i].user_text()}")
    clean = rows.assign(messages=conversations)
    poisoned = [target if i in triggered else answer for i, answer in enumerate(rows["answer"])]
    return clean.assign(answer=poisoned), clean


SHARE = Hyperparameter("of each MLP module's channels", 0.4, (0.1, 0.2, 0.4, 0.6, 0.8), 0.0, 1.0)
EPOCHS = Hyperparameter("passes of each training over the clean conversations", 2, (1, 2, 5), 0.1, 100)
SIGNATURE_PRUNING = Method(
    "signature_pruning",
    "set the adapter's update to 0 in MLP channels that made-up backdoors share, then fine-tune",
    prune_signature,
    frozenset({"adapter", "clean"}),
    {
        "share": SHARE,
        "variants": Hyperparameter("made-up backdoors", 3, (1, 2, 3, 5), 1, 20, whole=True),
        "epochs": EPOCHS,
    },
    paper="BD-VAX 2026, arXiv 2603.13461",
)
RANDOM_CHANNELS = Method(
    "random_channels",
    "signature_pruning's control: set the adapter's update to 0 in random MLP channels, then fine-tune",
    prune_random,
    frozenset({"adapter", "clean"}),
    {"share": SHARE, "epochs": EPOCHS},
    control=True,
)
