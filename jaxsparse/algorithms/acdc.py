"""Alternating compressed / decompressed training."""

from jaxsparse import _updater
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.algorithms import _registry


@_registry.algorithm
def acdc(
  sparsity: float | None = None, *, sparse_steps: int, dense_steps: int, start: int = 0, stop: int, **common
) -> _updater.Updater:
  """AC/DC: turns of magnitude-masked and dense training; the last turn is sparse.

  Dense before `start`; then the largest |w| are kept for `sparse_steps` updates, all weights train for `dense_steps`
  (removed ones from zero), and so on. The last switch to sparse falls at or before `stop`.

  Args:
    sparsity: fraction removed in sparse turns; None where the structure implies it.
    sparse_steps: updates in a sparse turn (5 epochs in the paper's ImageNet runs).
    dense_steps: updates in a dense turn (likewise 5 epochs).
    start: count of the first switch to sparse.
    stop: no dense turn ends after this count.
    **common: as in `magnitude`; the paper ranks globally: `distribution=Global()`.

  >>> acdc(sparsity=0.9, sparse_steps=100, dense_steps=100, stop=1000).schedule.start
  0

  References:
    Peste et al., AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks, 2021,
    https://arxiv.org/abs/2106.12379. Differs from the paper: the default distribution is uniform, as in JaxPruner.
  """
  schedule = schedules.Alternating(sparse_steps=sparse_steps, dense_steps=dense_steps, stop=stop, start=start)
  return _updater.Updater(schedule=schedule, drop=scorers.Magnitude(), sparsity=sparsity, **common)
