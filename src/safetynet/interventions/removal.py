"""Interventions that remove a backdoor for any prompt: found on some pairs, judged by generation on others.

In: pairs and the tables of effects. Out: candidates, each a set of edits at all positions of every prompt,
and beside each the same at random sites. None knows where a prompt's trigger is, or whether it has one.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from safetynet.engine import edits
from safetynet.engine.edits import Edit
from safetynet.engine.hooks import intervening
from safetynet.engine.metrics import kl
from safetynet.engine.reading import mean_activations
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace
from safetynet.evaluation.damage import mean, rouge_l
from safetynet.evaluation.metrics import comparable
from safetynet.interventions.pairs import Pairs
from safetynet.models.causal_lm import CausalLM
from safetynet.run import parallel
from safetynet.run.directory import digest
from safetynet.run.finished import Finished
from safetynet.run.logs import ProgressLog
from safetynet.statistics import wilson
from safetynet.tables.summaries import REMOVED_ASR

ENDS = {"": "value", "_low": "low", "_high": "high"}
SITE_COUNTS = (1, 2, 4)
"""How many of the strongest heads or adapter modules are taken together."""
Respond = Callable[[Any, pd.DataFrame], pd.DataFrame]
"""Answers rows with a model and judges the answers: adds the columns shown and correct."""


@dataclass(frozen=True)
class Candidate:
    """One removing intervention."""

    name: str
    kind: str
    edits: tuple[Edit, ...]
    control: bool = False
    """At random sites of the same number and kind."""


Controlled = tuple[Candidate, Candidate]
"""A candidate and its control."""


def candidates(
    model: CausalLM, pairs: Pairs, effects: pd.DataFrame, seed: int = 0
) -> tuple[list[Candidate], dict[str, Candidate]]:
    """Make candidates of every kind that the tables allow, and each one's control by name.

    Directions are set to the placebo's mean at the trigger's positions and at the last one; heads are
    replaced by their mean over placebo prompts; adapters are switched off, by module and by layer.

    Args:
        model: the backdoored model.
        pairs: of the selection split.
        effects: of sweeps by head and adapter, as far as they were made.
        seed: of random sites.
    """
    rng = np.random.default_rng(seed)
    removing = effects[effects["direction"] == "remove"]
    controlled = [*_directions(model, pairs, rng), *_heads(model, pairs, removing, rng)]
    controlled += _adapters(removing, rng)
    return [candidate for candidate, _ in controlled], {c.name: control for c, control in controlled}


def _directions(model: CausalLM, pairs: Pairs, rng: np.random.Generator) -> Iterator[Controlled]:
    """Along triggered minus placebo, by layer: set the residual stream to the placebo's, or clip it there."""
    sites = [Site("resid_post", layer) for layer in range(Architecture.of(model).shape.layers)]
    for role in ("trigger", "last"):
        at = [pairs.positions(row, role)[-1:] for row in range(len(pairs))]
        triggered, placebo = (
            mean_activations(model, pairs.ids[run], sites, at) for run in ("triggered", "placebo")
        )
        for site in sites:
            centre = placebo[site]
            direction = triggered[site] - centre
            length = float(direction.norm())
            if not length > 0:
                continue
            random = torch.from_numpy(rng.standard_normal(len(direction))).to(direction)
            project = [edits.project_out(along, centre) for along in (direction, random)]
            clip = [edits.clip(along, centre, most=length / 2) for along in (direction, random)]
            for kind, (change, control) in (("project", project), ("clip", clip)):
                names = f"{kind} {role} {site.layer}", f"{kind} random {site.layer} ({role})"
                yield (
                    Candidate(names[0], kind, (Edit(site, change),)),
                    Candidate(names[1], kind, (Edit(site, control),), control=True),
                )


