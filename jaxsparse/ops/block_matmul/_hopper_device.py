"""Device code of the block-sparse matmul that Pallas has no words for, each as a callable for a kernel body (`_hopper_body`)."""

import jax.numpy as jnp

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops import _mosaic_meeting as meeting
from jaxsparse.ops.nm_matmul import _hopper_device as nm_device

ROWS = 64  # outputs of a warpgroup: what one wgmma covers
_AT_ONCE = 12  # loads of four sums that a thread has in flight: beside the accumulator there are registers for so many


def fetch(cluster):
  """`(counter, place)`: one thread takes a number from a counter in device memory, for all shared memories of a cluster."""

  # Where nobody has to be told by the warp that issues copies, another one waits for the counter.
  thread = 0 if cluster > 1 else 32

  def take(_, counter, place):
    meeting.fetch_add(mg.global_address(counter), mg.shared_address(place), mg.is_thread(thread), cluster)

  return mg.plgpu.inline_mgpu(arg_types=(mg.plgpu.RefType(), mg.plgpu.RefType()))(take)


def synchronize():
  """`()`: all threads of the warpgroup meet."""
  return mg.plgpu.inline_mgpu()(lambda _: mg.warpgroup_barrier())


def product(tile_b, transposed, swizzle, transforms):
  """accumulator [64, tile_b] + (64 outputs of w) @ (a tile of x)^T."""
  plgpu = mg.plgpu
  WGMMA, ref = plgpu.Layout.WGMMA, plgpu.RefType(transforms)

  def multiply(_, accumulator, w_ref, x_ref):
    return mg.wgmma(accumulator, w_ref, x_ref, a_transposed=not transposed, b_transposed=True, swizzle=swizzle)

  return plgpu.inline_mgpu(
    arg_types=(WGMMA, ref, ref), return_type=plgpu.ShapeDtypeStruct((ROWS, tile_b), jnp.float32, layout=WGMMA)
  )(multiply)


def product_in_halves(tile_b, step, transposed, swizzle, transforms, dtype):
  """As `product` for two blocks of 32 outputs, of which one may be absent: `(accumulator, present, w, x)`."""
  plgpu = mg.plgpu
  WGMMA, ref, scalar = plgpu.Layout.WGMMA, plgpu.RefType(transforms), plgpu.Layout.WG_SPLAT(())

  def multiply(_, accumulator, halves, w_ref, x_ref):
    fragments = mg.halves_of_rows(w_ref, halves, step, dtype, transposed=not transposed, swizzle=swizzle)
    return mg.wgmma(accumulator, fragments, x_ref, a_transposed=None, b_transposed=True, swizzle=swizzle)

  run = plgpu.inline_mgpu(
    arg_types=(WGMMA, scalar, ref, ref),
    return_type=plgpu.ShapeDtypeStruct((ROWS, tile_b), jnp.float32, layout=WGMMA),
  )(multiply)

  def of_present(accumulator, present, w_ref, x_ref):
    halves = present[0].astype(jnp.int32) + 2 * present[1].astype(jnp.int32)
    return run(accumulator, halves, w_ref, x_ref)

  return of_present


def exchange(tile_b, split, transforms):
  """`(accumulator, inbox)`: adds up the accumulators of a cluster; member m gets slice m of `split` slices along B.

  The inbox is shared memory that nobody uses any more when both warpgroups of all members have come here.
  """
  plgpu = mg.plgpu
  share = tile_b // split
  fours = share // 8  # of a thread, 16 bytes each, in a slice
  bytes_of_share = fours * 16 * mg.WARPGROUP

  def meet(_, accumulator, inbox):
    warpgroup = mg.arith.divui(mg.thread_index(), mg.const32(mg.WARPGROUP))
    thread = mg.arith.remui(mg.thread_index(), mg.const32(mg.WARPGROUP))
    scaled = lambda a, factor: mg.arith.muli(a, mg.const32(factor))
    base = mg.arith.addi(mg.shared_address(inbox), scaled(warpgroup, split * bytes_of_share))
    base = mg.arith.addi(base, scaled(thread, 16))
    place = mg.arith.addi(base, scaled(meeting.cluster_rank(), bytes_of_share))
    meeting.cluster_barrier()  # from here on, nobody's tensor cores read what sums are sent to
    registers = list(accumulator.registers.flat)
    for member in range(split):
      mine = registers[member * 2 * fours : (member + 1) * 2 * fours]
      values = [mg.extract(register, i) for register in mine for i in range(2)]
      meeting.send_f32x4(place, member, values, 16 * mg.WARPGROUP)
    meeting.cluster_barrier()
    sums = None
    for sender in range(split):
      values = meeting.load_shared_f32x4(base, sender * bytes_of_share, fours, 16 * mg.WARPGROUP)
      sums = values if sums is None else [mg.arith.addf(a, b) for a, b in zip(sums, values, strict=True)]
    return mg.accumulator(sums, (ROWS, share))

  return plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(transforms)),
    return_type=plgpu.ShapeDtypeStruct((ROWS, share), jnp.float32, layout=plgpu.Layout.WGMMA),
  )(meet)


def interpreted_product(w, x, transposed, present):
  """The same on a CPU, from the same slabs."""
  w = w.transpose(1, 0, 2) if transposed else w.transpose(0, 2, 1)
  w = jnp.where(jnp.repeat(jnp.stack(present), ROWS // len(present))[:, None], w.reshape(ROWS, -1), 0)
  x = x.transpose(0, 2, 1)
  return jnp.dot(w, x.reshape(-1, x.shape[-1]), preferred_element_type=jnp.float32)


def comes_second():
  """`(flag, turn)` -> 1 if another part of a list was here since the flag became `turn`, which is waited for; else 0."""
  plgpu = mg.plgpu

  def come(_, flag, turn):
    second = meeting.comes_second(mg.global_address(flag), turn.registers.item())
    return turn.splat(second, (), turn.layout, is_signed=True)

  scalar = plgpu.Layout.WG_SPLAT(())
  return plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), scalar), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar)
  )(come)


def leave_sums():
  """`(accumulator, flag, sums)`: leaves sums in device memory, and signals."""
  plgpu = mg.plgpu

  def leave(_, accumulator, flag, sums):
    nm_device.write_sums(accumulator, sums)
    _signal(flag)

  return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.RefType()))(leave)


def add_sums(tile_b):
  """`(accumulator, flag, written, sums)`: waits until the flag is `written`, adds what lies in device memory, and signals."""
  plgpu = mg.plgpu

  def add(_, accumulator, flag, written, sums):
    meeting.await_signal(mg.global_address(flag), written.registers.item())
    accumulator = meeting.add_from_global(accumulator, nm_device.sums_address(sums), _AT_ONCE)
    _signal(flag)
    return accumulator

  return plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.Layout.WG_SPLAT(()), plgpu.RefType()),
    return_type=plgpu.ShapeDtypeStruct((ROWS, tile_b), jnp.float32, layout=plgpu.Layout.WGMMA),
  )(add)


def _signal(flag):
  mg.warpgroup_barrier()  # all threads have written, or read
  meeting.signal(mg.global_address(flag), mg.is_thread(0))
