"""The noisy batch norm of [P2]: batch norm whose output does not stay normalised."""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn

from batchnorm import functional
from batchnorm.functional import TrainingResult
from batchnorm.nn.statistics import Options, Running, Statistics

__all__ = ["Distribution", "Noise", "Noisy"]


@dataclass(frozen=True)
class Distribution:
    r"""Noise whose own distribution is drawn anew for each unit j at every step.

    .. math::

        \mu_j \sim U(-n_\mu, n_\mu),\quad \sigma_j \sim U(1, n_\sigma),\quad
        m_{ij} \sim U(\mu_j - r_\mu, \mu_j + r_\mu),\quad
        s_{ij} \sim N(\sigma_j, r_\sigma),\quad a_{ij} \leftarrow s_{ij} a_{ij} + m_{ij}

    i counts the samples and, of a convolution, the positions as well. The paper leaves open what
    the second argument of N is: the standard deviation here.

    References:
        [P2] Santurkar et al. 2018, arXiv 1805.11604, Appendix A.2.1.
    """

    n_mu: float = 0.5
    n_sigma: float = 1.25
    r_mu: float = 0.1
    r_sigma: float = 0.1

    def add(self, a: Tensor) -> Tensor:
        """Add the noise to activations of shape (N, C, *)."""
        # torch draws fast into contiguous memory only: channels_last is drawn as it lies there.
        if a.dim() > 2 and a.movedim(1, -1).is_contiguous():
            return self._add(a.movedim(1, -1), -1).movedim(-1, 1)
        return self._add(a, 1)

    def _add(self, a: Tensor, units_dim: int) -> Tensor:
        units = [1] * a.dim()
        units[units_dim] = a.shape[units_dim]
        mean = a.new_empty(units).uniform_(-self.n_mu, self.n_mu)
        scale = a.new_empty(units).uniform_(1, self.n_sigma)
        shift = mean + torch.empty_like(a).uniform_(-self.r_mu, self.r_mu)
        return torch.addcmul(shift, scale + self.r_sigma * torch.randn_like(a), a)


@dataclass(frozen=True)
class Noisy(Statistics):
    """Statistics of the batch, with :class:`Distribution` noise behind γ and β.

    In training only; the running statistics are those of the batch.

    Example:
        >>> from batchnorm import BatchNorm1d
        >>> BatchNorm1d(3, statistics=Noisy()).statistics.distribution.n_mu
        0.5

    References:
        [P2] Santurkar et al. 2018, arXiv 1805.11604, Section 2.2 and Figure 2.
    """

    distribution: Distribution = Distribution()

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        running: Running,
        **options: Unpack[Options],
    ) -> TrainingResult:
        """Normalise by the moments of the batch and add the noise.

        Raises:
            ValueError: a residual or an activation is to be fused.
        """
        if options["residual"] is not None or options["activation"] is not None:
            raise ValueError(
                "Noisy statistics add noise to the normalised value itself, so neither a residual "
                "nor an activation can be fused; apply them behind the layer"
            )
        y, moments = functional.batch_norm(x, weight, bias, eps, mask=options["mask"])
        return TrainingResult(self.distribution.add(y), moments)


class Noise(nn.Identity):
    """:class:`Distribution` noise on activations that nothing normalises; in training only."""

    def __init__(self, distribution: Distribution | None = None) -> None:
        """The paper's distribution unless another is given."""
        super().__init__()
        self.distribution = distribution or Distribution()

    def forward(self, input: Tensor) -> Tensor:
        """Add the noise to activations of shape (N, C, *)."""
        return self.distribution.add(input) if self.training else input
