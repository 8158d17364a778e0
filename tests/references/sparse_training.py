"""Dynamic sparse training beyond SET and RigL, in the style of `references.training`: plain gradient descent in NumPy.

`units` maps a kernel's name to its units `[groups, units, entries]` (see `references.selection`); one group each here.
"""

from fractions import Fraction
import math

import numpy as np
from references import network
from references.selection import global_topk, keep_count, topk, topk_units
from references.training import apply_masks, cubic, descend


def scores_of(x, units):
  return np.asarray(x, np.float64).ravel()[units[0]].sum(-1)


def kept_of(mask, units):
  return mask.ravel()[units[0]].all(-1)


def entries_of(kept, units, shape):
  flat = np.zeros(math.prod(shape), bool)
  flat[units[0][kept].ravel()] = True
  return flat.reshape(shape)


def among(kept, scores):
  return np.where(kept, scores, -np.inf)


def up(x):
  return math.ceil(x - 1e-6)


def cosine(t, start, stop, first, last):
  return last + (first - last) / 2 * (1 + math.cos(math.pi * (t - start) / (stop - start)))


def elastic(params, masks, batches, lr, *, due, total, low, high, units, drop, grow, joint):
  """At a refresh: keep the best, drop a share of them, grow as much, and grow a surplus.

  total(t): units kept over all leaves (joint) or of leaf k, total(t, k). low(t), high(t): the share dropped and regrown,
  and the share grown on top. drop(k, t, w, g), grow(k, t, w, g): scores of entries. joint: leaves compete for what is kept
  and for the surplus; what is dropped and regrown stays in its leaf.
  """
  for t, (x, y) in enumerate(batches):
    grads = network.gradients(params, x, y)
    if t in due:
      inputs = {k: (k, t, params[k]["kernel"], grads[k]["kernel"]) for k in params}
      worst = {k: scores_of(drop(*inputs[k]), units[k]) for k in params}
      best = {k: scores_of(grow(*inputs[k]), units[k]) for k in params}
      kept = {k: kept_of(masks[k], units[k]) for k in params}
      if joint:
        chosen = dict(zip(kept, global_topk([among(kept[k], worst[k]) for k in kept], total(t))))
        counts = {k: int(m.sum()) for k, m in chosen.items()}
      else:
        counts = {k: total(t, k) for k in params}
      for k, count in counts.items():
        stay = topk(among(kept[k], worst[k]), count - up(low(t) * count)) & kept[k]
        goal = count if joint else count + up(high(t) * count)
        kept[k] = stay | topk(among(~stay, best[k]), goal - int(stay.sum()))
      if joint and high(t):
        # A joint budget counts entries; only whole units fit.
        size = next(iter(units.values())).shape[-1]
        more = up(high(t) * sum(counts.values()) * size) // size
        extra = dict(zip(kept, global_topk([among(~kept[k], best[k]) for k in kept], more)))
        kept = {k: kept[k] | extra[k] for k in kept}
      masks = {k: entries_of(kept[k], units[k], masks[k].shape) for k in kept}
    params = descend(apply_masks(params, masks), grads, masks, lr)
    yield masks, params


def granet_total(size, every, start, ramp_stop, first, last):
  """t -> entries kept by the cubic ramp from sparsity `first` to `last`."""
  end = max(range(start, ramp_stop, every))
  removed = [size - keep_count(size, s) for s in (first, last)]
  return lambda t: size - cubic(min(t, end), every, start, ramp_stop, *removed)


def srigl(params, masks, batches, lr, *, every, start, stop, fraction, fan_in, salient):
  """SRigL as the paper's list of steps, column by column; no gradient step at a refresh."""
  for t, (x, y) in enumerate(batches):
    grads = network.gradients(params, x, y)
    due = t in range(start, stop, every)
    if due:
      for k, p in params.items():
        weight, grad = np.abs(p["kernel"]), np.abs(grads[k]["kernel"])
        inputs, outputs = weight.shape
        budget = fan_in[k] * outputs
        swaps = up(cosine(t, start, stop, fraction, 0.0) * budget)
        stay_total = int(masks[k].sum()) - swaps
        survive = topk(among(masks[k], weight), stay_total)
        promising = topk(among(~survive, grad), swaps)
        active = [j for j in range(outputs) if (survive | promising)[:, j].sum() >= salient * fan_in[k]]
        active = active or list(range(outputs))
        width = min(budget // len(active), inputs)
        allowed = masks[k].copy()
        allowed[:, [j for j in range(outputs) if j not in active]] = False
        survive = topk(among(allowed, weight), stay_total) & allowed
        new = np.zeros_like(masks[k])
        for j in active:
          column = topk(among(survive[:, j], weight[:, j]), min(int(survive[:, j].sum()), width))
          column |= topk(among(~column, grad[:, j]), width - int(column.sum()))
          new[:, j] = column
        masks = masks | {k: new}
    params = apply_masks(params, masks)
    if not due:
      params = descend(params, grads, masks, lr)
    yield masks, params


def top_kast(params, batches, lr, *, due, keep, units, explore, decay):
  """Forward with the `keep[k]` largest units of every group, gradients for `explore` of the leaf's entries more."""
  select = lambda ps: {k: topk_units(np.abs(p["kernel"]), keep[k], units[k]) for k, p in ps.items()}
  masks = select(params)
  for t, (x, y) in enumerate(batches):
    grads = network.gradients(apply_masks(params, masks), x, y)
    new = {}
    for k, p in params.items():
      w, mask = p["kernel"], masks[k]
      more = math.floor(mask.size * Fraction(str(explore)))
      around = topk(among(~mask, np.abs(w)), min(more, int((~mask).sum())))
      density = mask.sum() / mask.size
      pull = decay * np.where(mask, w, w / density)
      step = np.where(mask | around, grads[k]["kernel"] + pull, 0.0)
      new[k] = {"kernel": w - lr * step, "bias": p["bias"] - lr * grads[k]["bias"]}
    params = new
    if t in due:
      masks = select(params)
    yield masks, params


def movement(params, batches, lr, *, every, start, stop, keep, units):
  """Scores gather -w g of the masked forward pass; only kept weights move; removed ones may come back."""
  masks = {k: np.ones(p["kernel"].shape, bool) for k, p in params.items()}
  total = {k: np.zeros(m.shape) for k, m in masks.items()}
  for t, (x, y) in enumerate(batches):
    grads = network.gradients(apply_masks(params, masks), x, y)
    total = {k: total[k] - params[k]["kernel"] * grads[k]["kernel"] for k in total}
    params = {
      k: {
        "kernel": p["kernel"] - lr * np.where(masks[k], grads[k]["kernel"], 0.0),
        "bias": p["bias"] - lr * grads[k]["bias"],
      }
      for k, p in params.items()
    }
    if t in range(start, stop, every):
      counts = {k: u.shape[1] - cubic(t, every, start, stop, 0, u.shape[1] - keep[k]) for k, u in units.items()}
      masks = {k: topk_units(total[k], counts[k], units[k]) for k in masks}
    yield masks, params