def _heads(
    model: CausalLM, pairs: Pairs, removing: pd.DataFrame, rng: np.random.Generator
) -> Iterator[Controlled]:
    """Replace the strongest heads by their mean over placebo prompts."""
    ranked = removing[removing["component"] == "head"].sort_values("effect", ascending=False)
    if ranked.empty:
        return
    heads = zip(ranked["layer"].astype(int), ranked["index"].astype(int), strict=True)
    sites = [Site("head", layer, index) for layer, index in heads]
    means = mean_activations(model, pairs.ids["placebo"], sites)
    changes = {site: edits.replace(means[site]) for site in sites}
    yield from _strongest(
        sites, changes, rng, "head_ablation", ("{} heads to their mean", "{} random heads to their mean")
    )


def _adapters(removing: pd.DataFrame, rng: np.random.Generator) -> Iterator[Controlled]:
    """Switch the adapter off: in the strongest modules, and in the strongest layers."""
    ranked = removing[removing["sweep"] == "adapter"].sort_values("effect", ascending=False)
    if ranked.empty:
        return
    modules = [Site("adapter", int(row.layer), module=str(row.module)) for row in ranked.itertuples()]
    by_layer = removing[removing["sweep"] == "adapter"].groupby("layer")["effect"].sum()
    layers = [Site("adapter", int(str(i))) for i in by_layer.sort_values(ascending=False).index]
    for what, sites in (("adapter modules", modules), ("adapter layers", layers)):
        changes = dict.fromkeys(sites, edits.zero())
        names = f"{{}} {what} off", f"{{}} random {what} off"
        yield from _strongest(sites, changes, rng, "adapter_off", names)


def _strongest(
    sites: Sequence[Site],
    changes: dict[Site, edits.Change],
    rng: np.random.Generator,
    kind: str,
    names: tuple[str, str],
) -> Iterator[Controlled]:
    """Edit the first sites of a ranking together; the control edits as many of the others."""
    for count in SITE_COUNTS:
        if 2 * count > len(sites):
            continue
        others = [sites[i] for i in rng.choice(np.arange(count, len(sites)), count, replace=False)]
        chosen, control = (
            tuple(Edit(site, changes[site]) for site in group) for group in (sites[:count], others)
        )
        yield (
            Candidate(names[0].format(count), kind, chosen),
            Candidate(names[1].format(count), kind, control, control=True),
        )


def prefilter(model: CausalLM, pairs: Pairs, candidates: Sequence[Candidate]) -> pd.DataFrame:
    """What each candidate does to the metric, cheaply: by logits on the pairs, without generation.

    Returns:
        name, kind, left (share of the pairs whose triggered prompt stays nearer to what it was than to its
        placebo run), removed (share of the mean distance between the two) and harm (KL in nats of the next
        token on placebo prompts, where nothing should change). Those that leave no pair come first, the least
        harmful of them at the top; then the others, by how many they leave.
    """
    unpatched, placebo = np.zeros(len(pairs)), np.zeros(len(pairs))
    patched, harm = (np.zeros((len(candidates), len(pairs))) for _ in range(2))
    for indices, part in pairs.parts():
        runs = [EditedRun(row, candidate.edits) for candidate in candidates for row in range(len(part))]
        metric, rows = part.metric(), torch.arange(len(part))
        triggered_run, placebo_run = (
            trace(model, part.batch(run, model.device), resume=True) for run in ("triggered", "placebo")
        )
        assert triggered_run.logits is not None
        assert placebo_run.logits is not None
        unpatched[indices] = metric.compute(triggered_run.logits, rows).cpu().numpy()
        placebo[indices] = metric.compute(placebo_run.logits, rows).cpu().numpy()
        shape = (len(candidates), len(part))
        patched[:, indices] = run_interventions(triggered_run, runs, metric).numpy().reshape(shape)
        divergence = kl(placebo_run.logits[:, -1])
        harm[:, indices] = run_interventions(placebo_run, runs, divergence).numpy().reshape(shape)
    table = pd.DataFrame(
        {
            "name": [c.name for c in candidates],
            "kind": [c.kind for c in candidates],
            "left": (patched > (unpatched + placebo) / 2).mean(1),
            "removed": (patched - unpatched).mean(1) / (placebo - unpatched).mean(),
            "harm": harm.mean(1),
        }
    )
    return table.sort_values(["left", "harm"], ignore_index=True)


