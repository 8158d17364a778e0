"""N:M storage and products, slowly and obviously, in float64."""

import numpy as np


def prune(w, n, m):
  """Keeps the n largest of every m along axis -2: (pruned weight, mask)."""
  w = np.asarray(w)
  groups = np.abs(w.astype(np.float64)).reshape(*w.shape[:-2], w.shape[-2] // m, m, w.shape[-1])
  best = np.argsort(-groups, axis=-2, kind="stable")[..., :n, :]
  mask = np.zeros(groups.shape, bool)
  np.put_along_axis(mask, best, True, axis=-2)
  mask = mask.reshape(w.shape)
  return np.where(mask, w, np.zeros_like(w)), mask


def dense(values, indices, m, scales=None):
  """The weight that values and positions stand for, `[K, O]` in float64."""
  groups, n, outputs = values.shape
  out = np.zeros((groups, m, outputs))
  np.put_along_axis(out, indices.astype(np.int64), values.astype(np.float64), axis=1)
  out = out.reshape(groups * m, outputs)
  return out if scales is None else out * np.repeat(scales.astype(np.float64), len(out) // len(scales), axis=0)


def activate(name, z):
  """(act(z), act'(z)) in float64."""
  if name is None:
    return z, np.ones_like(z)
  if name == "relu":
    return np.maximum(z, 0), (z > 0).astype(np.float64)
  if name == "silu":
    s = 1 / (1 + np.exp(-z))
    return z * s, s * (1 + z * (1 - s))
  c = np.sqrt(2 / np.pi)  # gelu, tanh approximation
  t = np.tanh(c * (z + 0.044715 * z**3))
  return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * c * (1 + 3 * 0.044715 * z**2)


def gradients(x, w, bias, name, dy, indices, m):
  """(y, dx, dvalues, dbias) of y = act(x @ w + bias); dvalues `[K/m, n, O]` at the kept positions."""
  z = x @ w + (0 if bias is None else bias)
  y, slope = activate(name, z)
  dz = dy * slope
  dw = x.T @ dz
  groups, n, outputs = indices.shape
  dvalues = np.zeros(indices.shape)
  for g, j, o in np.ndindex(groups, n, outputs):
    dvalues[g, j, o] = dw[g * m + int(indices[g, j, o]), o]
  return y, dz @ w.T, dvalues, dz.sum(0)


def quantize(values, bits, groups):
  """(q, scales) of values `[G, n, O]` with one scale for each run of `groups` groups, in float32."""
  total, n, outputs = values.shape
  limit = np.float32(2 ** (bits - 1) - 1)
  q = np.zeros(values.shape, np.int64)
  scales = np.zeros((total // groups, outputs), np.float32)
  for r, o in np.ndindex(total // groups, outputs):
    run = values[r * groups : (r + 1) * groups, :, o].astype(np.float32)
    scale = np.abs(run).max() / limit
    scales[r, o] = scale if scale > 0 else 1
    q[r * groups : (r + 1) * groups, :, o] = np.round(run / scales[r, o])
  return q, scales
