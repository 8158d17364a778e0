"""2:4 pruning and packing by looking at every group, and transposable masks by trying all 90."""

import itertools

import numpy as np


def transposable_patterns():
  """All 4x4 masks with two kept in every row and column, `[90, 4, 4]`."""
  rows = [np.isin(np.arange(4), pair) for pair in itertools.combinations(range(4), 2)]
  return np.array([p for p in itertools.product(rows, repeat=4) if (np.sum(p, 0) == 2).all()])


def best_kept(w):
  """The largest magnitude that a transposable mask can keep of each 4x4 block, `[K/4, O/4]`."""
  blocks = np.abs(np.asarray(w, np.float64)).reshape(w.shape[0] // 4, 4, w.shape[1] // 4, 4)
  return np.einsum("xrys,prs->xyp", blocks, transposable_patterns()).max(-1)


def kept(w, mask):
  """The magnitude that a mask keeps of each 4x4 block."""
  blocks = np.where(mask, np.abs(np.asarray(w, np.float64)), 0).reshape(w.shape[0] // 4, 4, w.shape[1] // 4, 4)
  return blocks.sum((1, 3))


def two_of_four(w):
  """Mask of the two largest of every four along axis 0; ties to the lower index, NaN as 0."""
  size = np.nan_to_num(np.abs(np.asarray(w, np.float64)), nan=0.0, posinf=np.inf)
  mask = np.zeros(w.shape, bool)
  for k in range(0, w.shape[0], 4):
    for o in range(w.shape[1]):
      first, second = sorted(range(4), key=lambda i: (-size[k + i, o], i))[:2]
      mask[k + first, o] = mask[k + second, o] = True
  return mask


def pack(w, mask):
  """values `[K/2, O]` and metadata `[K/16, O]` of a masked weight, K divisible by 16."""
  values = np.zeros((w.shape[0] // 2, w.shape[1]), w.dtype)
  metadata = np.zeros((w.shape[0] // 16, w.shape[1]), np.uint16)
  for o in range(w.shape[1]):
    for group in range(w.shape[0] // 4):
      first, second = np.flatnonzero(mask[4 * group : 4 * group + 4, o])
      values[2 * group, o], values[2 * group + 1, o] = w[4 * group + first, o], w[4 * group + second, o]
      metadata[group // 4, o] |= (first | second << 2) << 4 * (group % 4)
  return values, metadata
