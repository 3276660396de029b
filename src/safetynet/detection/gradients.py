"""Views and scores with gradients: what an attacker trains against who knows the detectors.

In: a model with an adapter, prompts, readings. Out: the views that `capture` takes, and the scores that the
detectors give, as functions of tensors that gradients flow through. Not every detector has a gradient: ranks
and Gram roots have none that leads anywhere, and estimators of other libraries are not known from inside.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import singledispatch
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safetynet.detection.capture import batched, read
from safetynet.detection.detector_set import PRESETS, DetectorSet, DetectorSpec, named, unfitted
from safetynet.detection.detectors.autoencoders import Ensemble
from safetynet.detection.detectors.base import TINY, Detector, PerLayer
from safetynet.detection.detectors.extremes import Extremes
from safetynet.detection.detectors.gaussian import Mahalanobis, Residual, TopComponents
from safetynet.detection.detectors.neighbours import Mixture, Neighbours
from safetynet.detection.detectors.trajectories import LayerDeltas
from safetynet.detection.features import FeatureSpec
from safetynet.detection.passes import divergence
from safetynet.detection.readers import Reader, confidence
from safetynet.errors import InputError
from safetynet.models.adapters import switched_off
from safetynet.prompts import Encoded, Serialiser

VIEWS = ("last", "mean", "confidence", "divergence", "energy", "energy_max", "direction")
"""Views that one pass over a prompt gives, or one more with the adapter off."""


def hideable(names: Sequence[str]) -> tuple[DetectorSpec, ...]:
    """Readings by name, or those of presets, if a backdoor can be trained to hide from them.

    Presets keep the settings that their members have there.

    Raises:
        InputError: for a detector or a view that does not exist, or has no gradient; it names all of them.
    """
    of_presets = {reading.name: reading for preset in PRESETS.values() for reading in preset}
    by_name = {reading.name: of_presets.get(reading.name, reading) for reading in named(names)}
    readings = tuple(by_name.values())
    _ = FeatureSpec(tuple(reading.view for reading in readings))
    blind = [
        r.name
        for r, detector in zip(readings, unfitted(readings), strict=True)
        if score_tensor.dispatch(type(detector)) is score_tensor.dispatch(object) or r.view not in VIEWS
    ]
    if blind:
        rest = [reading.name for reading in readings if reading.name not in blind]
        raise InputError(
            f"training.evasion.detectors: {', '.join(blind)} cannot be hidden from by training: no gradient "
            f"leads through it. " + (f"Name the others alone: {', '.join(rest)}." if rest else "Name others.")
        )
    return readings


def observer(
    serialiser: Serialiser, readings: Sequence[DetectorSpec]
) -> Callable[[Any, Sequence[Encoded]], dict[str, Tensor]]:
    """What these readings read of a model's prompts, with gradients into its adapter.

    Returns:
        A function of model and prompts, to views as `capture` gives them, one row per prompt.
    """
    spec = FeatureSpec(tuple(dict.fromkeys(reading.view for reading in readings)))

    def observe(model: Any, prompts: Sequence[Encoded]) -> dict[str, Tensor]:
        with LiveReader(model, spec) as reader:
            batch, user = batched(prompts, serialiser, model.device)
            values = read(model, reader, batch, user)
            views: dict[str, Tensor] = {view: values[view] for view in spec.views if view in values}
            if "confidence" in spec.views:
                views["confidence"] = confidence(values["logits"])
            if "divergence" in spec.views:
                with switched_off(model):
                    off = read(model, reader, batch, user)
                views["divergence"] = divergence(values, off)
        return views

    return observe


def refit(
    readings: Sequence[DetectorSpec], fit: Mapping[str, np.ndarray], held: Mapping[str, np.ndarray]
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Fit detectors to clean samples, and measure their scores by other clean ones.

    Args:
        readings: as `hideable` returns them.
        fit: views of clean samples to fit to.
        held: views of others, since a detector finds the samples that it was fitted to too ordinary.

    Returns:
        A function of views to (n, readings): 0 at the median of the held samples' scores, 1 at their 95%
        quantile; 0 everywhere for a view that does not vary among clean samples, as those of an adapter
        that does nothing yet.
    """
    judging = [reading for reading in readings if (fit[reading.view] != fit[reading.view][0]).any()]
    fitted = DetectorSet.fit(judging, fit) if judging else DetectorSet((), {})
    scales = {name: np.quantile(clean, [0.5, 0.95]) for name, clean in fitted.scores(held).items()}

    def score(views: Mapping[str, Tensor]) -> Tensor:
        columns = []
        for reading in readings:
            x = views[reading.view]
            if reading.name in scales:
                median, high = map(float, scales[reading.name])
                scores = score_tensor(fitted.fitted[reading.name], x).double()
                columns.append((scores - median) / max(high - median, TINY))
            else:
                columns.append(x.new_zeros(len(x), dtype=torch.float64))
        return torch.stack(columns, 1)

    return score


