"""`x.T @ dy` at the kept blocks of a weight on Hopper's tensor cores.

Two warpgroups multiply, each 64 columns of x by 256 columns of dy, gathered from the block columns where blocks are kept. At
higher densities, and for blocks of 128, they share the columns of dy: a tile is 128 x 256, and block rows lower than
128 walk over the union of their columns, in the lists of the transposed product. At low density such rows have few columns in
common; then the tile is flat, 64 x 512: the warpgroups share x, and each has columns of its own. What is computed where
blocks are absent is not stored, and absent columns are not loaded.

A third warpgroup loads, blocks of threads persist; how many tiles there are is read from memory. They come in stripes of
columns, so that what runs at a time needs as few columns of x and dy as possible, and all blocks walk down the rows
side by side: what one loads from memory the others find in the L2 cache. The last tiles, too few for all blocks, are cut
along the rows; the blocks of a group exchange their parts through memory, and each adds up some columns, in a fixed order.
"""

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _block_array
from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _hopper as block_hopper
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.sampled_matmul import _hopper_body as body
from jaxsparse.ops.sampled_matmul import _hopper_launch as launches
from jaxsparse.ops.sampled_matmul import tuning as tunings

_INTERPRETED_THREADS = 3  # blocks of threads that one plays
_LOADER_REGISTERS = 40  # three warpgroups start with 168: what some give up the others may have, and no more
_COMPUTE_REGISTERS = 232


def supports(x, dy, at: _block_array.BlockArray, *, out_dtype=None) -> str | None:
  """Why `sampled_matmul_hopper` cannot run here, as a sentence; None if it can. Arguments as there (or their types)."""
  return block_hopper.unsupported(x, at, at.shape[0], out_dtype) or _bad_cotangent(x, dy, at)


def _bad_cotangent(x, dy, at) -> str | None:
  if tuple(dy.shape) != (x.shape[0], at.shape[1]) or dy.dtype != x.dtype:
    return f"dy is {dy.dtype}{list(dy.shape)}; the kernel takes {x.dtype}[{x.shape[0]}, {at.shape[1]}], of x's dtype."
  return None


def sampled_matmul_hopper(x, dy, at: _block_array.BlockArray, *, out_dtype=None, tuning=None, interpret=None):
  """Blocks of `x.T @ dy` where `at` keeps them; accumulates in float32.

  Args:
    x: `[B, K]`, bfloat16 or float16, B >= 1.
    dy: `[B, O]`, of x's dtype.
    at: positions in `[K, O]`, blocks with sides of 32, 64, 128 or 256; their values are not read.
    out_dtype: bfloat16, float16 or float32; x's dtype by default.
    tuning: a `tuning.Tuning`; chosen from the shape by default.
    interpret: a `_mosaic_gpu.Interpret` to run on a CPU with a plain dot in place of the tensor cores.

  Returns:
    `[N, bk, bo]`; 0 in slots without a block.

  Raises:
    NotImplementedError: this JAX cannot build the kernel.
    ValueError: shapes or dtypes do not fit.
  """
  if (reason := mg.unavailable()) is not None:
    raise NotImplementedError(reason)
  reason = block_hopper._bad_arguments(x, at, at.shape[0], out_dtype) or _bad_cotangent(x, dy, at)
  if reason is not None:
    raise ValueError(reason)
  launch = _launch(x, at, tuning or tunings.Tuning(), out_dtype, interpret)
  plan = _plan.plans_of(at).sampled
  lists = (plan.minor, plan.slots, plan.units, plan.items.reshape(-1), plan.empty, plan.counts)
  return _build(launch)(x, dy, *(jnp.asarray(a) for a in lists))


def _launch(x, at, tuning, out_dtype, interpret) -> launches.Launch:
  bk, bo = at.block_shape
  return launches.Launch(
    t=tuning,
    batch=x.shape[0],
    capacity=at.capacity,
    bk=bk,
    bo=bo,
    block_cols=at.grid[1],
    height=_plan.sampled_height(at.grid, at.block_shape, at.density),
    dtype=jnp.dtype(x.dtype),
    out_dtype=jnp.dtype(x.dtype if out_dtype is None else out_dtype),
    threads=mg.sm_count() if interpret is None else _INTERPRETED_THREADS,
    interpret=interpret,
  )


def _build(launch):
  """The kernel of a launch: takes x, dy and a plan, gives `[N, bk, bo]`."""
  plgpu = mg.plgpu

  def kernel(*refs, **scratch):
    names = ("x", "dy", "minor", "slots", "units", "items", "empty", "counts", "out", "sums")
    parts = body.Body(launch, dict(zip(names, refs, strict=True)), scratch)
    registers = (_LOADER_REGISTERS, _COMPUTE_REGISTERS) if launch.interpret is None else None
    mg.split_roles(parts.warpgroup, launches.WARPGROUPS, parts.load, parts.multiply, registers)

  out = jax.ShapeDtypeStruct((launch.capacity, launch.bk, launch.bo), launch.out_dtype)
  run = plgpu.kernel(
    kernel,
    out_type=(out, launch.mailboxes()),
    grid=(launch.threads if launch.interpret is None else 1,),
    grid_names=("block",),
    num_threads=launches.WARPGROUPS + 1,
    thread_name="warpgroup",
    compiler_params=mg.COMPILER_PARAMS,
    scratch_types=launch.scratch(),
    interpret=launch.interpret,
    kernel_name="sampled_matmul",
  )
  return lambda *args: run(*args)[0]
