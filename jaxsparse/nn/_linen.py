"""A Dense layer with sparse weights for flax.linen."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen
import jax
import jax.numpy as jnp

from jaxsparse import ops
from jaxsparse.arrays import NMArray
from jaxsparse.nn import _dot_general


class SparseDense(linen.Module):
  """`act(x @ w + bias)` with an n:m sparse `w`: `linen.Dense` that stores and multiplies kept values only.

  Variables: `params/values` `[K/m, n, O]` and `params/bias` `[O]`, which train, and `sparse/indices` `[K/m, n, O]`, uint8,
  which do not. A layer that is made anew draws positions at random; a trained `linen.Dense` becomes one by `js.compress`
  and `linen_variables`.

  Attributes:
    features: O.
    n, m: the pattern: n of m consecutive inputs are kept.
    use_bias: whether to add a bias.
    activation: None, "relu", "gelu" or "silu", fused where the device can.
    dtype: of the computation; None takes the widest of input, values and bias.
    param_dtype: of values and bias.
    kernel_init: initializer, called with the shape (K n / m, O): the inputs that each output really has.
    bias_init: initializer of the bias.
    implementation: of `jaxsparse.ops.nm_matmul`.
  """

  features: int
  n: int = 2
  m: int = 4
  use_bias: bool = True
  activation: str | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable[..., jax.Array] = linen.initializers.lecun_normal()
  bias_init: Callable[..., jax.Array] = linen.initializers.zeros_init()
  implementation: str | None = None

  @linen.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """`[*B, K] -> [*B, O]`; ValueError if K is not divisible by m."""
    k = inputs.shape[-1]
    if k % self.m:
      raise ValueError(f"{self.path}: SparseDense with {self.n}:{self.m} needs inputs divisible by {self.m}, got {k}.")
    groups, n = k // self.m, self.n
    values = self.param("values", self._init_values, (groups, n, self.features))
    indices = self.variable("sparse", "indices", self._init_indices, (groups, n, self.features)).value
    bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
    kernel = NMArray(values, indices, n=n, m=self.m)
    inputs, kernel, bias = _dot_general.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
    return ops.nm_matmul(inputs, kernel, bias=bias, activation=self.activation, implementation=self.implementation)

  def _init_values(self, key, shape):
    groups, n, outputs = shape
    return self.kernel_init(key, (groups * n, outputs), self.param_dtype).reshape(shape)

  def _init_indices(self, shape):
    groups, n, outputs = shape
    order = jnp.argsort(jax.random.uniform(self.make_rng("params"), (groups, self.m, outputs)), axis=1)
    return jnp.sort(order[:, :n], axis=1).astype(jnp.uint8)


def linen_variables(params: Any) -> dict[str, Any]:
  """Variables for a linen model in which `SparseDense` layers stand for the Dense layers that `js.compress` compressed.

  Args:
    params: a parameter dictionary with `NMArray` kernels, from `js.compress`.

  Returns:
    {"params": ..., "sparse": ...}: a layer's `kernel` became `params/values` and `sparse/indices`.

  Raises:
    TypeError: a quantised or packed kernel; those belong in `nnx` models or in plain functions.
  """
  found = {"params": {}, "sparse": {}}

  def walk(node, trains, fixed, path):
    for name, child in node.items():
      where = f"{path}/{name}" if path else name
      if isinstance(child, Mapping):
        below = {}
        trains[name] = {}
        walk(child, trains[name], below, where)
        if below:
          fixed[name] = below
      elif isinstance(child, NMArray) and name == "kernel" and child.scales is None:
        trains["values"], fixed["indices"] = child.values, child.indices
      elif isinstance(child, NMArray) or hasattr(child, "unpack"):
        raise TypeError(f"{where} is {child!r}; SparseDense takes the floating-point NMArray of a layer's kernel.")
      else:
        trains[name] = child

  walk(params, found["params"], found["sparse"], "")
  return found
