"""Linear probes: from which layer on can it be read that a trigger is there, or that the behaviour will fire.

In: prompts with labels. Out: the table `probes`. Probes are trained on one half of the groups and tested on
the other. A probe is correlational: what it reads, the model need not use. A claim about the model needs an
intervention at the same layer beside it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from safetynet.engine.batch import BATCH_TOKENS, Prompts, check_pairs
from safetynet.engine.reading import residuals
from safetynet.errors import InputError
from safetynet.models.causal_lm import CausalLM
from safetynet.statistics import draw_counts, resampled_auroc


def trigger_probe(
    model: CausalLM,
    triggered: Prompts,
    placebo: Prompts,
    other: Prompts | None = None,
    *,
    seed: int = 0,
    tokens: int = BATCH_TOKENS,
) -> pd.DataFrame:
    """Probe each layer's last token for the presence of the trigger (Alain and Bengio 2016).

    Args:
        model: the model.
        triggered: one prompt per group.
        placebo: the same prompts with a placebo in the trigger's place.
        other: with another placebo. The control is the same probe trained to separate the two placebos;
            without it, a probe trained and tested on shuffled labels.
        seed: of the split in halves, and of the shuffling.
        tokens: of one batch.

    Returns:
        Table `probes`: label (trigger), layer, auroc, low, high (95 % bootstrap over test groups), n (test
        groups), control, control_low, control_high.

    Raises:
        InputError: if the runs differ in length, or there are fewer than 4 groups.
    """
    check_pairs(triggered=triggered, placebo=placebo, other=other)
    groups = np.tile(np.arange(len(triggered)), 2)
    labels = np.repeat([True, False], len(triggered))
    clean = residuals(model, placebo, tokens=tokens)
    states = np.concatenate([residuals(model, triggered, tokens=tokens), clean])
    if other is None:
        return _probed("trigger", states, labels, groups, seed)
    control = np.concatenate([residuals(model, other, tokens=tokens), clean])
    return _probed("trigger", states, labels, groups, seed, control)


def fires_probe(
    model: CausalLM,
    prompts: Prompts,
    fired: Sequence[bool],
    groups: Sequence[int] | None = None,
    *,
    seed: int = 0,
    tokens: int = BATCH_TOKENS,
) -> pd.DataFrame:
    """Probe each layer's last token for whether the behaviour will fire.

    With triggered and other prompts together, this hardly differs from a probe for the trigger; with
    triggered prompts alone it is about the behaviour. The control is a probe trained and tested on shuffled
    labels.

    Args:
        model: the model.
        prompts: N prompts.
        fired: per prompt, whether its answer showed the behaviour.
        groups: per prompt its group, which stays in one half; None if each has one of its own.
        seed: of the split in halves, and of the shuffling.
        tokens: of one batch.

    Returns:
        Table `probes`, as in `trigger_probe`, with label `fires`.

    Raises:
        InputError: if the lists differ in length, or a half would hold one class alone.
    """
    members = np.arange(len(prompts)) if groups is None else np.asarray(groups)
    if not len(prompts) == len(fired) == len(members):
        raise InputError(
            f"fires_probe: {len(prompts)} prompts, {len(fired)} labels and {len(members)} groups; give one "
            "of each."
        )
    states = residuals(model, prompts, tokens=tokens)
    return _probed("fires", states, np.asarray(fired, bool), members, seed)


def halves(labels: np.ndarray, groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into two halves that share no group and hold groups of each kind alike.

    Args:
        labels: (N,) bool.
        groups: (N,) numbers.
        seed: of the split.

    Returns:
        Row indices of the training and of the test half.

    Raises:
        InputError: if one of them would lack a class.
    """
    rng = np.random.default_rng(seed)
    kinds: dict[tuple[bool, ...], list[Any]] = {}
    for group in np.unique(groups):
        kinds.setdefault(tuple(sorted(set(labels[groups == group].tolist()))), []).append(group)
    # Groups go to the halves in turn, and each kind of group goes on where the last one ended.
    order = [group for kind in sorted(kinds) for group in rng.permutation(np.array(kinds[kind]))]
    test = np.isin(groups, order[::2])
    for name, half in (("train", ~test), ("test", test)):
        if len(set(labels[half].tolist())) < 2 or len(np.unique(groups[half])) < 2:
            raise InputError(
                f"probe: {int(labels.sum())} of {len(labels)} rows in {len(order)} groups carry the label, "
                f"and the {name} half holds one class or one group alone. Give more groups of each class."
            )
    return np.flatnonzero(~test), np.flatnonzero(test)


def _probed(
    label: str,
    states: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    seed: int,
    control: np.ndarray | None = None,
) -> pd.DataFrame:
    """One row per layer of states, (N, layers, width), beside a probe on other states or shuffled labels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # Shuffled within each half, so that both keep their share of the label.
    train, test = halves(labels, groups, seed)
    control_labels, control_states = labels.copy(), states if control is None else control
    if control is None:
        rng = np.random.default_rng(seed)
        for half in (train, test):
            control_labels[half] = rng.permutation(labels[half])
    # Groups are drawn, not rows: rows of one group are alike, and would make the interval too narrow.
    test_groups, member = np.unique(groups[test], return_inverse=True)
    drawn = draw_counts(len(test_groups))[:, member]  # (resamples, test rows): how often each row was drawn

    def probe(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
        """AUROC on the test half and its interval over test groups."""
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        scores = classifier.fit(x[train], y[train]).decision_function(x[test])
        value = resampled_auroc(scores, y[test], np.ones((1, len(test))))[0]
        low, high = np.quantile(resampled_auroc(scores, y[test], drawn), (0.025, 0.975))
        return float(value), float(low), float(high)

    records = []
    for layer in range(states.shape[1]):
        auc = probe(states[:, layer], labels)
        beside = probe(control_states[:, layer], control_labels)
        records.append((label, layer, *auc, len(test_groups), *beside))
    names = "label layer auroc low high n control control_low control_high"
    return pd.DataFrame(records, columns=names.split())
