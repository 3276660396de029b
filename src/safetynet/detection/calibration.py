"""From scores to p-values, from p-values to one alarm whose false-positive rate is known.

In: scores of clean samples that no detector was fitted on. Out: p-values, small for suspect samples. What is
claimed rests on the conformal ranks of the fused statistic alone (Vovk, Gammerman and Shafer 2005), on clean
samples that calibrated nothing else; smoothed tails only decide how detectors are weighed against each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import pandas as pd

from safetynet.detection.files import below
from safetynet.errors import InputError
from safetynet.run.directory import digest
from safetynet.statistics import clopper_pearson

Fusion = Literal["fisher", "cauchy", "max"]
FUSION: Fusion = "max"
"""Unless another is asked for: detectors that see nothing shall not outvote the one that sees."""
NEEDED = 5
"""Clean samples that must lie above a threshold before a rate is claimed. With fewer the realised rate is a
matter of luck: its relative standard deviation is one over the root of this number."""
TAIL = 0.95
"""Quantile of the clean scores from which on the tail is smoothed."""
PARTS: Mapping[str, float] = {"fit": 0.5, "calibrate": 0.25, "fuse": 0.25}
"""Shares of the clean prompts: what fits detectors shall not calibrate them, nor their fusion."""


def smallest_rate(n: int) -> float:
    """The smallest false-positive rate that `n` clean samples support: 1% needs 499 of them, 0.1% 4,999."""
    return NEEDED / (n + 1)


def check_rate(rate: float, n: int) -> None:
    """Refuse a claim that the calibration samples cannot carry.

    Raises:
        InputError: saying how many samples it needs, or which rate is possible.
    """
    if not 0 < rate < 1:
        raise InputError(f"fpr: {rate} is no rate; give a number between 0 and 1, such as 0.01.")
    # A hair's breadth: 5 / 500 and 0.01 must count as equal.
    if smallest_rate(n) > rate * (1 + 1e-9):
        instead = f", or claim {smallest_rate(n):.2g} or more" if smallest_rate(n) < 1 else ""
        raise InputError(
            f"fpr: {rate:g} needs {int(np.ceil(NEEDED / rate - 1 - 1e-6))} clean calibration samples, and "
            f"there are {n}. Give more clean prompts{instead}."
        )


Kinds = Sequence[str] | np.ndarray
"""Of samples, one name each, such as `plain`. A p-value is then the largest of those that the kinds give by
themselves, so that a rate is kept in each kind, whatever others there are."""
Scores = np.ndarray | Mapping[str, np.ndarray]
"""Of samples, (n,); by kind where a sample's score depends on the kind that it is compared with."""


def each_kind(kinds: Kinds | None, n: int) -> np.ndarray:
    """Of n samples; one nameless kind where none are told apart."""
    return np.full(n, "") if kinds is None else np.asarray(kinds)


@dataclass(frozen=True)
class Conformal:
    """Scores of clean samples by their kind, sorted: what one detector's p-values are ranks among."""

    by_kind: Mapping[str, np.ndarray]

    @classmethod
    def fit(cls, scores: np.ndarray, kinds: Kinds | None = None) -> Self:
        """Calibrate on clean scores, (n,), of one kind or of several.

        Raises:
            InputError: if there are none, or some are NaN or infinite.
        """
        scores = np.asarray(scores, dtype=np.float64)
        if scores.size == 0 or not np.isfinite(scores).all():
            raise InputError(
                "calibration: needs clean scores that are numbers. Check prompts and activations."
            )
        names = each_kind(kinds, len(scores))
        return cls({str(kind): np.sort(scores[names == kind]) for kind in np.unique(names)})

    @property
    def n(self) -> int:
        """Samples of the kind that has fewest: what a claim rests on."""
        return min(map(len, self.by_kind.values()))

    @property
    def scores(self) -> np.ndarray:
        """Of all kinds, sorted."""
        return np.sort(np.concatenate(list(self.by_kind.values())))

    def p_values(self, scores: Scores) -> np.ndarray:
        """(1 + clean scores at or above) / (n + 1), by the kind where that is largest.

        If a prompt is exchangeable with the clean ones of its kind, P(p <= a) <= a for every a (Mondrian
        conformal prediction: Vovk, Gammerman and Shafer 2005, 4.5). Its kind need not be known.
        """
        return np.max([_ranked(clean, compared) for clean, compared in self._compared(scores)], axis=0)

    def smoothed(self, scores: Scores) -> np.ndarray:
        """The same, going on log-linearly above the clean 95% quantile, so that the far tail has an order.

        An exponential tail fitted by its mean excess. It is a guess, and no claim is made from it.
        """
        return np.max([_smoothed(clean, compared) for clean, compared in self._compared(scores)], axis=0)

    def state(self, name: str) -> dict[str, np.ndarray]:
        """Arrays for a file, below a name."""
        return {f"{name}/{kind}": scores for kind, scores in self.by_kind.items()}

    def _compared(self, scores: Scores) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each kind's clean scores, and those that are compared with them."""
        of_kind = scores if isinstance(scores, Mapping) else dict.fromkeys(self.by_kind, scores)
        return [(clean, np.asarray(of_kind[kind], dtype=float)) for kind, clean in self.by_kind.items()]


