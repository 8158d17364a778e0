"""One ranking over all leaves."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax

from jaxsparse import selection
from jaxsparse.distributions import _base


@dataclasses.dataclass(frozen=True)
class Global(_base.AbstractDistribution):
  """Leaves compete: the highest scores over all of them are kept, whichever leaf they are in.

  Units are compared by their score per entry, and the budget is counted in entries, so leaves with different unit
  sizes (whole channels) may be mixed; the total is then exact up to one unit.
  """

  joint: ClassVar[bool] = True

  def keep_counts(self, leaves, sparsity):
    raise TypeError("Global() has no counts before the scores are known; the engine calls allocate().")

  def allocate(
    self, scores: Sequence[jax.Array], leaves: Sequence[_base.LeafShape], total: jax.Array | int
  ) -> list[jax.Array]:
    """Scores of the units of every leaf and the entries to keep in all -> int32 units to keep in each leaf."""
    per_entry = [s if leaf.unit_size == 1 else s / leaf.unit_size for s, leaf in zip(scores, leaves, strict=True)]
    return selection.global_keep_counts(per_entry, total, [leaf.unit_size for leaf in leaves])
