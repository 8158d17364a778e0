"""ALPS: support and weights together, by operator splitting."""

import functools

import jax
import jax.numpy as jnp

from jaxsparse import structures
from jaxsparse.calibration import _gram
from jaxsparse.calibration import _refit
from jaxsparse.calibration import _selection
from jaxsparse.calibration import _sparsegpt


@functools.partial(jax.jit, static_argnames=("structure", "iterations", "every", "refit_iterations"))
def alps(
  w: jax.Array,
  gram: jax.Array,
  structure: structures.AbstractStructure,
  keep: int | jax.Array,
  *,
  damping: float | jax.Array = 0.01,
  rho: float | jax.Array = 0.1,
  growth: float | jax.Array = 1.0,
  iterations: int = 300,
  every: int = 3,
  refit_iterations: int = 10,
) -> _sparsegpt.Pruned:
  """Minimises ||X (w - w')||^2 over w' with a mask of the structure.

  ADMM on `min ||X (w - v)||^2, v = d, d sparse`: `v` solves a ridge regression in the eigenbasis of H, `d` is the
  projection on the structure, and the penalty rho grows every few iterations by how much the support still changes,
  until it settles. Then conjugate gradients refit the weights on it.

  Args:
    w, gram, structure, keep, damping: as `sparsegpt`.
    rho: first penalty, for a Gram matrix with a unit diagonal.
    growth: exponent of the penalty's factors (1.3, 1.2, 1.1): 2 settles in about half the iterations.
    iterations: at most.
    every: iterations between two looks at the support.
    refit_iterations: of the conjugate gradients at the end.

  Returns:
    A `Pruned`.

  References:
    Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models, 2024
    (https://arxiv.org/abs/2406.07831). Differs from the paper: supports are ranked in bfloat16 until the last one,
    and any structure goes; the first look compares with the support of the projected dense weight.
  """
  h, scale = _refit.unit_diagonal(gram, damping)
  target = w.astype(jnp.float32) * scale
  values, basis = jnp.linalg.eigh(h)
  values = jnp.maximum(values, 0)
  moment = _gram.dot(h, target)
  keep = jnp.int32(keep)
  # Half of the bits rank as well here, in half of the passes: the projection is a step, not the result.
  support = lambda d, dtype: _selection.select(jnp.square(d).astype(dtype), structure, keep)

  def solve(rho, right):
    if w.shape[0] > w.shape[1]:
      return _gram.dot(basis, _gram.dot(basis.T, right) / (values + rho)[:, None])
    return _gram.dot(_gram.dot(basis / (values + rho), basis.T), right)

  def iterate(_, state):
    d, dual, rho = state
    v = solve(rho, moment - dual + rho * d)
    free = v + dual / rho
    d = jnp.where(support(free, jnp.bfloat16), free, 0)
    return d, dual + rho * (v - d), rho

  def unsettled(state):
    step, _, _, _, _, changed = state
    return (step * every < iterations) & (changed > 0)

  def look(state):
    step, d, dual, rho, old, _ = state
    d, dual, _ = jax.lax.fori_loop(0, every, iterate, (d, dual, rho))
    mask = d != 0
    changed = jnp.sum(mask != old, dtype=jnp.int32)
    share = changed / jnp.maximum(jnp.sum(mask, dtype=jnp.int32), 1)
    factor = jnp.where(share > 0.1, 1.3, jnp.where(share > 0.005, 1.2, 1.1)) ** growth
    return step + 1, d, dual, rho * factor, mask, changed

  first = support(target, jnp.bfloat16)
  state = (0, jnp.where(first, target, 0), jnp.zeros_like(target), jnp.float32(rho), first, jnp.int32(1))
  _, d, dual, rho, _, _ = jax.lax.while_loop(unsettled, look, state)
  mask = support(d, jnp.float32)
  weight = _refit.conjugate_gradients(h, jnp.where(mask, d, 0), target, mask, refit_iterations) / scale
  return _sparsegpt.Pruned(weight, mask, jnp.float32(damping))
