"""Device code of the sampled product that Pallas has no words for: a ring in shared memory with barriers placed by hand.

Pallas lets every thread of a warpgroup signal a barrier for every copy; with copies as small as 64 rows of 32 columns that is
what the kernel would wait for. Here one thread signals once a step, and each warp issues some of the copies.
"""

import jax.numpy as jnp

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _plan

WARPS = 4  # of a warpgroup


def _scalar():
  return mg.plgpu.Layout.WG_SPLAT(())


def begin(stages: int, warpgroups: int):
  """`(full, empty)`: sets the barriers of a ring up; for all threads. Each is a ref `[2 * stages]`, int32."""
  ref = mg.plgpu.RefType()

  def run(_, full, empty):
    mg.init_barriers([(full, stages, 1), (empty, stages, warpgroups * WARPS)])

  return mg.plgpu.inline_mgpu(arg_types=(ref, ref))(run)


def warp_of_warpgroup():
  """Index of this thread's warp in its warpgroup, i32."""

  def run(_):
    return mg.splat(mg.arith.andi(mg.warp_index(), mg.const32(WARPS - 1)))

  return mg.plgpu.inline_mgpu(return_type=mg.plgpu.ShapeDtypeStruct((), jnp.int32, layout=_scalar()))(run)()


def wait():
  """`(barriers, slot, parity)`: waits for the end of a phase."""

  def run(_, barriers, slot, parity):
    mg.wait_barrier(mg.word_address(barriers, mg.word(slot), 8), mg.word(parity))

  return mg.plgpu.inline_mgpu(arg_types=(mg.plgpu.RefType(), _scalar(), _scalar()))(run)


def arrive():
  """`(barriers, slot)`: each warp signals that it has read what it needs."""

  def run(_, barriers, slot):
    mg.arrive_warps(mg.word_address(barriers, mg.word(slot), 8))

  return mg.plgpu.inline_mgpu(arg_types=(mg.plgpu.RefType(), _scalar()))(run)


def load_step(launch, step: int):
  """Issues the copies of a pipeline step, each warp those of its own slabs.

  Takes x, dy, the slot's part of x's and of dy's ring, the barriers, the slot, the first row, how many bytes come in all,
  this warp's slab of x (-1: none) with its column, and for each of its slabs of dy (every fourth) the column, or -1.
  """
  plgpu, row = mg.plgpu, launch.row
  ref, ring = plgpu.RefType(), plgpu.RefType(launch.row_transforms)
  own = launch.dy_groups * (_plan.SAMPLED_COLUMNS // row) // WARPS

  def run(ctx, x, dy, x_ring, dy_ring, barriers, slot, first, num_bytes, x_slab, x_column, *columns):
    warp = mg.arith.andi(mg.warp_index(), mg.const32(WARPS - 1))
    one = mg.elected()
    barrier = mg.barrier(barriers, mg.word(slot))
    leads = mg.arith.andi(one, mg.arith.cmpi(mg.arith.CmpIPredicate.eq, warp, mg.const32(0)))
    mg.expect_bytes(barrier, mg.word(num_bytes), leads)
    copies = [(x, x_ring, mg.word(x_slab), mg.word(x_column))]
    for i, column in enumerate(columns):
      copies.append((dy, dy_ring, mg.arith.addi(warp, mg.const32(i * WARPS)), mg.word(column)))
    for source, target, slab, column in copies:
      present = mg.arith.cmpi(mg.arith.CmpIPredicate.sge, column, mg.const32(0))
      with mg.when(mg.arith.andi(one, present)):
        mg.load_slab(ctx, source, (mg.word(first), step), (column, row), target, slab, barrier, 2 * row)

  scalars = [_scalar()] * (5 + own)
  return plgpu.inline_mgpu(arg_types=(ref, ref, ring, ring, ref, *scalars))(run)
