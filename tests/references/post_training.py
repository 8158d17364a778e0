"""Post-training pruning of `[K, O]` weights, slowly and obviously, in float64."""

import numpy as np


def damped(gram, damping):
  gram = np.array(gram, np.float64)
  diagonal = np.diag(gram).copy()
  return gram + np.diag(damping * diagonal.mean() + (diagonal <= 0))


def error(w, target, gram):
  """||X (w - target)||^2 of the layer."""
  away = np.asarray(w, np.float64) - np.asarray(target, np.float64)
  return float(np.sum(away * (np.asarray(gram, np.float64) @ away)))


def top(scores, keep):
  """Mask of the `keep` highest entries of a flat array, ties to the first."""
  mask = np.zeros(scores.size, bool)
  mask[np.argsort(-scores.ravel(), kind="stable")[:keep]] = True
  return mask.reshape(scores.shape)


def mask_of_rows(scores, kind, keep):
  """Mask of a run of rows `[rows, O]`: kind is "output", "layer", ("nm", m) or ("block", shape)."""
  if kind == "layer":
    return top(scores, keep)
  if kind == "output":
    return np.stack([top(column, keep) for column in scores.T], 1)
  name, size = kind
  if name == "nm":
    groups = [np.stack([top(c, keep) for c in scores[i : i + size].T], 1) for i in range(0, len(scores), size)]
    return np.concatenate(groups)
  rows, cols = size
  tiles = scores.reshape(len(scores) // rows, rows, -1, cols).sum((1, 3))
  return np.kron(top(tiles, keep), np.ones(size, bool)).astype(bool)


def sparsegpt(w, gram, kind, keeps, run, damping=0.01):
  """The paper's Algorithm 1: H^-1, its Cholesky factor, one row after the other; a mask for each `run` rows.

  Args:
    keeps: units kept (per group) in each run.
  """
  w, h = np.array(w, np.float64), damped(gram, damping)
  w[np.diag(gram) <= 0] = 0
  u = np.linalg.cholesky(np.linalg.inv(h)).T
  masks = []
  for start, keep in zip(range(0, len(w), run), keeps):
    rows = slice(start, start + run)
    mask = mask_of_rows((w[rows] / np.diag(u)[rows, None]) ** 2, kind, keep)
    for i in range(start, start + run):
      kept = np.where(mask[i - start], w[i], 0)
      w[i:] -= u[i, i:, None] * ((w[i] - kept) / u[i, i])[None]
      w[i] = kept
    masks.append(mask)
  return w, np.concatenate(masks)


def gptq(w, gram, mask, bits, group, damping=0.01):
  """GPTQ with symmetric scales of `group` rows, on a mask: (integers, scales)."""
  limit = 2 ** (bits - 1) - 1
  w, h = np.where(mask, np.array(w, np.float64), 0), damped(gram, damping)
  u = np.linalg.cholesky(np.linalg.inv(h)).T
  values, scales = np.zeros(w.shape, int), []
  for start in range(0, len(w), group):
    rows = slice(start, start + group)
    scale = np.abs(np.where(mask[rows], w[rows], 0)).max(0) / limit
    scale[scale == 0] = 1
    for i in range(start, start + group):
      values[i] = np.where(mask[i], np.clip(np.round(w[i] / scale), -limit, limit), 0)
      w[i + 1 :] -= u[i, i + 1 :, None] * ((w[i] - values[i] * scale) / u[i, i])[None]
    scales.append(scale)
  return values, np.stack(scales)


def least_squares(target, gram, mask, damping=0.01):
  """The best kept weights, output by output, by a direct solve."""
  target, h = np.asarray(target, np.float64), damped(gram, damping)
  out = np.zeros(target.shape)
  for o in range(target.shape[1]):
    kept = mask[:, o]
    out[kept, o] = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ target[:, o])
  return out


def dsnot(w, mask, mean, variance, norm, group, cycles, threshold, stop_on_sign_flip):
  """Swaps of one kept and one pruned weight, output by output."""
  w, mask = np.asarray(w, np.float64), mask.copy()
  for o in range(w.shape[1]):
    effect = w[:, o] * mean
    wanda = np.abs(w[:, o]) * norm
    for _ in range(cycles):
      error = effect[~mask[:, o]].sum()
      if abs(error) <= threshold:
        break
      sign = np.sign(error)
      grow = [k for k in range(len(w)) if not mask[k, o] and sign * effect[k] > 0]
      if not grow:
        break
      new = max(grow, key=lambda k: (sign * effect[k] / variance[k], -k))
      drop = [k for k in range(len(w)) if mask[k, o] and sign * effect[k] < 0 and k // group == new // group]
      if not drop:
        break
      old = min(drop, key=lambda k: (wanda[k], k))
      if stop_on_sign_flip and sign * (error - effect[new] + effect[old]) < 0:
        break
      mask[new, o], mask[old, o] = True, False
  return mask
