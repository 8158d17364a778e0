"""Pruning by chance: during training, and once before it."""

from jaxsparse import _updater
from jaxsparse import distributions
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse import structures
from jaxsparse.algorithms import _registry
from jaxsparse.algorithms import _schedule_arguments


@_registry.algorithm
def random_(
  sparsity: float | None = None,
  *,
  every: int = 100,
  start: int = 0,
  stop: int | None = None,
  schedule: schedules.AbstractMaskSchedule | None = None,
  **common,
) -> _updater.Updater:
  """Removes random weights, more at each refresh: the baseline of every criterion.

  Args:
    sparsity, every, start, stop, schedule, **common: as in `magnitude`.

  >>> random_(sparsity=0.9, stop=5000)
  random(sparsity=0.9, stop=5000)

  References:
    Lee et al., JaxPruner, 2023, https://arxiv.org/abs/2304.14082. No known differences.
  """
  schedule = _schedule_arguments.ramp("random", every, start, stop, schedule)
  return _updater.Updater(schedule=schedule, drop=scorers.Random(), sparsity=sparsity, **common)


@_registry.algorithm
def static_sparse(
  sparsity: float | None = None, *, distribution: distributions.AbstractDistribution = distributions.ERK(), **common
) -> _updater.Updater:
  """A random mask drawn before training and never changed.

  Args:
    sparsity: fraction removed.
    distribution: layer densities; they decide the quality (ERK beats uniform by far at high sparsity). The paper's others
      are `Uniform()`, `UniformPlus(...)`, `ErdosRenyi()`, `ERKPlus(...)`, and the factories `snip_ratio`, `grasp_ratio`.
    **common: as in `magnitude`.

  >>> static_sparse(sparsity=0.9).schedule
  Static()

  References:
    Liu et al., The Unreasonable Effectiveness of Random Pruning, 2022, https://arxiv.org/abs/2202.02643.
    Differs from the paper: exact counts instead of independent draws.
  """
  return _updater.Updater(
    schedule=schedules.Static(),
    drop=scorers.Random(),
    init=scorers.Random(),
    sparsity=sparsity,
    distribution=distribution,
    **common,
  )


@_registry.algorithm
def snip_ratio(sparsity: float | None = None, **common) -> _updater.Updater:
  """Random masks at initialisation with the layer densities that SNIP would choose, trained statically.

      pruned, masks = updater.instant_sparsify(params, key=0, loss_fn=loss, batches=[batch])
      opt_state = jaxsparse.set_masks(tx.init(pruned), masks)

  Args:
    sparsity: fraction removed.
    **common: as in `magnitude`, for single weights only.

  >>> snip_ratio(sparsity=0.9).drop
  Shuffled(scorer=Snip())

  References:
    Liu et al., The Unreasonable Effectiveness of Random Pruning, 2022, https://arxiv.org/abs/2202.02643.
    Differs from the paper: exact counts instead of independent draws.
  """
  return _ratio("snip_ratio", scorers.Snip(), sparsity, common)


@_registry.algorithm
def grasp_ratio(sparsity: float | None = None, **common) -> _updater.Updater:
  """Random masks at initialisation with the layer densities that GraSP would choose, trained statically.

  Args:
    sparsity, **common: as in `snip_ratio`.

  >>> grasp_ratio(sparsity=0.9).drop
  Shuffled(scorer=Grasp())

  References:
    Liu et al., The Unreasonable Effectiveness of Random Pruning, 2022, https://arxiv.org/abs/2202.02643.
    Differs from the paper: exact counts instead of independent draws.
  """
  return _ratio("grasp_ratio", scorers.Grasp(), sparsity, common)


def _ratio(name: str, scorer, sparsity, common) -> _updater.Updater:
  structure = common.get("structure", structures.Unstructured())
  if not isinstance(structure, structures.Unstructured):
    raise ValueError(
      f"{name} has layer densities of single weights only; {structure!r} would mix the scores of its units."
    )
  return _updater.Updater(
    schedule=schedules.Static(),
    drop=scorers.Shuffled(scorer),
    sparsity=sparsity,
    **{"distribution": distributions.Global()} | common,
  )
