"""`fan_in_matmul`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _fixed_fan_in_array
from jaxsparse.ops import _dispatch
from jaxsparse.ops import _shard_map
from jaxsparse.ops.fan_in_matmul import vjp

DTYPES = ("bfloat16", "float16", "float32")


def fan_in_matmul(
  x: Any,
  w: _fixed_fan_in_array.FixedFanInArray,
  *,
  implementation: str | None = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """`x @ w` for a weight with a fixed fan-in: y[b, o] = sum_f x[b, indices[f, o]] values[f, o], summed in float32.

  Implementations:

  - "xla": a loop over the fan-in that gathers one input of every output at a time. Its memory, and that of its gradients,
    is `B * O` numbers beside the operands. Runs everywhere; 2 B O F operations, without tensor cores.
  - "reference": the specification, a dense product in float32.

  Differentiable in reverse mode, once, in x and the kept values (the gradient of the values is `[F, O]`). On a GPU dx is
  summed by atomic additions, whose order changes from run to run.

  Args:
    x: `[*B, K]`, bfloat16, float16 or float32.
    w: `FixedFanInArray` `[K, O]` of x's dtype.
    implementation: one of the names above; None takes "xla".
    preferred_element_type: dtype of the result: bfloat16, float16 or float32; None takes that of x.

  Returns:
    `[*B, O]`.

  Raises:
    TypeError, ValueError: operands that do not fit each other.

  >>> w = _fixed_fan_in_array.FixedFanInArray.from_dense(jnp.array([[1.0, 0.0], [0.0, 2.0]]), 1)
  >>> fan_in_matmul(jnp.array([[3.0, 4.0]]), w).tolist()
  [[3.0, 8.0]]
  """
  x = jnp.asarray(x)
  dtype = jnp.dtype(x.dtype if preferred_element_type is None else preferred_element_type)
  check("fan_in_matmul", x, w, dtype)
  reasons = {"xla": lambda: None, "reference": lambda: None}
  choice = _dispatch.choose(
    "fan_in_matmul", implementation, reasons, (("xla", "it runs everywhere."),), _dispatch.current_target()
  )
  return _run(choice.implementation, dtype, x, w)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(implementation, dtype, x, w):
  operands = _shard_map.vary_together(x.reshape(-1, x.shape[-1]), w.values, w.indices)
  y = vjp.matmul(implementation, dtype, *operands)
  return y.reshape(*x.shape[:-1], w.shape[1])


def check(op: str, x: Any, w: Any, out: Any) -> None:
  """Errors for operands that do not fit."""
  if not isinstance(w, _fixed_fan_in_array.FixedFanInArray):
    raise TypeError(
      f"{op}: w is a {type(w).__name__}; a FixedFanInArray (updater.forward_params, FixedFanInArray.from_dense) is needed. "
      "For a dense weight use x @ w."
    )
  if w.values is None or w.indices is None or len(w.values.shape) != 2:
    raise ValueError(f"{op}: w is {w!r}; values and indices [F, O] of one layer are needed.")
  if len(x.shape) < 1 or x.shape[-1] != w.shape[0]:
    raise ValueError(f"{op}: x has shape {tuple(x.shape)}, w {w.shape}; the last axis of x must be {w.shape[0]}.")
  if jnp.dtype(x.dtype).name not in DTYPES:
    raise TypeError(f"{op}: x is {x.dtype}; allowed are {', '.join(DTYPES)}.")
  if jnp.dtype(w.dtype) != jnp.dtype(x.dtype):
    raise TypeError(f"{op}: x is {x.dtype}, w {w.dtype}; make them equal: x.astype(w.dtype) or w.astype(x.dtype).")
  if out.name not in DTYPES:
    raise TypeError(f"{op}: preferred_element_type={out.name}; allowed are {', '.join(DTYPES)}.")
