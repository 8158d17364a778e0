"""Movement pruning."""

from jaxsparse import _updater
from jaxsparse import forwards
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.algorithms import _registry
from jaxsparse.algorithms import _schedule_arguments


@_registry.algorithm
def movement(
  sparsity: float | None = None,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  schedule: schedules.AbstractMaskSchedule | None = None,
  **common,
) -> _updater.Updater:
  """Movement pruning: keeps weights that fine-tuning moves away from zero, S <- S - w dL/dw.

  Removed weights keep their stored value; their scores go on, and they come back if these rise above the others.

  Args:
    sparsity, every, start, stop, schedule, **common: as in `magnitude`. The paper refreshes in every update, prunes locally
      or with `distribution=Global()`, and fine-tunes pretrained transformers.

  >>> movement(sparsity=0.9, stop=5000).drop
  Movement()

  References:
    Sanh et al., Movement Pruning: Adaptive Sparsity by Fine-Tuning, 2020, https://arxiv.org/abs/2005.10683.
    Differs from the paper: scores are plain sums, without an optimizer and learning rate of their own; momentum of the
    inner optimizer moves a weight on for a while after its removal. The soft variant (a threshold on scores) is not here.
  """
  schedule = _schedule_arguments.ramp("movement", every, start, stop, schedule)
  return _updater.Updater(
    schedule=schedule, drop=scorers.Movement(), forward=forwards.MaskedGradient(), sparsity=sparsity, **common
  )
