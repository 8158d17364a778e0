"""The same sparsity everywhere, and the variant that spares the first and the last layer."""

import dataclasses
import re

from jaxsparse import selection
from jaxsparse.distributions import _base


@dataclasses.dataclass(frozen=True)
class Uniform(_base.AbstractDistribution):
  """Every leaf gets the same sparsity: keep = units - floor(units * sparsity) in each group."""

  def keep_counts(self, leaves, sparsity):
    return [selection.keep_count(leaf.units, sparsity) for leaf in leaves]


@dataclasses.dataclass(frozen=True)
class UniformPlus(_base.AbstractDistribution):
  """Uniform, but the first layer stays dense and the last keeps at least `last_density`.

  The other leaves share what is left of the budget evenly, so the total sparsity is the one asked for.

  Args:
    first: regular expression (searched in the leaf's path) of the leaf that stays dense, or None.
    last: regular expression of the leaf that keeps at least `last_density`, or None.
    last_density: smallest density of the last leaf, in (0, 1].

  Raises:
    ValueError: if neither leaf is named, an expression matches no leaf, or the budget cannot be met.

  References:
    Gale, Elsen, Hooker, The State of Sparsity in Deep Neural Networks, 2019, https://arxiv.org/abs/1902.09574.
    Differs from the paper: layers are named by regular expressions, not found by position.
  """

  first: str | None = None
  last: str | None = None
  last_density: float = 0.2

  def __post_init__(self):
    if self.first is None and self.last is None:
      raise ValueError(
        "UniformPlus needs first= and/or last=, regular expressions of the leaves it spares; use Uniform() to spare none."
      )
    if not 0.0 < self.last_density <= 1.0:
      raise ValueError(f"UniformPlus(last_density={self.last_density!r}) must be in (0, 1].")

  def keep_counts(self, leaves, sparsity):
    total = _base.total_keep(leaves, sparsity)
    fixed = {i: 1.0 for i in matching(leaves, self.first, self)}
    fixed |= {i: max(self.last_density, 1.0 - sparsity) for i in matching(leaves, self.last, self)}
    return _base.round_densities(with_fixed(fixed, [1.0] * len(leaves), leaves, total, self), leaves, total)


def matching(leaves, pattern: str | None, distribution) -> list[int]:
  """Positions of the leaves whose path matches; [] for no pattern, an error for one that matches nothing."""
  if pattern is None:
    return []
  found = [i for i, leaf in enumerate(leaves) if re.search(pattern, leaf.name)]
  if not found:
    raise ValueError(
      f"{distribution!r}: {pattern!r} matches none of the pruned leaves {[leaf.name for leaf in leaves]}."
    )
  return found


def with_fixed(fixed: dict[int, float], raw, leaves, total: int, distribution) -> list[float]:
  """Densities of `fixed` leaves as given, of the others proportional to `raw` so that `total` entries are kept."""
  rest = [i for i in range(len(leaves)) if i not in fixed]
  budget = total - sum(d * leaves[i].size for i, d in fixed.items())
  if budget < 0:
    raise ValueError(
      f"{distribution!r}: the leaves that it spares hold more entries than the {total} that may be kept; lower the sparsity."
    )
  if not rest:
    raise ValueError(f"{distribution!r}: every pruned leaf is spared, so the sparsity cannot be met.")
  solved = dict(zip(rest, _base.scale_to_total([raw[i] for i in rest], [leaves[i] for i in rest], budget)))
  return [fixed.get(i, solved.get(i, 0.0)) for i in range(len(leaves))]