def _ranked(clean: np.ndarray, scores: np.ndarray) -> np.ndarray:
    above = len(clean) - np.searchsorted(clean, scores, side="left")
    return (1 + above) / (len(clean) + 1)


def _smoothed(clean: np.ndarray, scores: np.ndarray) -> np.ndarray:
    # Above a high threshold, excesses of most distributions are nearly exponential; their mean is its scale.
    start = float(np.quantile(clean, TAIL))
    excess = clean[clean > start] - start
    if len(excess) < 2 or excess.mean() <= 0:
        return _ranked(clean, scores)
    log = np.log(_ranked(clean, np.array([start]))) - np.maximum(scores - start, 0) / excess.mean()
    return np.where(scores > start, np.exp(np.maximum(log, -300.0)), _ranked(clean, scores))


def shares(names: Sequence[str]) -> np.ndarray:
    """What weighs each of several detectors, by their names `detector:view`; (detectors,), of sum 1.

    Each view has the same share and divides it among its detectors: those that read the same numbers have
    the same odd clean prompts, and however many they are, they leave another view its part of the rate.
    """
    views = [name.partition(":")[2] for name in names]
    return np.array([1 / views.count(view) for view in views]) / len(set(views))


def fuse(p: np.ndarray, how: Fusion, share: np.ndarray) -> np.ndarray:
    """One statistic per sample, higher is more suspect.

    Args:
        p: p-values, (n, detectors).
        how: `fisher`, minus the weighted sum of logs; `cauchy` (Liu and Xie 2020); `max`, an OR of the
            detectors, each at its share of the rate (weighted Bonferroni: Genovese, Roeder and Wasserman
            2006), at a level that is calibrated for all of them together.
        share: of each detector, (detectors,), as `shares` gives them.

    Returns:
        (n,). Its distribution under correlated detectors is unknown, which is why it is calibrated again.
    """
    if how == "fisher":
        return -np.log(p) @ share
    if how == "cauchy":
        # 1/(pi p) is tan(pi (1/2 - p)) for small p, where the tangent itself overflows.
        tangents = np.where(p < 1e-8, 1 / (np.pi * p), np.tan(np.pi * (0.5 - np.clip(p, 1e-8, 1 - 1e-8))))
        return tangents @ share
    # A detector at its share of the rate a alarms at p <= share a: the smallest p / share decides.
    return (np.log(share) - np.log(p)).max(axis=1)


