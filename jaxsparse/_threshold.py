"""The search for the key of the k-th highest score, by counting passes over the scores.

A leaf is often hundreds of MB and sharded, so everything here works on its natural shape with plain reductions. Scores
are compared as order-preserving integer keys: integers give -0.0 == +0.0, one lowest rank for every NaN, and exact
order of subnormals, which float compares flush to zero on CPU. A search then narrows an interval of keys by counting,
per pass, how many keys reach each of a few pivots. Keys are computed anew inside every pass and never stored.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Places of a pass's pivots around a guess, in deviations; the middle two bound an atom. One read serves all counts:
# with eight a search takes 3 to 5 passes; a tenth would spill registers on an H100 and triple the time of a pass.
_SPREAD = (-3.0, -1.0, -0.35, 0.0, 0.0, 0.35, 1.0, 3.0)
SAMPLE = 1 << 15  # largest sample per group; sorting more costs a GPU more than a pass
_SAMPLE_ALL = 1 << 20  # largest sample over all groups
_SAMPLE_MIN = 16  # smaller samples do not repay their sort
_RUNGS = 128  # sample order statistics kept as candidate pivots
_WINDOW = 5.0  # half width of the rung window, in sampling sigmas
_JOINT_REDUCE = True  # one variadic reduce per pass, else one sum per pivot


def key_range(dtype):
  """Lowest and highest key of a dtype; floats: NaN is lowest, +inf highest."""
  dtype = jnp.dtype(dtype)
  if dtype == bool:
    return 0, 1
  if jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize <= 4:
    if dtype == jnp.uint32:
      return -(2**31), 2**31 - 1
    return int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)
  inf = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}.get(dtype.name)
  if inf is None:
    raise TypeError(f"scores of dtype {dtype} are not supported")
  return -inf - 1, inf


def sortable_key(x, where=None):
  """int32 keys in the order of x; entries not in `where` go below all others."""
  lowest, highest = key_range(x.dtype)
  if x.dtype == jnp.uint32:
    key = lax.bitcast_convert_type(x ^ jnp.uint32(2**31), jnp.int32)
  elif not jnp.issubdtype(x.dtype, jnp.floating):
    key = x.astype(jnp.int32)
  else:
    wide = x.dtype.itemsize == 4
    bits = lax.bitcast_convert_type(x, jnp.int32 if wide else jnp.int16).astype(jnp.int32)
    # Sign and magnitude to two's complement: both zeros land on 0.
    size = bits & (0x7FFFFFFF if wide else 0x7FFF)
    key = jnp.where(size > highest, lowest, jnp.where(bits < 0, -size, size))
  return key if where is None else jnp.where(where, key, lowest - 1)


class Keys(NamedTuple):
  """Keys of scores that are an elementwise function of arrays, so that a pass reads the arrays and stores nothing.

  Attributes:
    fn: maps `arrays` (or the same entries of each) to scores of their shape.
    arrays: all of one shape.
    where: None, or a bool array of that shape; entries where it is not `among` rank below everything, NaN included.
    among: see `where`; False spares a caller the copy that `~where` would be.
  """

  fn: Callable[..., jax.Array]
  arrays: tuple[jax.Array, ...]
  where: jax.Array | None = None
  among: bool = True

  @property
  def shape(self):
    return self.arrays[0].shape

  @property
  def dtype(self):
    return jax.eval_shape(self.fn, *self.arrays).dtype

  @property
  def lowest(self):
    return key_range(self.dtype)[0] - (self.where is not None)

  def compute(self):
    """int32 keys, shape of the arrays."""
    where = self.where if self.where is None or self.among else ~self.where
    return sortable_key(self.fn(*self.arrays), where)

  def inside(self, carried):
    """(keys to compute inside a loop's body, carried): XLA may not move their computation out of the loop.

    It would, as nothing in it changes from pass to pass, and the passes would then read a stored copy.
    """
    (arrays, where), carried = lax.optimization_barrier(((self.arrays, self.where), carried))
    return self._replace(arrays=arrays, where=where), carried

  def map(self, fn):
    """The keys of fn(array) in place of every array."""
    return self._replace(arrays=tuple(map(fn, self.arrays)), where=None if self.where is None else fn(self.where))


def sum_together(terms, axes):
  """int32 sums of bool arrays over `axes`, dims kept, in one pass that stores none of the terms.

  XLA on CPU neither fuses sibling sums nor vectorises a lone sum over a trailing axis, nor fuses the term into it; a
  variadic reduce it does (two operands or more), and the barrier keeps it from pruning the second operand.
  """
  axes = tuple(axes)
  terms = [t.astype(jnp.int32) for t in terms]
  if _JOINT_REDUCE:
    ops = tuple(terms if len(terms) > 1 else terms + [1 - terms[0]])
    sums = lax.reduce(ops, (jnp.int32(0),) * len(ops), lambda a, b: tuple(u + v for u, v in zip(a, b)), axes)
    sums = lax.optimization_barrier(sums)
  else:
    sums = [jnp.sum(t, axes) for t in terms]
  return [lax.expand_dims(s, axes) for s in sums[: len(terms)]]


def count_reaching(keys, pivots, axes):
  """[P, *group] counts over `axes` of key >= pivots[p]."""
  keys, pivots = keys.inside(pivots)
  key = keys.compute()
  return jnp.stack(sum_together([key >= p for p in pivots], axes))


def sample(keys, axes, size):
  """Keys of `size` units spread over each group, [*other axes, size].

  A gather, since under sharding a strided slice exchanges whole shards.  A
  hash moves each place within its stride, out of step with any pattern.
  """
  shape = keys.shape
  stride = math.prod(shape[a] for a in axes) // size
  i = lax.iota(jnp.uint32, size)
  move = ((i * jnp.uint32(2654435761)) >> 7) % stride
  place = (i * jnp.uint32(stride) + move).astype(jnp.int32)
  index = [slice(None)] * len(shape)
  for a in reversed(axes):
    index[a], place = place % shape[a], place // shape[a]
  # Indexing puts the sample first unless the indexed axes are neighbours.
  front = axes[0] if axes[-1] - axes[0] == len(axes) - 1 else 0
  take = lambda y: jnp.moveaxis(y.at[tuple(index)].get(mode="promise_in_bounds"), front, -1)
  return keys.map(take).compute()


def rung_positions(below, size):
  """[_RUNGS, *group] fractional ranks around rank below * size of a sample."""
  sigma = jnp.sqrt(size * below * (1 - below)) + 1
  steps = jnp.linspace(-_WINDOW, _WINDOW, _RUNGS).reshape((-1,) + (1,) * below.ndim)
  return below * size + steps * sigma


def find_rungs(keys, axes, units, keep):
  """Sample keys near the wanted rank, [_RUNGS, *group] ascending, or None."""
  size = min(SAMPLE, _SAMPLE_ALL // (math.prod(keys.shape) // units))
  size = min(size, units // 4)
  if size < _SAMPLE_MIN:
    return None
  found = lax.sort(sample(keys, axes, size), is_stable=False)
  rest = found.shape[:-1]
  at = rung_positions((units - keep) / units, size).reshape((_RUNGS,) + rest)
  at = jnp.clip(at, 0, size - 1).astype(jnp.int32)
  rungs = jnp.take_along_axis(found, jnp.moveaxis(at, 0, -1), axis=-1)
  return jnp.moveaxis(rungs, -1, 0).reshape((_RUNGS,) + keep.shape)


def search(count, dtype, units, keep, rungs, lowest=None, highest=None):
  """Narrows, per group, the keys [low, last] around the keep-th highest.

  count(low) >= keep > count(last + 1) throughout (for keep > 0); ends when
  count(low) == keep or low == last, in at most some 2 * log_8(2**32) passes.

  Args:
   count: maps int32 pivots [P, *group] to counts of keys >= pivot.
   dtype: score dtype, gives the range of keys.
   units: int32 [*group], count at the lowest key.
   keep: int32 [*group], in [0, units].
   rungs: [_RUNGS, *group] keys expected near the threshold, or None.
   lowest: lowest key, where not the dtype's.
   highest: highest key, where not the dtype's.

  Returns:
   low, last (keys), count(low), count(last + 1), all int32 [*group].
  """
  if dtype is not None:
    lowest = key_range(dtype)[0] if lowest is None else lowest
    highest = key_range(dtype)[1]
  open_ = lambda s: (s[2] != keep) & (s[1] > 0) & (keep > 0)

  def body(state):
    low, span, c_low, c_high, stalled, first = state
    # Offsets from `low` are unsigned: the span of keys can need 32 bits.
    off = jnp.where(stalled, _even_offsets(span), _guess_offsets(low, span, c_low, c_high, keep))
    if rungs is not None:
      near, usable = _rung_offsets(low, span, c_low, c_high, keep, rungs, first)
      off = jnp.where(usable & (first | ~stalled), near, off)
    off = jnp.minimum(jnp.maximum(off, 1), span)
    c = count(low + off.astype(jnp.int32))
    up = c >= keep
    rise = jnp.max(jnp.where(up, off, 0), 0)
    end = jnp.min(jnp.where(up, span, off - 1), 0)
    new_span = end - rise
    return (
      low + rise.astype(jnp.int32),
      new_span,
      jnp.min(jnp.where(up, c, c_low), 0),
      jnp.max(jnp.where(up, c_high, c), 0),
      new_span > span // 4,
      jnp.bool_(False),
    )

  full = lambda v, d: jnp.full(keep.shape, v, d)
  start = (
    full(lowest, jnp.int32),
    full(highest - lowest, jnp.uint32),
    units,
    jnp.zeros_like(keep),
    full(dtype is not None, bool),
    jnp.bool_(True),
  )
  low, span, c_low, c_high, *_ = lax.while_loop(lambda s: jnp.any(open_(s)), body, start)
  return low, low + span.astype(jnp.int32), c_low, c_high


def _pivot_index(ndim):
  return lax.iota(jnp.int32, len(_SPREAD)).reshape((-1,) + (1,) * ndim)


def _even_offsets(span):
  """Offsets that split [1, span] evenly: the safeguard that bounds the search."""
  k = _pivot_index(span.ndim).astype(jnp.uint32)
  pivots = len(_SPREAD)
  return 1 + span // pivots * k + span % pivots * k // pivots


def _guess_offsets(low, span, c_low, c_high, keep):
  """Offsets around where the threshold lies if keys are spread evenly."""
  inside = jnp.maximum(c_low - c_high, 1).astype(jnp.float32)
  share = (c_low - keep) / inside
  width = span.astype(jnp.float32)
  # .003: for the bend of a density, which a straight line through it misses.
  dev = width * (jnp.sqrt(share * (1 - share) / inside) + 0.003)
  spread = jnp.array(_SPREAD).reshape((-1,) + (1,) * span.ndim)
  off = jnp.clip(width * share + spread * dev, 0, 2.0**32 - 2**9).astype(jnp.uint32)
  # Quantised scores sit at round keys: try the roundest key near the guess.
  bit = jnp.exp2(jnp.floor(jnp.log2(jnp.clip(dev, 1, 2.0**31)))).astype(jnp.uint32)
  start = lax.bitcast_convert_type(low, jnp.uint32)
  index, half = _pivot_index(span.ndim), len(_SPREAD) // 2
  round_ = ((start + off + bit // 2) & ~(bit - 1)) - start
  off = jnp.where(((index == half - 1) | (index == half)) & (round_ <= span), round_, off)
  return off + (index == half).astype(jnp.uint32)


def _rung_offsets(low, span, c_low, c_high, keep, rungs, first):
  """Offsets of rungs around the threshold, and whether enough lie inside."""
  last = low + span.astype(jnp.int32)
  under = jnp.sum(rungs < low, 0, dtype=jnp.int32)
  inside = jnp.sum(rungs <= last, 0, dtype=jnp.int32) - under
  n = jnp.maximum(inside, 1).astype(jnp.float32)
  share = (c_low - keep) / jnp.maximum(c_low - c_high, 1)
  # At first the window is centred on the wanted rank, whatever it holds.
  at = jnp.where(first, _RUNGS / 2, under + share * n)
  dev = jnp.where(first, _RUNGS / (2 * _WINDOW) * 1.4, 0.06 * n + 1)
  spread = jnp.array(_SPREAD).reshape((-1,) + (1,) * span.ndim)
  pick = jnp.clip(at + spread * dev, 0, _RUNGS - 1).astype(jnp.int32)
  near = jnp.take_along_axis(rungs, pick, axis=0)
  near = jnp.clip(near, low, last)
  off = (near - low).astype(jnp.uint32)
  upper = (_pivot_index(span.ndim) >= len(_SPREAD) // 2).astype(jnp.uint32)
  return jnp.minimum(off, span - upper) + upper, first | (inside >= 12)


def tie_cut(keys, threshold, need, axes):
  """Row-major index over `axes` below which `need` keys equal threshold.

  Axis by axis, outermost first: find the slice that holds the last tie
  wanted, then look only inside it.
  """
  shape = list(keys.shape)
  cut, stride = jnp.int32(0), math.prod(shape[a] for a in axes)
  for i, a in enumerate(axes[:-1]):
    stride //= shape[a]
    ties = sum_together([keys.compute() == threshold], axes[i + 1 :])[0]
    below = jnp.cumsum(ties, a)
    at = jnp.sum(below < need, a, keepdims=True, dtype=jnp.int32)
    at = jnp.minimum(at, shape[a] - 1)  # groups without ties
    need = need - jnp.sum(jnp.where(below < need, ties, 0), a, keepdims=True)
    cut = cut + stride * at
    keys, shape[a] = keys.map(lambda v: jnp.take_along_axis(v, at, axis=a)), 1
  a = axes[-1]
  n = shape[a]
  tie = keys.compute() == threshold
  place = lax.broadcasted_iota(jnp.int32, tuple(m if b == a else 1 for b, m in enumerate(shape)), a)
  # The same search, over places from the back: exact, since no two are equal.
  count = lambda pivots: jnp.stack(sum_together([tie & (n - 1 - place >= p) for p in pivots], (a,)))
  units = sum_together([tie], (a,))[0]
  low = search(count, None, units, jnp.clip(need, 0, units), None, 0, n - 1)[0]
  return cut + n - low


def bisect(reach, lowest, highest, keep):
  """Largest threshold that at least `keep` keys reach, per group: one bit of it a pass.

  Slower than `search` on a large array, but a tenth of the program for XLA to compile.

  Args:
    reach: maps int32 pivots `[*group]` to how many keys reach them.
    lowest, highest: range of the keys, Python integers.
    keep: int32 `[*group]`.

  Returns:
    int32 `[*group]`.
  """
  span = jnp.uint32(highest - lowest)
  bits = (highest - lowest).bit_length()

  def body(i, found):
    trial = found | (jnp.uint32(1) << jnp.uint32(bits - 1 - i))
    enough = reach(lowest + trial.astype(jnp.int32)) >= keep
    return jnp.where((trial <= span) & enough, trial, found)

  found = lax.fori_loop(0, bits, body, jnp.zeros(keep.shape, jnp.uint32))
  return lowest + found.astype(jnp.int32)
