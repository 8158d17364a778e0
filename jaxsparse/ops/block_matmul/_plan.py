"""What the kernels must know of the positions of blocks: who works on what, with which rows of x.

A tile of the result is `TILE` wide. Blocks that are narrower share it: their rows are merged to one sorted list (the
union), so that each part of x is loaded once a tile. A *list* belongs to `max(1, TILE / size)` neighbouring block columns;
block columns wider than a tile have `size / TILE` tiles that work on the same list.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.arrays import _block_array

TILE = 128  # of the result, along O (along K in the transposed product)
SAMPLED_COLUMNS = 256  # of the sampled product's tile


class Plan(NamedTuple):
  """The blocks as lists, one for every tile of the result; int32 throughout.

  `minor` is what is summed over (block rows in `x @ w`), `major` what the result has (block columns).

  Attributes:
    minor: `[N]`, of every entry of every list.
    slots: `[N * S]`, for every entry the slot of the block in each of the S block columns of the list; the capacity N
      where there is none, which lies outside of the array, so that the copy engine reads zeros and stores nothing.
    starts: `[lists + 1]`, of the lists in `minor`.
    order: `[lists]`, longest first.
    heavy: `[1]`, how many lists are more than twice as long as the mean.
    items: `[I, 2]` of (list, first entry): the lists in pieces of equal length, for the sampled product.
    num_items: `[1]`, how many of them there are.
  """

  minor: Any
  slots: Any
  starts: Any
  order: Any
  heavy: Any
  items: Any
  num_items: Any


class Plans(NamedTuple):
  """What the three products of a layer need: `x @ w`, `dy @ w.T`, and `x.T @ dy` at the kept blocks."""

  forward: Plan
  transposed: Plan
  sampled: Plan


def plans_of(w: _block_array.BlockArray) -> Plans:
  """The plans of a weight: those it carries, else derived here, while tracing where positions are static."""
  if w.plan is not None:
    return w.plan
  if w.static:
    return _static_plans(w.positions, w.grid, w.block_shape)
  return _plans(w.rows, w.cols, w.grid, w.block_shape)


@functools.lru_cache(64)
def _static_plans(positions, grid, block_shape):
  return _make(np, positions.rows, positions.cols, grid, block_shape)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _plans(rows, cols, grid, block_shape):
  return _make(jnp, rows, cols, grid, block_shape)


def sampled_rows(bk: int) -> int:
  """Rows of w to a tile of the sampled product: one wgmma for each of two warpgroups where blocks are that high."""
  return 128 if bk >= 128 else 64


def sampled_entries(bo: int) -> int:
  """Entries of a list that a tile of the sampled product takes."""
  return max(1, SAMPLED_COLUMNS // bo)


def _make(xp, rows, cols, grid, block_shape) -> Plans:
  (block_rows, block_cols), (bk, bo) = grid, block_shape
  live = cols < block_cols
  make = functools.partial(_plan, xp, live, piece=sampled_entries(bo))
  return Plans(
    forward=make(cols, rows, block_cols, block_rows, max(1, TILE // bo)),
    transposed=make(rows, cols, block_rows, block_cols, max(1, TILE // bk)),
    sampled=make(rows, cols, block_rows, block_cols, max(1, sampled_rows(bk) // bk)),
  )


def _plan(xp, live, major, minor, majors, minors, shared, *, piece) -> Plan:
  """Lists of `shared` neighbours along major, in NumPy or JAX."""
  capacity = major.shape[0]
  lists = -(-majors // shared)
  key = xp.where(live, major // shared * minors + minor, lists * minors).astype(np.int32)
  order = xp.argsort(key, stable=True)
  key, live = key[order], live[order]
  first = xp.concatenate([live[:1], (key[1:] != key[:-1]) & live[1:]])
  # Entry of every block; blocks that are none go to one past the end, which is cut off.
  entry = xp.where(live, xp.cumsum(first) - 1, capacity)
  slot_at = xp.where(live, entry * shared + (major % shared)[order], capacity * shared)
  slots = _scatter(xp, np.int32(capacity), capacity * shared, slot_at, order)
  minors_of = _scatter(xp, np.int32(0), capacity, entry, key % minors)
  counts = _count(xp, lists, xp.where(first, key // minors, lists))
  starts = xp.concatenate([xp.zeros(1, np.int32), xp.cumsum(counts).astype(np.int32)])
  longest = xp.argsort(-counts, stable=True)
  heavy = (counts * lists > 2 * counts.sum()).sum()
  # Pieces of lists: the j-th piece of list l is item j + (pieces of the lists before it).
  pieces = -(-counts // piece)
  ends = xp.cumsum(pieces)
  bound = min(capacity, capacity // piece + lists)
  item = xp.arange(bound)
  of = xp.minimum(xp.searchsorted(ends, item, side="right"), lists - 1)
  begin = starts[:-1][of] + (item - (ends - pieces)[of]) * piece
  as32 = lambda a: xp.asarray(a).astype(np.int32)
  return Plan(
    minor=as32(minors_of),
    slots=as32(slots),
    starts=as32(starts),
    order=as32(longest),
    heavy=as32(heavy)[None],
    items=as32(xp.stack([of, begin], 1)),
    num_items=as32(ends[-1])[None],
  )


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
