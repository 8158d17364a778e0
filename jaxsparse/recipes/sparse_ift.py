"""Sparse Iso-FLOP Transformations: a dense layer becomes a larger sparse one of equal FLOPs.

With s the sparsity and b = round(1 / (1 - s)):

* wide: inputs and outputs are wider by sqrt(b);
* parallel: b sparse branches, each through the non-linearity, are summed;
* factorized: two sparse factors with an inner width k^2 i o / ((1 - s)(k^2 i + o));
* doped: a sparse layer plus a dense low-rank product of rank s k^2 i o / (k^2 i + o).

i and o are the inputs and outputs of the layer and k^2 the positions of a convolution's kernel. The widths serve models of any
framework; `Layer` is a dense layer on plain arrays. Sparse leaves are called "sparse...", so that `rules(s)` finds them:

    layer = parallel(256, 256, sparsity=0.75)
    params = layer.init(jax.random.key(0))
    updater = js.rigl(sparsity=0.75, stop=1000, rules=rules(0.75), distribution=js.Uniform())

References:
  Thangarasa et al., Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency, 2023,
  https://arxiv.org/abs/2303.11525.
  Differs from the paper: layers are dense ones; normalisation in branches and between factors is passed in as `activation`.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import rules as rules_lib

Activation = Callable[[jax.Array], jax.Array]


class Layer(NamedTuple):
  """`init(key) -> params`, `apply(params, x[..., inputs]) -> y[..., outputs]`, and both widths."""

  init: Callable[[jax.Array], dict[str, Any]]
  apply: Callable[[dict[str, Any], jax.Array], jax.Array]
  inputs: int
  outputs: int


def branches(sparsity: float) -> int:
  """round(1 / (1 - sparsity)).

  >>> [branches(s) for s in (0.0, 0.5, 0.75, 0.9)]
  [1, 2, 4, 10]
  """
  return round(1 / (1 - rules_lib.check_sparsity(sparsity, "sparsity")))


def wide_width(width: int, sparsity: float) -> int:
  """width * sqrt(branches), rounded.

  >>> [wide_width(256, s) for s in (0.0, 0.5, 0.75, 0.9)]
  [256, 362, 512, 810]
  """
  return round(width * math.sqrt(branches(sparsity)))


def factorized_width(inputs: int, outputs: int, sparsity: float, kernel_positions: int = 1) -> int:
  """Inner width of two sparse factors.

  >>> [factorized_width(256, 256, s) for s in (0.5, 0.75, 0.9)]
  [256, 512, 1281]
  """
  rules_lib.check_sparsity(sparsity, "sparsity")
  fan = kernel_positions * inputs
  return math.ceil(fan * outputs / ((1 - sparsity) * (fan + outputs)))


def doped_rank(inputs: int, outputs: int, sparsity: float, kernel_positions: int = 1) -> int:
  """Rank of the dense product beside a sparse layer.

  >>> [doped_rank(256, 256, s) for s in (0.0, 0.5, 0.75, 0.9)]
  [0, 64, 96, 115]
  """
  rules_lib.check_sparsity(sparsity, "sparsity")
  fan = kernel_positions * inputs
  return math.floor(sparsity * fan * outputs / (fan + outputs))


def rules(sparsity: float) -> rules_lib.Rules:
  """The sparsity for leaves called "sparse...", none for the others."""
  return rules_lib.Rules((r"sparse\w*$", sparsity), (".*", None))


def wide(inputs: int, outputs: int, sparsity: float, activation: Activation = jax.nn.relu) -> Layer:
  """act(x W + b) with both widths scaled; the first and the last layer of a model must meet widths that are not."""
  return _dense(wide_width(inputs, sparsity), wide_width(outputs, sparsity), activation)


def parallel(inputs: int, outputs: int, sparsity: float, activation: Activation = jax.nn.relu) -> Layer:
  """sum_i act(x W_i + b_i)."""
  layers = [_dense(inputs, outputs, activation) for _ in range(branches(sparsity))]

  def init(key):
    keys = jax.random.split(key, len(layers))
    return {f"branch_{i}": layer.init(k) for i, (layer, k) in enumerate(zip(layers, keys))}

  def apply(params, x):
    return sum(layer.apply(params[f"branch_{i}"], x) for i, layer in enumerate(layers))

  return Layer(init, apply, inputs, outputs)


def factorized(
  inputs: int,
  outputs: int,
  sparsity: float,
  activation: Activation = jax.nn.relu,
  inner_activation: Activation = lambda h: h,
) -> Layer:
  """act(inner(x U) V + b) with sparse U and V; the plain layer at sparsity 0."""
  if not sparsity:
    return _dense(inputs, outputs, activation)
  inner = factorized_width(inputs, outputs, sparsity)

  def init(key):
    first, second = jax.random.split(key)
    return {
      "sparse_in": _he(first, inputs, inner),
      "sparse_out": _he(second, inner, outputs),
      "bias": jnp.zeros((outputs,)),
    }

  def apply(params, x):
    return activation(inner_activation(x @ params["sparse_in"]) @ params["sparse_out"] + params["bias"])

  return Layer(init, apply, inputs, outputs)


def doped(inputs: int, outputs: int, sparsity: float, activation: Activation = jax.nn.relu) -> Layer:
  """act(x W + (x U) V + b) with sparse W and dense U, V; the plain layer at rank 0."""
  plain, rank = _dense(inputs, outputs, lambda h: h), doped_rank(inputs, outputs, sparsity)

  def init(key):
    keys = jax.random.split(key, 3)
    params = plain.init(keys[0])
    return params | {"u": _he(keys[1], inputs, rank), "v": _he(keys[2], rank, outputs)} if rank else params

  def apply(params, x):
    h = plain.apply(params, x)
    return activation(h + (x @ params["u"]) @ params["v"] if rank else h)

  return Layer(init, apply, inputs, outputs)


def _dense(inputs: int, outputs: int, activation: Activation) -> Layer:
  def init(key):
    return {"sparse": _he(key, inputs, outputs), "bias": jnp.zeros((outputs,))}

  return Layer(init, lambda params, x: activation(x @ params["sparse"] + params["bias"]), inputs, outputs)


def _he(key, inputs: int, outputs: int) -> jax.Array:
  return jax.random.normal(key, (inputs, outputs)) * math.sqrt(2 / inputs)
