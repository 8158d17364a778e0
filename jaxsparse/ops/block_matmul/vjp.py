"""The three products of a block-sparse layer, each with its derivatives.

With y = x @ w and the cotangent dy:

- `dx = dy @ w.T`, the transposed product: also block-sparse;
- the kept blocks get `dw = x.T @ dy`, sampled at their positions: nothing is computed elsewhere.

So the backward pass costs 2 * density of a dense one, and gradients and optimizer moments are as small as the blocks.
The derivatives of the transposed and of the sampled product are the same three products again. Positions and plans are
integers and have no gradient; slots without a block get 0.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.arrays import _block_array
from jaxsparse.ops import _shard_map
from jaxsparse.ops.block_matmul import reference as matmul_paths
from jaxsparse.ops.sampled_matmul import reference as sampled_paths

IMPLEMENTATIONS = ("reference", "xla", "dense", "hopper")


@dataclasses.dataclass(frozen=True)
class Call:
  """What is static in a call.

  Attributes:
    fwd, dx, dw: which of `IMPLEMENTATIONS` computes `x @ w`, `dy @ w.T` and `x.T @ dy` at the kept blocks.
    strict: whether a kernel must run, or may give way to XLA where the computation ends up on another device.
    out_dtype: of the result.
  """

  fwd: str
  dx: str
  dw: str
  strict: bool
  out_dtype: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def matmul(call: Call, transposed: bool, x: jax.Array, w: _block_array.BlockArray) -> jax.Array:
  """`[B, K] @ [K, O] -> [B, O]`, or `[B, O] @ [K, O].T -> [B, K]`."""
  implementation = call.dx if transposed else call.fwd
  if implementation == "hopper":
    return _on_gpu(_matmul_kernel(transposed, call.out_dtype), call)((x,), w)
  return getattr(matmul_paths, implementation)(x, w, transposed, call.out_dtype)


def _matmul_forward(call, transposed, x, w):
  return matmul(call, transposed, x, w), (x, w)


def _matmul_backward(call, transposed, residuals, dy):
  x, w = residuals
  dy = dy.astype(x.dtype)  # operands of x's dtype run on the tensor cores; sums are float32
  dx = matmul(dataclasses.replace(call, out_dtype=x.dtype), not transposed, dy, w)
  left, right = (dy, x) if transposed else (x, dy)
  dblocks = sampled(dataclasses.replace(call, out_dtype=w.blocks.dtype), left, right, w)
  return dx, _cotangent(w, dblocks)


matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sampled(call: Call, x: jax.Array, dy: jax.Array, at: _block_array.BlockArray) -> jax.Array:
  """`[B, K].T @ [B, O]` at the blocks of `at`: `[N, bk, bo]`."""
  if call.dw == "hopper":
    return _on_gpu(_sampled_kernel(call.out_dtype), call)((x, dy), at)
  return getattr(sampled_paths, call.dw)(x, dy, at, call.out_dtype)


def _sampled_forward(call, x, dy, at):
  return sampled(call, x, dy, at), (x, dy, at)


def _sampled_backward(call, residuals, g):
  x, dy, at = residuals
  call = dataclasses.replace(call, out_dtype=x.dtype)
  # The cotangent is itself block-sparse, at the same positions.
  w = with_blocks(at, g.astype(x.dtype))
  return matmul(call, True, dy, w), matmul(call, False, x, w), _cotangent(at, jnp.zeros_like(at.blocks))


sampled.defvjp(_sampled_forward, _sampled_backward)


def with_blocks(at: _block_array.BlockArray, blocks: jax.Array) -> _block_array.BlockArray:
  """Other values at the same positions, unchecked."""
  leaves, treedef = jax.tree.flatten(at)
  return treedef.unflatten([blocks, *leaves[1:]])


def _cotangent(w, dblocks):
  leaves, treedef = jax.tree.flatten(w)
  return treedef.unflatten([dblocks, *(np.zeros(leaf.shape, jax.dtypes.float0) for leaf in leaves[1:])])


@functools.cache
def _matmul_kernel(transposed, dtype):
  """(kernel, what runs where there is no GPU, fold): see `_on_gpu`."""

  def kernel(operands, w):
    from jaxsparse.ops.block_matmul import _hopper

    return _hopper.block_matmul_hopper(*operands, w, transposed=transposed, out_dtype=dtype)

  return kernel, lambda operands, w: matmul_paths.xla(*operands, w, transposed, dtype), True


@functools.cache
def _sampled_kernel(dtype):
  def kernel(operands, at):
    from jaxsparse.ops.sampled_matmul import _hopper

    return _hopper.sampled_matmul_hopper(*operands, at, out_dtype=dtype)

  return kernel, lambda operands, at: sampled_paths.xla(*operands, at, dtype), False


def _on_gpu(paths, call: Call):
  """A kernel as a function of (operands, weight); vmap over x alone is folded into its rows, other vmaps are loops."""
  kernel, elsewhere, fold = paths

  def on_gpu(operands, w):
    if axes := _shard_map.varying((operands, w)):
      raise NotImplementedError(
        f"Operands vary over the mesh axes {sorted(axes)}, which Pallas cannot follow into the kernels of block-sparse "
        "products. Give jax.shard_map(..., check_vma=False), or name an implementation: 'xla' or 'dense'."
      )
    return kernel(operands, w)

  @jax.custom_batching.custom_vmap
  def run(operands, w):
    if call.strict:
      return on_gpu(operands, w)
    return jax.lax.platform_dependent(operands, w, cuda=on_gpu, default=elsewhere)

  @run.def_vmap
  def batched(size, in_batched, operands, w):
    if fold and in_batched[0][0] and not any(jax.tree.leaves(in_batched[1])):
      (x,) = operands
      y = run((x.reshape(size * x.shape[1], x.shape[2]),), w)
      return y.reshape(size, x.shape[1], -1), True
    spread = lambda a, b: a if b else jnp.broadcast_to(a, (size, *a.shape))
    args = jax.tree.map(spread, (operands, w), tuple(in_batched))
    return jax.lax.map(lambda a: run(*a), args), True

  return run
