"""Pruning by magnitude: per leaf, global, gradual (GMP), and to N:M step by step."""

from jaxsparse import _updater
from jaxsparse import distributions
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse import structures
from jaxsparse.algorithms import _registry
from jaxsparse.algorithms import _schedule_arguments


@_registry.algorithm
def magnitude(
  sparsity: float | None = None,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  schedule: schedules.AbstractMaskSchedule | None = None,
  **common,
) -> _updater.Updater:
  """Removes the weights of smallest |w|, more at each refresh (JaxPruner's `magnitude`).

  At each refresh the `keep` entries of largest |w| among those still kept survive, with
  sparsity_t = sparsity * (1 - (1 - tau)^3), tau from 0 at the first refresh to 1 at the last before `stop`.

  Args:
    sparsity: final fraction removed, in [0, 1); None where the structure implies it.
    every: updates between refreshes.
    start: count of the first refresh.
    stop: refreshes end before this count; needed unless `schedule` is given.
    schedule: any schedule instead of the cubic ramp, such as `OneShot(at=1000)`.
    **common: `structure`, `distribution`, `rules`, `pack_masks`, `on_mismatch` of `Updater`.

  Raises:
    ValueError, TypeError: for a bad schedule, sparsity or unknown argument.

  >>> magnitude(sparsity=0.9, every=100, stop=5000)
  magnitude(sparsity=0.9, every=100, stop=5000)

  References:
    Han et al., Learning both Weights and Connections, 2015, https://arxiv.org/abs/1506.02626; schedule of Zhu and Gupta,
    2017, https://arxiv.org/abs/1710.01878. Differs from the papers: removed weights are zero and do not come back.
  """
  schedule = _schedule_arguments.ramp("magnitude", every, start, stop, schedule)
  return _updater.Updater(schedule=schedule, drop=scorers.Magnitude(), sparsity=sparsity, **common)


@_registry.algorithm
def gmp(
  sparsity: float | None = None,
  *,
  initial_sparsity: float = 0.0,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  **common,
) -> _updater.Updater:
  """Gradual magnitude pruning: sparsity_t = s_f + (s_i - s_f)(1 - tau)^3.

  Args:
    sparsity: final sparsity s_f.
    initial_sparsity: sparsity s_i at the first refresh.
    every: updates between refreshes (the paper: 100 to 1000).
    start: count of the first refresh.
    stop: refreshes end before this count.
    **common: as in `magnitude`.

  >>> gmp(sparsity=0.9, initial_sparsity=0.5, stop=5000).schedule.power
  3.0

  References:
    Zhu and Gupta, To prune, or not to prune, 2017, https://arxiv.org/abs/1710.01878.
    Differs from the paper: tau reaches 1 at the last refresh before `stop` whatever `every` is, and removed weights are
    stored as zeros, so they do not come back.
  """
  schedule = _schedule_arguments.ramp("gmp", every, start, stop, None)
  return _updater.Updater(
    schedule=schedule, drop=scorers.Magnitude(), sparsity=sparsity, initial_sparsity=initial_sparsity, **common
  )


@_registry.algorithm
def global_magnitude(
  sparsity: float | None = None,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  schedule: schedules.AbstractMaskSchedule | None = None,
  distribution: distributions.AbstractDistribution = distributions.Global(),
  **common,
) -> _updater.Updater:
  """Magnitude pruning in which all leaves compete: the largest |w| of the whole model are kept.

  Args:
    sparsity, every, start, stop, schedule, **common: as in `magnitude`.
    distribution: `Global()`.

  >>> global_magnitude(sparsity=0.9, stop=5000).distribution
  Global()

  References:
    Blalock et al., What is the State of Neural Network Pruning?, 2020, https://arxiv.org/abs/2003.03033.
    No known differences.
  """
  schedule = _schedule_arguments.ramp("global_magnitude", every, start, stop, schedule)
  return _updater.Updater(
    schedule=schedule, drop=scorers.Magnitude(), sparsity=sparsity, distribution=distribution, **common
  )


@_registry.algorithm
def iterative_nm(
  n: int = 2, m: int = 4, *, every: int = 100, start: int = 0, stop: int | None = None, **common
) -> _updater.Updater:
  """Magnitude pruning to N:M in steps: m:m, m-1:m, ... n:m, evenly over [start, stop) (JaxPruner's extension).

  Args:
    n: entries kept of each group in the end.
    m: group size, along the reduction axis.
    every: updates between refreshes.
    start: count of the first refresh.
    stop: refreshes end before this count.
    **common: as in `magnitude`, without `structure` (pass `structure=NM(n, m, axis=...)` to `magnitude` for other axes).

  >>> iterative_nm(2, 4, stop=1000).structure
  NM(n=2, m=4)

  References:
    Lee et al., JaxPruner, 2023, https://arxiv.org/abs/2304.14082.
    Differs from JaxPruner: groups run along the reduction axis, where a sparse matmul can use them.
  """
  if "structure" in common:
    raise TypeError(
      "iterative_nm(n, m) makes its own structure; use magnitude(structure=NM(n, m, axis=...), schedule=Linear(...))."
    )
  if stop is None:
    raise ValueError("iterative_nm needs stop=, the count of updates at which pruning has ended.")
  schedule = schedules.Linear(every=every, stop=stop, start=start)
  return _updater.Updater(schedule=schedule, drop=scorers.Magnitude(), structure=structures.NM(n, m), **common)
