"""The 5.8M-parameter MLP whose training step the CPU benchmarks time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

SIZES = (784, 2048, 2048, 10)


def init_params(key):
  keys = jax.random.split(key, len(SIZES) - 1)
  return {
    f"dense_{i}": {"kernel": jax.random.normal(k, (a, b)) / np.sqrt(a), "bias": jnp.zeros((b,))}
    for i, (k, a, b) in enumerate(zip(keys, SIZES, SIZES[1:]))
  }


def loss(params, x, y):
  for i in range(len(params)):
    layer = params[f"dense_{i}"]
    x = x @ layer["kernel"] + layer["bias"]
    x = jax.nn.relu(x) if i < len(params) - 1 else x
  return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()
