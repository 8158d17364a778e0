"""How a sparsity is shared out over the leaves of a model."""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from jaxsparse import selection


class LeafShape(NamedTuple):
  """What a distribution may know of a leaf.

  Attributes:
    name: path of the leaf, such as "mlp/kernel".
    shape: shape of one layer.
    units: units in a group of the leaf's structure.
    groups: groups in the leaf (layers included).
    unit_size: entries in a unit.
  """

  name: str
  shape: tuple[int, ...]
  units: int
  groups: int
  unit_size: int

  @property
  def size(self) -> int:
    return self.units * self.groups * self.unit_size


@dataclasses.dataclass(frozen=True)
class AbstractDistribution(abc.ABC):
  """Shares a total sparsity out over leaves, as units to keep in each group."""

  joint: ClassVar[bool] = False
  """Whether counts depend on the scores of all leaves, and are only known at a refresh (`Global`)."""

  @abc.abstractmethod
  def keep_counts(self, leaves: Sequence[LeafShape], sparsity: float) -> list[int]:
    """Units to keep per group, one number a leaf, each in [0, leaf.units]."""


def total_keep(leaves: Sequence[LeafShape], sparsity: float) -> int:
  """Entries to keep over all leaves."""
  return selection.keep_count(sum(leaf.size for leaf in leaves), sparsity)


def round_densities(densities: Sequence[float], leaves: Sequence[LeafShape], total: int) -> list[int]:
  """Densities -> integer counts whose sum comes as near to `total` entries as whole units allow, never above.

  Every count is rounded down, then the largest remainders are rounded up while they fit, so an unstructured total is
  exact.
  """
  wanted = [min(max(d, 0.0), 1.0) * leaf.units for d, leaf in zip(densities, leaves, strict=True)]
  counts = [math.floor(w + 1e-9) for w in wanted]
  steps = [leaf.groups * leaf.unit_size for leaf in leaves]
  left = total - sum(c * s for c, s in zip(counts, steps))
  # A second round is needed only when densities were clipped and their sum falls short.
  while True:
    order = sorted(range(len(counts)), key=lambda i: wanted[i] - counts[i], reverse=True)
    moved = False
    for i in order:
      if steps[i] <= left and counts[i] < leaves[i].units:
        counts[i] += 1
        left -= steps[i]
        moved = True
    if not moved:
      return counts


def scale_to_total(raw: Sequence[float], leaves: Sequence[LeafShape], total: float) -> list[float]:
  """Densities proportional to `raw`, at most 1, that keep `total` entries in sum.

  Leaves whose share exceeds 1 become dense and the factor of the others is solved again, as in RigL's code.
  """
  dense: set[int] = set()
  while True:
    budget = total - sum(leaves[i].size for i in dense)
    weight = sum(raw[i] * leaves[i].size for i in range(len(leaves)) if i not in dense)
    factor = budget / weight if weight > 0 else 0.0
    over = [i for i in range(len(leaves)) if i not in dense and raw[i] * factor > 1.0]
    if not over:
      return [1.0 if i in dense else raw[i] * factor for i in range(len(leaves))]
    dense.add(max(over, key=lambda i: raw[i]))
