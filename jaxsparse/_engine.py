"""The update: refresh masks when due, keep the inner optimizer's state clean, keep parameters masked.

Everything here works on flat lists, one item a leaf of the parameters; leaves that are not sparsified have a plan
without a structure and a MaskedNode for a mask, and pass untouched.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import _choice
from jaxsparse import _hold
from jaxsparse import _plan
from jaxsparse import _state
from jaxsparse import _tree
from jaxsparse import _zero_map
from jaxsparse import masks as masks_lib
from jaxsparse import scorers


def init(
  updater: Any, inner: optax.GradientTransformation, params: Any, key: jax.Array, tag: str | None
) -> _state.SparsityState:
  """The state before the first update."""
  leaves = _tree.flatten(params)
  plans = _plan.make_plan(updater, leaves)
  data = key_data(key)
  masks = _initial_masks(updater, leaves, plans, data)
  inner_state = inner.init(params)
  for name in updater.needs_inner:
    if not optax.tree.get_all_with_path(inner_state, name):
      raise ValueError(
        f"{updater!r} needs an inner optimizer whose state has {name!r}, such as adamw_nm(..., {name}=...) or a "
        f"chain with scale_by_adam_nm({name}=...); with another it would be a different method."
      )
  state = _state.first(data, leaves.treedef.unflatten(masks), inner_state, tag)
  if not updater.schedule.refreshes:
    return state
  return state._replace(
    drop_state=_scorer_states(updater.drop, leaves, plans), grow_state=_scorer_states(updater.grow, leaves, plans)
  )


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
  """One update of the wrapped optimizer: `(updates, state)`.

  Args:
    updater: the configuration.
    inner: the wrapped optimizer.
    zero_map: tells whether the inner optimizer keeps zeros at zero.
    grads: what the inner optimizer gets, before masking.
    state: from `init` or the last update.
    params: the stored parameters.
    scorer_grads: gradients for the scorers, None where there are none.
    extra: keyword arguments of `tx.update`.
  """
  if params is None:
    raise ValueError("tx.update(grads, opt_state, params) needs the parameters: masks are applied to them.")
  leaves = _tree.flatten(params)
  nodes = [_state.require_set(node) for node in _tree.match(leaves, state.masks, "the masks in the optimizer state")]
  plans = _plan.make_plan(updater, leaves)
  _check_selection(leaves, plans, nodes)
  step = _hard_update if updater.forward.storage == "hard" else _dense_update
  due = updater.schedule.due(state.count)
  sparse = _sparse_leaves(updater, leaves, plans, state, scorer_grads, extra) if updater.schedule.refreshes else []
  sparse = [
    leaf._replace(
      drop_state=updater.drop.accumulate(leaf.drop_state, leaf.inputs),
      grow_state=updater.grow.accumulate(leaf.grow_state, leaf.inputs) if updater.grow else (),
    )
    for leaf in sparse
  ]
  updates, nodes, inner_state = step(updater, inner, zero_map, grads, state, leaves, sparse, nodes, due, extra)
  mask_structure = jax.tree.structure(state.masks, is_leaf=_tree.is_mask_leaf)
  return updates, state._replace(
    count=optax.safe_increment(state.count),
    masks=mask_structure.unflatten(nodes),
    drop_state=_put_states(leaves, sparse, [leaf.drop_state for leaf in sparse]),
    grow_state=_put_states(leaves, sparse, [leaf.grow_state for leaf in sparse]),
    inner_state=inner_state,
  )


def _hard_update(updater, inner, zero_map, grads, state, leaves, sparse, nodes, due, extra):
  """Refresh, clean the inner state, mask the gradient, step, project: parameters are masked after every update."""
  nodes = _refresh_if(updater, due, sparse, nodes, state.count)
  masks = [masks_lib.unpack(node) for node in nodes]
  hold = due if updater.skip_step_when_due and sparse else None
  updates, inner_state = step_masked(updater, inner, zero_map, grads, state, leaves, masks, hold, extra)
  return updates, nodes, inner_state


def step_masked(updater, inner, zero_map, grads, state, leaves, masks, hold, extra):
  """A step of the inner optimizer that sees, and leaves, nothing but zeros off the masks: `(updates, inner state)`.

  `hold` is None, or a bool (shape=()) at which the optimizer pauses.
  """
  mask_tree = leaves.treedef.unflatten(masks)
  inner_state = _clean(inner, state.inner_state, mask_tree)
  masked_grads = _map_grads(leaves, grads, masks, lambda g, p, m: updater.forward.gradient(g, p, m, state.count))
  masked_params = leaves.treedef.unflatten([_where(m, p) for m, p in zip(masks, leaves.values)])
  extra = extra | {"masks": mask_tree}
  if hold is not None:
    updates, new_inner = _hold.update_unless(hold, inner, masked_grads, inner_state, masked_params, extra)
  else:
    updates, new_inner = inner.update(masked_grads, inner_state, masked_params, **extra)
  if not zero_map.keeps_zeros(inner, leaves):
    new_inner = _clean(inner, new_inner, mask_tree)
  return _map_grads(leaves, updates, masks, _project), new_inner


def _dense_update(updater, inner, zero_map, grads, state, leaves, sparse, nodes, due, extra):
  """Gradient hook, step, then refresh on the new parameters, so that masks fit the weights that are stored."""
  del zero_map, due
  masks = [masks_lib.unpack(node) for node in nodes]
  hooked = _map_grads(leaves, grads, masks, lambda g, p, m: updater.forward.gradient(g, p, m, state.count))
  extra = extra | {"masks": leaves.treedef.unflatten(masks)}
  updates, new_inner = inner.update(hooked, state.inner_state, leaves.treedef.unflatten(leaves.values), **extra)
  flat = jax.tree.leaves(updates, is_leaf=_tree.is_masked_node)
  moved = [leaf._replace(param=optax.apply_updates(leaf.param, flat[leaf.index])) for leaf in sparse]
  clock = schedule_count(updater.schedule, state.count, new_inner)
  return updates, _refresh_if(updater, updater.schedule.due(clock), moved, nodes, clock), new_inner


def schedule_count(schedule, count, inner_state) -> jax.Array:
  """The count that a schedule goes by: updates seen, or those since an event in the inner optimizer (-1 before it)."""
  if schedule.event is None:
    return count
  found = optax.tree.get_all_with_path(inner_state, schedule.event)
  if len(found) != 1:
    raise ValueError(
      f"{schedule!r} waits for {schedule.event!r}, of which the inner optimizer's state has {len(found)}."
    )
  return jnp.where(found[0][1] >= 0, count - found[0][1], -1)


def _refresh_if(updater, due, sparse, nodes, count):
  """The mask nodes after this update: chosen anew under one `lax.cond` when due, else as they are."""
  if not sparse:
    return nodes
  old = [nodes[leaf.index] for leaf in sparse]

  def refresh():
    new: list[Any] = []
    for leaves in [sparse] if updater.distribution.joint else [[leaf] for leaf in sparse]:
      # One leaf after the other, so that what a refresh needs beside the masks is the scratch of one leaf.
      current, new = jax.lax.optimization_barrier(([nodes[leaf.index] for leaf in leaves], new))
      masks = [masks_lib.unpack(node) for node in current]
      chosen = _choice.choose_in_frame(updater, leaves, masks, count)
      new += [masks_lib.pack(m) if updater.pack_masks else m for m in chosen]
    return new

  new = jax.lax.cond(due, refresh, lambda: old)
  nodes = list(nodes)
  for leaf, node in zip(sparse, new):
    nodes[leaf.index] = node
  return nodes


def _project(u, p, m):
  """The update that lands exactly on zero where the mask is off: `p + -p` in the wider of the two dtypes."""
  dtype = _tree.wider(p.dtype, u.dtype)
  return jnp.where(m, u.astype(dtype), -p.astype(dtype))


def _where(mask, value):
  return value if _tree.is_masked_node(mask) else jnp.where(mask, value, jnp.zeros((), value.dtype))


def _clean(inner, inner_state, mask_tree):
  """Zeroes every parameter-shaped leaf of the inner state where the mask is off."""

  def zero(leaf, mask):
    same = not _tree.is_masked_node(leaf) and not _tree.is_masked_node(mask) and jnp.shape(leaf) == mask.shape
    return _where(mask, leaf) if same else leaf

  return optax.tree.map_params(inner, zero, inner_state, mask_tree, is_leaf=_tree.is_masked_node)


def _map_grads(leaves, grads, masks, fn):
  """fn(gradient, parameter, mask) on sparsified leaves of a tree like the parameters."""
  values = _tree.match(leaves, grads, "the gradients")
  structure = jax.tree.structure(grads, is_leaf=_tree.is_mask_leaf)
  return structure.unflatten(
    [g if _tree.is_masked_node(m) else fn(g, p, m) for g, p, m in zip(values, leaves.values, masks)]
  )


def _sparse_leaves(updater, leaves, plans, state, grads, extra) -> list[_choice.Leaf]:
  """The sparsified leaves with all that scorers may ask for."""
  used = [s for s in (updater.drop, updater.grow) if s is not None]
  if grads is None and any(s.uses_gradient for s in used):
    name = next(type(s).__name__ for s in used if s.uses_gradient)
    raise ValueError(
      f"{name} scores by gradients: pass them as tx.update(updates, state, params, grads=grads), or use wrap_optax."
    )
  grad_values = None if grads is None else _tree.match(leaves, grads, "the gradients")
  needed = {name: _find_extra(name, leaves, plans, state.inner_state, extra) for s in used for name in s.needs}
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="threefry2x32"), state.count)
  drop_states, grow_states = (_get_states(leaves, s) for s in (state.drop_state, state.grow_state))
  return [
    _choice.Leaf(
      i,
      plan,
      leaves.values[i],
      None if grad_values is None else grad_values[i],
      jax.random.fold_in(key, i),
      {name: values[i] for name, values in needed.items()},
      drop_states[i],
      grow_states[i],
    )
    for i, plan in enumerate(plans)
    if plan.structure is not None
  ]


def _find_extra(name: str, leaves, plans, inner_state, extra) -> list[Any]:
  """An input that a scorer declares: a keyword of tx.update, or a part of the inner optimizer's state.

  Optimizers over different leaves (`optax.partition`, Muon with its Adam) each keep a part of it.
  """
  trees = [extra[name]] if name in extra else [tree for _, tree in optax.tree.get_all_with_path(inner_state, name)]
  columns = [_tree.match(leaves, tree, repr(name)) for tree in trees]
  values = []
  for i, (label, plan) in enumerate(zip(leaves.labels, plans)):
    found = [column[i] for column in columns if not _tree.is_masked_node(column[i])]
    if plan.structure is not None and len(found) != 1:
      raise ValueError(
        f"A scorer needs {name!r} of {label}, and the inner optimizer keeps {len(found) or 'none'}: pass tx.update(..., "
        f"{name}=tree like the parameters), or wrap an optimizer whose state has one (Adam's has 'mu' and 'nu')."
      )
    values.append(found[0] if found else optax.MaskedNode())
  return values


def _initial_masks(updater, leaves, plans, data) -> list[Any]:
  """Masks before the first update, in the storage they are kept in."""
  nodes = [optax.MaskedNode()] * len(plans)
  sparse = [i for i, plan in enumerate(plans) if plan.structure is not None]
  if isinstance(updater.drop, scorers.AbstractModelScorer):
    for i in sparse:
      nodes[i] = masks_lib.UnsetMask(plans[i].shape, repr(updater), updater.pack_masks)
    return nodes
  new = _first_masks(updater, tuple(plans[i] for i in sparse), tuple(sparse), [leaves.values[i] for i in sparse], data)
  for i, mask in zip(sparse, new):
    nodes[i] = mask
  return nodes


# Compiled once for an updater and a model, also where tx.init runs outside jit.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _first_masks(updater, plans, indices, values, data):
  """Masks of the sparsified leaves by `init`, by the weights (dense storage), or all kept."""
  scorer = updater.init or (updater.drop if updater.forward.storage == "dense" else None)
  if scorer is None or scorer.uses_gradient or scorer.needs:
    masks = [jnp.ones(plan.shape, bool) for plan in plans]
  else:
    key = jax.random.wrap_key_data(data, impl="threefry2x32")
    sparse = [
      _choice.Leaf(i, plan.in_frame(0), value, None, jax.random.fold_in(key, i), {}, scorer.init(value), ())
      for i, plan, value in zip(indices, plans, values)
    ]
    # A mask by `init` has its final sparsity at once, unless a ramp starts below it.
    first = 0 if updater.schedule.event is None else -1
    start = (
      updater.schedule.progress(first) if updater.init is None else jnp.float32(0 if updater.schedule.ramps else 1)
    )
    scores = [_choice.unit_scores(scorer, leaf, leaf.drop_state, leaf.inputs) for leaf in sparse]
    if updater.init_distribution is not None:
      sparse = _with_first_counts(updater, sparse)
    units = _choice.prune(updater, sparse, scores, None, start)
    masks = [leaf.plan.structure.from_units(u, leaf.plan.shape) for leaf, u in zip(sparse, units)]
  return [masks_lib.pack(mask) if updater.pack_masks else mask for mask in masks]


def _with_first_counts(updater, sparse):
  """The leaves of a joint distribution with the counts that `init_distribution` gives their first masks."""
  joint = [i for i, leaf in enumerate(sparse) if leaf.plan.final_keep is None]
  sparsity = updater.initial_sparsity if updater.schedule.ramps else updater.sparsity
  counts = updater.init_distribution.keep_counts([sparse[i].plan.leaf_shape for i in joint], sparsity)
  sparse = list(sparse)
  for i, count in zip(joint, counts):
    sparse[i] = sparse[i]._replace(plan=sparse[i].plan.with_counts(count))
  return sparse


def _scorer_states(scorer, leaves, plans):
  if scorer is None:
    return ()
  states = [
    optax.MaskedNode() if plan.structure is None else scorer.init(value) for plan, value in zip(plans, leaves.values)
  ]
  stateless = all(_tree.is_masked_node(s) or (isinstance(s, tuple) and not s) for s in states)
  return () if stateless else leaves.treedef.unflatten(states)


def _get_states(leaves, tree) -> list[Any]:
  return (
    [()] * len(leaves.values)
    if isinstance(tree, tuple) and not tree
    else _tree.match(leaves, tree, "the scorer's state")
  )


def _put_states(leaves, sparse, states):
  if all(isinstance(s, tuple) and not s for s in states):
    return ()
  full = [optax.MaskedNode()] * len(leaves.values)
  for leaf, state in zip(sparse, states):
    full[leaf.index] = state
  return leaves.treedef.unflatten(full)


def _check_selection(leaves, plans, nodes) -> None:
  for label, plan, node in zip(leaves.labels, plans, nodes, strict=True):
    if (plan.structure is None) != _tree.is_masked_node(node):
      have, want = ("a mask", "dense") if plan.structure is None else ("no mask", "sparse")
      raise ValueError(
        f"{label} has {have} in the optimizer state, but this updater keeps it {want}: the state was made by another "
        "configuration. Start from tx.init(params), or carry the masks over with set_masks."
      )


def key_data(key: jax.Array | int) -> jax.Array:
  """An integer seed, a typed key of any kind or an old-style uint32 key -> uint32[2] of a threefry key."""
  if isinstance(key, (int, np.integer)):
    return jax.random.key_data(jax.random.key(key, impl="threefry2x32"))
  if not isinstance(key, (jax.Array, np.ndarray)):
    raise TypeError(f"key must be an integer, jax.random.key(...) or jax.random.PRNGKey(...), got {key!r}.")
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    data = jax.random.key_data(key)
    return data if data.shape == (2,) else jax.random.bits(key, (2,), jnp.uint32)
  if key.shape == (2,) and key.dtype == jnp.uint32:
    return key
  raise TypeError(
    f"key must be an integer, jax.random.key(...) or jax.random.PRNGKey(...), got {key.dtype}{list(key.shape)}."
  )
