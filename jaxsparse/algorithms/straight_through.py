"""Straight-through methods: dense weights are trained behind a mask that follows them."""

from jaxsparse import _updater
from jaxsparse import forwards
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.algorithms import _registry


@_registry.algorithm
def magnitude_ste(
  sparsity: float | None = None,
  *,
  every: int = 1,
  start: int = 0,
  stop: int | None = None,
  schedule: schedules.AbstractMaskSchedule | None = None,
  **common,
) -> _updater.Updater:
  """The forward pass uses the largest |w|; its gradient is applied to all weights.

  Args:
    sparsity: fraction removed; None where the structure implies it.
    every: updates between new masks.
    start: count of the first refresh; dense before it.
    stop: masks are fixed from this count on; None never fixes them.
    schedule: any schedule instead of `Periodic(every, stop, start)`.
    **common: as in `magnitude`.

  >>> magnitude_ste(sparsity=0.9).forward
  StraightThrough()

  References:
    Bengio et al., 2013, https://arxiv.org/abs/1308.3432; Lee et al., JaxPruner, 2023, https://arxiv.org/abs/2304.14082.
    No known differences.
  """
  schedule = schedule or schedules.Periodic(every=every, stop=stop, start=start)
  return _updater.Updater(
    schedule=schedule, drop=scorers.Magnitude(), forward=forwards.StraightThrough(), sparsity=sparsity, **common
  )


@_registry.algorithm
def random_ste(
  sparsity: float | None = None,
  *,
  every: int = 1,
  start: int = 0,
  stop: int | None = None,
  schedule: schedules.AbstractMaskSchedule | None = None,
  **common,
) -> _updater.Updater:
  """Straight-through training with a random mask, drawn anew at every refresh.

  Args:
    sparsity, every, start, stop, schedule, **common: as in `magnitude_ste`.

  >>> random_ste(sparsity=0.9, stop=1000)
  random_ste(sparsity=0.9, stop=1000)

  References:
    Lee et al., JaxPruner, 2023, https://arxiv.org/abs/2304.14082. No known differences.
  """
  schedule = schedule or schedules.Periodic(every=every, stop=stop, start=start)
  return _updater.Updater(
    schedule=schedule, drop=scorers.Random(), forward=forwards.StraightThrough(), sparsity=sparsity, **common
  )


@_registry.algorithm
def sr_ste(
  sparsity: float | None = None,
  *,
  decay: float = 2e-4,
  every: int = 1,
  start: int = 0,
  stop: int | None = None,
  schedule: schedules.AbstractMaskSchedule | None = None,
  **common,
) -> _updater.Updater:
  """Sparse-refined straight-through: g + decay (1 - mask) w, made for N:M from scratch.

  Args:
    sparsity: None with `structure=NM(n, m)`, which implies it.
    decay: strength of the pull on removed weights; the paper's 2e-4 goes with SGD at learning rate 0.1.
    every, start, stop, schedule, **common: as in `magnitude_ste`.

  >>> from jaxsparse import structures
  >>> sr_ste(structure=structures.NM(2, 4)).forward
  SRSTE(decay=0.0002)

  References:
    Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, 2021,
    https://arxiv.org/abs/2102.04010. No known differences.
  """
  schedule = schedule or schedules.Periodic(every=every, stop=stop, start=start)
  return _updater.Updater(
    schedule=schedule, drop=scorers.Magnitude(), forward=forwards.SRSTE(decay), sparsity=sparsity, **common
  )
