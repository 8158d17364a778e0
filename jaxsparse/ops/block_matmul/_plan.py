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
from jaxsparse.ops.block_matmul import _cuts

TILE = 128  # of the result, along O (along K in the transposed product)
UNIT = 64
SAMPLED_COLUMNS = 256  # of the sampled product's tile, to each warpgroup
_FLAT_BELOW = {64: 0.2, 32: 0.3}  # density, by height of blocks; measured at 8192^3; see `sampled_height`
_FLAT_STRIPES = 3  # stripes of flat tiles, relative to those of others; measured, at 1 to 6
PART = 5  # numbers to a part of a list
# A list is cut in parts of at most so many times the mean length: the first of these for which there is room, and there always
# is for the last. Measured: adding a part costs as much as 10 us of work. So no list as short as _LEAST rows of the sum is
# cut, and twice the mean is too little.
_CUTS = (3, 4)
_LEAST = 1536
HEAD_LINE, HEAD_ROWS = 32, 26  # words of a line of `Plans.heads`, 128 bytes; rows of blocks in it
HEAD_STRIP = 32  # outputs that have a counter of their own, at least
# As _CUTS and _LEAST, for few rows of x. Meeting costs 1 to 2 us, so that lists of _HEAD_WHOLE rows are not cut at all.
_HEAD_CUTS = (2, 3, 4)
_HEAD_LEAST, _HEAD_WHOLE = 1024, 1536
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
    parts: `[1 + 5 P]`: how many parts of lists there are, then of each, longest first and those of one list together:
      (list, first entry, one past the last, partials, place). Parts but the last of a list leave their sums at `place`,
      and have partials = -1; the last one adds `partials` of them, from `place` on. A list that is not long is one part.
    units: `[2 * lists]`, where blocks are narrower than a tile: which 64 columns of the result each half of a tile is. The
      last one may lie outside of the result.
  """

  minor: Any
  slots: Any
  starts: Any
  parts: Any
  units: Any


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
    heads: int32 `[lines, 32]` for few rows of x; None where blocks are not in a `BlockArray`'s order. A line for every
      piece of a list, longest first: the column (where there is no work, one that does not exist), the slot of the
      first block, how many there are; in how many pieces the list is cut, the place of the first piece's sums, which
      piece this is; the rows of its first blocks. Then counters: pieces that have left their sums count there in device
      memory, and the last one leaves 0 behind.
  """

  forward: Plan
  transposed: Plan
  sampled: Sampled
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


def sampled_height(bk: int, density: float) -> int:
  """Block rows, in entries, of a tile of the sampled product: 128 (64 to each warpgroup) or 64.

  Two warpgroups that share columns of dy, or that share columns of x: at low density block rows have few columns in common,
  and what is loaded for one of them would be multiplied in vain for the others.
  """
  return UNIT if density < _FLAT_BELOW.get(bk, 0) else TILE


def sampled_entries(bo: int, height: int) -> int:
  """Entries of a list of block rows that a tile of the sampled product takes."""
  return SAMPLED_COLUMNS // bo * (TILE // height)


