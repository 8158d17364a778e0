"""Top-K always sparse training."""

from jaxsparse import _updater
from jaxsparse import forwards
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.algorithms import _registry


@_registry.algorithm
def top_kast(
  sparsity: float | None = None,
  *,
  explore: float = 0.3,
  decay: float = 1e-4,
  every: int = 1,
  start: int = 0,
  stop: int | None = None,
  **common,
) -> _updater.Updater:
  """Top-KAST: the largest |w| are used, a larger set around them is trained, so that others may grow into use.

  g on B plus decay w on A and decay w / D on B - A: see `forwards.TopKast`.

  Args:
    sparsity: fraction removed in the forward pass.
    explore: share of a leaf that gets gradients beside what is used: the backward sparsity is `sparsity - explore` (the
      paper's 80 % forward and 50 % backward).
    decay: L2 pull, stronger by 1 / density outside the forward set; the paper's value was not checked.
    every: updates between new forward masks (1 in the paper; it shows that 100 does little harm).
    start: count of the first refresh; the masks of the largest |w| hold before it.
    stop: masks are fixed from this count on.
    **common: as in `magnitude`.

  >>> top_kast(sparsity=0.8).forward
  TopKast(explore=0.3, decay=0.0001)

  References:
    Jayakumar et al., Top-KAST: Top-K Always Sparse Training, 2020, https://arxiv.org/abs/2106.03517.
    Differs from the paper: the larger set is found in every update, whatever `every` is; momentum still moves weights that
    have just left it.
  """
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, stop=stop, start=start),
    drop=scorers.Magnitude(),
    init=scorers.Magnitude(),
    forward=forwards.TopKast(explore, decay),
    sparsity=sparsity,
    **common,
  )
