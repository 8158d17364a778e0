"""From dense shapes to values and positions, and back: what does not change during training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _plan
from jaxsparse import _state
from jaxsparse import _tree
from jaxsparse import masks as masks_lib
from jaxsparse import scorers
from jaxsparse import structures
from jaxsparse._compact import blocks
from jaxsparse._compact import fan_in


def kind(structure: structures.AbstractStructure) -> Any:
  """The module that stores a structure."""
  return blocks if isinstance(structure, structures.Block) else fan_in


def groups(plans: list[_plan.LeafPlan]) -> list[list[int]]:
  """Indices of leaves that are refreshed together: those stored as blocks where only the names differ, others alone."""
  found: dict[Any, list[int]] = {}
  for i, plan in enumerate(plans):
    found.setdefault(_nameless(plan) if kind(plan.structure) is blocks else i, []).append(i)
  return list(found.values())


def _nameless(plan):
  """What programs depend on, so that leaves of one shape share them."""
  return dataclasses.replace(plan, name="", label="", reason="")


def stored_shape(updater: Any, plan: _plan.LeafPlan) -> tuple[int, ...]:
  """Shape of the parameter of a compact leaf."""
  return kind(plan.structure).stored_shape(plan, _capacity(updater, plan))


def _capacity(updater, plan) -> int:
  """Units per group that there is room for: those kept at first, since later there are never more."""
  if plan.final_keep is None:
    raise ValueError(
      f"{plan.label} needs a count of its own to be stored compactly; {updater.distribution!r} has none."
    )
  starts_sparse = updater.init is not None and not updater.schedule.ramps
  return plan.final_keep if starts_sparse else plan.initial_keep


def init_params(updater: Any, params: Any, key: jax.Array, gain: float) -> tuple[Any, Any]:
  """Values and Positions for a tree of dense shapes; see `Updater.compact_init`."""
  given = jax.tree.leaves(params, is_leaf=_is_node)
  like = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_node(leaf) else leaf
  leaves = _tree.flatten(jax.tree.map(like, params, is_leaf=_is_node))
  plans = _plan.make_plan(updater, leaves)
  check_plans(updater, plans)
  made = []
  for i, (plan, value) in enumerate(zip(plans, given, strict=True)):
    if plan.compact:
      made.append(_make(updater, plan, value, jax.random.fold_in(key, i), gain))
      continue
    if isinstance(value, jax.ShapeDtypeStruct) or _is_node(value):
      raise ValueError(
        f"{plan.label} is not stored compactly ({plan.reason}): compact_init needs its values, as an array, not "
        f"{type(value).__name__}."
      )
    made.append((value, optax.MaskedNode()))
  values, nodes = zip(*made)
  return leaves.treedef.unflatten(values), leaves.treedef.unflatten(nodes)


def _is_node(leaf):
  return isinstance(leaf, (blocks.Array, fan_in.Array))


def _make(updater, plan, value, key, gain):
  if tuple(value.shape) != plan.shape:
    raise ValueError(f"{plan.label} has shape {tuple(value.shape)}; Compact(..., {plan.shape}) states its dense shape.")
  store, stored = kind(plan.structure), stored_shape(updater, plan)
  if not _is_node(value):
    draw = jax.jit(store.draw, static_argnums=(0, 1, 3, 4))
    return draw(_nameless(plan), _capacity(updater, plan), key, gain, jnp.dtype(value.dtype))
  if not isinstance(value, store.Array):
    raise TypeError(
      f"{plan.label} is a {type(value).__name__}; {plan.structure!r} is stored as {store.Array.__name__}."
    )
  values, node = store.take(plan, value)
  if tuple(values.shape) != stored:
    raise ValueError(f"{plan.label} stores values of shape {tuple(values.shape)}; {updater!r} keeps {stored}.")
  return values, node


def join(params: Any, masks: Any, sort: bool = False) -> Any:
  """The array nodes that ops understand, in the place of compact leaves; sorted copies for use outside of training."""
  leaves = _tree.flatten(params)
  nodes = [_state.require_set(node) for node in _tree.match(leaves, masks, "the masks in the optimizer state")]
  joined = []
  for value, node in zip(leaves.values, nodes):
    if isinstance(node, masks_lib.Positions):
      store = kind(node.structure.structure)
      value = store.export(value, node) if sort else store.join(value, node)
    joined.append(value)
  return leaves.treedef.unflatten(joined)


def densify(params: Any, masks: Any) -> Any:
  """Dense arrays in the place of compact leaves."""
  return jax.tree.map(lambda leaf: leaf.to_dense() if _is_node(leaf) else leaf, join(params, masks), is_leaf=_is_node)


def split_gradients(grads: Any, masks: Any) -> tuple[Any, Any]:
  """Gradients of dense arrays -> (gradients of the stored values, scores of what may grow)."""
  nodes, treedef = jax.tree.flatten(masks, is_leaf=_tree.is_mask_leaf)
  values, scores = [], []
  for grad, node in zip(treedef.flatten_up_to(grads), nodes):
    pair = (grad, None)
    if isinstance(node, masks_lib.Positions):
      pair = kind(node.structure.structure).split(grad, node)
    values.append(pair[0])
    scores.append(pair[1])
  return treedef.unflatten(values), treedef.unflatten(scores)


def check_plans(updater: Any, plans: list[_plan.LeafPlan]) -> None:
  """ValueError for a leaf that would be masked in a model whose sparse leaves are stored compactly."""
  for plan in plans:
    if plan.compact:
      stored_shape(updater, plan)
    elif plan.structure is not None:
      raise ValueError(
        f"{plan.label} would get a mask of {plan.structure!r} ({plan.reason}), but this updater stores sparse leaves "
        f"compactly: give it a Compact structure by a rule, leave it dense with the rule ({plan.name!r}, None), or give it "
        "to an updater of its own with optax.partition."
      )


def check_updater(updater: Any) -> None:
  """ValueError for a combination of axes that compact storage cannot run."""
  said = [value for _, value in updater.rules.entries] + [updater.structure]
  said = [v[0] if isinstance(v, tuple) else v for v in said]
  inner = [v.structure for v in said if isinstance(v, structures.Compact)]
  moves = updater.schedule.refreshes
  problem = None
  if updater.forward.storage != "hard" or isinstance(updater.drop, scorers.AbstractModelScorer):
    problem = f"forward=Hard() and masks that are not found before training, not {updater.forward!r}, {updater.drop!r}"
  elif updater.distribution.joint or updater.surplus is not None:
    problem = "a count for every leaf that never grows: no joint distribution, and no surplus="
  elif not isinstance(updater.init, (scorers.Random, type(None))):
    problem = (
      f"a random start, init=Random(), or a full one; another comes as arrays to compact_init, not {updater.init!r}"
    )
  elif updater.pack_masks:
    problem = "pack_masks=False: there are no masks"
  elif moves and (
    updater.drop.needs or not isinstance(updater.drop, scorers.AbstractElementwiseScorer | scorers.Random)
  ):
    problem = f"a drop= that reads kept weights and their gradients only, not {updater.drop!r}"
  elif moves and not isinstance(updater.grow, (scorers.Random, scorers.GradientMagnitude, type(None))):
    problem = f"grow=Random() or GradientMagnitude(), not {updater.grow!r}"
  elif (
    any(isinstance(s, structures.FixedFanIn) for s in inner)
    and moves
    and (updater.grow is None or updater.schedule.ramps)
  ):
    problem = "a constant fan-in in FixedFanIn: a static mask, or growth of as much as is dropped"
  if problem:
    raise ValueError(f"Compact storage needs {problem}.")
