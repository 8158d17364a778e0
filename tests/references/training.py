"""Sparse training loops as the papers' algorithm boxes state them, with plain gradient descent.

Every loop takes parameters {"a": {"kernel", "bias"}, "b": ...}, batches `(x, y)` and a learning rate, and yields
`(masks, params)` after every update; `masks` is {"a": mask, "b": mask}. Kernels are pruned, biases train.
"""

from fractions import Fraction
import math

import numpy as np
from references import network
from references.selection import global_topk, keep_count, topk, topk_units, units_of


def descend(params, grads, masks, lr):
  """One step of gradient descent on biases and on what the masks keep; the rest becomes zero."""
  return {
    k: {
      "kernel": np.where(masks[k], p["kernel"] - lr * grads[k]["kernel"], 0.0),
      "bias": p["bias"] - lr * grads[k]["bias"],
    }
    for k, p in params.items()
  }


def apply_masks(params, masks):
  return {k: {**p, "kernel": np.where(masks[k], p["kernel"], 0.0)} for k, p in params.items()}


def cubic(t, every, start, stop, first, last):
  """Entries removed at the refresh t, of `first` to `last` ones: last + (first - last)(1 - tau)^3, rounded down."""
  end = max(range(start, stop, every))
  tau = Fraction(1) if end == start else Fraction(t - start, end - start)
  return math.floor(last + (first - last) * (1 - tau) ** 3)


def gradual(params, batches, lr, *, every, start, stop, sparsity, score, first=0.0, joint=False):
  """Gradual pruning: at a refresh the best among the kept survive; score(k, weights, gradient, state) ranks them.

  `score.observe(k, gradient)`, where there is one, sees every gradient before.
  """
  masks = {k: np.ones(p["kernel"].shape, bool) for k, p in params.items()}
  for t, (x, y) in enumerate(batches):
    grads = network.gradients(params, x, y)
    for k in params:
      getattr(score, "observe", lambda *_: None)(k, grads[k]["kernel"])
    if t in range(start, stop, every):
      keep = lambda n: n - cubic(t, every, start, stop, n - keep_count(n, first), n - keep_count(n, sparsity))
      ranked = {k: np.where(masks[k], score(k, params[k]["kernel"], grads[k]["kernel"]), -np.inf) for k in params}
      if joint:
        size = sum(m.size for m in masks.values())
        masks = dict(zip(masks, global_topk(list(ranked.values()), keep(size))))
      else:
        masks = {k: topk(ranked[k], keep(m.size)) for k, m in masks.items()}
    params = descend(apply_masks(params, masks), grads, masks, lr)
    yield masks, params


def stepwise_nm(params, batches, lr, *, every, start, stop, n, m):
  """Magnitude pruning from m:m to n:m, evenly: at a refresh the largest |w| among the kept of each group survive."""
  masks = {k: np.ones(p["kernel"].shape, bool) for k, p in params.items()}
  for t, (x, y) in enumerate(batches):
    grads = network.gradients(params, x, y)
    if t in range(start, stop, every):
      tau = Fraction(t - start, max(range(start, stop, every)) - start)
      keep = m - math.floor((m - n) * tau)
      ranked = {k: np.where(masks[k], np.abs(p["kernel"]), -1.0) for k, p in params.items()}
      masks = {k: topk_units(w, keep, units_of(w.shape, "nm", m=m)) for k, w in ranked.items()}
    params = descend(apply_masks(params, masks), grads, masks, lr)
    yield masks, params


def replace(mask, drop, grow, count):
  """Drops the `count` worst kept entries, grows as many of the best entries that are then not kept."""
  kept = mask.ravel().copy()
  total = int(kept.sum())
  order = sorted(np.flatnonzero(kept), key=lambda i: (-drop.ravel()[i], i))
  after = np.zeros(kept.size, bool)
  after[order[: total - count]] = True
  absent = sorted(np.flatnonzero(~after), key=lambda i: (-grow.ravel()[i], i))
  after[absent[:count]] = True
  return after.reshape(mask.shape)


def replace_in_groups(mask, drop, grow, count, units):
  """As `replace`, one swap in each of the `count` groups with the largest grow minus drop; counts per group stay."""
  flat, drop, grow = mask.ravel().copy(), drop.ravel(), grow.ravel()
  gains = []
  for g, group in enumerate(units[:, :, 0]):
    kept, absent = group[flat[group]], group[~flat[group]]
    gains.append(grow[absent].max() - drop[kept].min())
  for g in sorted(range(len(gains)), key=lambda g: (-gains[g], g))[:count]:
    group = units[g, :, 0]
    flat[group] = replace(flat[group], drop[group], grow[group], 1)
  return flat.reshape(mask.shape)