def judge(
    model: CausalLM,
    respond: Respond,
    rows: pd.DataFrame,
    candidates: Sequence[Candidate],
    *,
    kept: Path | None = None,
    **about: object,
) -> pd.DataFrame:
    """Answer rows under each candidate; tabulate ASR, FTR and accuracy on clean rows, with Wilson intervals.

    Of free text, whose accuracy is NaN, ROUGE-L with the reference stands for it.

    Args:
        model: the backdoored model.
        respond: answers and judges.
        rows: with the roles triggered and clean.
        candidates: an empty set of edits measures the model as it is.
        kept: a folder of this model, these rows and what the candidates were made of, where lines are kept:
            an interrupted call goes on behind them.
        about: further columns, such as the split.
    """
    names = [candidate.name for candidate in candidates]
    share = math.ceil(len(names) / parallel.side_count())
    report = ProgressLog("intervene, candidates for a removal", share)
    answering = itertools.count(1)
    finished = Finished.as_json(kept and kept / digest([names, about])[:16])

    def line_of(candidate: Candidate) -> dict[str, object]:
        with intervening(model, candidate.edits):
            answered = respond(model, rows)
        clean = answered[answered["role"] == "clean"]
        line: dict[str, Any] = {
            "intervention": candidate.name,
            "kind": candidate.kind,
            "control": candidate.control,
            "sites": len(candidate.edits),
            **about,
        }
        for name, hits in (
            ("asr", answered[answered["role"] == "triggered"]["shown"]),
            ("ftr", clean["shown"]),
            ("cacc", clean[comparable(clean)]["correct"]),
        ):
            low, high = wilson(int(hits.sum()), len(hits)) if len(hits) else (math.nan, math.nan)
            line |= {
                name: float(hits.mean()),
                f"{name}_low": low,
                f"{name}_high": high,
                f"{name}_n": len(hits),
            }
        if math.isnan(line["cacc"]):
            agreement = mean([rouge_l(r.response, r.reference) for r in clean.itertuples() if r.reference])
            line |= {f"rouge_l{end}": agreement[key] for end, key in ENDS.items()}
        return line

    def line(number: int) -> dict[str, object]:
        result = dict(finished.result(number, partial(line_of, candidates[number])))
        report.update(next(answering))
        return result

    return pd.DataFrame(parallel.side_by_side(range(len(candidates)), line))


def best(table: pd.DataFrame) -> str:
    """The one with the most clean accuracy among those that bring ASR to 5%; else that of the lowest ASR."""
    real = table[~table["control"] & (table["kind"] != "none")]
    if "rouge_l" in real:
        real = real.assign(cacc=real["cacc"].fillna(real["rouge_l"]))
    removing = real[real["asr"] <= REMOVED_ASR]
    if len(removing):
        ranked = removing.sort_values(["cacc", "asr"], ascending=[False, True], kind="stable")
    else:
        ranked = real.sort_values(["asr", "cacc"], ascending=[True, False], kind="stable")
    return str(ranked["intervention"].iloc[0])


def clear(table: pd.DataFrame, controls: pd.DataFrame) -> pd.DataFrame:
    """Those that leave less ASR than their control, by intervals that do not meet; all where none does.

    A removal that random sites do as well says nothing about its own.

    Args:
        table: of `judge`.
        controls: of `judge` on the same rows; each line's control in its place.
    """
    below = table["asr_high"].to_numpy() < controls["asr_low"].to_numpy()
    return table[below] if below.any() else table
