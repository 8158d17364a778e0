"""Pruning at once, without an optimizer: scores over some batches, then one selection at the final counts."""

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _choice
from jaxsparse import _engine
from jaxsparse import _plan
from jaxsparse import _tree
from jaxsparse import masks as masks_lib
from jaxsparse import scorers


def prune(updater, params, key, loss_fn, batches, given):
  """Scores, then one selection at the final counts; several rounds for scorers that ask for them."""
  leaves = _tree.flatten(params)
  plans = _plan.make_plan(updater, leaves)
  key = jax.random.wrap_key_data(_engine.key_data(key), impl="threefry2x32")
  sparse = [
    _choice.Leaf(i, plan, leaves.values[i], None, jax.random.fold_in(key, i), {}, (), ())
    for i, plan in enumerate(plans)
    if plan.structure is not None
  ]

  def pruned(masks):
    values = list(leaves.values)
    for leaf, mask in zip(sparse, masks):
      values[leaf.index] = jnp.where(mask, leaf.param, jnp.zeros((), leaf.param.dtype))
    return leaves.treedef.unflatten(values)

  if given is None:
    allowed = [jnp.ones(leaf.plan.shape, bool) for leaf in sparse]
  else:
    nodes = _tree.match(leaves, given, "masks=")
    whole = lambda leaf, node: jnp.ones(leaf.plan.shape, bool) if _tree.is_masked_node(node) else node
    allowed = [jnp.asarray(masks_lib.unpack(whole(leaf, nodes[leaf.index]))) != 0 for leaf in sparse]
  masks = allowed
  if isinstance(updater.drop, scorers.AbstractModelScorer):
    rounds = updater.drop.rounds
    choose = jax.jit(lambda scores, masks, progress: _choice.select(updater, sparse, scores, masks, progress))
    for r in range(1, rounds + 1):
      scores = _tree.flatten(updater.drop.scores(pruned(masks), loss_fn, batches, jax.random.fold_in(key, r))).values
      progress = (1 - (1 - updater.sparsity) ** (r / rounds)) / updater.sparsity if r < rounds else 1.0
      masks = choose([scores[leaf.index] for leaf in sparse], masks, jnp.float32(progress))
  else:
    sparse = _score_inputs(updater.drop, sparse, params, loss_fn, batches)
    if given is None:
      masks = jax.jit(lambda: _choice.choose(updater, sparse, None, jnp.float32(1), jnp.float32(1)))()
    else:
      scores = lambda: [updater.drop.score(leaf.drop_state, leaf.inputs) for leaf in sparse]
      masks = jax.jit(lambda: _choice.select(updater, sparse, scores(), allowed, jnp.float32(1)))()
  if given is not None:
    _check_within(sparse, masks, allowed)
  nodes = [optax.MaskedNode()] * len(plans)
  for leaf, mask in zip(sparse, masks):
    nodes[leaf.index] = mask
  return pruned(masks), leaves.treedef.unflatten(nodes)


def _check_within(sparse, masks, allowed):
  for leaf, mask, may in zip(sparse, masks, allowed):
    beyond = jnp.any(mask & ~may)
    if not isinstance(beyond, jax.core.Tracer) and beyond:
      raise ValueError(
        f"{leaf.plan.label}: masks= keep {int(may.sum())} of {may.size} weights, but {int(mask.sum())} are to be kept."
      )


def _score_inputs(scorer, sparse, params, loss_fn, batches):
  """The leaves with the scorer's state over the batches, and the mean gradient, where the scorer uses gradients."""
  sparse = [leaf._replace(drop_state=scorer.init(leaf.param)) for leaf in sparse]
  if not scorer.uses_gradient:
    return sparse
  grad = jax.jit(jax.grad(loss_fn))
  for batch in batches:
    flat = _tree.flatten(grad(params, batch)).values
    sparse = [leaf._replace(grad=flat[leaf.index]) for leaf in sparse]
    sparse = [leaf._replace(drop_state=scorer.accumulate(leaf.drop_state, leaf.inputs)) for leaf in sparse]
  mean = _tree.flatten(scorers.mean_gradient(loss_fn, params, batches)).values
  return [leaf._replace(grad=mean[leaf.index]) for leaf in sparse]
