"""Modular networks with Hebbian growth."""

from jaxsparse import _updater
from jaxsparse import distributions
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.algorithms import _registry
from jaxsparse.algorithms import _schedule_arguments


@_registry.algorithm
def g2gnet(
  sparsity: float | None = None,
  *,
  modules: int = 4,
  inside: float = 1.0,
  between: float = 0.1,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  drop_fraction: float | schedules.AbstractDropFraction = 0.3,
  distribution: distributions.AbstractDistribution = distributions.Uniform(),
  **common,
) -> _updater.Updater:
  """G2GNet: block-modular first masks, then the smallest |w| drop and the most correlated pairs of units grow. Experimental.

  `tx.update(..., corr=tree)` takes the correlations of activations, a tree like the parameters with an array for every
  kernel; see `jaxsparse.recipes.correlation`. They are only read in updates that are due (`updater.due(opt_state)`).

  Args:
    sparsity: fraction removed, constant.
    modules: runs of units in every layer; connections inside and between them are drawn with the weights
    inside, between: of `scorers.Modular`. With between=0 and sparsity=1 - 1/modules, layers are block diagonal.
    every, start, stop, drop_fraction: as in `set`.
    distribution: layer densities.
    **common: as in `magnitude`.

  >>> g2gnet(sparsity=0.75, modules=4, between=0.0, stop=1000).init
  Modular(modules=4, inside=1.0, between=0.0)

  References:
    G2GNet ("group-to-group" ensemble networks with Hebbian regrowth). Differs from the paper: not known. Only the abstract
    was read; the growth score, all defaults and the schedule are ours.
  """
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, stop=stop, start=start),
    drop=scorers.Magnitude(),
    grow=scorers.Correlation(),
    drop_fraction=_schedule_arguments.fraction("g2gnet", drop_fraction, schedules.ConstantFraction, stop),
    init=scorers.Modular(modules, inside, between),
    sparsity=sparsity,
    distribution=distribution,
    **common,
  )
