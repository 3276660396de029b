"""Ensembles of small autoencoders, plain and variational, that score every sample by itself.

In: samples (n, d) or (n, L, d); layers are joined and whitened in their top components. Scores are
differentiable (`score_tensor`), so that an attacker can be simulated who trains against them.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from safetynet.detection.detectors.base import Detector, clean, joined, layered, principal
from safetynet.detection.files import below

LARGEST = 50.0
"""Whitened values are cut here: a massive activation would otherwise be the whole loss."""


@dataclass
class Ensemble(Detector):
    """What plain and variational autoencoders share: whitening, training, agreement of members."""

    latent: int = 16
    components: int = 128
    members: int = 3
    steps: int = 300
    batch_size: int = 128
    learning_rate: float = 3e-3
    seed: int = 0

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> Self:
        """Train every member on clean samples."""
        flat = joined(clean(x, self.name, 20))
        self.mean_, self.variances_, self.components_ = principal(flat, self.components)
        inputs = self._inputs(torch.from_numpy(flat)).float()
        self._networks = []
        for seed in range(self.seed, self.seed + self.members):
            generator = torch.Generator().manual_seed(seed)
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(seed)
                network = self.network(inputs.shape[1])
                optimiser = torch.optim.Adam(network.parameters(), self.learning_rate)
                most = min(self.batch_size, len(inputs))
                for _ in range(self.steps):
                    rows = torch.randint(len(inputs), (most,), generator=generator)
                    loss = self.loss(network, inputs[rows], generator)
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
            self._networks.append(network.eval().requires_grad_(False))
        for member, network in enumerate(self._networks):
            for key, tensor in network.state_dict().items():
                setattr(self, f"net{member}.{key}_", tensor.numpy())
        return self

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        """Mean of the members' errors plus their disagreement (one standard deviation), (n,)."""
        with torch.no_grad():
            return self.score_tensor(torch.from_numpy(layered(x, self.name))).numpy().astype(np.float64)

    def score_tensor(self, x: Tensor) -> Tensor:
        """The same as a differentiable function of (n, d) or (n, L, d)."""
        inputs = self._inputs(x.reshape(len(x), -1)).float()
        errors = torch.stack([self.errors(network, inputs) for network in self._networks])
        return errors.mean(0) + errors.std(0, unbiased=False)

    def learn(self, arrays: dict[str, np.ndarray]) -> None:
        """Take learned arrays back and rebuild the networks."""
        super().learn(arrays)
        self._networks = []
        for member in range(self.members):
            weights = below(arrays, f"net{member}.")
            network = self.network(len(self.variances_))
            network.load_state_dict({k.removesuffix("_"): torch.from_numpy(v) for k, v in weights.items()})
            self._networks.append(network.eval())

    @abstractmethod
    def network(self, width: int) -> nn.Module:
        """An untrained member for inputs of `width` numbers."""

    @abstractmethod
    def errors(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """(n, width) to (n,), the score of one member."""

    @abstractmethod
    def loss(self, network: nn.Module, inputs: Tensor, noise: torch.Generator) -> Tensor:
        """What training makes small."""

    def _inputs(self, flat: Tensor) -> Tensor:
        mean, scale = torch.from_numpy(self.mean_).to(flat), torch.from_numpy(self.variances_).to(flat).sqrt()
        z = (flat - mean) @ torch.from_numpy(self.components_).to(flat).T / scale
        return z.clamp(-LARGEST, LARGEST)


@dataclass
class AutoEncoders(Ensemble):
    """Mean squared error of reconstruction, after SafetyNet (2025)."""

    name: ClassVar[str] = "autoencoders"

    def network(self, width: int) -> nn.Module:
        """Width - 2 latent - latent - 2 latent - width."""
        hidden = 2 * self.latent
        return nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, self.latent),
            nn.GELU(), nn.Linear(self.latent, hidden), nn.GELU(), nn.Linear(hidden, width),
        )  # fmt: skip

    def errors(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """Mean squared error, (n,)."""
        return (network(inputs) - inputs).square().mean(1)

    def loss(self, network: nn.Module, inputs: Tensor, noise: torch.Generator) -> Tensor:
        """The same, averaged."""
        return self.errors(network, inputs).mean()


@dataclass
class VariationalAutoEncoders(Ensemble):
    """Negative evidence lower bound with the latent at its mean (Kingma and Welling 2014), per sample."""

    name: ClassVar[str] = "variational"

    def network(self, width: int) -> nn.Module:
        """Encoder to mean and log variance, and decoder."""
        hidden = 2 * self.latent
        return nn.ModuleDict(
            {
                "encoder": nn.Sequential(
                    nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 2 * self.latent)
                ),
                "decoder": nn.Sequential(nn.Linear(self.latent, hidden), nn.GELU(), nn.Linear(hidden, width)),
            }
        )

    def errors(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """Squared error plus KL divergence, (n,); no draw, so that a sample has one score."""
        mean, log_variance = network["encoder"](inputs).chunk(2, dim=1)  # type: ignore[index]
        return self._bound(network, inputs, mean, mean, log_variance)

    def loss(self, network: nn.Module, inputs: Tensor, noise: torch.Generator) -> Tensor:
        """The bound with a drawn latent."""
        mean, log_variance = network["encoder"](inputs).chunk(2, dim=1)  # type: ignore[index]
        latent = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=noise)
        return self._bound(network, inputs, latent, mean, log_variance).mean()

    def _bound(
        self, network: nn.Module, inputs: Tensor, latent: Tensor, mean: Tensor, log_variance: Tensor
    ) -> Tensor:
        error = (network["decoder"](latent) - inputs).square().sum(1)  # type: ignore[index]
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return error + divergence
