"""The lists of blocks as the kernel for few rows of x wants them: a line with all that a block of threads needs to begin."""

import numpy as np

from jaxsparse.ops.block_matmul import _lists

LINE, ROWS = 32, 26  # words of a line, 128 bytes; rows of blocks in it
# A list is cut in pieces of at most so many times the mean length, as _lists.cut takes them; not below _LEAST rows of the sum.
# Meeting costs 1 to 2 us and its counters a launch, so that lists of _WHOLE rows are not cut at all; where outputs are few, two
# blocks of threads share a list, and 4096 rows gain nothing (but with narrow strips).
_CUTS = (2, 3, 4)
_LEAST, _WHOLE, _WHOLE_OF_FEW, _FEW = 1024, 1536, 4096, 64 * 132


def make(xp, rows, cols, grid, block_shape):
  """int32 `[lines, 32]`, a line for every piece of a list of blocks, longest first.

  Of each piece: the block column; the slot of the first block, how many there are; in how many pieces the list is cut, the
  place of the first piece's sums, which piece this is; the rows of its first blocks. Lists are cut only where positions are
  static: else nobody knows whether there are long ones, and to prepare for it would cost every launch another one.
  """
  (_, block_cols), (bk, bo) = grid, block_shape
  counts = _lists.count(xp, block_cols, cols)
  starts = xp.concatenate([xp.zeros(1, np.int32), xp.cumsum(counts)])
  room = -(-block_cols // _CUTS[-1]) if xp is np else 0
  few = min(bk, bo) >= 64 and block_cols * bo <= _FEW
  whole = (_WHOLE_OF_FEW if few else _WHOLE) // bk if xp is np else rows.shape[0]
  piece = _lists.cut(xp, starts, _CUTS, -(-_LEAST // bk), room, whole)
  place = xp.cumsum(piece.count > 1) - 1 - piece.index
  header = piece.list, piece.begin, piece.end - piece.begin, piece.count, xp.maximum(place, 0), piece.index
  header = xp.stack(header, 1)[: int(piece.total) if xp is np else block_cols]
  slots = xp.minimum(header[:, 1:2] + xp.arange(ROWS), rows.shape[0] - 1)
  return xp.concatenate([header, xp.asarray(rows)[slots]], 1).astype(np.int32)
