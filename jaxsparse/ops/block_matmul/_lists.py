"""What plans are made of: sums and scatters of int32, pairs of rows that have much in common, and lists in pieces.

In NumPy where positions are static, else in JAX, with the same results.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_ROUNDS = 8  # of matching; each matches about a third of what is left


def scatter(xp, fill, size, at, values):
  """An array of `size` with `values` at `at`; what lies at `size` is dropped."""
  if xp is np:
    out = np.full(size + 1, fill, np.int32)
    out[at] = values
  else:
    out = jnp.full(size + 1, fill, jnp.int32).at[at].set(values.astype(jnp.int32))
  return out[:size]


def count(xp, size, of):
  """How often each of range(size) occurs; int32 `[size]`."""
  return xp.bincount(of, minlength=size + 1, **({} if xp is np else {"length": size + 1}))[:size].astype(np.int32)


def matching(xp, used):
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


def group(xp, live, minor, minors, lists, shared, list_of, place):
  """Blocks as lists of entries: an entry is a block row that one of the `shared` block columns of the list has.

  Args:
    xp: NumPy, or jax.numpy.
    live: `[N]`, which of the blocks there are.
    minor: `[N]`, what is summed over; `minors`: how many there are.
    lists: how many.
    shared: S, block columns of a list.
    list_of, place: `[N]`, of every block its list and its place among the block columns of that.

  Returns:
    The minor of every entry, `[N]`; the blocks of every entry, `[N * S]`, N where there is none; entries of every list.
  """
  capacity = minor.shape[0]
  key = xp.where(live, list_of * minors + minor, lists * minors).astype(np.int32)
  order = xp.argsort(key, stable=True)
  key, live = key[order], live[order]
  first = xp.concatenate([live[:1], (key[1:] != key[:-1]) & live[1:]])
  # Entry of every block; blocks that are none go to one past the end, which is cut off.
  entry = xp.where(live, xp.cumsum(first) - 1, capacity)
  slot_at = xp.where(live, entry * shared + place[order], capacity * shared)
  slots = scatter(xp, np.int32(capacity), capacity * shared, slot_at, order)
  minors_of = scatter(xp, np.int32(0), capacity, entry, key % minors)
  return minors_of, slots, count(xp, lists, xp.where(first, key // minors, lists))


def ceil_div(xp, a, b):
  """The quotient of small integers, rounded up; float32.

  Quotients in float32 are as good as those of integers, and a third of the operations. But XLA's on a GPU are off by an ulp,
  so a half keeps dividends away from multiples of the divisor.
  """
  return xp.ceil((a - 0.5) / b)


class Pieces(NamedTuple):
  """Pieces of lists, longest first and those of one list together; there may be more room than pieces.

  Attributes:
    total: how many there are.
    list, begin, end: of each, which list it belongs to, its first entry and one past its last one.
    index, count: which of the list's pieces it is, of how many.
    rank: how many lists come before its list.
  """

  total: Any
  list: Any
  begin: Any
  end: Any
  index: Any
  count: Any
  rank: Any


def cut(xp, starts, cuts, least, room, whole=0) -> Pieces:
  """Cuts lists longer than a number of times the mean, and than `least`, in pieces of about equal length.

  Args:
    xp: NumPy, or jax.numpy.
    starts: `[lists + 1]`, of the lists in their entries.
    cuts: how many times, in halves; the first of these for which there is room, and there always is for a room of lists / cuts[-1].
    least: entries of a piece.
    room: pieces beside one for every list.
    whole: entries; lists of so many or fewer are not cut.
  """
  counts = starts[1:] - starts[:-1]
  lists = counts.shape[0]
  as32, floor_div = lambda a: a.astype(np.int32), lambda a, b: as32(xp.floor((a + 0.5) / b))
  # Of a piece, for each of the cuts; in halves, so that these are integers.
  most = xp.maximum(least, ceil_div(xp, np.array([2 * cut for cut in cuts], np.int32) * starts[-1], 2 * lists))
  pieces = xp.where(counts > whole, xp.maximum(1, as32(ceil_div(xp, counts, most[:, None]))), 1)
  pieces = pieces[xp.argmax((pieces - 1).sum(1) <= room)]
  order = xp.argsort(-(counts / pieces), stable=True)
  pieces, counts, starts = pieces[order], counts[order], starts[:-1][order]
  ends = xp.cumsum(pieces)
  piece = xp.arange(lists + room)
  rank = xp.minimum((piece[:, None] >= ends).sum(1), lists - 1)
  pieces = pieces[rank]
  index = piece - (ends[rank] - pieces)
  begin, end = (starts[rank] + floor_div(counts[rank] * i, pieces) for i in (index, index + 1))
  return Pieces(ends[-1], order[rank], begin, end, index, pieces, rank)