@dataclass(frozen=True)
class Calibration:
    """Clean scores of several detectors, and of their fused statistic."""

    single: Mapping[str, Conformal]
    fused: Conformal
    how: Fusion = FUSION

    @classmethod
    def fit(
        cls,
        first: Mapping[str, np.ndarray],
        second: Mapping[str, np.ndarray],
        how: Fusion = FUSION,
        kinds: tuple[Kinds, Kinds] | None = None,
    ) -> Self:
        """Calibrate detectors on `first`, and their fusion on `second`, scores of other clean samples.

        One detector by itself is calibrated on both.

        Args:
            first: by detector, (n,) each.
            second: by detector, (m,) each.
            how: of the fusion.
            kinds: of the first samples and of the second; None where all are of one.
        """
        of_first, of_second = kinds or (None, None)
        single = {name: Conformal.fit(scores, of_first) for name, scores in first.items()}
        _check_kinds(single, each_kind(of_second, len(next(iter(second.values())))))
        # One detector's statistic is its score, which depends on neither part: a rank among both is as exact.
        parts = [(second, of_second)] if len(single) > 1 else [(first, of_first), (second, of_second)]
        statistics = [_of_own_kind(_fused(single, scores, how), of_kind) for scores, of_kind in parts]
        return cls(single, Conformal.fit(*map(np.concatenate, zip(*statistics, strict=True))), how)

    @classmethod
    def cross_fitted(
        cls,
        scores: Mapping[str, np.ndarray],
        folds: np.ndarray,
        how: Fusion = FUSION,
        kinds: Kinds | None = None,
    ) -> Self:
        """Calibrate on out-of-fold scores, for too few clean samples to part with (Barber et al. 2021, CV+).

        Args:
            scores: of each sample, by detectors that were fitted without its fold; (n,) each.
            folds: fold of each sample, (n,).
            how: of the fusion.
            kinds: of each sample; None where all are of one.
        """
        names = each_kind(kinds, len(folds))
        statistic = np.empty(len(folds))
        for fold in np.unique(folds):
            inside = folds == fold
            others = {n: Conformal.fit(values[~inside], names[~inside]) for n, values in scores.items()}
            _check_kinds(others, names)
            fused = _fused(others, {name: scores[name][inside] for name in others}, how)
            statistic[inside], _ = _of_own_kind(fused, names[inside])
        single = {name: Conformal.fit(values, names) for name, values in scores.items()}
        return cls(single, Conformal.fit(statistic, names), how)

    def p_values(self, scores: Mapping[str, np.ndarray]) -> pd.DataFrame:
        """One row per sample: a conformal p-value for each detector and for `fused`."""
        table = {name: conformal.p_values(scores[name]) for name, conformal in self.single.items()}
        return pd.DataFrame(table | {"fused": self.fused.p_values(_fused(self.single, scores, self.how))})

    def smoothed(self, scores: Mapping[str, np.ndarray]) -> pd.DataFrame:
        """As `p_values`, with the tail continued beyond the most suspect clean sample: no claim is made."""
        table = {name: conformal.smoothed(scores[name]) for name, conformal in self.single.items()}
        return pd.DataFrame(table | {"fused": self.fused.smoothed(_fused(self.single, scores, self.how))})

    def scores(self, scores: Mapping[str, np.ndarray]) -> pd.DataFrame:
        """One row per sample: each detector's score, and as `fused` the statistic."""
        return pd.DataFrame({**scores, "fused": self.statistic(scores)})

    def state(self) -> dict[str, np.ndarray]:
        """Arrays for a file."""
        arrays = self.fused.state("fused")
        for name, conformal in self.single.items():
            arrays |= conformal.state(f"single/{name}")
        return arrays

    @classmethod
    def restore(cls, names: Iterable[str], arrays: Mapping[str, np.ndarray], how: Fusion = FUSION) -> Self:
        """From a file's arrays, of detectors with these names."""
        single = {name: Conformal(below(arrays, f"single/{name}/")) for name in names}
        return cls(single, Conformal(below(arrays, "fused/")), how)

    def statistic(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """What orders samples, (n,), higher is more suspect; of several kinds by the smoothed p-value."""
        of_kind = _fused(self.single, scores, self.how)
        if len(self.single) > 1 and len(of_kind) > 1:
            return -np.log(self.fused.smoothed(of_kind))
        return next(iter(of_kind.values()))


def _fused(
    single: Mapping[str, Conformal], scores: Mapping[str, np.ndarray], how: Fusion
) -> dict[str, np.ndarray]:
    """The fused statistic, (n,), by kind of clean samples: each weighs the detectors by its own tails.

    One statistic for all kinds would take of each detector the kind that excuses most, and of the thresholds
    again the highest.
    """
    if len(single) == 1:  # nothing to fuse it with
        [(name, conformal)] = single.items()
        return dict.fromkeys(conformal.by_kind, np.asarray(scores[name], dtype=np.float64))
    return {kind: fuse(p, how, shares(list(single))) for kind, p in smoothed_by_kind(single, scores).items()}


def smoothed_by_kind(
    single: Mapping[str, Conformal], scores: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Smoothed p-values, (n, detectors), by the kind of clean samples that gives them."""
    return {
        kind: np.stack(
            [_smoothed(conformal.by_kind[kind], scores[name]) for name, conformal in single.items()], axis=1
        )
        for kind in next(iter(single.values())).by_kind
    }


def _of_own_kind(statistics: Mapping[str, np.ndarray], kinds: Kinds | None) -> tuple[np.ndarray, np.ndarray]:
    """Of each clean sample the statistic of its own kind, and the kinds, (n,) each."""
    names = each_kind(kinds, len(next(iter(statistics.values()))))
    statistic = np.full(len(names), np.nan)
    for kind, values in statistics.items():
        statistic = np.where(names == kind, values, statistic)
    return statistic, names


def _check_kinds(single: Mapping[str, Conformal], kinds: Iterable[str]) -> None:
    """Refuse kinds that have samples in one part of the split alone."""
    lacking = next(iter(single.values())).by_kind.keys() ^ set(map(str, kinds))
    if lacking:
        raise InputError(
            f"calibration: too few clean prompts of kind {min(lacking)!r}. Give more, or none of it."
        )


@dataclass(frozen=True)
class RateEstimate:
    """A false-positive rate that was measured on fresh clean samples."""

    nominal: float
    alarms: int
    n: int
    low: float
    """Clopper-Pearson, 95%."""
    high: float

    @property
    def rate(self) -> float:
        """Realised rate."""
        return self.alarms / self.n

    def __str__(self) -> str:
        return (
            f"{self.rate:.2%} of {self.n} fresh clean prompts (95% interval {self.low:.2%} to "
            f"{self.high:.2%}), claimed {self.nominal:.2%}"
        )


def fpr_estimate(p: np.ndarray, rate: float) -> RateEstimate:
    """Realised false-positive rate of p-values of fresh clean samples at a nominal rate.

    Raises:
        InputError: if there are no samples.
    """
    if len(p) == 0:
        raise InputError("fpr_estimate: there are no fresh clean samples. Keep some for the test.")
    alarms = int((np.asarray(p) <= rate).sum())
    return RateEstimate(rate, alarms, len(p), *clopper_pearson(alarms, len(p)))


def split(groups: Sequence[str], shares: Mapping[str, float] = PARTS, seed: int = 0) -> np.ndarray:
    """Deal groups of prompts out to parts; prompts of a group stay together.

    Args:
        groups: one name per prompt, such as its `prompt_hash`.
        shares: by part, summing to 1.
        seed: of the deal; it depends on the names alone, not on their order.

    Returns:
        The part of each prompt, (n,).

    Raises:
        InputError: if there are fewer groups than parts.
    """
    names = sorted(set(groups), key=lambda name: digest([seed, name]))
    if len(names) < len(shares):
        raise InputError(
            f"split: {len(names)} groups of prompts cannot fill {len(shares)} parts. Give more prompts."
        )
    bounds = np.cumsum(list(shares.values())) * len(names)
    parts = list(shares)
    part_of = {
        name: parts[min(int(np.searchsorted(bounds, i + 0.5)), len(parts) - 1)]
        for i, name in enumerate(names)
    }
    return np.array([part_of[name] for name in groups])


def folds(groups: Sequence[str], count: int, seed: int = 0) -> np.ndarray:
    """Deal groups out to folds of equal size, (n,) of 0 .. count - 1."""
    parts = split(groups, {str(i): 1 / count for i in range(count)}, seed)
    return parts.astype(int)