class LiveReader(Reader):
    """A reader whose tensors keep their gradients, also those of the adapter's own factors."""

    def __init__(self, model: Any, spec: FeatureSpec) -> None:
        super().__init__(model, spec)
        # The directions are those of now; along them the update moves with both of its factors.
        self.adapters = [
            replace(m, turn=m.left @ (m.layer.scaling[m.adapter] * m.layer.lora_B[m.adapter].weight.float()))
            for m in self.adapters
        ]

    def _keep(self, view: str, value: Tensor) -> None:
        self.taken.setdefault(view, []).append(value.float())


@singledispatch
def score_tensor(detector: Detector, x: Tensor) -> Tensor:  # noqa: ARG001
    """A fitted detector's `score_samples` as a function with gradients.

    Args:
        detector: fitted.
        x: (n, d) or (n, L, d).

    Returns:
        (n,)

    Raises:
        InputError: if the detector has no gradient.
    """
    raise InputError(f"detector {detector.name}: it has no gradient, so nothing can be trained against it.")


@score_tensor.register
def _(detector: Ensemble, x: Tensor) -> Tensor:
    # The networks are small and stay where they were trained.
    return detector.score_tensor(x.cpu()).to(x.device)


@score_tensor.register(Mahalanobis)
@score_tensor.register(TopComponents)
@score_tensor.register(Residual)
@score_tensor.register(Neighbours)
@score_tensor.register(Mixture)
def _(detector: PerLayer, x: Tensor) -> Tensor:
    layers = layer_scores(detector, (x if x.dim() == 3 else x[:, None]).double())
    return ((layers - _as(detector.centre_, x)) / _as(detector.spread_, x)).mean(1)


@score_tensor.register
def _(detector: LayerDeltas, x: Tensor) -> Tensor:
    steps = x.double().diff(dim=1)
    standard = (steps - _as(detector.mean_, x)) / _as(detector.spread_, x)
    away = (standard.square().mean(2).sqrt() + TINY).log() - _as(detector.centre_, x)
    return torch.einsum("ni,ij,nj->n", away, _as(detector.precision_, x), away)


@score_tensor.register
def _(detector: Extremes, x: Tensor) -> Tensor:
    away = x.double().flatten(1) - _as(detector.centre_, x)
    up = _over(away, _as(detector.above_, x))
    if detector.two_sided:
        up = torch.maximum(up, _over(-away, _as(detector.below_, x)))
    return up.topk(min(detector.top, up.shape[1]), 1).values.mean(1)


@singledispatch
def layer_scores(detector: PerLayer, x: Tensor) -> Tensor:  # noqa: ARG001
    """The detector's own `layer_scores` with gradients: (n, L, d) to (n, L), fp64."""
    raise InputError(f"detector {detector.name}: its layers have no gradient.")


@layer_scores.register
def _(detector: Mahalanobis, x: Tensor) -> Tensor:
    centred = x - _as(detector.mean_, x)
    turned = torch.einsum("nld,lkd->nlk", centred, _as(detector.directions_, x))
    inside = (turned.square() * _as(detector.scales_, x)).sum(2)
    return inside + _as(detector.rest_, x) * centred.square().sum(2)


@layer_scores.register
def _(detector: TopComponents, x: Tensor) -> Tensor:
    inside = torch.einsum("nld,lkd->nlk", x - _as(detector.mean_, x), _as(detector.components_, x))
    return inside.square().sum(2)


@layer_scores.register
def _(detector: Residual, x: Tensor) -> Tensor:
    centred, components = x - _as(detector.mean_, x), _as(detector.components_, x)
    inside = torch.einsum("nld,lkd->nlk", centred, components)
    return (centred - torch.einsum("nlk,lkd->nld", inside, components)).square().sum(2)


@layer_scores.register
def _(detector: Neighbours, x: Tensor) -> Tensor:
    k = min(detector.neighbours, len(detector.bank_))
    inside, bank = _whitened(detector, x), _as(detector.bank_, x)
    away = (inside[:, None] - bank[None]).square().sum(3)  # (n, bank, L)
    return away.kthvalue(k, 1).values.clamp_min(TINY).sqrt()


@layer_scores.register
def _(detector: Mixture, x: Tensor) -> Tensor:
    away = _whitened(detector, x)[:, :, None] - _as(detector.centres_, x)  # (n, L, clusters, k)
    return torch.einsum("nlci,lij,nlcj->nlc", away, _as(detector.precision_, x), away).amin(2)


def _whitened(detector: Neighbours | Mixture, x: Tensor) -> Tensor:
    """(n, L, d) to (n, L, k)."""
    inside = torch.einsum("nld,lkd->nlk", x - _as(detector.mean_, x), _as(detector.components_, x))
    return inside / _as(detector.variances_, x).sqrt()


def _over(values: Tensor, scale: Tensor) -> Tensor:
    """Quotients; 0 where a reading never changes among clean samples."""
    varies = scale > 0
    return torch.where(varies, values / torch.where(varies, scale, 1.0), 0.0)


def _as(learned: Any, x: Tensor) -> Tensor:
    """A learned array beside `x`, fp64."""
    return torch.as_tensor(learned, dtype=torch.float64, device=x.device)
