"""Erdos-Renyi distributions: small leaves stay denser than large ones."""

import dataclasses
import math

from jaxsparse.distributions import _base
from jaxsparse.distributions import _uniform


@dataclasses.dataclass(frozen=True)
class ErdosRenyi(_base.AbstractDistribution):
  """Density proportional to (in + out) / (in * out); the spatial axes of a convolution are not counted.

  References:
    Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
    science, 2018, https://arxiv.org/abs/1707.04780. No known differences.
  """

  def keep_counts(self, leaves, sparsity):
    raw = [_ratio(leaf.shape[-2:], 1.0) for leaf in leaves]
    return _solve(raw, leaves, sparsity)


@dataclasses.dataclass(frozen=True)
class ERK(_base.AbstractDistribution):
  """Erdos-Renyi-Kernel: density proportional to (sum of dims / product of dims) ** power; leaves above 1 are dense.

  Args:
    power: 0 is uniform, 1 the paper's ERK.

  References:
    Evci et al., Rigging the Lottery, 2020, https://arxiv.org/abs/1911.11134. No known differences.
  """

  power: float = 1.0

  def keep_counts(self, leaves, sparsity):
    return _solve([_ratio(leaf.shape, self.power) for leaf in leaves], leaves, sparsity)


@dataclasses.dataclass(frozen=True)
class ERKPlus(_base.AbstractDistribution):
  """ERK with the density of the last (classifier) leaf fixed.

  Args:
    last: regular expression of the classifier's leaf.
    last_density: its density, in (0, 1].
    power: as in `ERK`.

  Raises:
    ValueError: if the expression matches no leaf, or the budget cannot be met.

  References:
    Liu et al., The Unreasonable Effectiveness of Random Pruning, 2022, https://arxiv.org/abs/2202.02643.
    Differs from the paper: the classifier is named by a regular expression and its density is an argument.
  """

  last: str
  last_density: float = 1.0
  power: float = 1.0

  def __post_init__(self):
    if not 0.0 < self.last_density <= 1.0:
      raise ValueError(f"ERKPlus(last_density={self.last_density!r}) must be in (0, 1].")

  def keep_counts(self, leaves, sparsity):
    total = _base.total_keep(leaves, sparsity)
    fixed = {i: self.last_density for i in _uniform.matching(leaves, self.last, self)}
    raw = [_ratio(leaf.shape, self.power) for leaf in leaves]
    return _base.round_densities(_uniform.with_fixed(fixed, raw, leaves, total, self), leaves, total)


def _ratio(dims: tuple[int, ...], power: float) -> float:
  return (sum(dims) / math.prod(dims)) ** power


def _solve(raw, leaves, sparsity: float) -> list[int]:
  total = _base.total_keep(leaves, sparsity)
  return _base.round_densities(_base.scale_to_total(raw, leaves, total), leaves, total)
