"""Structured RigL."""

from jaxsparse import _updater
from jaxsparse import distributions
from jaxsparse import schedules
from jaxsparse import structures
from jaxsparse.algorithms import _registry
from jaxsparse.algorithms import _schedule_arguments
from jaxsparse.algorithms import dynamic_sparse


@_registry.algorithm
def srigl(
  sparsity: float | None = None,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  drop_fraction: float | schedules.AbstractDropFraction = 0.3,
  structure: structures.AbstractStructure = structures.FixedFanIn(min_salient=0.3),
  distribution: distributions.AbstractDistribution = distributions.ERK(),
  **common,
) -> _updater.Updater:
  """SRigL: RigL with the same number of inputs for every output, and ablation of outputs that are not worth theirs.

  At a refresh K = ceil(f_t * budget). A weight is salient if it survives when the K smallest |w| of the leaf go, or if it is
  among the K largest |gradient| of the others. Outputs with fewer than `min_salient * fan_in` salient weights are ablated;
  fan_in' = floor(budget / active outputs). The K smallest |w| are dropped, those of ablated outputs first, and every active
  output grows by |gradient| to fan_in'. Ablated outputs may come back.

  Args:
    sparsity: fraction removed, an upper bound on density through training; None where `FixedFanIn(fan_in)` implies it.
    every, start, stop, drop_fraction, distribution: as in `rigl`.
    structure: `FixedFanIn(min_salient=0.3)` (0.3 in the paper for convolutional networks, 0.95 for ViT).
    **common: as in `magnitude`.

  >>> srigl(sparsity=0.9, stop=25_000).structure
  FixedFanIn(min_salient=0.3)

  References:
    Lasby et al., Dynamic Sparse Training with Structured Sparsity, 2023, https://arxiv.org/abs/2305.02299.
    Differs from the paper: K is a share of the budget, rounded up, where the authors' code takes it of what is kept, rounded
    down; weights that are dropped in a refresh may grow back in it.
  """
  _schedule_arguments.check_stop("srigl", stop)
  return dynamic_sparse.rigl(
    sparsity,
    every=every,
    start=start,
    stop=stop,
    drop_fraction=drop_fraction,
    structure=structure,
    distribution=distribution,
    **common,
  )
