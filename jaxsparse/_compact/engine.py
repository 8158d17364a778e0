"""The update of compactly stored parameters: what is dropped is replaced in its slot, by a zero with zero moments.

A refresh changes where values lie, not their order, so nothing moves: values, gradients and moments of the slots that
stay are not touched, and a step is one of the masked engine whose mask says which slots stay.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _choice
from jaxsparse import _engine
from jaxsparse import _plan
from jaxsparse import _state
from jaxsparse import _tree
from jaxsparse import _zero_map
from jaxsparse import masks as masks_lib
from jaxsparse import structures
from jaxsparse._compact import storage

CANDIDATES = "candidate_scores"


def init(
  updater: Any, inner: optax.GradientTransformation, params: Any, key: jax.Array | int, tag: str | None
) -> _state.SparsityState:
  """The state before the first update; Positions are still to be set."""
  leaves = _tree.flatten(params)
  plans = _plan.make_plan(updater, leaves)
  storage.check_plans(updater, plans)
  nodes = []
  for plan, value in zip(plans, leaves.values):
    if not plan.compact:
      nodes.append(optax.MaskedNode())
      continue
    stored = storage.stored_shape(updater, plan)
    if tuple(value.shape) != stored:
      raise ValueError(
        f"{plan.label} has shape {tuple(value.shape)}; of the dense shape {plan.shape}, {plan.structure!r} stores {stored}. "
        "`params, masks = updater.compact_init(...)` makes it."
      )
    whole = structures.Compact(plan.structure, plan.shape)
    nodes.append(masks_lib.UnsetMask(stored, repr(updater), structure=whole))
  return _state.first(_engine.key_data(key), leaves.treedef.unflatten(nodes), inner.init(params), tag)


def update(
  updater: Any,
  inner: optax.GradientTransformationExtraArgs,
  zero_map: _zero_map.ZeroMap,
  grads: Any,
  state: _state.SparsityState,
  params: Any,
  scorer_grads: Any,
  extra: dict[str, Any],
):
  """One update of the wrapped optimizer: `(updates, state)`. Arguments as in `_engine.update`."""
  if params is None:
    raise ValueError("tx.update(grads, opt_state, params) needs the parameters: refreshes rank them.")
  leaves = _tree.flatten(params)
  nodes = [_state.require_set(node) for node in _tree.match(leaves, state.masks, "the masks in the optimizer state")]
  plans = _plan.make_plan(updater, leaves)
  _check_nodes(plans, nodes)
  extra = dict(extra)
  candidates = _candidates(updater, leaves, plans, extra)
  sparse = _sparse_leaves(leaves, plans, state, scorer_grads, candidates)
  refreshes = updater.schedule.refreshes and bool(sparse)
  due = updater.schedule.due(state.count)
  masks = [optax.MaskedNode()] * len(nodes)
  if refreshes and candidates is not None:
    nodes, masks = _refresh_if(updater, due, sparse, nodes, state.count)
  hold = due if refreshes and updater.skip_step_when_due else None
  updates, inner_state = _engine.step_masked(updater, inner, zero_map, grads, state, leaves, masks, hold, extra)
  if refreshes and candidates is None:
    # Without scores nothing can grow; what must not happen unseen is made to be seen.
    updates = jax.tree.map(lambda u: jnp.where(due, jnp.full((), jnp.nan, u.dtype), u), updates)
  structure = jax.tree.structure(state.masks, is_leaf=_tree.is_mask_leaf)
  return updates, state._replace(
    count=optax.safe_increment(state.count), masks=structure.unflatten(nodes), inner_state=inner_state
  )


def _refresh_if(updater, due, sparse, nodes, count):
  """Positions after this update, and the slots that stay, as masks of the values."""
  progress, elapsed = updater.schedule.progress(count), updater.schedule.elapsed(count)
  old = [nodes[leaf.index] for leaf in sparse]
  everything = lambda node: jnp.ones(node.indices.shape, bool)

  def refresh():
    # One group after the other, so that the scratch of one is free for the next.
    out: list[Any] = [None] * len(sparse)
    for group in storage.groups([leaf.plan for leaf in sparse]):
      before, out = jax.lax.optimization_barrier(([old[i] for i in group], out))
      leaves = [sparse[i] for i in group]
      found = storage.kind(leaves[0].plan.structure).refresh(updater, leaves, before, progress, elapsed)
      for i, new in zip(group, found, strict=True):
        out[i] = new
    return out

  new = jax.lax.cond(due, refresh, lambda: [(node, everything(node)) for node in old])
  nodes, masks = list(nodes), [optax.MaskedNode()] * len(nodes)
  for leaf, (node, stay) in zip(sparse, new):
    nodes[leaf.index] = node
    masks[leaf.index] = storage.kind(leaf.plan.structure).spread(stay, leaf.param)
  return nodes, masks


def _sparse_leaves(leaves, plans, state, grads, candidates):
  """The compact leaves with all that scorers may ask for."""
  grad_values = [None] * len(plans) if grads is None else _tree.match(leaves, grads, "the gradients")
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="threefry2x32"), state.count)
  return [
    _choice.Leaf(
      i,
      plan,
      leaves.values[i],
      grad_values[i],
      jax.random.fold_in(key, i),
      {CANDIDATES: candidates[i]} if candidates else {},
      (),
      (),
    )
    for i, plan in enumerate(plans)
    if plan.compact
  ]


def _candidates(updater, leaves, plans, extra) -> list[Any] | None:
  """Scores of what may grow, one item a leaf; [] where growth needs none; None in a step that is never a refresh."""
  given = extra.pop(CANDIDATES, ...)
  if updater.grow is None or not updater.grow.uses_gradient or not updater.schedule.refreshes:
    return []
  if given is ...:
    raise ValueError(
      f"{updater!r} grows by gradients of weights that are not stored: call tx.update(..., {CANDIDATES}=scores) when "
      f"updater.due(opt_state), with a tree like the parameters (js.ops.block_gradient_scores, js.ops.fan_in_candidates), and "
      f"tx.update(..., {CANDIDATES}=None) in the steps between."
    )
  if given is None:
    return None
  found = leaves.treedef.flatten_up_to(given)
  for plan, scores in zip(plans, found):
    if plan.compact and (scores is None or _tree.is_masked_node(scores)):
      raise ValueError(f"{CANDIDATES} of {plan.label} is missing: the leaf is stored compactly.")
  return found


def _check_nodes(plans, nodes) -> None:
  for plan, node in zip(plans, nodes, strict=True):
    if plan.compact != isinstance(node, masks_lib.Positions):
      have = "no positions" if plan.compact else "positions"
      raise ValueError(
        f"{plan.label} has {have} in the optimizer state: the state was made by another configuration. Start from "
        "tx.init(params), or carry positions over with set_masks."
      )