def cosine_fraction(t, start, stop, fraction):
  return fraction / 2 * (1 + math.cos(math.pi * (t - start) / (stop - start)))


def dynamic(
  params, masks, batches, lr, *, every, start, stop, fraction, growth, skip, smooth=None, noise=None, nm_units=None
):
  """SET (growth="noise", given), RigL (growth="gradient") and SNFS (growth="momentum").

  SET and RigL take no gradient step at a refresh (`skip`). nm_units: groups of every kernel whose counts must stay.
  """
  momentum = {k: np.zeros(p["kernel"].shape) for k, p in params.items()}
  for t, (x, y) in enumerate(batches):
    grads = network.gradients(params, x, y)
    for k in params:
      if smooth is not None:
        momentum[k] = smooth * momentum[k] + (1 - smooth) * grads[k]["kernel"]
    due = t in range(start, stop, every)
    if due:
      share = fraction if growth == "noise" else cosine_fraction(t, start, stop, fraction)
      new = {}
      for k, p in params.items():
        grow = {"noise": lambda: noise[t][k], "gradient": lambda: grads[k]["kernel"], "momentum": lambda: momentum[k]}
        count = math.ceil(share * masks[k].sum() - 1e-6)
        scores = np.abs(p["kernel"]), np.abs(grow[growth]())
        if nm_units is None:
          new[k] = replace(masks[k], *scores, count)
        else:
          new[k] = replace_in_groups(masks[k], *scores, count, nm_units[k])
      masks = new
    params = apply_masks(params, masks)
    if not (due and skip):
      params = descend(params, grads, masks, lr)
    yield masks, params


def alternating(params, batches, lr, *, closes, opens, sparsity):
  """AC/DC: magnitude masks at the counts in `closes`, all weights at the counts in `opens`."""
  masks = {k: np.ones(p["kernel"].shape, bool) for k, p in params.items()}
  for t, (x, y) in enumerate(batches):
    grads = network.gradients(params, x, y)
    if t in closes:
      masks = {k: topk(np.abs(p["kernel"]), keep_count(p["kernel"].size, sparsity)) for k, p in params.items()}
    if t in opens:
      masks = {k: np.ones(m.shape, bool) for k, m in masks.items()}
    params = descend(apply_masks(params, masks), grads, masks, lr)
    yield masks, params


def straight_through(params, batches, lr, *, due, select, decay=0.0):
  """STE and SR-STE: the gradient at the masked weights moves all of them, plus `decay` times the masked-out ones."""
  masks = {k: select(k, p["kernel"]) for k, p in params.items()}
  for t, (x, y) in enumerate(batches):
    grads = network.gradients(apply_masks(params, masks), x, y)
    params = {
      k: {
        "kernel": p["kernel"] - lr * (grads[k]["kernel"] + decay * np.where(masks[k], 0.0, p["kernel"])),
        "bias": p["bias"] - lr * grads[k]["bias"],
      }
      for k, p in params.items()
    }
    if t in due:
      masks = {k: select(k, p["kernel"]) for k, p in params.items()}
    yield masks, params


def nm_select(m, n):
  return lambda k, w: topk_units(np.abs(w), n, units_of(w.shape, "nm", m=m))


class Fisher:
  """w^2 F / 2, F a moving average of squared gradients."""

  def __init__(self, decay):
    self.decay, self.fisher = decay, {}

  def observe(self, k, grad):
    self.fisher[k] = self.decay * self.fisher.get(k, 0.0) + (1 - self.decay) * grad**2

  def __call__(self, k, weights, grad):
    return weights**2 * self.fisher[k] / 2


def synflow(kernels, ones, sparsity, rounds):
  """Masks of a linear network: R = sum(ones |A| |B|), scores |w dR/dw|, density (1 - s)^(r / rounds) after round r."""
  weights = [np.abs(np.asarray(w, np.float64)) for w in kernels]
  masks = [np.ones(w.shape, bool) for w in weights]
  size = sum(w.size for w in weights)
  for r in range(1, rounds + 1):
    a, b = (np.where(m, w, 0.0) for m, w in zip(masks, weights))
    flow_in = ones.sum(0)
    scores = [a * np.outer(flow_in, b.sum(1)), b * (flow_in @ a)[:, None]]
    scores = [np.where(m, s, -np.inf) for m, s in zip(masks, scores)]
    final = size - keep_count(size, sparsity)
    removed = math.floor(final * (1 - (1 - sparsity) ** (r / rounds)) / sparsity) if r < rounds else final
    masks = global_topk(scores, size - removed)
  return masks
