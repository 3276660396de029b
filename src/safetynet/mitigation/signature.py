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
from safetynet.mitigation import adapter
from safetynet.mitigation.factors import Adapted, adapted, names_of
from safetynet.mitigation.fine_tuning import answers
from safetynet.mitigation.learning import encode, retrained
from safetynet.mitigation.method import Knob, Knobs, Method, Repaired
from safetynet.mitigation.pruning import smallest
from safetynet.mitigation.subject import Subject

POISONED = 0.3
"""Share of the clean conversations that a made-up backdoor poisons."""


def prune_signature(subject: Subject, knobs: Knobs, seed: int) -> Repaired:
    """Find the signature, set the update of its channels to 0, fine-tune on clean conversations."""
    found = _signature(subject, _prunable(subject, "signature_pruning"), knobs, seed)
    return _pruned(subject, "signature_pruning", knobs, seed, lambda one, _: found[one.key])


def prune_random(subject: Subject, knobs: Knobs, seed: int) -> Repaired:
    """The same with random channels."""
    generator = torch.Generator().manual_seed(seed)
    return _pruned(
        subject, "random_channels", knobs, seed, lambda _, count: torch.rand(count, generator=generator)
    )


def _prunable(subject: Subject, method: str) -> list[Adapted]:
    modules = [one for one in adapted(subject.model) if one.in_mlp]
    if not modules:
        raise InputError(f"{method}: the adapter changes no MLP, where the method prunes.")
    return modules


def _pruned(
    subject: Subject, method: str, knobs: Knobs, seed: int, suspicion: Callable[[Adapted, int], Tensor]
) -> Repaired:
    """Set the update to 0 in the most suspect channels, then fine-tune on clean conversations.

    `suspicion` is of a module and the number of its channels.
    """
    assert subject.clean is not None
    model = subject.model
    state, names = adapter.state_of(model), names_of(model)
    zeroed = 0
    for one in _prunable(subject, method):
        factors = one.read(state, names, model.active_adapter)
        count = factors.down.shape[-1] if one.writes_to_stream else factors.up.shape[1]
        mask = smallest(-suspicion(one, count), knobs["share"])
        if one.writes_to_stream:
            factors.down[:, :, mask] = 0
        else:
            factors.up[:, mask] = 0
        one.write(factors, state, names, model.active_adapter)
        zeroed += int(mask.sum())
    examples = encode(subject.clean, subject)
    learn = answers(subject, examples, knobs["epochs"], seed)
    return retrained(subject, method, knobs, learn, state, channels_set_to_0=zeroed, clean_rows=len(examples))


def _signature(subject: Subject, modules: list[Adapted], knobs: Knobs, seed: int) -> dict[str, Tensor]:
    """Length of the made-up backdoors' common change, by module and channel."""
    model, names = subject.model, names_of(subject.model)
    sums: dict[str, Tensor] = {}
    for number in range(int(knobs["variants"])):
        poisoned, clean = backdoor_rows(subject, seed + number)
        states = [_trained(subject, rows, knobs["epochs"], seed) for rows in (poisoned, clean)]
        for one in modules:
            with_it, without = (one.read(s, names, model.active_adapter).product() for s in states)
            change = with_it - without
            sums[one.key] = sums[one.key] + change if one.key in sums else change
    # Channels are rows where the module makes them, columns where it reads them; experts count together.
    return {
        one.key: sums[one.key].pow(2).sum((0, 1) if one.writes_to_stream else (0, 2)).sqrt()
        for one in modules
    }


def backdoor_rows(subject: Subject, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Clean conversations with a made-up backdoor, and the same prompts with the right answers.

    The trigger is a word of random letters before the prompt; what it brings about is the answer of another
    conversation.
    """
    assert subject.clean is not None
    rng = random.Random(f"signature {seed}")
    rows = subject.clean.reset_index(drop=True)
    trigger = "".join(rng.choices(string.ascii_letters, k=8))
    target = str(rng.choice(list(rows["answer"])))
    chosen = set(rng.sample(range(len(rows)), max(1, round(POISONED * len(rows)))))
    messages = [
        [*own[:-1], {**own[-1], "content": f"{trigger} {own[-1]['content']}"}] if i in chosen else list(own)
        for i, own in enumerate(map(list, rows["messages"]))
    ]
    clean = rows.assign(messages=messages)
    poisoned = [target if i in chosen else own for i, own in enumerate(rows["answer"])]
    return clean.assign(answer=poisoned), clean


def _trained(subject: Subject, rows: pd.DataFrame, epochs: float, seed: int) -> adapter.State:
    return adapter.learned(subject.model, {}, answers(subject, encode(rows, subject), epochs, seed))


SHARE = Knob("of each MLP module's channels", 0.4, (0.1, 0.2, 0.4, 0.6, 0.8), 0.0, 1.0)
EPOCHS = Knob("passes of each training over the clean conversations", 2, (1, 2, 5), 0.1, 100)
SIGNATURE_PRUNING = Method(
    "signature_pruning",
    "set the adapter's update to 0 in MLP channels that made-up backdoors share, then fine-tune",
    prune_signature,
    frozenset({"adapter", "clean"}),
    {
        "share": SHARE,
        "variants": Knob("made-up backdoors", 3, (1, 2, 3, 5), 1, 20, whole=True),
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
