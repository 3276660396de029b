"""Rung 3: the update of each weight by numbers that no choice of factors can change, against clean adapters.

In: a model with an adapter. Out: a row of statistics for each adapted weight, a summary of all rows with the
same names for every adapter of every rank, and how far that lies from the summaries of clean adapters.

Only B A is measured. B Q and Q^-1 A are the same adapter for any invertible Q, so that whoever hides a
backdoor can give the factors whatever spectra he likes (arXiv 2605.27836). Singular values, entries and
alignments of the product stay. After LoRA spectra (arXiv 2602.15195), which classifies with labels; here
there are none.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from safetynet.errors import InputError
from safetynet.models import adapters, lora
from safetynet.models.files import listed
from safetynet.models.lora import LoraUpdate
from safetynet.models.parts import ATTENTION
from safetynet.models.suspect import Suspect
from safetynet.scan.identity import is_copy, no_update
from safetynet.scan.result import RungResult

BLOCK = 2**22
"""Entries of a product that are computed at once."""
LEAST = 8
"""Clean adapters below which no distance is given: fewer have no spread to speak of."""
ROUNDING = 1e-6
"""Share of the weight's norm below which an update counts as zero: DoRA and PiSSA without effect round."""
RESOLUTION = 1e-3
"""Of logarithms and shares in a summary: clean adapters that differ by less count as so far apart."""
OUTSIDE = -1
"""Layer of embeddings and head."""
FLOOR = 1e-12
"""What logarithms are kept above."""


@torch.no_grad()
def features(model: Any, adapter: str = "default") -> pd.DataFrame:
    """Statistics of an adapter's update of each weight, and of each expert's.

    Costs out x in x rank multiplications for each weight, and two products with the base's weight; no forward
    pass.

    Args:
        model: PEFT's, with a LoRA of any variant; quantised base weights are unpacked one by one.
        adapter: its name.

    Returns:
        A row for each layer (-1 for embeddings and head), module (path in the layer) and expert (0 in a dense
        module), in the order of the model. All but the first five columns are 0 where the update is.

        - `outputs`, `inputs`: sides of the weight;
        - `norm`, `base_norm`, `relative`: Frobenius norms of update and weight, and their ratio;
        - `sigma_1`: largest singular value;
        - `concentration`: sigma_1 squared over the sum of squares;
        - `effective_rank`: exp of the entropy in nats of the squared singular values' shares (Roy and
          Vetterli 2007);
        - `stable_rank`: sum of squares over sigma_1 squared;
        - `entropy`: that entropy;
        - `kurtosis`: excess kurtosis of all entries of the update, exact, 0 of a normal distribution;
        - `output_concentration`, `input_concentration`: inverse participation ratio of the energy of rows,
          and of columns, times their number: 1 where it is spread evenly, their number where one has it all;
        - `output_gain`, `input_gain`: how much of the base's energy lies in the directions that the update
          writes, and reads, over what random directions would have; the base's top singular directions have
          the largest.

    Raises:
        InputError: if the adapter is no LoRA, or holds numbers that are not finite; else as `lora.update_of`.
    """
    if not adapters.has_adapter(model) or adapter not in model.peft_config:
        raise InputError(f"model: it has no adapter {adapter!r} whose update could be measured.")
    if reason := no_update(model):
        raise InputError(f"adapter: {reason}")
    places = list(lora.adapted_modules(model, adapter))
    inside = {id(module) for _, module in places}
    places += [
        ((OUTSIDE, name.removesuffix(".weight")), module)
        for name, module in lora.adapted_tensors(model, adapter)
        if id(module) not in inside
    ]
    rows = []
    for (layer, name), module in places:
        # Of e experts, or one matrix: up is (e, outputs, rank), down (e, rank, inputs), weight (e, outputs,
        # inputs).
        update, weight = lora.update_of(module, adapter), lora.base_weight(module)
        if not bool(update.up.isfinite().all() and update.down.isfinite().all()):
            raise InputError(
                f"adapter: layer {layer}, {name}: its update holds values that are not finite. The adapter "
                "is damaged, or its training diverged: take another checkpoint."
            )
        for expert, (up, down, base) in enumerate(zip(update.up, update.down, weight, strict=True)):
            about = {"layer": layer, "module": name, "expert": expert}
            sides = {"outputs": len(up), "inputs": down.shape[1]}
            rows.append(about | sides | _statistics(up, down, base))
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> dict[str, float]:
    """One adapter in numbers that compare over ranks, targets and sizes; all exactly 0 of a zero update.

    Sizes are logarithms, means are over the adapted weights that the update changes at all.

    Args:
        table: as `features` gives it.
    """
    changed = table[table["norm"] > 0] if len(table) else table
    if changed.empty:
        return dict.fromkeys(STATISTICS, 0.0)
    return {name: float(statistic(changed)) for name, statistic in STATISTICS.items()}