def extra_parts(lists: int) -> int:
  """Parts that long lists may be cut into, beside one for every list."""
  return -(-lists // _CUTS[-1])


def _make(xp, rows, cols, grid, block_shape, ordered=True) -> Plans:
  (block_rows, block_cols), (bk, bo) = grid, block_shape
  live = cols < block_cols
  forward = _plan(xp, live, rows, block_rows, bk, *_tiles(xp, live, cols, block_cols, rows, block_rows, bo))
  transposed = _plan(xp, live, cols, block_cols, bo, *_tiles(xp, live, rows, block_rows, cols, block_cols, bk))
  sampled = _sampled(xp, live, rows, cols, grid, block_shape, transposed)
  return Plans(forward, transposed, sampled, _heads(xp, rows, cols, grid, block_shape) if ordered else None)


def _sampled(xp, live, rows, cols, grid, block_shape, transposed) -> Sampled:
  (block_rows, block_cols), (bk, bo) = grid, block_shape
  height, lists = sampled_height(bk, rows.shape[0] / max(1, block_rows * block_cols)), transposed
  wide = block_cols * bo / (block_rows * bk)
  if height < TILE:
    own, wide = height // bk, _FLAT_STRIPES**2 * wide
    tiles = -(-block_rows // own), own, xp.arange(1), rows // own, rows % own
    lists = _plan(xp, live, cols, block_cols, bo, *tiles)
  items, num_items = _items(xp, lists, block_cols, sampled_entries(bo, height), wide)
  size = live.shape[0]
  empty = _scatter(xp, 0, size, xp.where(live, size, xp.cumsum(~live) - 1), xp.arange(size))
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


def _plan(xp, live, minor, minors, depth, lists, shared, units, list_of, place) -> Plan:
  """The plan of lists of `shared` block columns each, of blocks of `depth`, in NumPy or JAX."""
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
  as32 = lambda a: xp.asarray(a).astype(np.int32)
  return Plan(
    minor=as32(minors_of),
    slots=as32(slots),
    starts=as32(starts),
    parts=_parts(xp, starts, depth),
    units=as32(units),
  )


def _parts(xp, starts, depth):
  """`Plan.parts`: long lists are cut, so that tiles of one stripe of x run at about the same time."""
  lists = starts.shape[0] - 1
  part = _cuts.cut(xp, starts, _CUTS, -(-_LEAST // depth), extra_parts(lists))
  leaves = part.index < part.count - 1
  # Every list before has a last part, which leaves no sums.
  place = xp.arange(part.list.shape[0]) - part.index - part.rank + xp.where(leaves, part.index, 0)
  parts = xp.stack([part.list, part.begin, part.end, xp.where(leaves, -1, part.count - 1), place], 1)
  return xp.concatenate([part.total[None], parts.reshape(-1)]).astype(np.int32)


def _items(xp, plan, minors, piece, wide):
  """Lists in pieces of at most `piece` entries, as (list, first entry, one past the last), and how many there are.

  `wide` is how many columns dy has for one of x.
  """
  starts, minors_of = plan.starts, plan.minor
  counts = starts[1:] - starts[:-1]
  lists, capacity = counts.shape[0], minors_of.shape[0]
  pieces = -(-counts // piece)
  ends = xp.cumsum(pieces)
  # The j-th piece of list l is item j + (pieces of the lists before it).
  item = xp.arange(min(capacity, capacity // piece + lists))
  of = xp.minimum(xp.searchsorted(ends, item, side="right"), lists - 1)
  j, count, parts = item - (ends - pieces)[of], counts[of], xp.maximum(pieces[of], 1)
  begin, end = (starts[:-1][of] + count * i // parts for i in (j, j + 1))
  # What runs at a time shall need about as many columns of dy as of x: take the items in stripes of columns.
  stripes = xp.maximum(1, xp.round((ends[-1] * (wide / _SMS)) ** 0.5)).astype(np.int32)
  stripe = minors_of[xp.minimum(begin, capacity - 1)] * stripes // minors
  order = xp.argsort(xp.where(item < ends[-1], stripe * lists + of, np.iinfo(np.int32).max), stable=True)
  return xp.stack([of, begin, end], 1)[order].astype(np.int32), ends[-1]


def head_places(block_cols: int) -> int:
  """Pieces, at most, of columns that are cut for few rows of x."""
  return 2 * -(-block_cols // _HEAD_CUTS[-1])  # a list in n pieces has taken n - 1 of the room


def head_lines(block_cols: int) -> int:
  """Lines of `Plans.heads` that have work, or may have."""
  return block_cols + head_places(block_cols) // 2


def _heads(xp, rows, cols, grid, block_shape):
  """`Plans.heads`."""
  (_, block_cols), (bk, bo) = grid, block_shape
  counts = _count(xp, block_cols, cols)
  starts = xp.concatenate([xp.zeros(1, np.int32), xp.cumsum(counts)])
  lines = head_lines(block_cols)
  piece = _cuts.cut(xp, starts, _HEAD_CUTS, -(-_HEAD_LEAST // bk), lines - block_cols, _HEAD_WHOLE // bk)
  live = xp.arange(lines) < piece.total
  place = xp.cumsum(live & (piece.count > 1)) - 1 - piece.index
  header = piece.list, piece.begin, piece.end - piece.begin, piece.count, place, piece.index
  nothing = block_cols, 0, 0, 1, 0, 0
  header = xp.stack([xp.where(live, a, b) for a, b in zip(header, nothing, strict=True)], 1)
  slots = xp.minimum(header[:, 1:2] + xp.arange(HEAD_ROWS), rows.shape[0] - 1)
  counters = head_places(block_cols) * (bo // HEAD_STRIP)
  zeros = xp.zeros((-(-counters // HEAD_LINE), HEAD_LINE), np.int32)
  return xp.concatenate([xp.concatenate([header, xp.asarray(rows)[slots]], 1), zeros]).astype(np.int32)


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
