"""Least squares on a fixed support."""

import functools

import jax
import jax.numpy as jnp

from jaxsparse.calibration import _gram
from jaxsparse.calibration import _shapes


@functools.partial(jax.jit, static_argnames=("iterations",))
def refit(
  w: jax.Array,
  target: jax.Array,
  gram: jax.Array,
  mask: jax.Array,
  *,
  damping: float | jax.Array = 0.01,
  iterations: int = 20,
) -> jax.Array:
  """The kept weights that minimise ||X (w - target)||^2, by conjugate gradients on all outputs at once.

  Args:
    w: `[K, O]`, where to start (the pruned weight).
    target: `[K, O]`, the dense weight or `corrected_target`.
    gram: float32 `[K, K]`.
    mask: bool `[K, O]`.
    damping: relative to the mean of the diagonal; it pulls kept weights towards the target.
    iterations: of the conjugate gradients. The damped objective never rises, whatever their number.

  Returns:
    float32 `[K, O]`, 0 off the mask.

  References:
    Meng et al., ALPS, 2024 (https://arxiv.org/abs/2406.07831), section 3.3; the preconditioner is the diagonal.
  """
  _shapes.check_shapes("refit", w, target=target, gram=gram, mask=mask)
  h, scale = unit_diagonal(gram, damping)
  start = jnp.where(mask, w.astype(jnp.float32), 0) * scale
  return conjugate_gradients(h, start, target.astype(jnp.float32) * scale, mask, iterations) / scale


def unit_diagonal(gram: jax.Array, damping: float | jax.Array) -> tuple[jax.Array, jax.Array]:
  """The damped H with rows and columns scaled to a unit diagonal, and the scale `[K, 1]` of weights that goes with it."""
  h = _gram.damp(gram, damping)
  scale = jnp.sqrt(jnp.diagonal(h))
  return h / (scale[:, None] * scale[None, :]), scale[:, None]


def conjugate_gradients(h, start, target, mask, iterations):
  """Minimises (v - target)^T h (v - target) over v that are 0 off the mask, column by column; h has a unit diagonal."""

  def step(_, state):
    v, residual, direction, size = state
    along = _gram.dot(h, direction)
    curve = jnp.sum(direction * along, 0)
    # A column that has converged has nothing left to divide.
    alpha = jnp.where(curve > 0, size / jnp.where(curve > 0, curve, 1), 0)
    v = v + alpha * direction
    residual = residual - alpha * jnp.where(mask, along, 0)
    new = jnp.sum(residual * residual, 0)
    beta = jnp.where(size > 0, new / jnp.where(size > 0, size, 1), 0)
    return v, residual, residual + beta * direction, new

  residual = jnp.where(mask, _gram.dot(h, target - start), 0)
  state = start, residual, residual, jnp.sum(residual * residual, 0)
  return jax.lax.fori_loop(0, iterations, step, state)[0]
