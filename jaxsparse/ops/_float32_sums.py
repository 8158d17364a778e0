"""Dense products whose sums are float32; float32 operands are multiplied as float32, not as TF32."""

import jax
import jax.numpy as jnp


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """`a @ b` in float32."""
  return jnp.dot(a, b, precision=_precision(a), preferred_element_type=jnp.float32)


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """`jnp.einsum` of two operands in float32."""
  return jnp.einsum(spec, a, b, precision=_precision(a), preferred_element_type=jnp.float32)


def _precision(a):
  return "highest" if a.dtype == jnp.float32 else None
