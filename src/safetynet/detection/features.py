"""What detectors read of a prompt: named arrays with one row per prompt, and the model that they came from.

View             shape         what it is
last             (n, L, d)     residual stream after each layer, at the prompt's last token
mean             (n, L, d)     the same, mean over the tokens that users wrote
energy           (n, M, r)     the adapter's update by singular direction over ‖Wx‖, at the last token
energy_max       (n, M, r)     the same, largest over the tokens that users wrote
direction        (n, M, r)     cosine of a module's output with the update's left singular vectors, last token
confidence       (n, 2)        log-odds of the likeliest next token, and entropy in nats, at the last token
divergence       (n, 1 + L)    KL(adapter on || off) in nats, and relative change of each layer's output
unexplained      (n, 1)        symmetric KL, adapter on and off, that hangs on a word and is explained by none
probe            (n, 1)        fall of the log-odds of the answer to a fixed probe behind the prompt
attention        (n, L)        how far attention falls apart into two triangles (needs eager attention)
steps            (n, T, L, d)  residual stream that chose each generated token; NaN after an answer's end
step_confidence  (n, T, 2)     as confidence, for each generated token
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from safetynet.detection import files
from safetynet.errors import InputError
from safetynet.models.identity import Identity

View = Literal[
    "last", "mean", "energy", "energy_max", "direction", "confidence", "divergence", "unexplained", "probe",
    "attention", "steps", "step_confidence",
]  # fmt: skip
HIDDEN: tuple[View, ...] = ("last", "mean")
ADAPTER: tuple[View, ...] = ("energy", "energy_max", "direction")
COMPARED: frozenset[View] = frozenset(("divergence", "unexplained"))
GENERATED: tuple[View, ...] = ("steps", "step_confidence")


@dataclass(frozen=True)
class FeatureSpec:
    """What to capture."""

    views: tuple[View, ...] = HIDDEN
    layers: tuple[int, ...] | None = None
    """Which layers, counted from 0; None for all."""
    tokens: int = 0
    """Most tokens of an answer; needed by the generated views."""
    probe: str | None = None
    """For view `probe`: a request that the model refuses (or answers in one certain way)."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.views) - set(get_args(View)))
        if unknown or not self.views:
            raise InputError(f"views: {unknown or 'none given'}; choose from {', '.join(get_args(View))}.")
        if set(self.views) & set(GENERATED) and self.tokens < 1:
            raise InputError(
                "tokens: steps and step_confidence need the number of tokens to generate, at least 1."
            )
        if "probe" in self.views and not self.probe:
            raise InputError("probe: view probe needs the probe's text, a request that the model refuses.")

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Back from JSON, which has no tuples."""
        layers = fields["layers"]
        return cls(
            tuple(fields["views"]),
            None if layers is None else tuple(layers),
            fields["tokens"],
            fields["probe"],
        )


@dataclass(frozen=True)
class Features:
    """Captured views of some prompts."""

    arrays: dict[str, np.ndarray]
    """By view, float32, one row per prompt."""
    identity: Identity
    spec: FeatureSpec

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, view: str) -> np.ndarray:
        return view_of(self.arrays, view)

    def take(self, rows: Any) -> "Features":
        """The rows chosen by an index or mask."""
        return replace(self, arrays={name: array[rows] for name, array in self.arrays.items()})

    def save(self, path: Path) -> None:
        """Write to one file."""
        files.write(
            path, "features", {"identity": self.identity.as_dict(), "spec": self.spec.as_dict()}, self.arrays
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: if the file is missing, damaged or no features file.
        """
        about, arrays = files.read(path, "features")
        return cls(arrays, Identity(**about["identity"]), FeatureSpec.from_dict(about["spec"]))


def view_of(arrays: Mapping[str, np.ndarray], view: str) -> np.ndarray:
    """The array of a view.

    Raises:
        InputError: if it was not captured.
    """
    if view not in arrays:
        raise InputError(
            f"features: view {view!r} was not captured (there are: {', '.join(arrays)}). Add it to "
            "FeatureSpec.views."
        )
    return arrays[view]


def concatenate(parts: Sequence[Features]) -> Features:
    """Features of several batches as one.

    Raises:
        InputError: if they come from different models, or hold different views.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.identity != first.identity:
            raise InputError("features: parts come from different models or adapters; do not mix them.")
        if part.spec != first.spec:
            raise InputError(
                "features: parts were captured with different specifications; capture them anew."
            )
    arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in first.arrays}
    return Features(arrays, first.identity, first.spec)


def check_finite(arrays: dict[str, np.ndarray]) -> None:
    """Refuse NaN and infinite activations; the ends of short answers are NaN on purpose.

    Raises:
        InputError: naming the view and the first prompt.
    """
    for name, array in arrays.items():
        flat = array.reshape(len(array), -1)
        bad = np.isinf(flat).any(axis=1) if name in GENERATED else ~np.isfinite(flat).all(axis=1)
        if bad.any():
            raise InputError(
                f"features: view {name} of prompt {np.flatnonzero(bad)[0]} (and {bad.sum() - 1} more) holds "
                "NaN or infinite values. The model overflows: load it in bf16 or fp32."
            )
