"""Exact top-k masks by threshold search, without sorting or reshaping a leaf.

Scores are ranked along given axes of their natural shape, so a sharded leaf stays sharded. A score is compared as an
order-preserving integer key (`_threshold.sortable_key`), and the threshold is found by counting (`_threshold.search`).
Scores that are an elementwise function of arrays may be given as `Elementwise`; then they are never stored.
"""

import dataclasses
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse import _threshold

_SMALL_UNITS = 32  # up to this many units on one axis: compare all pairs
_PAIRED_UNITS = 8  # up to this many, a GPU compares each pair once
_SMALL_SIZE = 1 << 20  # up to this many scores: plain bisection, which compiles fast


@dataclasses.dataclass(frozen=True, eq=False)
class Elementwise:
  """Scores as an elementwise function of arrays: evaluated inside each pass of a search, so that no copy is stored.

  Attributes:
    fn: maps `arrays`, or the same entries of each, to scores of their shape.
    arrays: one or more arrays of one shape.
  """

  fn: Callable[..., jax.Array]
  arrays: tuple[jax.Array, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    return self.arrays[0].shape

  @property
  def size(self) -> int:
    return self.arrays[0].size

  def compute(self) -> jax.Array:
    """The scores as an array."""
    return self.fn(*self.arrays)


def rank_last(scores: jax.Array | Elementwise, among: jax.Array) -> jax.Array | Elementwise:
  """The scores with -inf outside `among` (bool, of their shape)."""
  outside = lambda scores, among: jnp.where(among, scores, -jnp.inf)
  if isinstance(scores, Elementwise):
    return Elementwise(lambda among, *arrays: outside(scores.fn(*arrays), among), (among, *scores.arrays))
  return outside(scores, among)


def keep_count(size: int, sparsity: float) -> int:
  """Number of entries kept out of `size`: size - floor(size * sparsity).

  The product gets a relative slack of 1e-12, so that a sparsity written in
  decimal (0.29 of 100) or as a fraction (1/3 of 3) prunes what it says.

  Args:
   size: number of entries, >= 0.
   sparsity: fraction to remove, in [0, 1].

  Returns:
   A Python int in [0, size].

  Raises:
   ValueError: size is negative or sparsity is outside [0, 1] or NaN.
  """
  size = operator.index(size)
  if size < 0 or not 0.0 <= sparsity <= 1.0:
    raise ValueError(f"need size >= 0 and sparsity in [0, 1], got {size}, {sparsity}")
  return size - min(size, math.floor(size * float(sparsity) * (1 + 1e-12)))


def topk_mask(scores, keep, axis=None, where=None):
  """Mask of exactly the `keep` highest scores in each group.

  A group is all entries along `axis`; the other axes index groups.  Ties go
  to the lowest row-major index over `axis`.  NaN ranks below -inf, and
  -0.0 ties with +0.0.

  Args:
   scores: array of f32, bf16, f16, bool, or an integer dtype of <= 32 bits; or `Elementwise`.
   keep: int, or int32 scalar (may be traced), or int32 array broadcastable
    to scores.shape with size 1 at `axis`.  Clipped to [0, units].
   axis: None (all axes), an int or a tuple of ints.

  Returns:
   Bool array of scores.shape.

  Raises:
   TypeError: unsupported score dtype, or keep is not an integer.
   ValueError: bad axis, or keep does not broadcast to the groups.
  """
  return _topk(_keys(scores, where), keep, axis)


def global_keep_counts(scores, keep_total, unit_sizes):
  """How many units of each array survive a joint budget.

  The highest-scoring units over all arrays are kept.  Units that tie at the
  threshold are taken in list order while they fit; with equal unit sizes
  the kept sizes sum to exactly keep_total (clipped to what there is).

  Args:
   scores: list of arrays or `Elementwise`, one score per unit, any shapes, dtypes as for
    topk_mask (compared in their common dtype).
   keep_total: budget in elements, int or int32 scalar (may be traced).
   unit_sizes: elements per unit, one positive int per array.

  Returns:
   List of int32 scalars, the kept units of each array.

  Raises:
   TypeError: unsupported score dtype, or keep_total is not an integer.
   ValueError: lists differ in length, a unit size is < 1, or there are
    2**31 elements or more.
  """
  weights = [operator.index(u) for u in unit_sizes]
  keys = [_keys(s if isinstance(s, Elementwise) else jnp.atleast_1d(s)) for s in scores]
  sizes = [math.prod(k.shape) for k in keys]
  total = sum(w * n for w, n in zip(weights, sizes))
  if len(keys) != len(weights) or min(weights, default=1) < 1 or total >= 2**31:
    raise ValueError("need one unit size >= 1 per array and < 2**31 elements")
  live = [i for i, n in enumerate(sizes) if n]
  kept = [jnp.int32(0)] * len(keys)
  if not live:
    return kept
  dtype = jnp.result_type(*(keys[i].dtype for i in live))
  leaves = [keys[i]._replace(fn=lambda *a, fn=keys[i].fn: fn(*a).astype(dtype)) for i in live]
  weights = [weights[i] for i in live]
  keep = jnp.clip(_as_count(keep_total), 0, total)

  def count_each(pivots):
    shaped = [pivots.reshape((-1,) + (1,) * len(k.shape)) for k in leaves]
    return [_threshold.count_reaching(k, p, range(len(k.shape))).reshape(-1) for k, p in zip(leaves, shaped)]

  def count(pivots):
    return sum(w * c for w, c in zip(weights, count_each(pivots)))

  if total <= _SMALL_SIZE:
    threshold = _threshold.bisect(lambda p: count(p[None])[0], *_threshold.key_range(dtype), keep)
  else:
    threshold = _joint_threshold(leaves, weights, total, keep, count)
  reach = count_each(threshold[None])
  # threshold + 1 may wrap for integer scores, so count the ties themselves.
  tied = [_threshold.sum_together([k.compute() == threshold], range(len(k.shape)))[0].reshape(()) for k in leaves]
  above = [r[0] - t for r, t in zip(reach, tied)]
  left = keep - sum(w * a for w, a in zip(weights, above))
  for i, w, a, t in zip(live, weights, above, tied):
    fill = jnp.minimum(t, left // w)
    kept[i], left = a + fill, left - w * fill
  return kept


def _joint_threshold(leaves, weights, total, keep, count):
  """The key of the keep-th highest entry over several arrays, searched from a weighted sample of them."""
  sizes = [math.prod(k.shape) for k in leaves]
  drawn = [min(n, max(1, int(_threshold.SAMPLE * (w * n / total)))) for w, n in zip(weights, sizes)]
  samples = [_threshold.sample(k, tuple(range(len(k.shape))), n) for k, n in zip(leaves, drawn)]
  # A sampled unit stands for its share of its array's elements.
  share = [jnp.full(p.size, w * n / p.size, jnp.float32) for w, n, p in zip(weights, sizes, samples)]
  keys, share = lax.sort((jnp.concatenate(samples), jnp.concatenate(share)), num_keys=1)
  at = _threshold.rung_positions((total - keep) / total, keys.size)
  at = jnp.searchsorted(jnp.cumsum(share) / total, at / keys.size)
  rungs = keys[jnp.clip(at, 0, keys.size - 1)]
  low, last = _threshold.search(count, leaves[0].dtype, jnp.int32(total), keep, rungs)[:2]
  return jnp.where(keep == 0, last, low)


def drop_and_grow(mask, drop_scores, grow_scores, keep_after_drop, keep_after_grow, axis=None):
  """One dynamic-sparse-training update: drop the worst, grow the best.

  Kept entries are first cut to the keep_after_drop highest drop scores; then
  the highest grow scores among all entries not kept (those just dropped
  included) are added until keep_after_grow are kept.

  Args:
   mask: bool array, the current mask.
   drop_scores: scores of mask.shape, float (or <= 16-bit integer), or `Elementwise`.
   grow_scores: scores of mask.shape, likewise.  NaN ranks lowest.
   keep_after_drop: kept entries per group after the drop, as topk_mask's
    `keep`; no more than what the mask keeps takes effect.
   keep_after_grow: kept entries per group at the end, likewise; nothing is
    dropped to reach it.
   axis: as in topk_mask.

  Returns:
   Bool array of mask.shape.  Per group exactly max(d, min(units,
   keep_after_grow)) are kept, with d = min(keep_after_drop, kept before).

  Raises:
   TypeError: unsupported dtype (32-bit integers have no key to spare).
   ValueError: shapes differ, or as topk_mask.
  """
  mask = jnp.asarray(mask, bool)
  drop = _keys(drop_scores, mask)
  if not mask.shape == drop.shape == jnp.shape(grow_scores):
    raise ValueError(f"mask and scores need one shape, got {mask.shape}, {drop.shape}, {jnp.shape(grow_scores)}")
  kept = mask & _topk(drop, keep_after_drop, axis)
  have = _threshold.sum_together([kept], _axes(axis, mask.ndim))[0]
  grow = jnp.maximum(_as_count(keep_after_grow) - have, 0)
  return kept | (~kept & _topk(_keys(grow_scores, kept, among=False), grow, axis))


def swap_counts(mask, drop_scores, grow_scores, total_swaps, axis):
  """Shares a number of swaps among groups that each keep a fixed count.

  Every group gets total_swaps // groups; the remainder goes, one each, to
  the groups that gain most: best grow score of an absent unit minus worst
  drop score of a kept one.

  Args:
   mask: bool array, the current mask.
   drop_scores: scores of mask.shape.
   grow_scores: scores of mask.shape.
   total_swaps: int or int32 scalar (may be traced), >= 0.
   axis: as in topk_mask.

  Returns:
   int32 array, mask.shape with size 1 at `axis`.  Capped at what a group
   can swap, min(kept, units - kept); the sum is total_swaps unless a cap
   bites.

  Raises:
   TypeError: total_swaps is not an integer.
   ValueError: bad axis.
  """
  mask = jnp.asarray(mask, bool)
  axes = _axes(axis, mask.ndim)
  units = math.prod(mask.shape[a] for a in axes)
  groups = mask.size // units if units else 0
  kept = _threshold.sum_together([mask], axes)[0]
  if not groups:
    return jnp.zeros_like(kept)
  cap = jnp.minimum(kept, units - kept)
  low = lambda s: jnp.where(jnp.isnan(s), -jnp.inf, s)
  as_float = lambda s: low(jnp.asarray(s).astype(jnp.float32))
  best = jnp.max(as_float(grow_scores), axes, keepdims=True, where=~mask, initial=-jnp.inf)
  worst = jnp.min(as_float(drop_scores), axes, keepdims=True, where=mask, initial=jnp.inf)
  return share_swaps(best - worst, cap, total_swaps, groups)


def share_swaps(gain, cap, total_swaps, groups, axis=None):
  """The shares of `swap_counts`, from what a swap gains in each group and how many a group can swap (int32)."""
  total = jnp.maximum(_as_count(total_swaps), 0)
  base, extra = total // groups, total % groups
  # A group already at its cap ranks last, so that its extra swap is not lost.
  gain = jnp.where(cap > base, jnp.where(jnp.isnan(gain), -jnp.inf, gain), jnp.nan)
  return jnp.minimum(base + topk_mask(gain, extra, axis).astype(jnp.int32), cap)


def _as_count(n):
  n = jnp.asarray(n)
  if not jnp.issubdtype(n.dtype, jnp.integer):
    raise TypeError(f"a count must be an integer, got {n.dtype}")
  return n.astype(jnp.int32)


def _axes(axis, ndim):
  if axis is None:
    return tuple(range(ndim))
  axes = [operator.index(a) for a in (axis if isinstance(axis, (tuple, list)) else (axis,))]
  if any(not -ndim <= a < ndim for a in axes) or len({a % ndim for a in axes}) < len(axes):
    raise ValueError(f"bad axis {axis} for {ndim} dimensions")
  return tuple(sorted(a % ndim for a in axes))


def _keys(scores, where=None, among=True):
  """The sortable keys of scores; entries where `where` is not `among` rank below everything, NaN included."""
  if not isinstance(scores, Elementwise):
    scores = Elementwise(lambda x: x, (jnp.asarray(scores),))
  keys = _threshold.Keys(scores.fn, tuple(scores.arrays), where, among)
  if keys.lowest < -(2**31):
    raise TypeError(f"{keys.dtype} scores are not supported here")
  return keys


def _topk(keys, keep, axis):
  """topk_mask of sortable keys."""
  shape = keys.shape
  axes = _axes(axis, len(shape))
  group = tuple(1 if a in axes else n for a, n in enumerate(shape))
  size, units = math.prod(shape), math.prod(shape[a] for a in axes)
  keep = jnp.broadcast_to(jnp.clip(_as_count(keep), 0, units), group)
  if size == 0 or not axes:
    return jnp.broadcast_to(keep > 0, shape)
  if len(axes) == 1 and units <= _SMALL_UNITS:
    return _topk_pairs(keys.compute(), keep, axes[0])
  index = _unit_index(shape, axes)
  if size <= _SMALL_SIZE:
    return _topk_bisect(keys, keep, axes, index, units)
  rungs = _threshold.find_rungs(keys, axes, units, keep)
  count = lambda pivots: _threshold.count_reaching(keys, pivots, axes)
  whole = jnp.full(group, units, jnp.int32)
  low, last, c_low, c_high = _threshold.search(count, keys.dtype, whole, keep, rungs, keys.lowest)
  # Keep what is above `threshold`, and its ties with index < `cut`.
  threshold = jnp.where(keep == 0, last, low)
  cut = jnp.where(keep == 0, 0, units)
  torn = (keep > 0) & (c_low != keep)
  cut = lax.cond(
    jnp.any(torn),
    lambda: jnp.where(torn, _threshold.tie_cut(keys, threshold, keep - c_high, axes), cut),
    lambda: cut,
  )
  key = keys.compute()
  return (key > threshold) | ((key == threshold) & (index < cut))


def _unit_index(shape, axes):
  """Row-major position of a unit in its group, broadcastable to `shape`."""
  index, stride = jnp.int32(0), math.prod(shape[a] for a in axes)
  for a in axes:
    stride //= shape[a]
    ones = tuple(n if b == a else 1 for b, n in enumerate(shape))
    index = index + stride * lax.broadcasted_iota(jnp.int32, ones, a)
  return index


def _topk_bisect(keys, keep, axes, index, units):
  """Threshold by bisection over the bits of the key, then over positions among the ties."""
  key = keys.compute()
  lowest, highest = _threshold.key_range(keys.dtype)
  threshold = _threshold.bisect(
    lambda p: _threshold.sum_together([key >= p], axes)[0], min(lowest, keys.lowest), highest, keep
  )
  above = key > threshold
  need = keep - _threshold.sum_together([above], axes)[0]
  place = jnp.where(key == threshold, units - 1 - index, -1)
  last = _threshold.bisect(lambda p: _threshold.sum_together([place >= p], axes)[0], -1, units - 1, need)
  return (above | ((place >= last) & (place >= 0))) & (keep > 0)


def _topk_pairs(key, keep, axis):
  """Ranks by comparing all pairs along one short axis, in one fused pass."""
  if key.shape[axis] > _PAIRED_UNITS:
    return _rank_all_against_one(key, keep, axis)
  # One thread of a GPU holds a whole group and compares each pair once; a CPU vectorises better along full rows.
  return lax.platform_dependent(
    key,
    keep,
    cuda=lambda key, keep: _rank_each_pair(key, keep, axis),
    default=lambda key, keep: _rank_all_against_one(key, keep, axis),
  )


def _rank_all_against_one(key, keep, axis):
  """Every unit's rank is the number of units that beat it; all units of an axis against one of them at a time."""
  index = lax.broadcasted_iota(jnp.int32, tuple(n if a == axis else 1 for a, n in enumerate(key.shape)), axis)
  rank = jnp.int32(0)
  for j in range(key.shape[axis]):
    other = lax.slice_in_dim(key, j, j + 1, axis=axis)
    rank += jnp.where(j < index, other >= key, other > key).astype(jnp.int32)
  return rank < keep


def _rank_each_pair(key, keep, axis):
  """The same ranks with each pair compared once, slice against slice."""
  rows = [lax.slice_in_dim(key, j, j + 1, axis=axis) for j in range(key.shape[axis])]
  ranks = [jnp.zeros(rows[0].shape, jnp.int8) for _ in rows]
  for i, earlier in enumerate(rows):
    for j in range(i + 1, len(rows)):
      wins = (rows[j] > earlier).astype(jnp.int8)
      ranks[i] += wins
      ranks[j] += 1 - wins
  return jnp.concatenate([rank < keep.astype(jnp.int8) for rank in ranks], axis)