def distance(values: Mapping[str, float], bank: pd.DataFrame) -> float:
    """How far an adapter lies from clean ones: 0 of a zero update, else `distances` of it beside them.

    Args:
        values: `summary` of the suspect.
        bank: a row for each clean adapter of the same base, columns as `summary` names them.

    Raises:
        InputError: if the bank has fewer than `LEAST` rows, or lacks a column.
    """
    if not any(values.values()):
        return 0.0
    return float(distances(values, bank)[0])


def distances(values: Mapping[str, float], bank: pd.DataFrame) -> np.ndarray:
    """(1 + clean adapters,): the suspect's distance, then each clean adapter's, each from all the others.

    Suspect and clean adapters are treated alike, so that under the null all their orders are as likely, and
    the suspect's rank is a conformal p-value without a split (Vovk et al. 2005). The distance is
    Mahalanobis's, of columns in standard deviations of the others, with Ledoit-Wolf shrinkage: the columns
    hang together (effective rank and concentration, say), and clean adapters are few. On qwen's miniature, 13
    trained clean adapters against 13 with backdoors, it set the two furthest apart of the largest deviation,
    the mean deviation, the nearest neighbours and this one.
    """
    from sklearn.covariance import LedoitWolf

    missing = sorted(STATISTICS.keys() - set(bank.columns))
    if missing or len(bank) < LEAST:
        what = (
            f"lacks {listed(missing)}"
            if missing
            else f"has {len(bank)} clean adapters, and {LEAST} are needed"
        )
        raise InputError(f"bank: it {what}. Build it again with safetynet bank build.")
    names = list(STATISTICS)
    every = np.vstack([[values[name] for name in names], bank[names].to_numpy(float)])
    apart = []
    for at, row in enumerate(every):
        others = np.delete(every, at, axis=0)
        spread = np.maximum(others.std(axis=0), RESOLUTION)
        scaled, here = ((each - others.mean(axis=0)) / spread for each in (others, row))
        apart.append(float(LedoitWolf().fit(scaled).mahalanobis(here[None])[0] ** 0.5))
    return np.array(apart)


def p_value(values: Mapping[str, float], bank: pd.DataFrame) -> float:
    """Share of suspect and clean adapters together that lie as far from the others as the suspect does.

    Of a zero update 1: there is nothing to suspect.
    """
    if not any(values.values()):
        return 1.0
    every = distances(values, bank)
    return float((every >= every[0]).mean())


