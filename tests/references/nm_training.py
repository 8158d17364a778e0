"""N:M training from scratch as the papers' equations state it: decaying masks, changing patterns, Adam with masks.

Loops are as in `training`: they yield `(masks, params)` after every update.
"""

import math

import numpy as np
from references import network
from references.selection import topk_units, units_of


def select_nm(weights, n, m):
  return topk_units(np.abs(weights), n, units_of(weights.shape, "nm", m=m))


def select_all(params, pattern):
  """Masks of all kernels at a pattern (n, m); None keeps everything."""
  if pattern is None:
    return {k: np.ones(p["kernel"].shape, bool) for k, p in params.items()}
  return {k: select_nm(p["kernel"], *pattern) for k, p in params.items()}


def exponential(t, rate, start, stop):
  return 1.0 if t < start else (0.0 if t >= stop else math.exp(-rate * (t - start)))


def linear(t, rate, start, stop):
  return 1.0 if t < start else (0.0 if t >= stop else max(0.0, 1 - rate * (t - start)))


def decaying(params, batches, lr, *, due, pattern, first, share, flow="straight_through"):
  """W~ = W (M + b (1 - M)); the gradient at W~ goes to W as it is, or times M + b (1 - M) (flow "chain").

  due: counts at which masks follow the weights. pattern: count -> (n, m) then. first: pattern before the first update.
  share: count -> b.
  """
  masks = select_all(params, first)
  for t, (x, y) in enumerate(batches):
    factor = {k: masks[k] + share(t) * ~masks[k] for k in params}
    grads = network.gradients({k: {**p, "kernel": p["kernel"] * factor[k]} for k, p in params.items()}, x, y)
    back = {k: factor[k] if flow == "chain" else 1.0 for k in params}
    params = {
      k: {"kernel": p["kernel"] - lr * back[k] * grads[k]["kernel"], "bias": p["bias"] - lr * grads[k]["bias"]}
      for k, p in params.items()
    }
    if t in due:
      masks = select_all(params, pattern(t))
    yield masks, params


def one_shot(params, batches, lr, *, at, pattern):
  """Dense descent, one pruning in the update with count `at`, then descent on what is left."""
  masks = select_all(params, None)
  for t, (x, y) in enumerate(batches):
    grads = network.gradients(params, x, y)
    if t == at:
      masks = select_all(params, pattern)
    params = {
      k: {
        "kernel": np.where(masks[k], p["kernel"] - lr * grads[k]["kernel"], 0.0),
        "bias": p["bias"] - lr * grads[k]["bias"],
      }
      for k, p in params.items()
    }
    yield masks, params


class Adam:
  """One leaf of Adam in which `decay(t, m, w)` takes the first moment's place where the mask is off."""

  def __init__(self, shape, b1, b2, eps):
    self.b1, self.b2, self.eps = b1, b2, eps
    self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0

  def direction(self, g, w, mask, decay):
    self.t += 1
    self.m = self.b1 * self.m + (1 - self.b1) * g
    signal = self.m if mask is None else np.where(mask, self.m, decay(self.t - 1, self.m, w))
    self.v = self.b2 * self.v + (1 - self.b2) * signal**2
    corrected = signal / (1 - self.b1**self.t)
    return corrected / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)


def ast_pull(strength):
  """m + strength_t w."""
  return lambda t, m, w: m + strength(t) * w


def cast_pull(strength, mix):
  """(1 - a_t) m + a_t strength sign(w)."""
  return lambda t, m, w: (1 - mix(t)) * m + mix(t) * strength * np.sign(w)


def adam_nm(params, batches, lr, *, due, pattern, decay, dense_forward=False, b1=0.9, b2=0.999, eps=1e-8):
  """AST (masked forward pass, straight through) and CAST (dense): Adam with a pull behind its first moment."""
  masks = select_all(params, pattern)
  adams = {k: {n: Adam(w.shape, b1, b2, eps) for n, w in p.items()} for k, p in params.items()}
  for t, (x, y) in enumerate(batches):
    seen = params if dense_forward else masked(params, masks)
    grads = network.gradients(seen, x, y)
    new = {}
    for k, p in params.items():
      kernel = adams[k]["kernel"].direction(grads[k]["kernel"], p["kernel"], masks[k], decay)
      bias = adams[k]["bias"].direction(grads[k]["bias"], p["bias"], None, decay)
      new[k] = {"kernel": p["kernel"] - lr * kernel, "bias": p["bias"] - lr * bias}
    params = new
    if t in due:
      masks = select_all(params, pattern)
    yield masks, params


def step(params, batches, lr, *, pattern, earliest, latest, floor, b1=0.9, b2=0.999, eps=1e-8, every=1):
  """STEP: Adam until mean|nu_t - nu_(t-1)| over kernels, averaged over 1 / (1 - b2) updates, is below eps.

  In that update nu is raised to `floor` times its mean in each leaf; afterwards nu and its bias correction are fixed.
  """
  masks = select_all(params, None)
  zeros = {k: {n: np.zeros(w.shape) for n, w in p.items()} for k, p in params.items()}
  mu, nu = zeros, zeros
  changes, frozen_at, window = [], None, round(1 / (1 - b2))
  for t, (x, y) in enumerate(batches):
    grads = network.gradients(masked(params, masks), x, y)
    mu = {k: {n: b1 * m + (1 - b1) * grads[k][n] for n, m in leaf.items()} for k, leaf in mu.items()}
    if frozen_at is None:
      correction, old = 1 - b2 ** (t + 1), nu
      nu = {k: {n: b2 * v + (1 - b2) * grads[k][n] ** 2 for n, v in leaf.items()} for k, leaf in nu.items()}
      changes.append(np.concatenate([np.abs(nu[k]["kernel"] - old[k]["kernel"]).ravel() for k in nu]).mean())
      settled = len(changes) >= window and np.mean(changes[-window:]) < eps
      if t >= latest or (t >= earliest and settled):
        frozen_at = t
        nu = {k: {n: np.maximum(v, floor * v.mean()) for n, v in leaf.items()} for k, leaf in nu.items()}
    params = {
      k: {n: w - lr * mu[k][n] / (1 - b1 ** (t + 1)) / (np.sqrt(nu[k][n] / correction) + eps) for n, w in p.items()}
      for k, p in params.items()
    }
    if frozen_at is not None and (t - frozen_at) % every == 0:
      masks = select_all(params, pattern)
    yield masks, params


def masked(params, masks):
  return {k: {**p, "kernel": np.where(masks[k], p["kernel"], 0.0)} for k, p in params.items()}


def switching_step(b2, squared, eps):
  """The count of the update (from 0) at which STEP switches under a constant squared gradient.

  The update t (from 1) changes nu by (1 - b2) b2^(t-1) g^2, so the last T changes add up to b2^(t-T) (1 - b2^T) g^2.
  """
  window = round(1 / (1 - b2))
  t = window
  while squared * b2 ** (t - window) * (1 - b2**window) / window >= eps:
    t += 1
  return t - 1
