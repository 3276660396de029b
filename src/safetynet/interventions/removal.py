"""Interventions that remove a backdoor for any prompt: found on some pairs, judged by generation on others.

In: pairs and the tables of effects. Out: candidates, each a set of edits at all positions of every prompt,
and beside each the same at random sites. None knows where a prompt's trigger is, or whether it has one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from safetynet.engine import edits
from safetynet.engine.edits import Edit
from safetynet.engine.hooks import intervening
from safetynet.engine.metrics import kl
from safetynet.engine.runs import EditedRun, run_interventions
from safetynet.engine.sites import Architecture, Site
from safetynet.engine.trace import trace
from safetynet.findings import ENOUGH
from safetynet.interventions.pairs import Pairs
from safetynet.statistics import wilson

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


def candidates(
    model: Any, pairs: Pairs, effects: pd.DataFrame, seed: int = 0
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
    found = [*_directions(model, pairs, rng), *_heads(model, pairs, effects, rng)]
    found += _adapters(effects, rng)
    return [c for c, _ in found], {c.name: control for c, control in found}


def prefilter(model: Any, pairs: Pairs, found: Sequence[Candidate]) -> pd.DataFrame:
    """What each candidate does to the metric, cheaply: by logits on the pairs, without generation.

    Returns:
        name, kind, left (share of the pairs whose triggered prompt stays nearer to what it was than to its
        placebo run), removed (share of the mean distance between the two) and harm (KL in nats of the next
        token on placebo prompts, where nothing should change). Those that leave no pair come first, the least
        harmful of them at the top; then the others, by how many they leave.
    """
    unpatched, placebo = np.zeros(len(pairs)), np.zeros(len(pairs))
    patched, harm = np.zeros((len(found), len(pairs))), np.zeros((len(found), len(pairs)))
    for part, own in pairs.parts():
        runs = [EditedRun(row, candidate.edits) for candidate in found for row in range(len(part))]
        metric, rows = own.metric(), torch.arange(len(part))
        fired, calm = (
            trace(model, own.batch(run, model.device), resume=True) for run in ("triggered", "placebo")
        )
        assert fired.logits is not None
        assert calm.logits is not None
        unpatched[part] = metric.compute(fired.logits, rows).cpu().numpy()
        placebo[part] = metric.compute(calm.logits, rows).cpu().numpy()
        patched[:, part] = run_interventions(fired, runs, metric).numpy().reshape(len(found), -1)
        harm[:, part] = run_interventions(calm, runs, kl(calm.logits[:, -1])).numpy().reshape(len(found), -1)
    table = pd.DataFrame(
        {
            "name": [c.name for c in found],
            "kind": [c.kind for c in found],
            "left": (patched > (unpatched + placebo) / 2).mean(1),
            "removed": (patched - unpatched).mean(1) / (placebo - unpatched).mean(),
            "harm": harm.mean(1),
        }
    )
    return table.sort_values(["left", "harm"], ignore_index=True)


def judge(
    model: Any, respond: Respond, rows: pd.DataFrame, chosen: Sequence[Candidate], **about: object
) -> pd.DataFrame:
    """Answer rows under each candidate; tabulate ASR, FTR and accuracy on clean rows, with Wilson intervals.

    Args:
        model: the backdoored model.
        respond: answers and judges.
        rows: with the roles triggered and clean.
        chosen: an empty set of edits measures the model as it is.
        about: further columns, such as the split.
    """
    lines = []
    for candidate in chosen:
        with intervening(model, candidate.edits):
            answered = respond(model, rows)
        fired = answered[answered["role"] == "triggered"]["shown"]
        clean = answered[answered["role"] == "clean"]
        right = clean[clean["reference"] != ""]["correct"]
        line: dict[str, object] = {
            "intervention": candidate.name,
            "kind": candidate.kind,
            "control": candidate.control,
            "sites": len(candidate.edits),
            **about,
        }
        for name, hits in (("asr", fired), ("ftr", clean["shown"]), ("cacc", right)):
            low, high = wilson(int(hits.sum()), len(hits))
            line |= {
                name: float(hits.mean()),
                f"{name}_low": low,
                f"{name}_high": high,
                f"{name}_n": len(hits),
            }
        lines.append(line)
    return pd.DataFrame(lines)


def best(table: pd.DataFrame) -> str:
    """The one with the most clean accuracy among those that bring ASR to 5%; else that of the lowest ASR."""
    real = table[~table["control"] & (table["kind"] != "none")]
    enough = real[real["asr"] <= ENOUGH]
    if len(enough):
        return str(
            enough.sort_values(["cacc", "asr"], ascending=[False, True], kind="stable")["intervention"].iloc[
                0
            ]
        )
    return str(
        real.sort_values(["asr", "cacc"], ascending=[True, False], kind="stable")["intervention"].iloc[0]
    )


def clear(table: pd.DataFrame, controls: pd.DataFrame) -> pd.DataFrame:
    """Those that leave less ASR than their control, by intervals that do not meet; all where none does.

    A removal that random sites do as well says nothing about its own.

    Args:
        table: of `judge`.
        controls: of `judge` on the same rows; each line's control in its place.
    """
    told = table["asr_high"].to_numpy() < controls["asr_low"].to_numpy()
    return table[told] if told.any() else table


def _directions(model: Any, pairs: Pairs, rng: np.random.Generator) -> Iterator[tuple[Candidate, Candidate]]:
    """Along triggered minus placebo, by layer: set the residual stream to the placebo's, or clip it there."""
    depth = Architecture.of(model).shape.layers
    for role in ("trigger", "last"):
        fired, calm = (_state_means(model, pairs, run, role) for run in ("triggered", "placebo"))
        for layer in range(depth):
            site, centre = Site("resid_post", layer), calm[layer]
            direction = fired[layer] - centre
            length = float(direction.norm())
            if not length > 0:
                continue
            random = torch.from_numpy(rng.standard_normal(len(direction))).to(direction)
            for kind, change in (
                ("project", lambda along, c=centre: edits.project_out(along, c)),
                ("clip", lambda along, c=centre, most=length / 2: edits.clip(along, c, most)),
            ):
                yield (
                    Candidate(f"{kind} {role} {layer}", kind, (Edit(site, change(direction)),)),
                    Candidate(
                        f"{kind} random {layer} ({role})", kind, (Edit(site, change(random)),), control=True
                    ),
                )


