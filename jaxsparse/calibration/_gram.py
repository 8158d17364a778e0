"""Gram matrices: damping, factors, and the error that they measure. All in float32, on every device."""

import jax
import jax.numpy as jnp

from jaxsparse.calibration import _shapes

HIGHEST = jax.lax.Precision.HIGHEST
_ATTEMPTS = 6


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """`a @ b` with float32 accuracy on GPUs and TPUs as well."""
  return jnp.matmul(a, b, precision=HIGHEST)


def damp(gram: jax.Array, damping: float | jax.Array) -> jax.Array:
  """H plus `damping` times the mean of its diagonal; inputs that were always 0 get a diagonal of 1."""
  diagonal = jnp.diagonal(gram)
  extra = damping * jnp.mean(diagonal) + jnp.where(diagonal > 0, 0, 1)
  return gram + jnp.diag(extra.astype(gram.dtype))


def upper_factor(gram: jax.Array, damping: float | jax.Array) -> tuple[jax.Array, jax.Array]:
  """Upper triangular R with R R^T = damped H, and the damping that was needed.

  Where the factorisation fails, it is tried again with 10 times the damping, from at least 1e-4 on, up to 6 times.
  R holds NaN if none succeeds (a Gram matrix that is not finite, or far from positive).
  """

  def factor(damping):
    return jnp.flip(jax.lax.linalg.cholesky(jnp.flip(damp(gram, damping)), symmetrize_input=False))

  def failed(state):
    attempt, _, r = state
    return (attempt < _ATTEMPTS) & ~jnp.isfinite(jnp.diagonal(r)).all()

  def more(state):
    attempt, damping, _ = state
    damping = jnp.maximum(10 * damping, 1e-4)
    return attempt + 1, damping, factor(damping)

  damping = jnp.float32(damping)
  _, damping, r = jax.lax.while_loop(failed, more, (0, damping, factor(damping)))
  return jnp.triu(r), damping


def reconstruction_error(w: jax.Array, target: jax.Array, gram: jax.Array) -> jax.Array:
  """||X (w - target)||^2 of each output, `[O]`, from H = X^T X."""
  away = w.astype(jnp.float32) - target.astype(jnp.float32)
  return jnp.sum(away * dot(gram, away), 0)


@jax.jit
def corrected_target(w: jax.Array, gram: jax.Array, moment: jax.Array, ridge: float | jax.Array = 0.1) -> jax.Array:
  """The dense weight that best maps the inputs of the pruned model to outputs of the dense one.

  Minimises ||X V - Y||^2 + ridge * mean(diag H) * ||V - w||^2 over V: pruning towards V instead of w also makes up for
  what the layers before have lost. With X itself the dense inputs and Y = X w it returns w.

  Args:
    w: `[K, O]`, the dense weight.
    gram: `[K, K]`, X^T X of the pruned model's inputs.
    moment: `[K, O]`, X^T Y (`Statistics.cross` with the wanted outputs as second stream). Where the layer adds to a
      residual stream, Y may contain that stream's own error: the layer then corrects it as far as it can.
    ridge: how much to stay with w, relative to the mean of the diagonal.

  Returns:
    float32 `[K, O]`.
  """
  _shapes.check_shapes("corrected_target", w, gram=gram, moment=moment)
  w = w.astype(jnp.float32)
  r, _ = upper_factor(gram, ridge)
  # R R^T V = b: two triangular solves.
  half = jax.scipy.linalg.solve_triangular(r, moment - dot(gram, w), lower=False)
  return w + jax.scipy.linalg.solve_triangular(r, half, lower=False, trans="T")
