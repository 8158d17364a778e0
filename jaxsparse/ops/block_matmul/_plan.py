"""What the kernels must know of the positions of blocks: who works on what, with which rows of x.

A tile of the result is `TILE` wide: two units of 64, one for each warpgroup that multiplies. Narrower blocks share a tile:
their rows are merged to one sorted list (the union), so that each part of x is loaded once a tile. Units whose blocks lie in
the same rows are put together, wherever they are: the union is what x costs. Block columns wider than a tile have
`size / TILE` tiles that work on the same list.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.arrays import _block_array
from jaxsparse.ops.block_matmul import _heads
from jaxsparse.ops.block_matmul import _lists
from jaxsparse.ops.block_matmul import _narrow_plan

TILE = 128  # of the result, along O (along K in the transposed product)
UNIT = 64
SAMPLED_COLUMNS = 256  # of the sampled product's tile, to each warpgroup
_FLAT_BELOW = 0.2  # density, of blocks lower than a tile; measured; see `sampled_height`
_FLAT_STRIPES = 3  # stripes of flat tiles, relative to those of others; measured, at 1 to 6
# Times of the sampled product, relative to that of multiplying 64 rows of a tile: loading 64 columns of them, and adding up
# the parts of a tile. 32 columns take _NARROW of the time of 64.
_LOAD, _NARROW, _MEETING = 0.18, 0.8, 0.12
HEADER, PART = 3, 6  # numbers before all parts of lists, and to each of them
# A list is cut in parts of at most so many times the mean length: the first of these for which there is room, and there always
# is for the last. Measured: what is cut finer shares more of x in the L2 cache, but parts that meet cost as much as 10 us of
# work, so no list as short as _LEAST rows of the sum is cut.
_CUTS = (1.5, 2, 3)
_LEAST = 2560
_TILE_COST = 192  # what a tile costs beside its steps, in rows of the sum
_SMS = 132


class Plan(NamedTuple):
  """The blocks as lists, one for every tile of the result; int32 throughout.

  `minor` is what is summed over (block rows in `x @ w`), `major` what the result has (block columns).

  Attributes:
    minor: `[N]`, of every entry of every list.
    slots: `[N * S]`, for every entry the slot of the block in each of the S block columns of the list; the capacity N
      where there is none.
    starts: `[lists + 1]`, of the lists in `minor`.
    parts: `[3 + 6 P]`: how many parts of lists there are, how many of them are longer than 1.5 times the mean of lists, and
      how many rounds of all of them the longest one takes; then of each, longest first and those of one list together:
      (list, first entry, one past the last, index, parts, place). The parts of a list, numbered by index, meet at places
      for their sums, one less than there are parts, from `place` on.
    units: `[2 * lists]`, where blocks are narrower than a tile: which 64 columns of the result each half of a tile is. The
      last one may lie outside of the result.
    whole: `[3 * lists]`, for those who do not cut them: (list, first entry, one past the last), longest first.
  """

  minor: Any
  slots: Any
  starts: Any
  parts: Any
  units: Any
  whole: Any


class Sampled(NamedTuple):
  """Lists of block rows, cut in pieces of about equal length, one for each tile of the sampled product; int32 throughout.

  Attributes:
    minor, slots, units: as in `Plan`; flat tiles need no units, their block rows are neighbours.
    items: `[I, 3]`, of (list, first entry, one past the last), in an order in which neighbours share rows and columns.
    empty: `[N]`, first the slots without a block.
    counts: `[2]`, how many items and how many empty slots there are.
  """

  minor: Any
  slots: Any
  units: Any
  items: Any
  empty: Any
  counts: Any


class Plans(NamedTuple):
  """What the three products of a layer need: `x @ w`, `dy @ w.T`, and `x.T @ dy` at the kept blocks.

  Attributes:
    forward: lists of block columns.
    transposed: lists of block rows.
    sampled: lists of block rows in pieces.
    heads: `_heads.make`, for few rows of x. None where blocks are not in a `BlockArray`'s order.
    narrow: `NarrowPlan` of the forward and of the transposed product, where blocks are such that the kernel for many narrow
      blocks may be taken; else None.
  """

  forward: Plan
  transposed: Plan
  sampled: Sampled
  heads: Any
  narrow: Any = None


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


def narrow_of(w: _block_array.BlockArray, transposed: bool) -> _narrow_plan.NarrowPlan:
  """The plan of the kernel for narrow blocks, of one of its products: that of `plans_of`, which dense weights have, else new."""
  narrow = plans_of(w).narrow
  if narrow is None:
    pair = functools.partial(_narrow_plan.pair, np) if w.static else _narrow_plan.traced_pair
    narrow = pair(w.rows, w.cols, w.grid)
  return narrow[int(transposed)]


@functools.lru_cache(64)
def _static_plans(positions, grid, block_shape):
  return _make(np, positions.rows, positions.cols, grid, block_shape)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _plans(rows, cols, grid, block_shape, ordered):
  return _make(jnp, rows, cols, grid, block_shape, ordered)


def sampled_height(grid: tuple[int, int], block_shape: tuple[int, int], density: float) -> int:
  """Rows of w in a tile of the sampled product: 128 (64 to each warpgroup) or 64.

  Two warpgroups that share columns of dy, or that share columns of x: at low density block rows have few columns in common,
  and what is loaded for one of them would be multiplied in vain for the others.

  But with blocks of 32 flat tiles differ in length, by a fifth where a list makes two or three. Where each multiprocessor has a
  list of its own, they soon work on different rows of dy, and find less in the L2 cache of what others have loaded. Tall
  tiles, nearly all of equal length, are faster there.
  """
  (block_rows, block_cols), (bk, bo) = grid, block_shape
  lists = -(-block_rows * bk // UNIT)
  tiles = block_cols * bo * (1 - (1 - density) ** 2) / (2 * SAMPLED_COLUMNS)  # of a list of 2 x 32 rows
  uneven = bk < UNIT and 1 < tiles < 4 and _SMS // 2 < lists < 2 * _SMS
  return UNIT if bk < TILE and density < _FLAT_BELOW and not uneven else TILE


def sampled_entries(bo: int, height: int) -> int:
  """Entries of a list of block rows that a tile of the sampled product takes."""
  return SAMPLED_COLUMNS // bo * (TILE // height)


def extra_parts(lists: int) -> int:
  """Parts that long lists may be cut into, beside one for every list."""
  return -(-lists // int(_CUTS[-1]))


def _make(xp, rows, cols, grid, block_shape, ordered=True) -> Plans:
  (block_rows, block_cols), (bk, bo) = grid, block_shape
  live = cols < block_cols
  forward = _plan(xp, live, rows, block_rows, bk, *_tiles(xp, live, cols, block_cols, rows, block_rows, bo))
  transposed = _plan(xp, live, cols, block_cols, bo, *_tiles(xp, live, rows, block_rows, cols, block_cols, bk))
  sampled = _sampled(xp, live, rows, cols, grid, block_shape, transposed)
  many = block_shape == (_narrow_plan.SIZE,) * 2 and rows.shape[0] >= _narrow_plan.PAYS_FROM * block_rows * block_cols
  narrow = _narrow_plan.pair(xp, rows, cols, grid) if many else None
  heads = _heads.make(xp, rows, cols, grid, block_shape) if ordered else None
  return Plans(forward, transposed, sampled, heads, narrow)


def _sampled(xp, live, rows, cols, grid, block_shape, transposed) -> Sampled:
  (block_rows, block_cols), (bk, bo) = grid, block_shape
  height = sampled_height(grid, block_shape, rows.shape[0] / max(1, block_rows * block_cols))
  lists = transposed
  wide = block_cols * bo / (block_rows * bk)
  if height < TILE:
    own, wide = height // bk, _FLAT_STRIPES**2 * wide
    tiles = -(-block_rows // own), own, xp.arange(1), rows // own, rows % own
    lists = _plan(xp, live, cols, block_cols, bo, *tiles)
  items, num_items = _items(xp, lists, block_cols, block_shape, height, wide)
  size = live.shape[0]
  empty = _lists.scatter(xp, 0, size, xp.where(live, size, xp.cumsum(~live) - 1), xp.arange(size))
  counts = xp.stack([num_items, (~live).sum()]).astype(np.int32)
  return Sampled(lists.minor, lists.slots, lists.units, items, empty, counts)


def _tiles(xp, live, major, majors, minor, minors, size):
  """(lists, S, units, list of every block, place of every block in its list) of tiles of `TILE`.

  Units of 64 are put together so that they share rows.
  """
  if size >= TILE:
    return majors, 1, xp.arange(2 * majors), major, xp.zeros_like(major)
  own = max(1, UNIT // size)
  units = -(-majors // own)
  unit = xp.where(live, major // own, units)
  used = _lists.scatter(
    xp, 0, units * minors, xp.where(live, unit * minors + minor, units * minors), xp.ones_like(minor)
  )
  mate = _lists.matching(xp, used.reshape(units, minors))
  lists = -(-units // 2)
  # A list is named by the lower of its units.
  lower = xp.arange(units) < mate
  name = xp.cumsum(lower) - 1
  list_of = xp.where(lower, name, name[xp.minimum(mate, units - 1)])
  place = xp.where(lower, 0, 1)
  members = _lists.scatter(xp, units, 2 * lists, 2 * list_of + place, xp.arange(units))
  unit = xp.minimum(unit, units - 1)
  return lists, 2 * own, members, list_of[unit], place[unit] * own + major % own


def _plan(xp, live, minor, minors, depth, lists, shared, units, list_of, place) -> Plan:
  """The plan of lists of `shared` block columns each, of blocks of `depth`, in NumPy or JAX."""
  minors_of, slots, counts = _lists.group(xp, live, minor, minors, lists, shared, list_of, place)
  starts = xp.concatenate([xp.zeros(1, np.int32), xp.cumsum(counts).astype(np.int32)])
  as32 = lambda a: xp.asarray(a).astype(np.int32)
  longest = xp.argsort(-counts, stable=True)
  whole = xp.stack([longest, starts[:-1][longest], starts[1:][longest]], 1).reshape(-1)
  return Plan(
    minor=as32(minors_of),
    slots=as32(slots),
    starts=as32(starts),
    parts=_parts(xp, starts, depth),
    units=as32(units),
    whole=as32(whole),
  )


def _parts(xp, starts, depth):
  """`Plan.parts`: long lists are cut, so that tiles of one stripe of x run at about the same time."""
  lists, total = starts.shape[0] - 1, starts[-1]
  part = _lists.cut(xp, starts, _CUTS, -(-_LEAST // depth), extra_parts(lists))
  # All lists before need one place less than they have parts.
  place = xp.arange(part.list.shape[0]) - part.index - part.rank
  parts = xp.stack([part.list, part.begin, part.end, part.index, part.count, place], 1)
  length = starts[part.list + 1] - starts[part.list]
  heavy = xp.sum((xp.arange(parts.shape[0]) < part.total) & (2 * lists * length > 3 * total * part.count))
  # So often do all multiprocessors together do all parts, while one of them does the longest.
  tile = _TILE_COST / depth
  rounds = _lists.ceil_div(xp, (part.end[0] - part.begin[0] + tile) * _SMS, total + tile * part.total)
  header = xp.stack([part.total, heavy, rounds])
  return xp.concatenate([header, parts.reshape(-1)]).astype(np.int32)


def _items(xp, plan, minors, block_shape, height, wide):
  """Lists in pieces of as many entries as a tile takes, or fewer: (list, first entry, one past the last), and how many.

  `wide` is how many columns dy has for one of x.
  """
  starts, minors_of = plan.starts, plan.minor
  counts = starts[1:] - starts[:-1]
  lists, capacity = counts.shape[0], minors_of.shape[0]
  pieces = _pieces(xp, counts, block_shape, height)
  ends = xp.cumsum(pieces)
  # The j-th piece of list l is item j + (pieces of the lists before it).
  item = xp.arange(min(capacity, 2 * capacity // sampled_entries(block_shape[1], height) + lists))
  of = xp.minimum(xp.searchsorted(ends, item, side="right"), lists - 1)
  j, count, parts = item - (ends - pieces)[of], counts[of], xp.maximum(pieces[of], 1)
  begin, end = (starts[:-1][of] + count * i // parts for i in (j, j + 1))
  # What runs at a time shall need about as many columns of dy as of x: take the items in stripes of columns.
  stripes = xp.maximum(1, xp.round((ends[-1] * (wide / _SMS)) ** 0.5)).astype(np.int32)
  stripe = minors_of[xp.minimum(begin, capacity - 1)] * stripes // minors
  order = xp.argsort(xp.where(item < ends[-1], stripe * lists + of, np.iinfo(np.int32).max), stable=True)
  return xp.stack([of, begin, end], 1)[order].astype(np.int32), ends[-1]


def _pieces(xp, counts, block_shape, height):
  """In how many pieces each list of the sampled product is cut: as long as a tile allows, or shorter.

  Short pieces load less in each step. Where the longest would leave a last round that is not full, and too full to be cut
  among multiprocessors, more of them take less time.
  """
  bk, bo = block_shape
  most = sampled_entries(bo, height)
  longest = -(-counts // most)
  if bo >= TILE:  # are multiplied for longer than they are loaded
    return longest
  limits = np.maximum(
    64, most * np.arange(64, 31, -1, dtype=np.int32)[:, None]
  )  # in 64ths of an entry, of which one is least
  pieces = -(-counts * 64 // limits)
  number = pieces.sum(1)
  tiles = number * max(1, bk // height)
  rounds, rest = tiles // _SMS, tiles % _SMS
  sharers = xp.clip(_SMS // xp.maximum(rest, 1), 1, 8)  # multiprocessors to each of the last tiles
  last = xp.where(sharers > 1, 1 / sharers + _MEETING, 1)
  loads = height // UNIT + max(_NARROW, bo / UNIT) * counts.sum() / xp.maximum(number, 1)
  cost = (rounds + xp.where(rest > 0, last, 0)) * xp.maximum(1, _LOAD * loads)
  return xp.where(rest[0] > _SMS // 2, pieces[cost.argmin()], longest)
