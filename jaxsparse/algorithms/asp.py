"""One-shot N:M of a trained model, then fine-tuning behind fixed masks: the baseline of all N:M training."""

from jaxsparse import _updater
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse import structures
from jaxsparse.algorithms import _registry


@_registry.algorithm
def asp(
  sparsity: float | None = None, *, at: int = 0, structure: structures.AbstractStructure = structures.NM(2, 4), **common
) -> _updater.Updater:
  """Keeps the largest |w| of every group once, in the update with count `at`, and trains what is left.

  Args:
    sparsity: None with N:M, which implies it.
    at: count of the update that prunes; 0 for a model that is trained already. Before it training is dense.
    structure: `NM(2, 4)`.
    **common: as in `magnitude`.

  >>> asp(at=1000)
  asp(at=1000)

  References:
    Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, https://arxiv.org/abs/2104.08378.
    Differs from the paper: channels are not permuted before pruning, and the learning rate of the fine-tuning (the
    paper repeats the dense training's whole schedule) is the wrapped optimizer's.
  """
  return _updater.Updater(
    schedule=schedules.OneShot(at), drop=scorers.Magnitude(), sparsity=sparsity, structure=structure, **common
  )