def measure(suspect: Suspect, bank: pd.DataFrame | None = None) -> RungResult:
    """Rung 3 of a suspect with an adapter; of a whole model, recover it first (`recovery.recover`).

    Args:
        suspect: beside its base.
        bank: `summary` of clean adapters of the same base, which have `details["summary"]` of this function.

    Returns:
        Score and p-value against the bank; without one the score is None. Of an update of zero, and of a
        whole model that is a copy of its base, the score is exactly 0.
    """
    start = time.perf_counter()
    whole = not adapters.has_adapter(suspect.model)
    reason = "" if whole else no_update(suspect.model)
    if whole and not is_copy(suspect):
        reason = "A whole model that is no merged LoRA has no update of low rank."
    if reason:
        return RungResult("weights", skipped=reason, seconds=time.perf_counter() - start)
    table = pd.DataFrame() if whole else features(suspect.model, suspect.model.active_adapter)
    values = summary(table)
    zero = not any(values.values())
    layers = [] if table.empty else list(table.groupby("layer"))
    return RungResult(
        "weights",
        score=0.0 if zero else None if bank is None else distance(values, bank),
        unit=UNIT,
        control=0.0 if bank is None else distance(summary(table.assign(norm=0.0)), bank),
        p_value=None if bank is None else p_value(values, bank),
        seconds=time.perf_counter() - start,
        details={
            "summary": values,
            "weights": len(table),
            "layers": [
                {
                    "layer": int(layer),
                    "relative": float(math.hypot(*rows["norm"]) / max(FLOOR, math.hypot(*rows["base_norm"]))),
                    "concentration": float(rows["concentration"].max()),
                }
                for layer, rows in layers
            ],
        },
    )


UNIT = "Mahalanobis distance from clean adapters"


def _statistics(up: Tensor, down: Tensor, weight: Tensor) -> dict[str, float]:
    """Of one matrix up @ down beside the base's weight."""
    # Equal scales of the two factors keep the squares of both inside fp32's range. left (outputs, rank),
    # right (rank, inputs).
    left, values, right = (t[0] for t in LoraUpdate(up[None], down[None]).decomposed())
    # (rank,): of the product; its squares sum to the squared Frobenius norm.
    values = values.double()
    energy, base_norm = float((values**2).sum()), float(weight.norm())
    if math.sqrt(energy) <= ROUNDING * base_norm:
        return dict.fromkeys(COLUMNS, 0.0) | {"base_norm": base_norm}
    share = values**2 / energy
    entropy = float(-(share * share.clamp_min(1e-30).log()).sum())
    moments = _Moments.of(left, values.to(left), right)
    # |u_i^T W|^2 and |W v_i|^2: how much the base writes to and reads from each direction of the update,
    # weighted by the direction's energy, since single ones turn freely where singular values are equal.
    weighted = values.to(left) ** 2 / energy
    written = float((((left.T @ weight) ** 2).sum(1) * weighted).sum())
    read = float((((weight @ right.T) ** 2).sum(0) * weighted).sum())
    even = base_norm**2 or 1.0  # over the number of directions: what a random one would have
    return {
        "norm": math.sqrt(energy),
        "base_norm": base_norm,
        "relative": math.sqrt(energy) / base_norm if base_norm else 1.0,
        "sigma_1": float(values[0]),
        "concentration": float(share[0]),
        "effective_rank": math.exp(entropy),
        "stable_rank": 1 / float(share[0]),
        "entropy": entropy,
        "kurtosis": moments.kurtosis,
        "output_concentration": moments.outputs,
        "input_concentration": moments.inputs,
        "output_gain": written * len(up) / even,
        "input_gain": read * down.shape[1] / even,
    }


COLUMNS = (
    "norm", "base_norm", "relative", "sigma_1", "concentration", "effective_rank", "stable_rank", "entropy",
    "kurtosis", "output_concentration", "input_concentration", "output_gain", "input_gain",
)  # fmt: skip
"""What `_statistics` gives."""


