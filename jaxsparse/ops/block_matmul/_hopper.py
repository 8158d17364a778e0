"""`x @ w` and `dy @ w.T` for block-sparse w on Hopper's tensor cores.

A block of threads computes tiles of the transposed result: 128 outputs x up to 256 rows of x, 64 outputs to each of two
multiplying warpgroups; a third warpgroup loads. So one block column of 128 fills the tile, and narrower ones share it: the
tile walks over the union of their rows and each part of x is loaded once. What loads of x through the L2 cache cost is the
bound of such blocks, so the plan puts block columns together that have rows in common. Absent blocks are neither loaded
nor multiplied: the copy engine is slower at writing zeros than at loading. Of two blocks of 32 that one instruction
covers, one may be absent; w then goes through registers, where the half of it is zeroed.

Blocks of threads persist and fetch their tiles from a counter: tiles that are long against what one of them has to do come
first, the rest in stripes along B, longest first, so that what runs at a time shares x in the L2 cache. Lengths, positions
and order are read from memory: masks change without compiling. The copy engine fills what lies outside of x with zeros
and drops what is stored outside, so B may be ragged.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse.arrays import _block_array
from jaxsparse.ops import _dispatch
from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _decode
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.block_matmul import tuning as tunings
from jaxsparse.ops.nm_matmul import _hopper_device as device

BLOCK_SIDES = (32, 64, 128, 256)
_IN_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_OUT_DTYPES = (*_IN_DTYPES, jnp.dtype(jnp.float32))
_WARPGROUPS = 2  # that multiply
_ROWS = 64  # outputs of a warpgroup: what one wgmma covers
_QUEUE = 2  # tiles that may have been fetched ahead
_LOADER_REGISTERS = 40
_COMPUTE_REGISTERS = 232


def supports(x, w: _block_array.BlockArray, *, transposed: bool = False, out_dtype=None) -> str | None:
  """Why `block_matmul_hopper` cannot run here, as a sentence; None if it can. Arguments as there (or their types)."""
  return unsupported(x, w, w.shape[1] if transposed else w.shape[0], out_dtype)


def unsupported(x, w, width, out_dtype) -> str | None:
  """As `supports`, for an operand `[B, width]`."""
  if (reason := mg.unavailable()) is not None:
    return reason
  if (reason := _bad_arguments(x, w, width, out_dtype)) is not None:
    return reason
  target = _dispatch.current_target()
  if target.capability != (9, 0):
    return f"the block-sparse kernel needs a Hopper GPU (compute capability 9.0), this is {target}."
  return None


def _bad_arguments(x, w, width, out_dtype) -> str | None:
  if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] != width:
    return f"x has shape {tuple(x.shape)}; the kernel takes [B, {width}] with B >= 1."
  if jnp.dtype(x.dtype) not in _IN_DTYPES:
    return f"x is {x.dtype}; the block-sparse kernel takes bfloat16 or float16."
  if jnp.dtype(w.dtype) != jnp.dtype(x.dtype):
    return f"w is {w.dtype} and x is {x.dtype}; they must be equal."
  if not all(side in BLOCK_SIDES for side in w.block_shape):
    return f"blocks are {w.block_shape[0]}x{w.block_shape[1]}; the kernel takes sides of 32, 64, 128 and 256."
  if out_dtype is not None and jnp.dtype(out_dtype) not in _OUT_DTYPES:
    return f"out_dtype is {jnp.dtype(out_dtype)}; it must be bfloat16, float16 or float32."
  return None


def block_matmul_hopper(
  x, w: _block_array.BlockArray, *, transposed: bool = False, out_dtype=None, tuning=None, interpret=None
):
  """`x @ w`, or `x @ w.T`; accumulates in float32.

  Args:
    x: `[B, K]` (`[B, O]` where transposed), bfloat16 or float16, B >= 1.
    w: `[K, O]`, blocks of x's dtype with sides of 32, 64, 128 or 256.
    transposed: which product.
    out_dtype: bfloat16, float16 or float32; x's dtype by default.
    tuning: a `tuning.Tuning`; chosen from the shape by default: then `x @ w` for at most 64 rows is `_decode`'s.
    interpret: a `_mosaic_gpu.Interpret` to run on a CPU with a plain dot in place of the tensor cores.

  Returns:
    `[B, O]` (`[B, K]` where transposed).

  Raises:
    NotImplementedError: this JAX cannot build the kernel.
    ValueError: shapes, dtypes or tuning do not fit.
  """
  if (reason := mg.unavailable()) is not None:
    raise NotImplementedError(reason)
  if (reason := _bad_arguments(x, w, w.shape[1] if transposed else w.shape[0], out_dtype)) is not None:
    raise ValueError(reason)
  out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
  plans = _plan.plans_of(w)
  if tuning is None and not transposed and x.shape[0] <= _decode.MAX_BATCH and plans.heads is not None:
    return _decode.block_matmul_decode(x, w, plans.heads, out_dtype=out_dtype, interpret=interpret)
  plan = plans.transposed if transposed else plans.forward
  outputs = w.shape[0] if transposed else w.shape[1]
  if tuning is None:
    tuning = tuning_for(x.shape[0], w, transposed)
  parts_dtype = out_dtype if tuning.split_k == 1 else jnp.dtype(jnp.float32)
  run, fetches = _build(tuning, x, w, outputs, transposed, parts_dtype, interpret)
  lists = [jnp.asarray(a) for a in (plan.minor, plan.slots, plan.starts, plan.order, plan.heavy, plan.units)]
  # From which blocks of threads take their tiles; a fresh zero in every call. Where each has one tile, nobody asks.
  counter = jax.new_ref(jnp.zeros((1,), jnp.int32)) if fetches else lists[0]
  y = run(x, w.blocks, *lists, counter)
  return y if tuning.split_k == 1 else y.sum(0).astype(out_dtype)  # parts in a fixed order: the same bits every time


def tuning_for(batch: int, w: _block_array.BlockArray, transposed: bool) -> tunings.Tuning:
  """The tiles that a product gets where none are named."""
  blocks = w.density * w.grid[1 if transposed else 0]  # of a tile where blocks are as wide
  depth, size = w.block_shape[::-1] if transposed else w.block_shape
  # Narrower blocks share a tile; at low density they share few rows.
  blocks *= min(max(1, tunings.TILE // size), 1 / max(w.density, 1e-9))
  outputs = w.shape[0] if transposed else w.shape[1]
  return tunings.best_tuning(batch, outputs, blocks, depth, size, w.density)


def _build(t, x, w, outputs, transposed, out_dtype, interpret):
  """The kernel for these shapes, and whether it takes tiles from a counter.

  The kernel takes x, blocks, a plan and the counter, and gives `[B, outputs]`, or `[split_k, B, outputs]` parts.
  """
  pl, plgpu = mg.pl, mg.plgpu
  batch = x.shape[0]
  capacity, bk, bo = w.blocks.shape
  depth, size = (bo, bk) if transposed else (bk, bo)  # of a block: along the sum, along the result
  if out_dtype.itemsize == 4:  # the same shared memory for twice the bytes
    t = dataclasses.replace(t, epilogue_n=max(8, t.epilogue_n // 16 * 8))

  shared, own = max(1, tunings.TILE // size), max(1, _ROWS // size)  # block columns of a list, of a warpgroup
  tiles_of_list = max(1, size // tunings.TILE)
  lists = -(-outputs // max(size, tunings.TILE))
  # Neighbours along B may form a cluster: what one loads of w all of them get. The interpreter knows no such copies.
  cluster = t.cluster if interpret is None else 1
  groups, across = lists * tiles_of_list, pl.cdiv(batch, t.tile_b * cluster)
  work = groups * across * t.split_k
  threads = min(work, mg.sm_count() // cluster if interpret is None else 2)  # clusters, or blocks of threads
  fetches = work > threads
  # The first tiles are handed out by index, but not all clusters may run at once.
  first_fetched = fetches and cluster > 1
  fetch_base = 0 if first_fetched else threads

  step = min(depth, 64)  # of the sum, to a pipeline step
  row = 64 if bk % 64 == 0 and bo % 64 == 0 else 32  # entries to a row of shared memory; equal for both operands
  swizzle = 2 * row
  piece = min(size, _ROWS)  # outputs that a copy of w brings where the sum is contiguous
  w_shape = (step // row, _ROWS, row) if transposed else (_ROWS // row, step, row)
  w_copies = step // row * (_ROWS // piece) if transposed else _ROWS // row
  x_copies = step // row
  out_row = mg.SWIZZLE_BYTES // out_dtype.itemsize
  out_rows = _ROWS // out_row
  chunks = [(start, min(t.epilogue_n, t.tile_b - start)) for start in range(0, t.tile_b, t.epilogue_n)]
  WGMMA = plgpu.Layout.WGMMA
  row_transforms = (plgpu.SwizzleTransform(swizzle),)
  out_transforms = (plgpu.SwizzleTransform(mg.SWIZZLE_BYTES),)

  def kernel(
    x_gmem, w_gmem, minor, slots, starts, order, heavy, units, counter, out_gmem,
    *, x_smem, w_smem, out_smem, queue, full, empty, fetched, taken,
  ):  # fmt: skip
    warpgroup = lax.axis_index("warpgroup")
    div, rem = lambda a, b: lax.div(a, jnp.int32(b)), lambda a, b: lax.rem(a, jnp.int32(b))

    def arrive(barrier):
      if cluster > 1:  # there, one thread signals for its warpgroup
        synchronize()
      plgpu.barrier_arrive(barrier)

    def tile_of(item):
      """(part of the list, list, tile of the list, first row of x, first entry, one past the last)."""
      part, item = div(item, groups * across), rem(item, groups * across)
      heavy_groups = heavy[_plan.heavy_level(across, threads)] * tiles_of_list
      light = item - heavy_groups * across
      is_heavy = light < 0
      # Stripes along B; those of the long lists are as wide as keeps everyone busy.
      many = jnp.maximum(jnp.where(is_heavy, heavy_groups, groups - heavy_groups), 1)
      width = jnp.where(is_heavy, lax.div(threads + many - 1, many), t.grid_width)
      width = jnp.minimum(width, across)
      index = jnp.where(is_heavy, item, light)
      stripe = lax.div(index, many * width)
      inside = index - stripe * many * width
      in_stripe = jnp.minimum(width, across - stripe * width)
      at = jnp.where(is_heavy, 0, heavy_groups) + lax.div(inside, in_stripe)
      b = stripe * width + lax.rem(inside, in_stripe)
      which = order[div(at, tiles_of_list)]
      first, length = starts[which], starts[which + 1] - starts[which]
      lo, hi = (first + div(length * p, t.split_k) for p in (part, part + 1))
      if cluster > 1:
        b = b * cluster + lax.axis_index("member")
      return part, which, rem(at, tiles_of_list), b * t.tile_b, lo, hi

    def tiles(body, following):
      """`body(i, tile, steps so far) -> steps so far` for the tiles of this block of threads."""

      def one(carry):
        i, item, count = carry
        publish, read = following(i, item)
        publish()
        count = body(i, tile_of(item), count)
        return i + 1, read(), count

      item = lax.axis_index("block")
      if not fetches:  # a tile for everybody: nothing to wait for
        return body(jnp.int32(0), tile_of(item), jnp.int32(0))
      start = jnp.int32(0)
      if first_fetched:
        publish, read = following(start, item)
        publish()
        start, item = start + 1, read()
      return lax.while_loop(lambda carry: carry[1] < work, one, (start, item, jnp.int32(0)))[2]

    def read_at(slot):
      plgpu.barrier_wait(fetched.at[slot])
      item = queue[slot] + fetch_base
      arrive(taken.at[slot])
      return item

    def load_tiles():
      if fetches:
        for slot in range(_QUEUE):
          arrive(taken.at[slot])

      def following(i, item):
        slot = rem(i, _QUEUE)

        def publish():
          plgpu.barrier_wait(taken.at[slot])
          if interpret is None:
            fetch(counter, queue.at[slot])
          else:
            queue[slot] = item + threads - fetch_base
          arrive(fetched.at[slot])

        return publish, lambda: read_at(slot)

      def tile(i, at, count):
        part, which, sub, b, lo, hi = at

        def entry(e, count):
          depth_start = minor[e] * depth
          slot_of = [slots[e * shared + j] for j in range(shared)]

          def load(barrier, source, target, j):
            axes = "member" if cluster > 1 else None
            copy = lambda: plgpu.copy_gmem_to_smem(source, target, barrier, collective_axes=axes)
            if shared == 1:
              return copy()
            pl.when(slot_of[j] < capacity)(copy)
            pl.when(slot_of[j] >= capacity)(lambda: plgpu.barrier_arrive(barrier))

          for k in range(0, depth, step):
            slot = rem(count, t.stages)
            plgpu.barrier_wait(empty.at[slot])
            for j in range(x_copies):
              source = x_gmem.at[pl.ds(b, t.tile_b), pl.ds(depth_start + k + j * row, row)]
              plgpu.copy_gmem_to_smem(source, x_smem.at[slot, j], full.at[slot])
            for wg in range(_WARPGROUPS):
              for output in range(0, _ROWS, piece if transposed else row):
                at = wg * _ROWS + output
                j = at // size if shared > 1 else 0
                block = w_gmem.at[slot_of[j]]
                at = at % size if shared > 1 else sub * tunings.TILE + at
                if not transposed:
                  source = block.at[pl.ds(k, step), pl.ds(at, row)]
                  load(full.at[slot], source, w_smem.at[slot, wg, output // row], j)
                  continue
                for r in range(step // row):
                  source = block.at[pl.ds(at, piece), pl.ds(k + r * row, row)]
                  load(full.at[slot], source, w_smem.at[slot, wg, r, pl.ds(output, piece)], j)
            count += 1
          return count

        return lax.fori_loop(lo, hi, entry, count)

      tiles(tile, following)
      for slot in range(t.stages):  # nobody leaves while a barrier is still to be signalled
        plgpu.barrier_wait(empty.at[slot])
      if fetches:
        for slot in range(_QUEUE):
          plgpu.barrier_wait(taken.at[slot])

    def multiply_tiles():
      for slot in range(t.stages):  # every slot is free at first
        arrive(empty.at[slot])
      if fetches:
        for slot in range(_QUEUE):
          arrive(taken.at[slot])

      def following(i, item):
        return lambda: None, lambda: read_at(rem(i, _QUEUE))

      def tile(i, at, count):
        part, which, sub, b, lo, hi = at

        def entry(e, carry):
          count, accumulator = carry
          if shared > 1:
            present = [slots[e * shared + warpgroup * own + j] < capacity for j in range(own)]
          for _ in range(0, depth, step):
            slot = rem(count, t.stages)
            plgpu.barrier_wait(full.at[slot])
            w_ref, x_ref = w_smem.at[slot, warpgroup], x_smem.at[slot]
            if shared == 1:
              accumulator = product(accumulator, w_ref, x_ref)
            else:
              multiply = lambda a, w_ref=w_ref, x_ref=x_ref: partial_product(a, present, w_ref, x_ref)
              accumulator = lax.cond(functools.reduce(jnp.logical_or, present), multiply, lambda a: a, accumulator)
            arrive(empty.at[slot])
            count += 1
          return count, accumulator

        zeros = plgpu.layout_cast(jnp.zeros((_ROWS, t.tile_b), jnp.float32), WGMMA)
        count, accumulator = lax.fori_loop(lo, hi, entry, (count, zeros))
        store(i, accumulator, out_gmem.at[part] if t.split_k > 1 else out_gmem, which, sub, b)
        return count

      tiles(tile, following)
      plgpu.wait_smem_to_gmem(0)

    def store(i, accumulator, target, which, sub, b):
      if shared > 1:
        first = units[which * _WARPGROUPS + warpgroup] * _ROWS
      else:
        first = (which * tiles_of_list + sub) * tunings.TILE + warpgroup * _ROWS
      for chunk, (start, length) in enumerate(chunks):
        y = accumulator[:, start : start + length].astype(out_dtype)
        # Slots go round over all tiles, so that the oldest store in flight is always the one of this slot.
        slot = rem(i * len(chunks) + chunk, t.epilogue_slots)
        staged = out_smem.at[warpgroup, slot, :, pl.ds(0, length)]
        plgpu.wait_smem_to_gmem(t.epilogue_slots - 1, wait_read_only=True)
        if interpret is None:
          store_transposed(y, staged)
        else:
          for j in range(out_rows):
            staged[j] = y[j * out_row : (j + 1) * out_row].T
        plgpu.commit_smem()
        for j in range(out_rows):
          plgpu.copy_smem_to_gmem(
            staged.at[j],
            target.at[pl.ds(b + start, length), pl.ds(first + j * out_row, out_row)],
            commit_group=j == out_rows - 1,
          )

    if interpret is None:
      fetch, synchronize = _fetch(cluster), plgpu.inline_mgpu()(lambda _: mg.warpgroup_barrier())
      if own > 1:
        partial_product = _product_in_halves(t.tile_b, step, transposed, swizzle, row_transforms, x.dtype)
      else:
        product = _product(t.tile_b, transposed, swizzle, row_transforms)
        partial_product = lambda accumulator, present, w_ref, x_ref: product(accumulator, w_ref, x_ref)
      store_transposed = device.store_transposed(t.epilogue_n, out_dtype, out_transforms)
    else:

      def product(accumulator, w_ref, x_ref):
        return partial_product(accumulator, [jnp.bool_(True)], w_ref, x_ref)

      def partial_product(accumulator, present, w_ref, x_ref):
        w, x = w_ref[...], x_ref[...]
        plgpu.commit_smem()  # these were ordinary loads, the copy engine writes next; the tensor cores need none
        return accumulator + _interpreted_product(w, x, transposed, present)

    registers = (_LOADER_REGISTERS, _COMPUTE_REGISTERS) if interpret is None else None
    mg.split_roles(warpgroup, _WARPGROUPS, load_tiles, multiply_tiles, registers)

  parts = (t.split_k,) if t.split_k > 1 else ()
  shared_barrier, clusters = plgpu.Barrier, {}
  if cluster > 1:
    shared_barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("member",))
    clusters = dict(cluster=(cluster,), cluster_names=("member",))
  run = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((*parts, batch, outputs), out_dtype),
    grid=(threads,),
    grid_names=("block",),
    **clusters,
    num_threads=_WARPGROUPS + 1,
    thread_name="warpgroup",
    compiler_params=mg.COMPILER_PARAMS,
    scratch_types=dict(
      x_smem=plgpu.SMEM((t.stages, x_copies, t.tile_b, row), x.dtype, transforms=row_transforms),
      w_smem=plgpu.SMEM((t.stages, _WARPGROUPS, *w_shape), x.dtype, transforms=row_transforms),
      out_smem=plgpu.SMEM(
        (_WARPGROUPS, t.epilogue_slots, out_rows, t.epilogue_n, out_row), out_dtype, transforms=out_transforms
      ),
      queue=plgpu.SMEM((_QUEUE,), jnp.int32),
      full=plgpu.Barrier(num_arrivals=x_copies + _WARPGROUPS * w_copies, num_barriers=t.stages),
      empty=shared_barrier(num_arrivals=_WARPGROUPS, num_barriers=t.stages),
      fetched=shared_barrier(num_arrivals=1, num_barriers=_QUEUE),
      taken=shared_barrier(num_arrivals=_WARPGROUPS + 1, num_barriers=_QUEUE),
    ),
    interpret=interpret,
    kernel_name="block_matmul_transposed" if transposed else "block_matmul",
  )
  return run, fetches


def _fetch(cluster):
  """`(counter, place)`: one thread takes a number from a counter in device memory, for all shared memories of a cluster."""

  # Where nobody has to be told by the warp that issues copies, another one waits for the counter.
  thread = 0 if cluster > 1 else 32

  def fetch(_, counter, place):
    in_warpgroup = mg.arith.andi(mg.thread_index(), mg.const32(mg.WARPGROUP - 1))
    first = mg.arith.cmpi(mg.arith.CmpIPredicate.eq, in_warpgroup, mg.const32(thread))
    mg.fetch_add(mg.global_address(counter), mg.shared_address(place), first, cluster)

  return mg.plgpu.inline_mgpu(arg_types=(mg.plgpu.RefType(), mg.plgpu.RefType()))(fetch)


def _product(tile_b, transposed, swizzle, transforms):
  """accumulator [64, tile_b] + (64 outputs of w) @ (a tile of x)^T."""
  plgpu = mg.plgpu
  WGMMA, ref = plgpu.Layout.WGMMA, plgpu.RefType(transforms)

  def product(_, accumulator, w_ref, x_ref):
    return mg.wgmma(accumulator, w_ref, x_ref, a_transposed=not transposed, b_transposed=True, swizzle=swizzle)

  return plgpu.inline_mgpu(
    arg_types=(WGMMA, ref, ref), return_type=plgpu.ShapeDtypeStruct((_ROWS, tile_b), jnp.float32, layout=WGMMA)
  )(product)


def _product_in_halves(tile_b, step, transposed, swizzle, transforms, dtype):
  """As `_product` for two blocks of 32 outputs, of which one may be absent: `(accumulator, present, w, x)`."""
  plgpu = mg.plgpu
  WGMMA, ref, scalar = plgpu.Layout.WGMMA, plgpu.RefType(transforms), plgpu.Layout.WG_SPLAT(())

  def product(_, accumulator, halves, w_ref, x_ref):
    fragments = mg.halves_of_rows(w_ref, halves, step, dtype, transposed=not transposed, swizzle=swizzle)
    return mg.wgmma(accumulator, fragments, x_ref, a_transposed=None, b_transposed=True, swizzle=swizzle)

  run = plgpu.inline_mgpu(
    arg_types=(WGMMA, scalar, ref, ref),
    return_type=plgpu.ShapeDtypeStruct((_ROWS, tile_b), jnp.float32, layout=WGMMA),
  )(product)

  def of_present(accumulator, present, w_ref, x_ref):
    halves = present[0].astype(jnp.int32) + 2 * present[1].astype(jnp.int32)
    return run(accumulator, halves, w_ref, x_ref)

  return of_present


def _interpreted_product(w, x, transposed, present):
  """The same on a CPU, from the same slabs."""
  w = w.transpose(1, 0, 2) if transposed else w.transpose(0, 2, 1)
  w = jnp.where(jnp.repeat(jnp.stack(present), _ROWS // len(present))[:, None], w.reshape(_ROWS, -1), 0)
  x = x.transpose(0, 2, 1)
  return jnp.dot(w, x.reshape(-1, x.shape[-1]), preferred_element_type=jnp.float32)
