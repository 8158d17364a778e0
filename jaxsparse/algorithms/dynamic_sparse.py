"""Dynamic sparse training: sparse from the start, a share of the connections moves at every refresh."""

from jaxsparse import _updater
from jaxsparse import distributions
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.algorithms import _registry
from jaxsparse.algorithms import _schedule_arguments


@_registry.algorithm
def set_(
  sparsity: float | None = None,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  drop_fraction: float | schedules.AbstractDropFraction = 0.3,
  distribution: distributions.AbstractDistribution = distributions.ERK(),
  **common,
) -> _updater.Updater:
  """SET: drops the smallest |w|, grows as many at random.

  Args:
    sparsity: fraction removed, constant through training; None where the structure implies it.
    every: updates between refreshes.
    start: count of the first refresh.
    stop: refreshes end before this count; None never ends them.
    drop_fraction: share of the kept weights replaced at each refresh (zeta, 0.3 in the paper, constant); a schedule such
      as `CosineFraction(0.3)` lets it decay until `stop`.
    distribution: layer densities.
    **common: as in `magnitude`.

  >>> set_(sparsity=0.9, stop=1000)
  set(sparsity=0.9, stop=1000)
  >>> set_(sparsity=0.9, stop=1000, drop_fraction=schedules.CosineFraction(0.3)).drop_fraction
  CosineFraction(fraction=0.3, end=0.0)

  References:
    Mocanu et al., 2018, https://arxiv.org/abs/1707.04780.
    Differs from the paper: the smallest |w| are dropped, not the weights nearest to zero from either side; the default
    distribution is ERK; the count of replaced weights is rounded up.
  """
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, stop=stop, start=start),
    drop=scorers.Magnitude(),
    grow=scorers.Random(),
    drop_fraction=_schedule_arguments.fraction("set", drop_fraction, schedules.ConstantFraction, stop),
    init=scorers.Random(),
    skip_step_when_due=True,
    sparsity=sparsity,
    distribution=distribution,
    **common,
  )


@_registry.algorithm
def rigl(
  sparsity: float | None = None,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  drop_fraction: float | schedules.AbstractDropFraction = 0.3,
  distribution: distributions.AbstractDistribution = distributions.ERK(),
  **common,
) -> _updater.Updater:
  """RigL: drops the smallest |w|, grows the removed weights of largest |dL/dw|.

  At a refresh ceil(f_t * kept) weights are dropped and as many grown, f_t = drop_fraction / 2 (1 + cos(pi t / stop)).
  Weights dropped in a refresh may come back in it, with their value; grown ones start at zero.

  Args:
    sparsity: fraction removed, constant through training; None where the structure implies it.
    every: updates between refreshes (Delta T, 100 in the paper).
    start: count of the first refresh.
    stop: refreshes end before this count (T_end, 75 % of training in the paper).
    drop_fraction: alpha, 0.3 in the paper; or any schedule instead of the cosine, such as `ConstantFraction(0.1)`.
    distribution: layer densities (ERK in the paper's best results).
    **common: as in `magnitude`.

  >>> rigl(sparsity=0.9, every=100, stop=25_000)
  rigl(sparsity=0.9, every=100, stop=25000)

  References:
    Evci et al., Rigging the Lottery, 2020, https://arxiv.org/abs/1911.11134.
    Differs from the paper: the count of replaced weights is rounded up, so that small leaves move too.
  """
  _schedule_arguments.check_stop("rigl", stop)
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, stop=stop, start=start),
    drop=scorers.Magnitude(),
    grow=scorers.GradientMagnitude(),
    drop_fraction=_schedule_arguments.fraction("rigl", drop_fraction, schedules.CosineFraction, stop),
    init=scorers.Random(),
    skip_step_when_due=True,
    sparsity=sparsity,
    distribution=distribution,
    **common,
  )


@_registry.algorithm
def snfs(
  sparsity: float | None = None,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  drop_fraction: float | schedules.AbstractDropFraction = 0.3,
  momentum: float = 0.9,
  distribution: distributions.AbstractDistribution = distributions.ERK(),
  **common,
) -> _updater.Updater:
  """Sparse networks from scratch: grows the removed weights of largest smoothed gradient.

  Args:
    sparsity, every, start, stop, drop_fraction, distribution, **common: as in `rigl`.
    momentum: decay of the gradient average that ranks growth; one float32 buffer of the leaf's shape.

  >>> snfs(sparsity=0.9, stop=1000).grow
  Momentum(decay=0.9)

  References:
    Dettmers and Zettlemoyer, 2019, https://arxiv.org/abs/1907.04840.
    Differs from the paper: layer densities stay as the distribution sets them, instead of following the mean momentum.
  """
  _schedule_arguments.check_stop("snfs", stop)
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, stop=stop, start=start),
    drop=scorers.Magnitude(),
    grow=scorers.Momentum(momentum),
    drop_fraction=_schedule_arguments.fraction("snfs", drop_fraction, schedules.CosineFraction, stop),
    init=scorers.Random(),
    sparsity=sparsity,
    distribution=distribution,
    **common,
  )