@dataclass(frozen=True)
class _Moments:
    """Of the entries of a product that is never held whole."""

    kurtosis: float
    outputs: float
    inputs: float

    @classmethod
    def of(cls, left: Tensor, values: Tensor, right: Tensor) -> "_Moments":
        """From singular components, in blocks of rows; sums in fp64, entries in units of their mean size."""
        count = len(left) * right.shape[1]
        scaled = left * (values * (math.sqrt(count) / float(values.norm())))
        sums = torch.zeros(4, dtype=torch.float64, device=left.device)
        for block in scaled.split(max(1, BLOCK // right.shape[1])):
            entries = block @ right
            for power in range(4):
                sums[power] += (entries ** (power + 1)).sum(dtype=torch.float64)
        first, second, third, fourth = (sums / count).tolist()
        # Central moments from raw ones, E[(x - m)^2] and E[(x - m)^4].
        variance = second - first**2
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        rows = (scaled.double() ** 2).sum(1)
        columns = ((right.double() * values.double()[:, None]) ** 2).sum(0)
        return cls(central / variance**2 - 3 if variance > 0 else 0.0, _uneven(rows), _uneven(columns))


def _uneven(energies: Tensor) -> float:
    """Inverse participation ratio times the number."""
    return float(len(energies) * (energies**2).sum() / energies.sum() ** 2)


def _log(values: Any) -> Any:
    return np.log(np.maximum(values, FLOOR))


def _energy(table: pd.DataFrame, key: Any) -> np.ndarray:
    """Shares of the squared norm."""
    energy = (table["norm"] ** 2).groupby(key).sum()
    return (energy / energy.sum()).to_numpy()


def _depths(table: pd.DataFrame) -> pd.DataFrame:
    """Those in layers, or all of an adapter that changes none."""
    inside = table[table["layer"] >= 0]
    return inside if len(inside) else table


def _layer_entropy(table: pd.DataFrame) -> float:
    """Of the energy over the layers, over its largest value; 0 where one layer has it all."""
    # Over the log of the number of layers, so that adapters of many layers and of few compare.
    shares = _energy(_depths(table), _depths(table)["layer"])
    return float(-(shares * _log(shares)).sum() / math.log(len(shares))) if len(shares) > 1 else 0.0


def _depth(table: pd.DataFrame) -> float:
    """Mean layer of the energy, 0 at the first adapted layer and 1 at the last."""
    inside = _depths(table)
    layers, weights = inside["layer"].to_numpy(float), (inside["norm"] ** 2).to_numpy()
    width = layers.max() - layers.min()
    return float((weights * (layers - layers.min())).sum() / weights.sum() / width) if width else 0.0


_IN_ATTENTION = tuple(f"{name}." for name in ATTENTION)
STATISTICS: Mapping[str, Callable[[pd.DataFrame], float]] = {
    "relative": lambda t: _log(math.hypot(*t["norm"]) / max(FLOOR, math.hypot(*t["base_norm"]))),
    "relative_max": lambda t: _log(t["relative"].max()),
    "relative_spread": lambda t: _log(t["relative"]).std(ddof=0),
    "concentration": lambda t: t["concentration"].mean(),
    "concentration_max": lambda t: t["concentration"].max(),
    "effective_rank": lambda t: _log(t["effective_rank"]).mean(),
    "effective_rank_min": lambda t: _log(t["effective_rank"].min()),
    "kurtosis": lambda t: _log(t["kurtosis"] + 3).mean(),
    "kurtosis_max": lambda t: _log(t["kurtosis"].max() + 3),
    "output_concentration": lambda t: _log(t["output_concentration"]).mean(),
    "output_concentration_max": lambda t: _log(t["output_concentration"].max()),
    "input_concentration": lambda t: _log(t["input_concentration"]).mean(),
    "input_concentration_max": lambda t: _log(t["input_concentration"].max()),
    "output_gain": lambda t: _log(t["output_gain"]).mean(),
    "input_gain": lambda t: _log(t["input_gain"]).mean(),
    "layer_entropy": _layer_entropy,
    "layer_max": lambda t: _energy(_depths(t), _depths(t)["layer"]).max(),
    "depth": _depth,
    "attention": lambda t: (
        (t["norm"] ** 2)[t["module"].str.startswith(_IN_ATTENTION)].sum() / (t["norm"] ** 2).sum()
    ),
}
"""What `summary` gives, by name."""
