"""Sparse gradients: only the largest of each leaf reach the optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _tree
from jaxsparse import selection


class TopKGradientState(NamedTuple):
  """shape=() int32 count of updates, and the masks in use: a tree like the gradients, `MaskedNode` where all pass."""

  count: jax.Array
  gradient_masks: Any


def topk_gradient(keep: float = 0.2, every: int = 30) -> optax.GradientTransformation:
  """SparCL's dynamic gradient masking: each leaf passes its `keep` largest |gradient|, the rest is zero.

  Positions are chosen every `every` updates and reused in between. Put it before the optimizer, inside the wrapper:
  `updater.wrap_optax(optax.chain(topk_gradient(0.2), optax.sgd(0.03)))`; there it sees gradients of kept weights only. An
  optimizer with momentum spreads later updates over earlier positions, too.

  Args:
    keep: share of a leaf's entries that pass, in (0, 1], rounded down but at least one. Leaves with fewer than two
      dimensions pass whole.
    every: updates between new positions.

  Returns:
    An optax transformation.

  Raises:
    ValueError: for a share outside (0, 1] or `every` below 1.

  >>> tx = topk_gradient(keep=0.25, every=2)
  >>> grads = {"w": jnp.array([[1.0, -3.0], [2.0, 0.5]])}
  >>> tx.update(grads, tx.init(grads))[0]["w"].tolist()
  [[0.0, -3.0], [0.0, 0.0]]

  References:
    Wang et al., SparCL: Sparse Continual Learning on the Edge, 2022, https://arxiv.org/abs/2209.09476 (80 % removed, 30
    batches). No known differences.
  """
  if not 0.0 < keep <= 1.0 or every < 1:
    raise ValueError(f"topk_gradient(keep={keep!r}, every={every!r}) needs keep in (0, 1] and every >= 1.")

  def init_fn(params):
    whole = lambda p: optax.MaskedNode() if _tree.is_masked_node(p) or jnp.ndim(p) < 2 else jnp.ones(p.shape, bool)
    masks = jax.tree.map(whole, params, is_leaf=_tree.is_masked_node)
    return TopKGradientState(jnp.zeros((), jnp.int32), masks)

  def update_fn(updates, state, params=None):
    del params
    leaves, treedef = jax.tree.flatten(updates, is_leaf=_tree.is_masked_node)
    old = treedef.flatten_up_to(state.gradient_masks)
    masked = [i for i, mask in enumerate(old) if not _tree.is_masked_node(mask)]
    count = lambda g: max(1, g.size - selection.keep_count(g.size, keep))
    choose = lambda: [selection.topk_mask(jnp.abs(leaves[i]), count(leaves[i])) for i in masked]
    new = jax.lax.cond(state.count % every == 0, choose, lambda: [old[i] for i in masked])
    leaves, old = list(leaves), list(old)
    for i, mask in zip(masked, new):
      leaves[i], old[i] = jnp.where(mask, leaves[i], jnp.zeros((), leaves[i].dtype)), mask
    state = TopKGradientState(optax.safe_increment(state.count), treedef.unflatten(old))
    return treedef.unflatten(leaves), state

  return optax.GradientTransformation(init_fn, update_fn)
