"""scikit-learn's digits and the MLP 64-128-128-10 that is trained on them."""

import math

import jax
import jax.numpy as jnp
import numpy as np

SIZES = (64, 128, 128, 10)


def load():
  """(train images, train labels), (test images, test labels); pixels have mean 0 and deviation 1 over the training part."""
  from sklearn import datasets

  images, labels = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(labels))
  train, test = order[:1200], order[1200:]
  mean, deviation = images[train].mean(), images[train].std()
  images = ((images - mean) / deviation).astype(np.float32)
  return tuple((jnp.asarray(images[part]), jnp.asarray(labels[part])) for part in (train, test))


def init_params(key):
  keys = jax.random.split(key, len(SIZES) - 1)
  return {
    f"dense_{i}": {"kernel": jax.random.normal(k, (a, b)) * math.sqrt(2 / a), "bias": jnp.zeros((b,))}
    for i, (k, a, b) in enumerate(zip(keys, SIZES, SIZES[1:]))
  }


def logits(params, x):
  for i in range(len(params)):
    layer = params[f"dense_{i}"]
    x = x @ layer["kernel"] + layer["bias"]
    x = jax.nn.relu(x) if i < len(params) - 1 else x
  return x
