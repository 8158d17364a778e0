"""`x.T @ dy` at the kept blocks of a weight on Hopper's tensor cores.

A tile holds 128 columns of x, 64 to each of two multiplying warpgroups, by 256 columns of dy, gathered from the block
columns where blocks are kept. Block rows lower than 128 share a tile, in the lists of the transposed product: they walk
over the union of their columns, so that columns of dy are loaded once for all of them; what is computed where blocks are
absent is not stored. The sum runs over the rows of x and dy, 64 to a pipeline step.

A third warpgroup loads, blocks of threads persist; how many tiles there are is read from memory. They come in stripes of
columns, so that what runs at a time needs as few columns of x and dy as possible.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse.arrays import _block_array
from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _hopper as block_hopper
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.sampled_matmul import tuning as tunings

_WARPGROUPS = 2  # that multiply
_ROWS = 64  # of w for one wgmma, and so for each warpgroup
_STEP = 64  # rows of x and dy to a pipeline step
_LOADER_REGISTERS = 40
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
  out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
  plans = _plan.plans_of(at)
  plan = plans.transposed
  if tuning is None:
    items = -(-at.capacity // (_plan.sampled_entries(at.block_shape[1]) * max(1, _plan.TILE // at.block_shape[0])))
    tuning = tunings.best_tuning(x.shape[0], items, at.blocks.size)
  parts_dtype = out_dtype if tuning.split_b == 1 else jnp.dtype(jnp.float32)
  run = _build(tuning, x, at, plans.items.shape[0], parts_dtype, interpret)
  lists = (plan.minor, plan.slots, plan.starts, plan.units, plans.items.reshape(-1), plans.num_items)
  out = run(x, dy, *(jnp.asarray(a) for a in lists))
  out = out if tuning.split_b == 1 else out.sum(0).astype(out_dtype)
  if at.static and at.count == at.capacity:
    return out
  return jnp.where((jnp.asarray(at.cols) < at.grid[1])[:, None, None], out, 0)


def _build(t, x, at, items, out_dtype, interpret):
  """The kernel for these shapes: takes x, dy and a plan, gives `[N, bk, bo]`, or `[split_b, N, bk, bo]` parts."""
  pl, plgpu = mg.pl, mg.plgpu
  batch = x.shape[0]
  capacity, (bk, bo), (_, block_cols) = at.capacity, at.block_shape, at.grid
  columns = _plan.SAMPLED_COLUMNS
  shared, tiles_of_list = max(1, _plan.TILE // bk), max(1, bk // _plan.TILE)
  threads = min(items * tiles_of_list * t.split_b, mg.sm_count() if interpret is None else 2)  # blocks of threads
  steps = pl.cdiv(batch, _STEP)
  row = 64 if bk % 64 == 0 and bo % 64 == 0 else 32  # entries to a row of shared memory; equal for both operands
  swizzle = 2 * row
  slabs = columns // row
  out_columns = min(bo, mg.SWIZZLE_BYTES // out_dtype.itemsize)
  out_piece = min(bk, _ROWS)
  # The interpreter knows no empty groups of stores, which are what a block that is absent leaves.
  in_flight = t.epilogue_slots - 1 if interpret is None else 0
  WGMMA = plgpu.Layout.WGMMA
  row_transforms = (plgpu.SwizzleTransform(swizzle),)
  out_transforms = (
    plgpu.TilingTransform((8, out_columns)),
    plgpu.SwizzleTransform(out_columns * out_dtype.itemsize),
  )

  def kernel(
    x_gmem, dy_gmem, minor, slots, starts, units, items, num_items, out_gmem, *, x_smem, dy_smem, out_smem, full, empty
  ):
    warpgroup = lax.axis_index("warpgroup")
    div, rem = lambda a, b: lax.div(a, jnp.int32(b)), lambda a, b: lax.rem(a, jnp.int32(b))

    def tiles(body):
      """`body(i, part, list, tile of the list, first entry, steps so far) -> steps so far`."""
      block = lax.axis_index("block")
      in_part = num_items[0] * tiles_of_list

      def one(i, count):
        item = i * threads + block
        part = lax.div(item, in_part)
        item -= part * in_part
        at_item = div(item, tiles_of_list)
        return body(i, part, items[2 * at_item], rem(item, tiles_of_list), items[2 * at_item + 1], count)

      trips = div(jnp.maximum(in_part * t.split_b - block + threads - 1, 0), threads)
      return lax.fori_loop(0, trips, one, jnp.int32(0))

    def steps_of(part):
      return (div(steps * p, t.split_b) for p in (part, part + 1))

    def load_tiles():
      def tile(i, part, which, sub, begin, count):
        end = starts[which + 1]
        if shared > 1:
          x_starts = [units[which * _WARPGROUPS + j] * _ROWS for j in range(_WARPGROUPS)]
        else:
          x_starts = [which * bk + sub * _plan.TILE + j * _ROWS for j in range(_WARPGROUPS)]
        # Past the end of a list: one column past the array, which reads as zeros.
        entries = [begin + j for j in range(_plan.sampled_entries(bo))]
        cols = [jnp.where(e < end, minor[jnp.minimum(e, capacity - 1)], block_cols) for e in entries]

        def step(s, count):
          slot = rem(count, t.stages)
          rows = pl.ds(s * _STEP, _STEP)
          plgpu.barrier_wait(empty.at[slot])
          for j in range(_WARPGROUPS):
            for k in range(_ROWS // row):
              source = x_gmem.at[rows, pl.ds(x_starts[j] + k * row, row)]
              plgpu.copy_gmem_to_smem(source, x_smem.at[slot, j, k], full.at[slot])
          for j in range(slabs):
            source = dy_gmem.at[rows, pl.ds(cols[j * row // bo] * bo + j * row % bo, row)]
            plgpu.copy_gmem_to_smem(source, dy_smem.at[slot, j], full.at[slot])
          return count + 1

        return lax.fori_loop(*steps_of(part), step, count)

      tiles(tile)
      for slot in range(t.stages):  # nobody leaves while a barrier is still to be signalled
        plgpu.barrier_wait(empty.at[slot])

    def multiply_tiles():
      for slot in range(t.stages):  # every slot is free at first
        plgpu.barrier_arrive(empty.at[slot])

      def tile(i, part, which, sub, begin, count):
        def step(s, carry):
          count, accumulator = carry
          slot = rem(count, t.stages)
          plgpu.barrier_wait(full.at[slot])
          accumulator = product(accumulator, x_smem.at[slot, warpgroup], dy_smem.at[slot])
          plgpu.barrier_arrive(empty.at[slot])
          return count + 1, accumulator

        zeros = plgpu.layout_cast(jnp.zeros((_ROWS, columns), jnp.float32), WGMMA)
        count, accumulator = lax.fori_loop(*steps_of(part), step, (count, zeros))
        store(i, accumulator, out_gmem.at[part] if t.split_b > 1 else out_gmem, which, sub, begin)
        return count

      tiles(tile)
      plgpu.wait_smem_to_gmem(0)

    def store(i, accumulator, target, which, sub, begin):
      end = starts[which + 1]
      chunks = columns // out_columns
      first_row = 0 if shared > 1 else sub * _plan.TILE + warpgroup * _ROWS
      for chunk in range(chunks):
        column = chunk * out_columns
        entry = begin + column // bo
        slot = rem(i * chunks + chunk, t.epilogue_slots)
        staged = out_smem.at[warpgroup, slot]
        plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
        staged[...] = accumulator[:, chunk * out_columns : (chunk + 1) * out_columns].astype(out_dtype)
        plgpu.commit_smem()
        for r in range(0, _ROWS, out_piece):
          place = warpgroup * (_ROWS // bk) + r // out_piece if shared > 1 else 0
          own = slots[jnp.minimum(entry, capacity - 1) * shared + place]

          @pl.when((entry < end) & (own < capacity))
          def _(r=r, own=own):
            block = target.at[own, pl.ds(first_row, out_piece), pl.ds(column % bo, out_columns)]
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(r, out_piece)], block, commit_group=False)

        plgpu.commit_smem_to_gmem_group()

    if interpret is None:
      product = _product(swizzle, row_transforms)
    else:

      def product(accumulator, x_ref, dy_ref):
        a, b = x_ref[...].transpose(0, 2, 1), dy_ref[...].transpose(1, 0, 2)
        plgpu.commit_smem()  # these were ordinary loads, the copy engine writes next; the tensor cores need none
        a, b = a.reshape(_ROWS, _STEP), b.reshape(_STEP, columns)
        return accumulator + jnp.dot(a, b, preferred_element_type=jnp.float32)

    registers = (_LOADER_REGISTERS, _COMPUTE_REGISTERS) if interpret is None else None
    mg.split_roles(warpgroup, _WARPGROUPS, load_tiles, multiply_tiles, registers)

  parts = (t.split_b,) if t.split_b > 1 else ()
  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((*parts, capacity, bk, bo), out_dtype),
    grid=(threads,),
    grid_names=("block",),
    num_threads=_WARPGROUPS + 1,
    thread_name="warpgroup",
    compiler_params=mg.COMPILER_PARAMS,
    scratch_types=dict(
      x_smem=plgpu.SMEM((t.stages, _WARPGROUPS, _ROWS // row, _STEP, row), x.dtype, transforms=row_transforms),
      dy_smem=plgpu.SMEM((t.stages, slabs, _STEP, row), x.dtype, transforms=row_transforms),
      out_smem=plgpu.SMEM((_WARPGROUPS, t.epilogue_slots, _ROWS, out_columns), out_dtype, transforms=out_transforms),
      full=plgpu.Barrier(num_arrivals=_WARPGROUPS * (_ROWS // row) + slabs, num_barriers=t.stages),
      empty=plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=t.stages),
    ),
    interpret=interpret,
    kernel_name="sampled_matmul",
  )


def _product(swizzle, transforms):
  """accumulator [64, 256] + (64 columns of x)^T @ (gathered columns of dy), over 64 rows."""
  plgpu = mg.plgpu
  WGMMA, ref = plgpu.Layout.WGMMA, plgpu.RefType(transforms)

  def product(_, accumulator, x_ref, dy_ref):
    return mg.wgmma(accumulator, x_ref, dy_ref, a_transposed=True, b_transposed=False, swizzle=swizzle)

  return plgpu.inline_mgpu(
    arg_types=(WGMMA, ref, ref),
    return_type=plgpu.ShapeDtypeStruct((_ROWS, _plan.SAMPLED_COLUMNS), jnp.float32, layout=WGMMA),
  )(product)
