"""Long lists of blocks are cut in pieces, so that nobody is still at the longest one when all others are done."""

from typing import Any, NamedTuple


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
    cuts: how many times; the first of these for which there is room, and there always is for a room of lists / cuts[-1].
    least: entries of a piece.
    room: pieces beside one for every list.
    whole: entries; lists of so many or fewer are not cut.
  """
  counts = starts[1:] - starts[:-1]
  lists = counts.shape[0]
  # These numbers are small: quotients in float32 are as good as those of integers, and a third of the operations. But XLA's
  # on a GPU are off by an ulp, so a half keeps dividends away from multiples of the divisor.
  as32 = lambda a: a.astype("int32")
  ceil_div, floor_div = lambda a, b: xp.ceil((a - 0.5) / b), lambda a, b: as32(xp.floor((a + 0.5) / b))
  most = xp.maximum(least, ceil_div(xp.asarray(cuts) * starts[-1], lists))  # of a piece, for each of the cuts
  pieces = xp.where(counts > whole, xp.maximum(1, as32(ceil_div(counts, most[:, None]))), 1)
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
