"""`sampled_matmul`, and which implementation of it runs."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _block_array
from jaxsparse.ops import _dispatch
from jaxsparse.ops import _shard_map
from jaxsparse.ops.block_matmul import api as block_api
from jaxsparse.ops.block_matmul import choice as choices
from jaxsparse.ops.block_matmul import vjp


def sampled_matmul(
  x: Any,
  dy: Any,
  at: _block_array.BlockArray,
  *,
  implementation: str | None = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """`x.T @ dy` at the kept blocks of a weight, and nowhere else: its gradient; sums are float32.

  Implementations are those of `block_matmul`, and chosen in the same way.

  Args:
    x: `[*B, K]`, bfloat16, float16 or float32; all axes but the last are summed over.
    dy: `[*B, O]`, of x's dtype.
    at: `BlockArray` `[K, O]` of that dtype: where blocks are kept. Their values are not read.
    implementation: "reference", "xla", "dense", "hopper", or None.
    preferred_element_type: dtype of the result: bfloat16, float16 or float32; None takes that of x.

  Returns:
    `[N, bk, bo]`, in the order of `at.blocks`; 0 in slots without a block. Differentiable in x and dy.

  Raises:
    TypeError, ValueError: operands that do not fit each other.
    NotImplementedError: the named implementation cannot run; the message says why.

  >>> at = _block_array.BlockArray.from_dense(jnp.array([[1.0, 0.0], [2.0, 0.0]]), (2, 1))
  >>> sampled_matmul(jnp.array([[3.0, 4.0]]), jnp.array([[1.0, 2.0]]), at).tolist()
  [[[3.0], [4.0]]]
  """
  x, dy = jnp.asarray(x), jnp.asarray(dy)
  choice = which_sampled_matmul(x, dy, at, implementation=implementation, preferred_element_type=preferred_element_type)
  dtype = block_api.result_dtype("sampled_matmul", x, preferred_element_type)
  return _run(choices.call(choice, "dw", math.prod(x.shape[:-1]), at, implementation, dtype), x, dy, at)


def which_sampled_matmul(
  x: Any,
  dy: Any,
  at: _block_array.BlockArray,
  *,
  implementation: str | None = None,
  preferred_element_type: Any = None,
) -> _dispatch.Choice:
  """Which implementation `sampled_matmul` takes for these arguments here, and why not the others.

  Args:
    x, dy: as in `sampled_matmul`; `jax.ShapeDtypeStruct` will do.
    at, implementation, preferred_element_type: as in `sampled_matmul`.

  Returns:
    A `Choice` with `implementation`, `reason`, `rejected` and `target`; prints as a list.

  Raises:
    As `sampled_matmul`.
  """
  out = block_api.result_dtype("sampled_matmul", x, preferred_element_type)
  block_api.check("sampled_matmul", x, at, None)
  if tuple(dy.shape) != (*x.shape[:-1], at.shape[1]):
    raise ValueError(
      f"sampled_matmul: x has shape {tuple(x.shape)} and dy {tuple(dy.shape)}; dy must be {(*x.shape[:-1], at.shape[1])}."
    )
  if dy.dtype != x.dtype:
    raise TypeError(f"sampled_matmul: x is {x.dtype}, dy {dy.dtype}; make them equal: dy.astype(x.dtype).")
  batch = math.prod(x.shape[:-1])
  return choices.choose("dw", batch, x.dtype, at, implementation, out)


@functools.partial(jax.jit, static_argnums=0)
def _run(call, x, dy, at):
  flat = lambda a: a.reshape(-1, a.shape[-1])
  return vjp.sampled(call, *_shard_map.vary_together(flat(x), flat(dy), at))
