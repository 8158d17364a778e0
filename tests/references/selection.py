"""Exact top-k with ties, and the patterns of a leaf as lists of flat positions."""

from fractions import Fraction
import math

import numpy as np


def keep_count(size, sparsity):
  """size - floor(size * sparsity), with the sparsity taken as the decimal that was written."""
  return size - math.floor(size * Fraction(str(sparsity)))


def units_of(shape, kind="unstructured", *, m=None, block=None, stack=0):
  """Flat positions of a leaf as `[groups, units, entries]`.

  kind: "unstructured" (one group of entries), "nm" (groups of m along axis -2), "block", "channel" (last axis) or
  "fan_in" (one group for each output). `stack` leading axes are layers with groups of their own.
  """
  size = math.prod(shape)
  index = np.arange(size).reshape(shape)
  if stack:
    layers = index.reshape(-1, *shape[stack:])
    inner = units_of(shape[stack:], kind, m=m, block=block)
    return np.concatenate([layer.ravel()[inner] for layer in layers])
  if kind == "unstructured":
    return index.reshape(1, size, 1)
  if kind == "nm":
    columns = np.moveaxis(index, -2, -1).reshape(-1, m)
    return columns[:, :, None]
  if kind == "block":
    rows, cols = block
    tiles = []
    for lead in np.ndindex(*shape[:-2]):
      for i in range(0, shape[-2], rows):
        for j in range(0, shape[-1], cols):
          tiles.append(index[lead][i : i + rows, j : j + cols].ravel())
    return np.stack(tiles)[None]
  if kind == "channel":
    return np.moveaxis(index, -1, 0).reshape(1, shape[-1], -1)
  if kind == "fan_in":
    return np.moveaxis(index, -1, 0).reshape(shape[-1], -1, 1)
  raise ValueError(kind)


def order(scores):
  """Positions from best to worst: NaN last, ties by position."""
  rank = [(1, 0.0, i) if math.isnan(s) else (0, -s, i) for i, s in enumerate(np.asarray(scores, np.float64).ravel())]
  return [i for _, _, i in sorted(rank)]


def topk(scores, keep):
  """Mask of exactly the `keep` best of a flat array."""
  mask = np.zeros(np.size(scores), bool)
  mask[order(scores)[: max(0, keep)]] = True
  return mask.reshape(np.shape(scores))


def topk_units(scores, keep, units):
  """Mask of a leaf that keeps the `keep` units of largest summed score in every group."""
  flat = np.asarray(scores, np.float64).ravel()
  mask = np.zeros(flat.size, bool)
  for group in units:
    for i in order(flat[group].sum(-1))[:keep]:
      mask[group[i]] = True
  return mask.reshape(np.shape(scores))


def count_units(mask, units):
  """Units kept in each group; ValueError where a unit is torn."""
  entries = np.asarray(mask).ravel()[units]
  if not (entries.all(-1) == entries.any(-1)).all():
    raise ValueError("a unit is partly kept")
  return entries.all(-1).sum(-1)


def global_topk(scores, keep):
  """Masks of several arrays that keep the `keep` best entries over all of them; ties go to earlier arrays."""
  flat = np.concatenate([np.asarray(s, np.float64).ravel() for s in scores])
  mask = topk(flat, keep)
  ends = np.cumsum([np.size(s) for s in scores])
  return [part.reshape(np.shape(s)) for part, s in zip(np.split(mask, ends[:-1]), scores)]
