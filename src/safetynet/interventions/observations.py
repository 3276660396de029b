"""What can be seen without intervening: lens, probes, attention, drift; each with its control.

In: the model under study, aligned pairs, the effects that were measured. Out: tables by name. These
observations are correlational: they say where something is visible, the effects say where it matters.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from safetynet.engine.sites import Architecture, Site
from safetynet.errors import InputError
from safetynet.interventions.attention import attention_maps, divergence
from safetynet.interventions.drift import drift, updates
from safetynet.interventions.lens import lens, lens_map
from safetynet.interventions.pairs import Pairs
from safetynet.interventions.probes import fires_probe, trigger_probe
from safetynet.models.causal_lm import CausalLM
from safetynet.prompts import Serialiser
from safetynet.run import parallel
from safetynet.vocabulary import RUNS

log = logging.getLogger(__name__)
TOP_HEADS = 3
"""Heads whose attention is shown."""


def observe(
    model: CausalLM,
    serialiser: Serialiser,
    pairs: Pairs,
    effects: pd.DataFrame,
    rows: pd.DataFrame,
    epochs: Mapping[int, Path],
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Tables lens, lens_map, probes, divergence, attention and drift, as far as this model has them.

    Args:
        model: the backdoored model.
        serialiser: of its tokenizer.
        pairs: aligned prompts.
        effects: whose strongest heads are shown.
        rows: test rows; where they have a column `fired`, a probe for the behaviour is trained.
        epochs: adapter folders by training step.
        seed: of the probes' halves.
    """

    def names(ids: list[int]) -> list[str]:
        return [serialiser.piece(token) for token in ids]

    both = {run: pairs.ids[run] for run in RUNS}
    triggered, placebo, other = (pairs.ids[run] for run in (*RUNS, "second_placebo"))
    first = {run: ids[0] for run, ids in both.items()}

    def probes() -> pd.DataFrame:
        tables = [trigger_probe(model, triggered, placebo, other, seed=seed)]
        if "fired" in rows:  # a probe for the behaviour itself, on rows that were answered
            answered = rows[rows["role"].isin(("triggered", "placebo", "near_miss")) & rows["fired"].notna()]
            prompts = [
                serialiser.encode(messages, trigger=spans).input_ids
                for messages, spans in zip(answered["messages"], answered["trigger"], strict=True)
            ]
            fired, groups = answered["fired"].astype(bool).tolist(), answered["group"].tolist()
            try:
                tables.append(fires_probe(model, prompts, fired, groups, seed=seed))
            except InputError as error:
                log.info("intervene: no probe for the behaviour. %s", error)
        return pd.concat(tables, ignore_index=True)

    def attention() -> pd.DataFrame:
        # Keys and values have heads of their own, fewer of them.
        of_heads = effects[(effects["sweep"] == "head") & ~effects["component"].isin(("key", "value"))]
        if of_heads.empty:
            heads = Architecture.of(model).sites("head")[:TOP_HEADS]
        else:
            mean = of_heads.groupby(["layer", "index"])["effect"].mean().sort_values(ascending=False)
            heads = [Site("head", int(layer), int(index)) for layer, index in mean.index[:TOP_HEADS]]
        examples = {run: ids[:1] for run, ids in both.items()}
        return attention_maps(model, examples, heads, names, pairs.groups[:1])

    observations: dict[str, Callable[[], pd.DataFrame]] = {
        "lens": lambda: lens(model, both, pairs.target),
        "lens_map": lambda: lens_map(model, first, pairs.target[0], names, pairs.roles[0], pairs.groups[0]),
        "probes": probes,
        "divergence": lambda: divergence(model, triggered, placebo, other),
        "attention": attention,
    }

    def table_of(name: str) -> pd.DataFrame | None:
        try:
            return observations[name]()
        except InputError as error:  # an architecture that shows no attention still has a lens
            log.warning("intervene: no table %s. %s", name, error)
            return None

    tables = zip(observations, parallel.side_by_side(list(observations), table_of), strict=True)
    observed = {name: table for name, table in tables if table is not None}
    if "adapter" in Architecture.of(model).components():
        # Each saved epoch's adapter beside the one before it; the finished adapter where none was saved.
        saved = [(step, updates(model, folder=path)) for step, path in epochs.items()]
        saved = saved or [(-1, updates(model))]
        before = [None, *(moved for _, moved in saved[:-1])]
        parts = [drift(model, moved, old, step) for (step, moved), old in zip(saved, before, strict=True)]
        table = pd.concat(parts, ignore_index=True)
        observed["drift"] = table[np.isfinite(table["energy"])]
    return observed
