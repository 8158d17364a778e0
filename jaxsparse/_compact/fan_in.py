"""`Compact(FixedFanIn(...))`: the parameter holds the kept inputs of every output, `[F, O]`.

Outputs are taken in chunks, so that nothing but what is stored has the size of the leaf.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _choice
from jaxsparse import _plan
from jaxsparse import masks as masks_lib
from jaxsparse import ops
from jaxsparse import selection
from jaxsparse import structures
from jaxsparse.arrays import FixedFanInArray
from jaxsparse.arrays import _fixed_fan_in_array

Array = FixedFanInArray
_CHUNK = 1 << 20  # entries that a chunk of outputs works on: up to there `selection` compiles fast


def stored_shape(plan: _plan.LeafPlan, keep: int) -> tuple[int, ...]:
  """Shape of the parameter with a fan-in of `keep`."""
  return (keep, plan.shape[1])


def draw(plan: _plan.LeafPlan, keep: int, key: jax.Array, gain: float, dtype: Any):
  """Random inputs with random values, N(0, gain^2 / fan_in): (values, Positions)."""
  place, fill = jax.random.split(key)
  inputs, outputs = plan.shape
  dtype_of_indices = _fixed_fan_in_array.index_dtype(inputs)

  def chosen(start, width):
    key = jax.random.fold_in(place, start)
    return (jnp.sort(_distinct(key, keep, inputs, width), axis=0).astype(dtype_of_indices),)

  indices = _by_chunks(chosen, outputs, keep, ((keep, dtype_of_indices),))[0]
  values = jax.random.normal(fill, (keep, outputs), dtype) * jnp.asarray(gain / keep**0.5, dtype)
  return values, positions(plan, indices)


def take(plan: _plan.LeafPlan, node: FixedFanInArray):
  """Values and Positions of a weight with a fixed fan-in."""
  return node.values, positions(plan, node.indices.astype(_fixed_fan_in_array.index_dtype(node.inputs)))


def positions(plan: _plan.LeafPlan, indices: jax.Array) -> masks_lib.Positions:
  """Indices `[fan_in, O]` as the node that stands in the place of a mask."""
  return masks_lib.Positions(indices, (), tuple(indices.shape), structures.Compact(plan.structure, plan.shape))


def join(values: jax.Array, node: masks_lib.Positions) -> FixedFanInArray:
  """The array of values and their Positions; the constructor's look at all indices would cost time outside of jit."""
  return FixedFanInArray.tree_unflatten(node.structure.shape[0], (values, node.indices))


def export(values: jax.Array, node: masks_lib.Positions) -> FixedFanInArray:
  """The array with sorted indices, for inference and files."""
  order = jnp.argsort(node.indices, axis=0)
  return FixedFanInArray.tree_unflatten(
    node.structure.shape[0], (jnp.take_along_axis(values, order, 0), jnp.take_along_axis(node.indices, order, 0))
  )


def split(dense: jax.Array, node: masks_lib.Positions) -> tuple[jax.Array, ops.Candidates]:
  """The gradient of a dense weight -> that of the kept entries, and the absent entries where it is largest."""
  inputs, fan_in = dense.shape[0], node.shape[0]
  kept = node.indices.astype(jnp.int32)
  absent = jnp.abs(dense).astype(jnp.float32).at[kept, jnp.arange(dense.shape[1])].set(-jnp.inf)
  scores, indices = jax.lax.top_k(absent.T, min(fan_in, inputs - fan_in))
  return jnp.take_along_axis(dense, kept, 0), ops.Candidates(indices.T, scores.T)


def refresh(updater: Any, leaves: list[_choice.Leaf], nodes: list[masks_lib.Positions], progress, elapsed):
  """New Positions, and which slots stay (bool `[F, O]`), of every leaf."""
  return [_refresh(updater, leaf, node, elapsed) for leaf, node in zip(leaves, nodes)]


def spread(stay: jax.Array, values: jax.Array) -> jax.Array:
  """`stay` for every entry of the values."""
  del values
  return stay


def _refresh(updater, leaf, node, elapsed):
  (inputs, outputs), fan_in = leaf.plan.shape, node.shape[0]
  drop = updater.drop.score((), leaf.inputs)
  given = _given_candidates(updater, leaf)
  count = min(fan_in, inputs - fan_in) if given is None else given.indices.shape[0]
  swaps = _swaps(updater, leaf, node, drop, given, elapsed)
  key = jax.random.fold_in(leaf.key, 1)

  def replace(start, width):
    cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, width, axis=a.ndim - 1)
    old = cut(node.indices).astype(jnp.int32)
    if given is None:
      # What has been dropped comes back only where there is nothing else.
      place, rank = jax.random.split(jax.random.fold_in(key, start))
      new = _absent(place, old, count, inputs)
      ranks = jax.random.uniform(rank, new.shape)
      again = jnp.full(old.shape, -1.0)
    else:
      new, ranks = cut(given.indices).astype(jnp.int32), cut(given.scores)
      again = updater.grow.score((), leaf.inputs._replace(grad=cut(leaf.grad))).astype(ranks.dtype)
    indices, stay = swap(old, cut(drop), again, new, ranks, cut(swaps), inputs)
    return indices.astype(node.indices.dtype), stay

  out = ((fan_in, node.indices.dtype), (fan_in, jnp.bool_))
  indices, stay = _by_chunks(replace, outputs, fan_in + count, out)
  return positions(leaf.plan, indices), stay


