"""What the kernel for narrow blocks must know of their positions: lists of block columns that lie in the same rows."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.ops.block_matmul import _lists

SIZE = 32  # of a block, both sides
COLUMNS = 8  # block columns of a tile
WIDTH = SIZE * COLUMNS  # of the result
_ONE = 1 << COLUMNS
# Density from which the kernel is taken. Measured at 8192 x 8192 x 8192: 1.5 times as fast as the other one at 0.5 and 0.25, 1.3 at
# 0.1, 1.18 at 0.05; not measured below. A random pattern of 0.05 has a few blocks less.
PAYS_FROM = 0.045


class NarrowPlan(NamedTuple):
  """The blocks as lists of S = 8 block columns each; int32 throughout.

  Attributes:
    minor: `[N]`, of every entry of every list: the block row (what is summed over).
    present: `[N]`, bit j: the entry has a block in place j of its list; and 256 times how many it has (`bits_of`, `count_of`).
    slots: `[N * S]`, of these blocks; the capacity N where there is none.
    starts: `[lists + 1]`, of the lists in `minor`.
    order: `[lists]`, longest first.
    units: `[lists * S]`, the block column of each place. Places that have none lie outside of the result, each somewhere
      else.
  """

  minor: Any
  present: Any
  slots: Any
  starts: Any
  order: Any
  units: Any


def bits_of(present):
  """Which blocks an entry of `NarrowPlan.present` has."""
  return present & (_ONE - 1)


def count_of(present):
  """How many blocks an entry of `NarrowPlan.present` has."""
  return present >> COLUMNS


@functools.partial(jax.jit, static_argnums=2)
def traced_pair(rows, cols, grid):
  """`pair` for positions that are traced, or on a device."""
  return pair(jnp, rows, cols, grid)


def pair(xp, rows, cols, grid) -> tuple[NarrowPlan, NarrowPlan]:
  """The plans of `x @ w` and of `dy @ w.T`, in NumPy or JAX."""
  block_rows, block_cols = grid
  live = cols < block_cols
  forward = make(xp, live, cols, block_cols, rows, block_rows)
  return forward, make(xp, live, rows, block_rows, cols, block_cols)


def make(xp, live, major, majors, minor, minors) -> NarrowPlan:
  """The plan, in NumPy or JAX.

  Block columns are put together in pairs that have many rows in common, then these pairs, and so on: the rows of a list
  are what x costs.

  Args:
    xp: numpy or jax.numpy.
    live: `[N]`, which of the blocks there are.
    major: `[N]`, block columns (of the result); `majors`: how many there are.
    minor: `[N]`, block rows; `minors`: how many there are.
  """
  capacity, columns = minor.shape[0], COLUMNS
  used = _lists.scatter(
    xp, 0, majors * minors, xp.where(live, major * minors + minor, majors * minors), xp.ones_like(minor)
  )
  used, lists = used.reshape(majors, minors), majors
  list_of, place, level = xp.arange(majors), xp.zeros(majors, np.int32), 1
  while level < columns:
    mate = _lists.matching(xp, used)
    lower = xp.arange(lists) < mate
    name = xp.cumsum(lower) - 1
    pair = xp.where(lower, name, name[xp.minimum(mate, lists - 1)])
    place = xp.where(lower[list_of], place, place + level)
    list_of = pair[list_of]
    pairs = -(-lists // 2)
    at = xp.where(used > 0, pair[:, None] * minors + xp.arange(minors), pairs * minors)
    used = _lists.scatter(xp, 0, pairs * minors, at.reshape(-1), xp.ones(at.size, np.int32)).reshape(pairs, minors)
    lists, level = pairs, level * 2
  units = _lists.scatter(xp, -1, lists * columns, list_of * columns + place, xp.arange(majors))
  units = xp.where(units < 0, majors + xp.arange(lists * columns), units)

  major = xp.minimum(major, majors - 1)
  of_block, place = list_of[major], place[major]
  minors_of, slots, counts = _lists.group(xp, live, minor, minors, lists, columns, of_block, place)
  arrays = (
    minors_of,
    ((slots.reshape(capacity, columns) < capacity) * (2 ** xp.arange(columns) + _ONE)).sum(1),
    slots,
    xp.concatenate([xp.zeros(1, np.int32), xp.cumsum(counts)]),
    xp.argsort(-counts, stable=True),
    units,
  )
  return NarrowPlan(*(xp.asarray(a).astype(np.int32) for a in arrays))
