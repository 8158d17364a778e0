"""Statistics of activations for Hebbian growth."""

import jax
import jax.numpy as jnp


def correlation(before: jax.Array, after: jax.Array) -> jax.Array:
  """Pearson correlation of every unit before a kernel with every unit behind it, over examples.

  Args:
    before: `[..., in]` activations; leading axes are examples.
    after: `[..., out]`, of as many examples.

  Returns:
    float32 `[in, out]`; 0 for units that do not vary.

  >>> x = jnp.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
  >>> correlation(x, -2 * x[:, :1]).round(3).tolist()
  [[-1.0], [0.0]]
  """
  a, b = (x.reshape(-1, x.shape[-1]).astype(jnp.float32) for x in (before, after))
  a, b = a - a.mean(0), b - b.mean(0)
  size = jnp.linalg.norm(a, axis=0)[:, None] * jnp.linalg.norm(b, axis=0)
  return jnp.where(size > 0, a.T @ b / jnp.where(size > 0, size, 1), 0.0)
