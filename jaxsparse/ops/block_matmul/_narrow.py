"""`x @ w` and `dy @ w.T` for blocks of 32 x 32 on Hopper's tensor cores, where there are many tiles.

x is what wgmma takes by rows here, and blocks are what it takes by columns, 32 at a time: nothing that is absent is
multiplied. A tile is 192 rows of x and 256 outputs, as much as registers hold: three warpgroups that multiply have 64
rows each, of all 8 block columns that share the tile. A fourth one walks over the union of the block
rows of these columns and loads each part of x once; columns are put together so that it is small (`_narrow_plan`).

What bounds it (runs with parts left out) is how fast the copy engine works through rows: about two clocks for one, be it 64 or
128 bytes, and 25 for a copy. So blocks come in rows of 128 bytes, two of their own; what the swizzle then exchanges, registers
put right (`_narrow_device`). Each of four warps loads the blocks of two columns: one alone was too slow. A step takes two
block rows as long as there is room for their blocks, and blocks lie in it one after the other, so that four steps fit.

What did not help: x in rows of 128 bytes where both block rows are there (loads take 0.92 of the time, but what reads such
rows is slower by more), blocks by the copies of ordinary threads (a quarter slower), single block rows to a step, five
steps of less room.

Blocks of threads persist and take their tiles from a counter, as in `_hopper`; lengths, positions and order are read from
memory: masks change without compiling. The copy engine fills what lies outside of x with zeros and drops what is stored
outside, so B may be ragged.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _narrow_body as body
from jaxsparse.ops.block_matmul import _narrow_plan

_WARPGROUPS = 3  # that multiply
TILE_B = _WARPGROUPS * body.ROWS  # rows of x to a tile
_LEAST_TILES = 2 * 132  # this kernel's are large; from 336 of them on, random patterns gained up to 36 %, least at 0.05
_REGISTERS = (32, 160)  # of a loading and of a multiplying thread


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the kernel cuts a product.

  Attributes:
    stages: pipeline steps in shared memory, 2 to 4.
    grid_width: tiles along B that are visited for all block columns before the next ones.

  Raises:
    ValueError: the kernel cannot do this.
  """

  stages: int = 4
  grid_width: int = 1

  def __post_init__(self):
    if self.stages not in (2, 3, 4) or self.grid_width < 1:
      raise ValueError(f"{self} needs 2, 3 or 4 stages and a positive grid_width.")


def pays(batch: int, outputs: int, block_shape: tuple[int, int], density: float) -> bool:
  """Whether this kernel is expected to be faster than that of `_hopper`."""
  if block_shape != (_narrow_plan.SIZE,) * 2 or density < _narrow_plan.PAYS_FROM:
    return False
  return -(-outputs // _narrow_plan.WIDTH) * -(-batch // TILE_B) >= _LEAST_TILES


def matmul(x, blocks, plan: _narrow_plan.NarrowPlan, outputs: int, *, transposed: bool, out_dtype, tuning, interpret):
  """`x @ w`, or `x @ w.T`; arguments as for `_hopper.block_matmul_hopper`.

  Args:
    x: `[B, K]` (`[B, O]` where transposed).
    blocks: `[capacity, 32, 32]`.
    plan: `_narrow_plan.make` for the blocks' positions.
    outputs: columns of the result.
    transposed: which product.
    out_dtype: of the result.
    tuning: a `Tuning`.
    interpret: a `_mosaic_gpu.Interpret`, or None.
  """
  # The interpreter's threads are those of the CPU: no more than needed.
  warpgroups, processors = (_WARPGROUPS, mg.sm_count()) if interpret is None else (2, 1)
  launch = body.Launch(
    stages=tuning.stages,
    grid_width=tuning.grid_width,
    batch=x.shape[0],
    lists=plan.order.shape[0],
    multiplying=warpgroups,
    processors=processors,
    capacity=blocks.shape[0],
    transposed=transposed,
    dtype=jnp.dtype(x.dtype),
    out_dtype=jnp.dtype(out_dtype),
    interpret=interpret,
  )
  counter = jax.new_ref(jnp.zeros((1,), jnp.int32))  # fresh zeros in every call
  lists = [jnp.asarray(a) for a in plan]
  return _build(launch, outputs)(x, blocks.reshape(-1, *launch.block_lines), *lists, counter)


def _build(launch: body.Launch, outputs: int) -> Any:
  def kernel(x, w, minor, present, slots, starts, order, units, counter, out, **smem):
    refs = dict(x=x, w=w, minor=minor, present=present, slots=slots, starts=starts, order=order, units=units)
    refs |= dict(counter=counter, out=out)
    work = body.Body(launch, refs, smem)
    registers = _REGISTERS if launch.interpret is None else None
    mg.split_roles(work.warpgroup, launch.multiplying, work.load_tiles, work.multiply_tiles, registers)

  return mg.plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((launch.batch, outputs), launch.out_dtype),
    grid=(launch.threads,),
    grid_names=("block",),
    num_threads=launch.multiplying + 1,
    thread_name="warpgroup",
    compiler_params=mg.COMPILER_PARAMS,
    scratch_types=launch.scratch(),
    interpret=launch.interpret,
    kernel_name="block_matmul_narrow_transposed" if launch.transposed else "block_matmul_narrow",
  )
