"""Pruning by first- and second-order estimates of the loss."""

from jaxsparse import _updater
from jaxsparse import distributions
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.algorithms import _registry
from jaxsparse.algorithms import _schedule_arguments


@_registry.algorithm
def saliency(
  sparsity: float | None = None,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  schedule: schedules.AbstractMaskSchedule | None = None,
  **common,
) -> _updater.Updater:
  """Removes the weights of smallest |w dL/dw| on the current batch.

  Args:
    sparsity, every, start, stop, schedule, **common: as in `magnitude`.

  >>> saliency(sparsity=0.9, stop=5000).drop
  WeightTimesGradient()

  References:
    Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, 2017,
    https://arxiv.org/abs/1611.06440. Differs from the paper: single weights, not filters (pass `structure=Channel()`).
  """
  schedule = _schedule_arguments.ramp("saliency", every, start, stop, schedule)
  return _updater.Updater(schedule=schedule, drop=scorers.WeightTimesGradient(), sparsity=sparsity, **common)


@_registry.algorithm
def global_saliency(
  sparsity: float | None = None,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  schedule: schedules.AbstractMaskSchedule | None = None,
  distribution: distributions.AbstractDistribution = distributions.Global(),
  **common,
) -> _updater.Updater:
  """Saliency pruning in which all leaves compete.

  Args:
    sparsity, every, start, stop, schedule, **common: as in `magnitude`.
    distribution: `Global()`.

  >>> global_saliency(sparsity=0.9, stop=5000).distribution
  Global()

  References:
    Lee et al., JaxPruner, 2023, https://arxiv.org/abs/2304.14082. No known differences.
  """
  schedule = _schedule_arguments.ramp("global_saliency", every, start, stop, schedule)
  return _updater.Updater(
    schedule=schedule, drop=scorers.WeightTimesGradient(), sparsity=sparsity, distribution=distribution, **common
  )


@_registry.algorithm
def adam_fisher(
  sparsity: float | None = None,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  schedule: schedules.AbstractMaskSchedule | None = None,
  **common,
) -> _updater.Updater:
  """Removes the weights of smallest w^2 nu / 2, with Adam's second moment nu as the diagonal Fisher.

  Needs an inner optimizer that keeps `nu` (Adam, AdamW, NAdam, ...); for others set `drop=Fisher()` on an `Updater`.

  Args:
    sparsity, every, start, stop, schedule, **common: as in `magnitude`.

  >>> adam_fisher(sparsity=0.9, stop=5000).drop
  AdamFisher()

  References:
    Lee et al., JaxPruner, 2023, https://arxiv.org/abs/2304.14082 (its Fisher extension).
    No known differences.
  """
  schedule = _schedule_arguments.ramp("adam_fisher", every, start, stop, schedule)
  return _updater.Updater(schedule=schedule, drop=scorers.AdamFisher(), sparsity=sparsity, **common)
