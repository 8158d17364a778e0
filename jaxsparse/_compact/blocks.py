"""`Compact(Block(...))`: the parameter holds the kept blocks, one to a slot."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _choice
from jaxsparse import _plan
from jaxsparse import masks as masks_lib
from jaxsparse import selection
from jaxsparse import structures
from jaxsparse.arrays import BlockArray
from jaxsparse.ops.block_matmul import _plan as kernel_plan

Array = BlockArray
_KERNEL_SIDES = (32, 64, 128, 256)  # blocks that kernels take; others need no plan


def stored_shape(plan: _plan.LeafPlan, keep: int) -> tuple[int, ...]:
  """Shape of the parameter with `keep` blocks."""
  return (keep, *plan.structure.shape)


def draw(plan: _plan.LeafPlan, keep: int, key: jax.Array, gain: float, dtype: Any):
  """Random blocks with random values, N(0, gain^2 / inputs of the output): (values, Positions)."""
  place, fill = jax.random.split(key)
  grid = plan.structure.view_shape(plan.shape)
  units = selection.topk_mask(jax.random.uniform(place, grid), keep)
  indices = jnp.nonzero(units.T.reshape(-1), size=keep)[0].astype(jnp.int32)
  rows = plan.structure.shape[0]
  inputs = units.sum(0)[indices // grid[0]] * rows
  values = jax.random.normal(fill, stored_shape(plan, keep), jnp.float32) * (gain / jnp.sqrt(inputs))[:, None, None]
  return values.astype(dtype), positions(plan, indices)


def take(plan: _plan.LeafPlan, node: BlockArray):
  """Values and Positions of a block-sparse array."""
  return node.blocks, positions(
    plan, (jnp.asarray(node.cols) * node.grid[0] + jnp.asarray(node.rows)).astype(jnp.int32)
  )


def positions(plan: _plan.LeafPlan, indices: jax.Array) -> masks_lib.Positions:
  """The Positions of blocks, with what kernels derive from them."""
  structure = structures.Compact(plan.structure, plan.shape)
  shape = stored_shape(plan, indices.shape[0])
  kernel = ()
  if all(side in _KERNEL_SIDES for side in plan.structure.shape):
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    unordered = _array(like, masks_lib.Positions(indices, (), shape, structure))
    kernel = kernel_plan.plans_of(unordered, ordered=False)
  return masks_lib.Positions(indices, kernel, shape, structure)


def join(values: jax.Array, node: masks_lib.Positions) -> BlockArray:
  """The BlockArray of values and their Positions.

  While tracing, blocks stay in the order of slots: products need no other, and sorting would move them in every step.
  """
  return _array(values, node) if isinstance(node.indices, jax.core.Tracer) else export(values, node)


def _array(values, node):
  # Past the constructor, which wants sorted positions.
  shape = node.structure.shape
  block_rows = node.structure.view_shape(shape)[0]
  plan = node.plan if node.plan != () else None
  return BlockArray.tree_unflatten((shape, None), (values, node.indices % block_rows, node.indices // block_rows, plan))


def export(values: jax.Array, node: masks_lib.Positions) -> BlockArray:
  """The BlockArray with sorted positions, for inference and files."""
  w = _array(values, node)
  return BlockArray.from_blocks(w.blocks, w.rows, w.cols, w.shape)


def split(dense: jax.Array, node: masks_lib.Positions) -> tuple[jax.Array, jax.Array]:
  """The gradient of a dense weight -> that of the kept blocks, and a growth score for every block."""
  bk, bo = node.shape[1:]
  rows, cols = node.structure.view_shape(node.structure.shape)
  tiles = dense.reshape(rows, bk, cols, bo).transpose(2, 0, 1, 3).reshape(rows * cols, bk, bo)
  return tiles.at[node.indices].get(mode="fill", fill_value=0), node.structure.to_units(jnp.abs(dense))


def refresh(updater: Any, leaves: list[_choice.Leaf], nodes: list[masks_lib.Positions], progress, elapsed):
  """New Positions, and which slots stay (bool `[N]`), of leaves with one plan but for their names.

  A loop over the leaves: what kernels derive from positions is long to compile, and is compiled once for all of them.
  """
  drop = [_block_sums(updater.drop.score((), leaf.inputs)) for leaf in leaves]
  grow = None if updater.grow is None else [_grow_scores(updater.grow, leaf) for leaf in leaves]

  def one(item):
    indices, drop, grow = item
    scattered = lambda fill, values: _scatter_units(nodes[0], indices, fill, values)
    kept = scattered(jnp.zeros((), bool), True)
    drop = scattered(jnp.zeros((), drop.dtype), drop)
    (units,) = _choice.choose_units(
      updater, leaves[:1], [kept], [drop], None if grow is None else [grow], progress, elapsed
    )
    return _replace(leaves[0].plan, indices, kept, units)

  items = list(zip([node.indices for node in nodes], drop, [None] * len(drop) if grow is None else grow))
  if len(items) == 1:
    return [one(items[0])]
  found = jax.lax.map(one, jax.tree.map(lambda *leaves: jnp.stack(leaves), *items))
  return [jax.tree.map(lambda a: a[i], found) for i in range(len(items))]


def _scatter_units(node, indices, fill, values):
  rows, cols = node.structure.view_shape(node.structure.shape)
  return jnp.full(rows * cols, fill).at[indices].set(values, mode="drop").reshape(cols, rows).T


def _block_sums(scores):
  return scores.sum((1, 2), dtype=jnp.float32 if jnp.issubdtype(scores.dtype, jnp.integer) else None)


def _grow_scores(scorer, leaf):
  grid = leaf.plan.structure.view_shape(leaf.plan.shape)
  if not scorer.uses_gradient:
    like = jax.ShapeDtypeStruct(grid, jnp.float32)
    return scorer.score((), leaf.inputs._replace(param=like, key=jax.random.fold_in(leaf.key, 1)))
  scores = leaf.extra["candidate_scores"]
  if getattr(scores, "shape", None) != grid:
    raise ValueError(
      f"candidate_scores of {leaf.plan.label} must be a score for each block, shape {grid}, got "
      f"{getattr(scores, 'shape', type(scores).__name__)}; js.ops.block_gradient_scores computes them."
    )
  return scores


def _replace(plan, indices, old, new):
  """Blocks that stay keep their slot; the others' slots take what has grown, or become empty."""
  flat = lambda units: units.T.reshape(-1)
  stay = flat(new).at[indices].get(mode="fill", fill_value=False)
  grown = jnp.nonzero(flat(new & ~old), size=stay.size, fill_value=old.size)[0].astype(jnp.int32)
  return positions(plan, jnp.where(stay, indices, grown[jnp.cumsum(~stay) - 1])), stay


def spread(stay: jax.Array, values: jax.Array) -> jax.Array:
  """`stay` for every entry of the values."""
  return jnp.broadcast_to(stay[:, None, None], values.shape)