def _given_candidates(updater, leaf):
  if not updater.grow.uses_gradient:
    return None
  given = leaf.extra["candidate_scores"]
  shapes = [getattr(getattr(given, name, None), "shape", None) for name in ("indices", "scores")]
  if shapes[0] is None or shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] != leaf.plan.shape[1]:
    raise ValueError(
      f"candidate_scores of {leaf.plan.label} must be candidates with indices and scores of shape [C, {leaf.plan.shape[1]}], "
      f"got {type(given).__name__}; js.ops.fan_in_candidates computes them."
    )
  return given


def _swaps(updater, leaf, node, drop, given, elapsed):
  """int32 `[O]`: inputs to replace of every output; as many for each, the rest where most is gained."""
  (inputs, outputs), fan_in = leaf.plan.shape, node.shape[0]
  total = _choice.ceil(updater.drop_fraction.value(elapsed) * (fan_in * outputs))
  cap = jnp.full(outputs, min(fan_in, inputs - fan_in), jnp.int32)
  worst = jnp.min(drop, axis=0).astype(jnp.float32)
  best = jnp.float32(0) if given is None else jnp.max(given.scores, axis=0).astype(jnp.float32)
  return selection.share_swaps(best - worst, cap, total, outputs, axis=0)


def swap(old, drop, again, new, ranks, swaps, inputs):
  """Replaces the worst inputs of some outputs by the best candidates, slot by slot.

  Args:
    old: int32 `[F, O]`, the inputs of now.
    drop: `[F, O]`, their scores; the lowest are replaced.
    again: `[F, O]`, their scores as candidates, once dropped.
    new: int32 `[C, O]`, candidates; one that is kept already, out of range, or named before does not count.
    ranks: `[C, O]`, their scores.
    swaps: int32 `[O]`, how many to replace.
    inputs: K.

  Returns:
    (int32 `[F, O]`, bool `[F, O]`): the new inputs, all different, and which slots stay as they are.
  """
  fan_in, count = old.shape[0], new.shape[0]
  each = lambda i, seen: seen | (new == jax.lax.dynamic_index_in_dim(old, i, 0))
  seen = jax.lax.fori_loop(0, fan_in, each, (new < 0) | (new >= inputs))
  row = jax.lax.broadcasted_iota(jnp.int32, new.shape, 0)
  before = lambda i, seen: seen | ((row > i) & (new == jax.lax.dynamic_index_in_dim(new, i, 0)))
  seen = jax.lax.fori_loop(0, count, before, seen)
  # NaN never grows; what has been dropped must be able to come back, so that there are enough whatever the candidates.
  again = jnp.where(jnp.isnan(again), -jnp.inf, again).astype(ranks.dtype)
  grow = jnp.concatenate([again, jnp.where(seen, jnp.nan, ranks)])
  kept = jnp.concatenate([jnp.ones(old.shape, bool), jnp.zeros(new.shape, bool)])
  worst = jnp.concatenate([drop, jnp.zeros(new.shape, drop.dtype)])
  chosen = selection.drop_and_grow(kept, worst, grow, (fan_in - swaps)[None], fan_in, axis=0)
  stay, grown = chosen[:fan_in], chosen[fan_in:]
  free, number = jnp.cumsum(~stay, axis=0), jnp.cumsum(grown, axis=0)

  def put(i, indices):
    pick = lambda a: jax.lax.dynamic_index_in_dim(a, i, 0)
    return jnp.where(~stay & pick(grown) & (free == pick(number)), pick(new), indices)

  return jax.lax.fori_loop(0, count, put, old), stay


def _absent(key, old, count, inputs):
  """int32 `[count, O]`: different inputs that are not in `old`, drawn uniformly."""
  fan_in, outputs = old.shape
  ranks = _distinct(key, count, inputs - fan_in, outputs)
  # The r-th absent input is r plus the kept ones before it; the j-th kept one has (its index - j) absent ones before it.
  gaps = jnp.sort(old, axis=0) - jnp.arange(fan_in)[:, None]
  below = lambda i, found: jnp.where(jax.lax.dynamic_index_in_dim(gaps, i, 0) <= ranks, found + 1, found)
  return jax.lax.fori_loop(0, fan_in, below, ranks)


def _distinct(key, count, below, outputs):
  """int32 `[count, O]`: different numbers in [0, below) for every output, drawn uniformly (Floyd's sampling)."""

  def draw(i, drawn):
    last = below - count + i
    number = jax.random.randint(jax.random.fold_in(key, i), (outputs,), 0, last + 1)
    number = jnp.where(jnp.any(drawn == number[None], axis=0), last, number)
    return jax.lax.dynamic_update_index_in_dim(drawn, number, i, 0)

  return jax.lax.fori_loop(0, count, draw, jnp.full((count, outputs), -1, jnp.int32))


def _by_chunks(fn, outputs, rows, out):
  """fn(start, width) -> arrays `[rows_i, width]`, put side by side; `out` are (rows_i, dtype).

  The last chunk reaches back, so that all are of one width: what it computes twice must not depend on the chunk, or may
  be overwritten.
  """
  width = min(outputs, max(1, _CHUNK // rows))

  def body(i, arrays):
    start = jnp.minimum(i * width, outputs - width)
    parts = fn(start, width)
    return tuple(jax.lax.dynamic_update_slice_in_dim(a, p, start, axis=1) for a, p in zip(arrays, parts))

  empty = tuple(jnp.zeros((n, outputs), dtype) for n, dtype in out)
  return jax.lax.fori_loop(0, -(-outputs // width), body, empty)