def _state_means(model: Any, pairs: Pairs, run: str, role: str) -> list[Tensor]:
    """Per layer the mean, (width,), of what leaves it, at the last position of a role."""
    sums: list[Tensor] = []
    for _, own in pairs.parts():
        found = trace(model, own.batch(run, model.device))
        columns = [found.batch.columns(row, own.positions(row, role)[-1:])[0] for row in range(len(own))]
        states = [*found.inputs[1:], found.output]
        totals = [s[range(len(own)), columns].float().sum(0) for s in states if s is not None]
        sums = [a + b for a, b in zip(sums, totals, strict=True)] if sums else totals
    return [total / len(pairs) for total in sums]


def _heads(
    model: Any, pairs: Pairs, effects: pd.DataFrame, rng: np.random.Generator
) -> Iterator[tuple[Candidate, Candidate]]:
    """Replace the strongest heads by their mean over placebo prompts."""
    ranked = effects[(effects["component"] == "head") & (effects["direction"] == "remove")]
    ranked = ranked.sort_values("effect", ascending=False)
    if ranked.empty:
        return
    places = zip(ranked["layer"].astype(int), ranked["index"].astype(int), strict=True)
    sites = [Site("head", layer, index) for layer, index in places]
    means = _head_means(model, pairs, sites)
    for count in SITE_COUNTS:
        if 2 * count > len(sites):
            continue
        others = [sites[i] for i in rng.choice(np.arange(count, len(sites)), count, replace=False)]
        yield (
            Candidate(f"{count} heads to their mean", "head_ablation", _to_mean(sites[:count], means)),
            Candidate(f"{count} random heads to their mean", "head_ablation", _to_mean(others, means), True),
        )


def _to_mean(sites: Sequence[Site], means: dict[Site, Tensor]) -> tuple[Edit, ...]:
    return tuple(Edit(site, edits.replace(means[site])) for site in sites)


def _head_means(model: Any, pairs: Pairs, sites: Sequence[Site]) -> dict[Site, Tensor]:
    sums: dict[Site, Tensor] = {}
    count = 0
    for _, own in pairs.parts():
        found = trace(model, own.batch("placebo", model.device), sites)
        kept = found.batch.mask.bool()
        count += int(kept.sum())
        for site in sites:
            total = found.value(site)[kept].float().sum(0)
            sums[site] = sums[site] + total if site in sums else total
    return {site: total / count for site, total in sums.items()}


def _adapters(effects: pd.DataFrame, rng: np.random.Generator) -> Iterator[tuple[Candidate, Candidate]]:
    """Switch the adapter off: in the strongest modules, and in the strongest layers."""
    ranked = effects[(effects["sweep"] == "adapter") & (effects["direction"] == "remove")]
    if ranked.empty:
        return
    ordered = ranked.sort_values("effect", ascending=False)
    modules = [Site("adapter", int(r.layer), module=str(r.module)) for r in ordered.itertuples()]
    by_layer = ranked.groupby("layer")["effect"].sum().sort_values(ascending=False)
    layers = [Site("adapter", int(str(layer))) for layer in by_layer.index]
    for what, sites in (("adapter modules", modules), ("adapter layers", layers)):
        for count in SITE_COUNTS:
            if 2 * count > len(sites):
                continue
            others = [sites[i] for i in rng.choice(np.arange(count, len(sites)), count, replace=False)]
            yield (
                Candidate(f"{count} {what} off", "adapter_off", _off(sites[:count])),
                Candidate(f"{count} random {what} off", "adapter_off", _off(others), True),
            )


def _off(sites: Sequence[Site]) -> tuple[Edit, ...]:
    return tuple(Edit(site, edits.zero()) for site in sites)
