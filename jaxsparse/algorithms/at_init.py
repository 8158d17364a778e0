"""Pruning at initialisation: `instant_sparsify` finds the masks, `set_masks` trains with them."""

from jaxsparse import _updater
from jaxsparse import distributions
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.algorithms import _registry


@_registry.algorithm
def snip(
  sparsity: float | None = None, *, distribution: distributions.AbstractDistribution = distributions.Global(), **common
) -> _updater.Updater:
  """SNIP: keeps the weights of largest |w dL/dw| at initialisation, over all leaves.

      pruned, masks = updater.instant_sparsify(params, loss_fn=loss, batches=[batch])
      opt_state = jaxsparse.set_masks(tx.init(pruned), masks)

  Args:
    sparsity: fraction removed.
    distribution: `Global()` as in the paper; others fix the layer densities.
    **common: as in `magnitude`.

  >>> snip(sparsity=0.9).drop
  Snip()

  References:
    Lee et al., SNIP, 2019, https://arxiv.org/abs/1810.02340. No known differences.
  """
  return _at_init(scorers.Snip(), sparsity, distribution, common)


@_registry.algorithm
def grasp(
  sparsity: float | None = None, *, distribution: distributions.AbstractDistribution = distributions.Global(), **common
) -> _updater.Updater:
  """GraSP: keeps the weights whose removal would lower the gradient flow most, the largest w (H g).

  Args:
    sparsity, distribution, **common: as in `snip`.

  >>> grasp(sparsity=0.9).drop
  Grasp()

  References:
    Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, 2020,
    https://arxiv.org/abs/2002.07376. Differs from the paper: `loss_fn` has to divide the logits by the temperature, 200.
  """
  return _at_init(scorers.Grasp(), sparsity, distribution, common)


@_registry.algorithm
def synflow(
  sparsity: float | None = None,
  *,
  iterations: int = 100,
  distribution: distributions.AbstractDistribution = distributions.Global(),
  **common,
) -> _updater.Updater:
  """SynFlow: keeps the weights that carry most flow through the network of absolute weights; needs no data.

  Pass `loss_fn=lambda params, ones: apply(params, ones).sum()` and `batches=[ones]` with an input of ones.

  Args:
    sparsity, distribution, **common: as in `snip`.
    iterations: rounds; the density falls geometrically to its final value (100 in the paper).

  >>> synflow(sparsity=0.9).drop
  SynFlow(iterations=100)

  References:
    Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, 2020,
    https://arxiv.org/abs/2006.05467. No known differences.
  """
  return _at_init(scorers.SynFlow(iterations), sparsity, distribution, common)


def _at_init(scorer, sparsity, distribution, common) -> _updater.Updater:
  return _updater.Updater(
    schedule=schedules.Static(), drop=scorer, sparsity=sparsity, distribution=distribution, **common
  )
