"""ALPS: support and weights together, by operator splitting."""

from collections.abc import Sequence
import functools
import itertools

import jax
import jax.numpy as jnp

from jaxsparse import structures
from jaxsparse.calibration import _gram
from jaxsparse.calibration import _refit
from jaxsparse.calibration import _selection
from jaxsparse.calibration import _shapes
from jaxsparse.calibration import _sparsegpt


@functools.partial(jax.jit, static_argnames=("structure", "levels", "every", "refit_iterations", "splits"))
def alps(
  w: jax.Array,
  gram: jax.Array,
  structure: structures.AbstractStructure,
  keep: int | jax.Array | Sequence[int],
  *,
  damping: float | jax.Array = 0.01,
  rho: float | jax.Array = 0.1,
  growth: float | jax.Array = 2.0,
  levels: int = 8,
  every: int = 8,
  refit_iterations: int = 10,
  splits: tuple[int, ...] = (),
) -> _sparsegpt.Pruned:
  """Minimises ||X (w - w')||^2 over w' with a mask of the structure.

  ADMM on `min ||X (w - v)||^2, v = d, d sparse`: `v` solves a ridge regression with penalty rho, `d` is the projection
  on the structure. rho starts low, where supports move freely, and grows level by level until `d` and `v` agree. Then
  conjugate gradients refit the weights on the support.

  Args:
    w, gram, structure, keep, damping: as `sparsegpt`.
    rho: penalty of the first level, for a Gram matrix with a unit diagonal.
    growth: factor of the penalty from one level to the next.
    levels: penalties; each costs an inverse, about `2 K**3` multiply-adds.
    every: iterations at each level; each costs `K**2 O`.
    refit_iterations: of the conjugate gradients at the end.
    splits: widths of the weights that w holds side by side, which share their inputs and so the inverses; each is
      ranked by itself, with a `keep` of its own where a sequence is given. Empty: w is one weight.

  Returns:
    A `Pruned`.

  References:
    Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models, 2024
    (https://arxiv.org/abs/2406.07831). Differs from the paper: the penalty grows by a fixed factor at fixed times and not
    by 1.1 to 1.3 every three iterations until the support settles; so a few Cholesky factors replace the
    eigendecomposition. With the defaults the error of a layer of a language model is that of 300 iterations of the
    paper's rule within 1 %; `growth=4, levels=4` takes half the time for an error 3 to 4 % higher. Any structure goes.
  """
  _shapes.check_shapes("alps", w, gram=gram)
  h, scale = _refit.unit_diagonal(gram, damping)
  target = w.astype(jnp.float32) * scale
  moment = _gram.dot(h, target)
  support = functools.partial(_support, structure=structure, keep=keep, splits=splits or (w.shape[1],))
  identity = jnp.eye(h.shape[0], dtype=h.dtype)

  def level(_, state):
    d, dual, rho = state
    r, _ = _gram.upper_factor(h + rho * identity, 0.0)
    half = jax.scipy.linalg.solve_triangular(r, identity, lower=False)
    inverse = _gram.dot(half.T, half)

    def iterate(_, state):
      d, dual = state
      v = _gram.dot(inverse, moment - dual + rho * d)
      free = v + dual / rho
      d = jnp.where(support(free), free, 0)
      return d, dual + rho * (v - d)

    return *jax.lax.fori_loop(0, every, iterate, (d, dual)), rho * growth

  start = jnp.where(support(target), target, 0)
  d, _, _ = jax.lax.fori_loop(0, levels, level, (start, jnp.zeros_like(target), jnp.float32(rho)))
  mask = support(d)
  weight = _refit.conjugate_gradients(h, jnp.where(mask, d, 0), target, mask, refit_iterations) / scale
  return _sparsegpt.Pruned(weight, mask, jnp.float32(damping))


def _support(d, structure, keep, splits):
  """Mask of the largest entries of each of the weights that d holds side by side."""
  counts = keep if isinstance(keep, (tuple, list)) or getattr(keep, "ndim", 0) else [keep] * len(splits)
  starts = itertools.accumulate(splits, initial=0)
  parts = [jax.lax.slice_in_dim(d, a, a + n, axis=1) for a, n in zip(starts, splits)]
  return jnp.concatenate([_selection.select(p * p, structure, c) for p, c in zip(parts, counts)], 1)
