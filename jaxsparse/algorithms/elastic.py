"""Dynamic sparse training with elastic budgets: for a while after each refresh there is more than the final count."""

from jaxsparse import _updater
from jaxsparse import distributions
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.algorithms import _registry
from jaxsparse.algorithms import _schedule_arguments


@_registry.algorithm
def mest(
  sparsity: float | None = None,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  soft: bool = True,
  amounts: tuple[float, ...] | None = None,
  boundaries: tuple[float, ...] = (0.5625, 0.75),
  gradient_weight: float = 0.0,
  distribution: distributions.AbstractDistribution = distributions.Uniform(),
  **common,
) -> _updater.Updater:
  """MEST: random growth under an elastic budget that tightens in steps.

  Soft ("elastic mutation and shrink"): a refresh keeps the final count of largest |w| + gradient_weight |dL/dw|, then grows
  a share of that count on top, which trains until the next refresh. Hard ("elastic mutation"): it drops that share below the
  final count and grows back to it, so the final count is never exceeded.

  Args:
    sparsity: fraction removed in the end.
    every, start, stop: as in `rigl`; 5 epochs and the whole of training in the paper.
    soft: which of the two.
    amounts: shares of the final count, in turn; None takes the authors' (0.5, 0.25, 0) for soft, (0.2, 0.1, 0) for hard,
      their scripts for 90 %.
    boundaries: shares of [start, stop) after which the next amount holds (epochs 90 and 120 of 160 in their scripts).
    gradient_weight: lambda; 0 in their code's default.
    distribution: layer densities.
    **common: as in `magnitude`.

  >>> mest(sparsity=0.9, stop=1000).surplus
  PiecewiseFraction(fractions=(0.5, 0.25, 0.0), boundaries=(0.5625, 0.75))

  References:
    Yuan et al., MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge, 2021,
    https://arxiv.org/abs/2110.14032.
    Differs from the paper: counts that are not whole are rounded up; no data-efficient training.
  """
  _schedule_arguments.check_stop("mest", stop)
  _schedule_arguments.check_last_part("mest", every, start, stop, max(boundaries, default=0.0))
  amounts = amounts or ((0.5, 0.25, 0.0) if soft else (0.2, 0.1, 0.0))
  moving, none = schedules.PiecewiseFraction(amounts, boundaries), schedules.ConstantFraction(0.0)
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, stop=stop, start=start),
    drop=scorers.MagnitudePlusGradient(gradient_weight) if gradient_weight else scorers.Magnitude(),
    grow=scorers.Random(),
    drop_fraction=none if soft else moving,
    surplus=moving if soft else None,
    init=scorers.Random(),
    sparsity=sparsity,
    distribution=distribution,
    **common,
  )


@_registry.algorithm
def sparcl(
  sparsity: float | None = None,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  amount: float = 0.04,
  boundaries: tuple[float, float] = (0.1, 0.9),
  gradient_weight: float = 0.5,
  distribution: distributions.AbstractDistribution = distributions.Uniform(),
  **common,
) -> _updater.Updater:
  """SparCL's task-aware dynamic masking: expand first, then swap at the budget, then hold, within each task.

  By |w| + gradient_weight |dL/dw| a refresh keeps the final count and grows `amount` of it at random on top (until the first
  boundary), then drops `amount` below it and grows back (until the second), then only keeps it. Start a new optimizer state
  with each task (`set_masks` carries the masks over). Its gradient masking is `jaxsparse.topk_gradient`.

  Args:
    sparsity: fraction removed in the end.
    every, start, stop: as in `rigl`; 5 epochs and the length of a task in the paper.
    amount: share of the final count that is elastic (0.04: 75 % becomes 74 % or 76 %, as in the authors' script).
    boundaries: shares of [start, stop): epochs 5 and 45 of 50 in their script.
    gradient_weight: 0.5 in their code.
    distribution: layer densities.
    **common: as in `magnitude`.

  >>> sparcl(sparsity=0.75, stop=1000).drop
  MagnitudePlusGradient(weight=0.5)

  References:
    Wang et al., SparCL: Sparse Continual Learning on the Edge, 2022, https://arxiv.org/abs/2209.09476.
    Differs from the paper: the removal of examples and the replay buffer belong to the data pipeline and are not here.
  """
  _schedule_arguments.check_stop("sparcl", stop)
  _schedule_arguments.check_last_part("sparcl", every, start, stop, boundaries[0])
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, stop=stop, start=start),
    drop=scorers.MagnitudePlusGradient(gradient_weight),
    grow=scorers.Random(),
    drop_fraction=schedules.PiecewiseFraction((0.0, amount, 0.0), boundaries),
    surplus=schedules.PiecewiseFraction((amount, 0.0), boundaries[:1]),
    init=scorers.Random(),
    sparsity=sparsity,
    distribution=distribution,
    **common,
  )


@_registry.algorithm
def chase(
  sparsity: float | None = None,
  *,
  every: int = 1000,
  start: int = 0,
  stop: int | None = None,
  surplus: float = 0.5,
  elastic_until: float = 0.1875,
  drop_fraction: float = 0.5,
  distribution: distributions.AbstractDistribution = distributions.Global(),
  init_distribution: distributions.AbstractDistribution = distributions.ERK(),
  **common,
) -> _updater.Updater:
  """Chase, the weights' part: an elastic global phase, then dynamic sparse training per leaf. Experimental.

  First a refresh keeps the final count of largest |w| over all leaves and grows `surplus` of it by the largest |dL/dw| over
  all leaves, so the network is denser until the next one. Later it drops a share of every leaf and grows as much there.

  Args:
    sparsity: fraction removed in the end.
    every, start, stop: as in `granet`.
    surplus: share of the final count grown on top. The authors' scripts set a density instead; 0.5 is our choice.
    elastic_until: share of [start, stop) in which the budget is elastic (30 of 160 epochs in their code).
    drop_fraction: share replaced afterwards, on a cosine over the whole of [start, stop) to 0.005 (0.5 in their code).
    distribution: `Global()`; others fix layer densities, and the surplus is grown per leaf.
    init_distribution: layer densities of the first masks.
    **common: as in `magnitude`.

  >>> chase(sparsity=0.9, stop=100_000).init_distribution
  ERK(power=1.0)

  References:
    Yin et al., Dynamic Sparsity Is Channel-Level Sparsity Learner, 2023, https://arxiv.org/abs/2305.19454.
    Differs from the paper: channels are not removed, so this is its S_c = 0.
  """
  _schedule_arguments.check_stop("chase", stop)
  _schedule_arguments.check_last_part("chase", every, start, stop, elastic_until)
  later = schedules.CosineFraction(drop_fraction, end=0.005)
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, stop=stop, start=start),
    drop=scorers.Magnitude(),
    grow=scorers.GradientMagnitude(),
    drop_fraction=schedules.PiecewiseFraction((0.0, later), (elastic_until,)),
    surplus=schedules.PiecewiseFraction((surplus, 0.0), (elastic_until,)),
    init=scorers.Random(),
    init_distribution=init_distribution if distribution.joint else None,
    sparsity=sparsity,
    distribution=distribution,
    **common,
  )
