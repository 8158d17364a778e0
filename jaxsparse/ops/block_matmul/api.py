"""`block_matmul`, its transposed product, and which implementation of them runs."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _block_array
from jaxsparse.arrays import _block_positions
from jaxsparse.ops import _dispatch
from jaxsparse.ops import _float32_sums
from jaxsparse.ops import _shard_map
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.block_matmul import choice as choices
from jaxsparse.ops.block_matmul import vjp

DTYPES = ("bfloat16", "float16", "float32")


def block_matmul(
  x: Any, w: _block_array.BlockArray, *, implementation: str | None = None, preferred_element_type: Any = None
) -> jax.Array:
  """`x @ w` for a block-sparse weight; products are summed in float32.

  Implementations (`which_block_matmul` says which one a call takes, and why):

  - "reference": the specification, a dense product in float32.
  - "xla": gathers the parts of x, multiplies them by the kept blocks, adds up. Runs everywhere.
  - "dense": decompresses, then a dense dot; runs everywhere, and wins where most blocks are kept.
  - "hopper": a kernel for H100 and H200: blocks with sides of 32, 64, 128 or 256 in bfloat16 or float16.

  Without a name the best one is taken for device, shape, blocks and density, and for each product of the backward pass
  by itself: above densities that were measured (`jaxsparse/ops/block_matmul/measured`), that is "dense". Kernels need a plan of the positions: it is made
  while tracing for a static weight; a dynamic one should carry it (`plan_blocks`), else it is derived in every call.

  Differentiable in reverse mode in x and the kept blocks: the backward pass is block-sparse as well
  (`jaxsparse.ops.block_matmul.vjp`). Works under `jit`, `vmap` and `scan`. Kernels are not partitioned by themselves: across
  devices call it inside `jax.shard_map`, for kernels with `check_vma=False`.

  Args:
    x: `[*B, K]`, bfloat16, float16 or float32.
    w: `BlockArray` `[K, O]` of x's dtype.
    implementation: one of the names above, or None.
    preferred_element_type: dtype of the result: bfloat16, float16 or float32; None takes that of x.

  Returns:
    `[*B, O]`.

  Raises:
    TypeError, ValueError: operands that do not fit each other.
    NotImplementedError: the named implementation cannot run, or a kernel inside `jax.shard_map` without
      `check_vma=False`; the message says why.

  >>> w = _block_array.BlockArray.from_dense(jnp.array([[1.0, 0.0], [2.0, 0.0]]), (2, 1))
  >>> block_matmul(jnp.array([[3.0, 4.0]]), w).tolist()
  [[11.0, 0.0]]
  """
  return _product(x, w, False, implementation, preferred_element_type)


def block_matmul_transposed(
  x: Any, w: _block_array.BlockArray, *, implementation: str | None = None, preferred_element_type: Any = None
) -> jax.Array:
  """`x @ w.T` for a block-sparse weight, without transposing it: `[*B, O] @ [K, O].T -> [*B, K]`; see `block_matmul`.

  >>> w = _block_array.BlockArray.from_dense(jnp.array([[1.0, 0.0], [2.0, 0.0]]), (2, 1))
  >>> block_matmul_transposed(jnp.array([[3.0, 4.0]]), w).tolist()
  [[3.0, 6.0]]
  """
  return _product(x, w, True, implementation, preferred_element_type)


def which_block_matmul(
  x: Any,
  w: _block_array.BlockArray,
  *,
  transposed: bool = False,
  implementation: str | None = None,
  preferred_element_type: Any = None,
) -> _dispatch.Choice:
  """Which implementation `block_matmul` takes for these arguments here, and why not the others.

  Args:
    x: as in `block_matmul`; `jax.ShapeDtypeStruct` will do.
    w, implementation, preferred_element_type: as in `block_matmul`.
    transposed: ask for `block_matmul_transposed`.

  Returns:
    A `Choice` with `implementation`, `reason`, `rejected` and `target`; prints as a list.

  Raises:
    As `block_matmul`.

  >>> w = _block_array.BlockArray.from_dense(jnp.eye(4), (2, 2))
  >>> which_block_matmul(jax.ShapeDtypeStruct((1, 4), jnp.float32), w).implementation
  'dense'
  """
  op = "block_matmul_transposed" if transposed else "block_matmul"
  dtype = result_dtype(op, x, preferred_element_type)
  check(op, x, w, w.shape[1] if transposed and isinstance(w, _block_array.BlockArray) else None)
  batch = math.prod(x.shape[:-1])
  return choices.choose("dx" if transposed else "fwd", batch, x.dtype, w, implementation, dtype)


def plan_blocks(w: _block_array.BlockArray) -> _block_array.BlockArray:
  """A weight that carries what kernels derive from its positions; values and positions stay.

  Once for a mask: after `from_dense` or a change of the mask, inside `jit` too. A static weight is planned while
  tracing, and passes.

  Args:
    w: `BlockArray` `[K, O]`.

  Returns:
    The same weight with `plan`.
  """
  if not isinstance(w, _block_array.BlockArray):
    raise TypeError(f"plan_blocks takes a BlockArray, got {type(w).__name__}.")
  if w.static:
    return w
  return dataclasses.replace(w, plan=_plan.plans_of(dataclasses.replace(w, plan=None)))


def masked_block_matmul(
  x: Any, w: Any, mask: Any, block_shape: tuple[int, int], *, capacity: int, implementation: str | None = None
) -> jax.Array:
  """`x @ where(mask, w, 0)` for a mask over blocks that changes from call to call, inside `jit` too.

  Kept blocks are taken out of w and multiplied. Where more are kept than there is room for, the product is dense
  (`jax.lax.cond`): slower, never wrong.

  Args:
    x: `[*B, K]`.
    w: dense `[K, O]`, of x's dtype.
    mask: bool `[K / bk, O / bo]`, True = kept.
    block_shape: (bk, bo).
    capacity: blocks that there is room for, static.
    implementation: of the sparse product, as in `block_matmul`.

  Returns:
    `[*B, O]`, differentiable in x and w.

  Raises:
    As `block_matmul` and `BlockArray.from_dense`.
  """
  for name, value in (("w", w), ("mask", mask)):
    if value is None or isinstance(value, _block_array.BlockArray):
      raise TypeError(
        f"masked_block_matmul: {name} is a {type(value).__name__}; a dense weight and a mask over its blocks are needed "
        "(block_matmul takes a BlockArray)."
      )
  x, w, mask = jnp.asarray(x), jnp.asarray(w), jnp.asarray(mask).astype(bool)
  block_shape, grid = _block_array.check_tiling(w.shape, block_shape, "masked_block_matmul: w")
  capacity = _block_positions.check_capacity(capacity, "masked_block_matmul")
  if x.ndim < 1 or x.shape[-1] != w.shape[0]:
    raise ValueError(
      f"masked_block_matmul: x has shape {x.shape}, w {w.shape}; the last axis of x must be {w.shape[0]}."
    )
  if mask.shape != grid:
    raise ValueError(
      f"masked_block_matmul: mask has shape {mask.shape} and w {w.shape}; the mask needs one entry for each block of "
      f"{block_shape[0]}x{block_shape[1]}: {grid}."
    )
  wide = lambda: jnp.repeat(jnp.repeat(mask, block_shape[0], 0), block_shape[1], 1)

  def dense(x, w):
    return _float32_sums.dot(x, jnp.where(wide(), w, 0)).astype(x.dtype)

  @jax.jit  # positions are data here, whether or not the mask is known while tracing
  def sparse(x, w, mask):
    return block_matmul(
      x, _block_array.BlockArray.from_dense(w, block_shape, mask, capacity=capacity), implementation=implementation
    )

  return jax.lax.cond(mask.sum() > capacity, dense, lambda x, w: sparse(x, w, mask), x, w)


def _product(x, w, transposed, implementation, preferred_element_type):
  x = jnp.asarray(x)
  choice = which_block_matmul(
    x, w, transposed=transposed, implementation=implementation, preferred_element_type=preferred_element_type
  )
  # A named kernel is lowered for any platform, so that what cannot run says so.
  dtype = result_dtype("block_matmul", x, preferred_element_type)
  batch, product = math.prod(x.shape[:-1]), "dx" if transposed else "fwd"
  return _run(choices.call(choice, product, batch, w, implementation, dtype), transposed, x, w)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(call, transposed, x, w):
  y = vjp.matmul(call, transposed, *_shard_map.vary_together(x.reshape(-1, x.shape[-1]), w))
  return y.reshape(*x.shape[:-1], w.shape[0] if transposed else w.shape[1])


def result_dtype(op: str, x: Any, preferred: Any) -> Any:
  """dtype of a result: that of x unless another is preferred."""
  try:
    dtype = jnp.dtype(x.dtype if preferred is None else preferred)
  except TypeError as error:
    raise TypeError(f"{op}: preferred_element_type={preferred!r}; allowed are {', '.join(DTYPES)}.") from error
  if preferred is not None and dtype.name not in DTYPES:
    raise TypeError(f"{op}: preferred_element_type={dtype.name}; allowed are {', '.join(DTYPES)}.")
  return dtype


def check(op: str, x: Any, w: Any, width: int | None) -> None:
  """Errors for operands that do not fit; `width` is the last axis of x, None: K."""
  name = "at" if op == "sampled_matmul" else "w"
  if not isinstance(w, _block_array.BlockArray):
    dense = "the product of dense arrays is x.T @ dy" if name == "at" else "for a dense weight use x @ w"
    raise TypeError(
      f"{op}: {name} is a {type(w).__name__}; a BlockArray (js.compress, BlockArray.from_dense) is needed; {dense}."
    )
  if len(w.blocks.shape) != 3:
    raise ValueError(
      f"{op}: {name} is {w!r}; one layer is needed. Run over stacked layers with jax.lax.scan or jax.vmap."
    )
  width = w.shape[0] if width is None else width
  if len(x.shape) < 1 or x.shape[-1] != width:
    raise ValueError(f"{op}: x has shape {tuple(x.shape)}, {name} {w.shape}; the last axis of x must be {width}.")
  if jnp.dtype(x.dtype).name not in DTYPES:
    raise TypeError(f"{op}: x is {x.dtype}; allowed are {', '.join(DTYPES)}.")
  if jnp.dtype(w.dtype) != jnp.dtype(x.dtype):
    raise TypeError(
      f"{op}: x is {x.dtype}, {name} {w.dtype}; make them equal: x.astype({name}.dtype) or {name}.astype(x.dtype)."
    )
