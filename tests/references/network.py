"""A two-layer tanh network with hand-written gradients, in float64."""

import numpy as np


def gradients(params, x, y):
  """Gradient of mean((tanh(x A + a) B + b - y)^2) for {"a": {"kernel", "bias"}, "b": {...}}."""
  hidden = np.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
  error = 2 * (hidden @ params["b"]["kernel"] + params["b"]["bias"] - y) / y.size
  back = (error @ params["b"]["kernel"].T) * (1 - hidden**2)
  return {
    "a": {"kernel": x.T @ back, "bias": back.sum(0)},
    "b": {"kernel": hidden.T @ error, "bias": error.sum(0)},
  }


def hessian_product(params, direction, x, y, h=1e-5):
  """H v by a central difference of the gradient."""
  ahead, behind = (
    gradients({k: {n: w + s * h * direction[k][n] for n, w in p.items()} for k, p in params.items()}, x, y)
    for s in (1, -1)
  )
  return {k: {n: (ahead[k][n] - behind[k][n]) / (2 * h) for n in ahead[k]} for k in ahead}


def double(tree):
  return {k: {n: np.asarray(w, np.float64) for n, w in p.items()} for k, p in tree.items()}
