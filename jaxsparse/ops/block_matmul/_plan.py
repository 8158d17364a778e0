"""What the kernels must know of the positions of blocks: who works on what, with which rows of x.

A tile of the result is `TILE` wide: two units of 64, one for each warpgroup that multiplies. Narrower blocks share a tile:
their rows are merged to one sorted list (the union), so that each part of x is loaded once a tile. Units whose blocks lie in
the same rows are put together, wherever they are: the union is what x costs. Block columns wider than a tile have
`size / TILE` tiles that work on the same list.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.arrays import _block_array

TILE = 128  # of the result, along O (along K in the transposed product)
UNIT = 64
SAMPLED_COLUMNS = 256  # of the sampled product's tile
HEAD_ROWS = 29  # rows in a line of `Plans.heads`, which so has 128 bytes
_HEAVY_LEVELS = 16
_ROUNDS = 8  # of matching units; each matches about a third of what is left
_SMS = 132


class Plan(NamedTuple):
  """The blocks as lists, one for every tile of the result; int32 throughout.

  `minor` is what is summed over (block rows in `x @ w`), `major` what the result has (block columns).

  Attributes:
    minor: `[N]`, of every entry of every list.
    slots: `[N * S]`, for every entry the slot of the block in each of the S block columns of the list; the capacity N
      where there is none.
    starts: `[lists + 1]`, of the lists in `minor`.
    order: `[lists]`, longest first.
    heavy: `[16]`, at j how many lists hold more than 2**-j of all entries.
    units: `[2 * lists]`, where blocks are narrower than a tile: which 64 columns of the result each half of a tile is. The
      last one may lie outside of the result.
  """

  minor: Any
  slots: Any
  starts: Any
  order: Any
  heavy: Any
  units: Any


class Plans(NamedTuple):
  """What the three products of a layer need: `x @ w`, `dy @ w.T`, and `x.T @ dy` at the kept blocks.

  Attributes:
    forward: lists of block columns.
    transposed: lists of block rows.
    items: `[I, 2]`, int32, of (list, first entry): the lists of `transposed` in pieces of equal length, for the sampled
      product, in an order in which neighbours share rows and columns.
    num_items: `[1]`, int32, how many of them there are.
    heads: int32 `[block columns, 32]`, longest list first, for few rows of x: the column, the slot of its first block, how
      many there are, and the rows of the first of them. None where blocks are not in a `BlockArray`'s order.
  """

  forward: Plan
  transposed: Plan
  items: Any
  num_items: Any
  heads: Any


def plans_of(w: _block_array.BlockArray, ordered: bool = True) -> Plans:
  """The plans of a weight: those it carries, else derived here, while tracing where positions are static.

  Args:
    w: the weight.
    ordered: whether blocks are in a `BlockArray`'s order.
  """
  if w.plan is not None:
    return w.plan
  if w.static:
    return _static_plans(w.positions, w.grid, w.block_shape)
  return _plans(w.rows, w.cols, w.grid, w.block_shape, ordered)


@functools.lru_cache(64)
def _static_plans(positions, grid, block_shape):
  return _make(np, positions.rows, positions.cols, grid, block_shape)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _plans(rows, cols, grid, block_shape, ordered):
  return _make(jnp, rows, cols, grid, block_shape, ordered)


def sampled_entries(bo: int) -> int:
  """Entries of a list of block rows that a tile of the sampled product takes."""
  return max(1, SAMPLED_COLUMNS // bo)


def heavy_level(across: int, threads: int) -> int:
  """The level of `Plan.heavy` at which a tile takes more than a sixth of what one of `threads` has to do.

  Such tiles are begun first, so that none of them is the last.

  Args:
    across: tiles along B.
    threads: blocks of threads.
  """
  share = across / (6 * threads)
  return min(_HEAVY_LEVELS - 1, max(0, round(-math.log2(share))))


def _make(xp, rows, cols, grid, block_shape, ordered=True) -> Plans:
  (block_rows, block_cols), (bk, bo) = grid, block_shape
  live = cols < block_cols
  forward = _plan(xp, live, rows, block_rows, *_tiles(xp, live, cols, block_cols, rows, block_rows, bo))
  transposed = _plan(xp, live, cols, block_cols, *_tiles(xp, live, rows, block_rows, cols, block_cols, bk))
  items, num_items = _items(xp, transposed, block_cols, sampled_entries(bo))
  heads = _heads(xp, rows, cols, block_cols) if ordered else None
  return Plans(forward, transposed, items, num_items, heads)


def _tiles(xp, live, major, majors, minor, minors, size):
  """(lists, S, units, list of every block, place of every block in its list) of tiles of `TILE`.

  Units of 64 are put together so that they share rows.
  """
  if size >= TILE:
    return majors, 1, xp.arange(2 * majors), major, xp.zeros_like(major)
  own = max(1, UNIT // size)
  units = -(-majors // own)
  unit = xp.where(live, major // own, units)
  used = _scatter(xp, 0, units * minors, xp.where(live, unit * minors + minor, units * minors), xp.ones_like(minor))
  mate = _matching(xp, used.reshape(units, minors))
  lists = -(-units // 2)
  # A list is named by the lower of its units.
  lower = xp.arange(units) < mate
  name = xp.cumsum(lower) - 1
  list_of = xp.where(lower, name, name[xp.minimum(mate, units - 1)])
  place = xp.where(lower, 0, 1)
  members = _scatter(xp, units, 2 * lists, 2 * list_of + place, xp.arange(units))
  unit = xp.minimum(unit, units - 1)
  return lists, 2 * own, members, list_of[unit], place[unit] * own + major % own


def _matching(xp, used):
  """Pairs of rows of a 0/1 matrix `[n, m]` that have many ones in common: the partner of each row; n: none.

  Whoever is each other's best partner is matched, a few times over, which is what taking the best pair again and again
  does; what is left is matched as it comes.
  """
  n = used.shape[0]
  index = xp.arange(n, dtype=np.int32)
  common = xp.asarray(used).astype(np.float32)
  common = (common @ common.T).astype(np.int32) * 1024
  # Ties are broken in the same way from both sides.
  common = common + ((index[:, None] + index) * 619 + index[:, None] * index * 433) % 1024
  common = xp.where(index[:, None] == index, -1, common)

  def match(_, mate):
    free = mate == n
    best = xp.where(free[:, None] & free, common, -1).argmax(1)
    mutual = free & free[best] & (best[best] == index) & (best != index)
    return xp.where(mutual, best, mate).astype(np.int32)

  # One round to a program, however many there are: plans are compiled with every program that changes masks.
  mate = (
    functools.reduce(lambda mate, i: match(i, mate), range(_ROUNDS), np.full(n, n, np.int32))
    if xp is np
    else (jax.lax.fori_loop(0, _ROUNDS, match, jnp.full(n, n, jnp.int32)))
  )
  left = mate == n
  order = xp.argsort(~left, stable=True)
  rank = xp.cumsum(left) - 1
  partner = rank ^ 1
  partner = xp.where(partner < left.sum(), order[xp.minimum(partner, n - 1)], n)
  return xp.where(left, partner, mate)


def _plan(xp, live, minor, minors, lists, shared, units, list_of, place) -> Plan:
  """The plan of lists of `shared` block columns each, in NumPy or JAX."""
  capacity = minor.shape[0]
  key = xp.where(live, list_of * minors + minor, lists * minors).astype(np.int32)
  order = xp.argsort(key, stable=True)
  key, live = key[order], live[order]
  first = xp.concatenate([live[:1], (key[1:] != key[:-1]) & live[1:]])
  # Entry of every block; blocks that are none go to one past the end, which is cut off.
  entry = xp.where(live, xp.cumsum(first) - 1, capacity)
  slot_at = xp.where(live, entry * shared + place[order], capacity * shared)
  slots = _scatter(xp, np.int32(capacity), capacity * shared, slot_at, order)
  minors_of = _scatter(xp, np.int32(0), capacity, entry, key % minors)
  counts = _count(xp, lists, xp.where(first, key // minors, lists))
  starts = xp.concatenate([xp.zeros(1, np.int32), xp.cumsum(counts).astype(np.int32)])
  longest = xp.argsort(-counts, stable=True)
  share = counts / xp.maximum(counts.sum(), 1)
  heavy = (share > 0.5 ** xp.arange(_HEAVY_LEVELS)[:, None]).sum(1)
  as32 = lambda a: xp.asarray(a).astype(np.int32)
  return Plan(
    minor=as32(minors_of),
    slots=as32(slots),
    starts=as32(starts),
    order=as32(longest),
    heavy=as32(heavy),
    units=as32(units),
  )


def _items(xp, plan, minors, piece):
  """Pieces of lists as (list, first entry), and how many there are."""
  starts, minors_of = plan.starts, plan.minor
  counts = starts[1:] - starts[:-1]
  lists, capacity = counts.shape[0], minors_of.shape[0]
  pieces = -(-counts // piece)
  ends = xp.cumsum(pieces)
  # The j-th piece of list l is item j + (pieces of the lists before it).
  item = xp.arange(min(capacity, capacity // piece + lists))
  of = xp.minimum(xp.searchsorted(ends, item, side="right"), lists - 1)
  begin = starts[:-1][of] + (item - (ends - pieces)[of]) * piece
  # What runs at a time shall need about as many columns of dy as of x: take the items in stripes of columns.
  stripes = xp.maximum(1, xp.round((ends[-1] / _SMS) ** 0.5)).astype(np.int32)
  stripe = minors_of[xp.minimum(begin, capacity - 1)] * stripes // minors
  order = xp.argsort(xp.where(item < ends[-1], stripe * lists + of, np.iinfo(np.int32).max), stable=True)
  as32 = lambda a: xp.asarray(a).astype(np.int32)
  return as32(xp.stack([of, begin], 1)[order]), as32(ends[-1])[None]


def _heads(xp, rows, cols, block_cols):
  """`Plans.heads`."""
  counts = _count(xp, block_cols, cols)
  order = xp.argsort(-counts, stable=True)
  counts, starts = counts[order], (xp.cumsum(counts) - counts)[order]
  slots = xp.minimum(starts[:, None] + xp.arange(HEAD_ROWS), rows.shape[0] - 1)
  return xp.concatenate([xp.stack([order, starts, counts], 1), xp.asarray(rows)[slots]], 1).astype(np.int32)


def _scatter(xp, fill, size, at, values):
  """An array of `size` with `values` at `at`; what lies at `size` is dropped."""
  if xp is np:
    out = np.full(size + 1, fill, np.int32)
    out[at] = values
  else:
    out = jnp.full(size + 1, fill, jnp.int32).at[at].set(values.astype(jnp.int32))
  return out[:size]


def _count(xp, size, of):
  """How often each of range(size) occurs; int32 `[size]`."""
  return xp.bincount(of, minlength=size + 1, **({} if xp is np else {"length": size + 1}))[:size].astype(np.int32)
