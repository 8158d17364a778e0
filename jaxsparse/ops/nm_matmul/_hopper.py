"""y = act(x @ w + bias) on Hopper's sparse tensor cores, for weights packed as 2:4.

The sparse operand of `wgmma.sp` is always its A, so a block computes tiles of y^T = w^T x^T: rows of the accumulator
are outputs, columns are rows of x. The epilogue transposes on the way to shared memory (stmatrix .trans), so y leaves
row-major through the copy engine. One warpgroup loads, one to three multiply; blocks persist, and the loader runs into
the next tile while the others finish this one. The copy engine fills what lies outside an array with zeros and drops
what is stored outside, so B, O and K may be ragged.

What bounds it. The sparse instruction multiplies at twice the dense rate: 64 outputs x n rows of x x 32 of the
reduction take n / 2 clocks, and reading x's 64 n bytes from shared memory takes as many. Reading the stored values, and
the copy engine's writes of everything, come on top, so bytes through shared memory (128 a clock) decide, and tiles are
chosen for few of them (`tuning`). On an H100 the 256 x 200 tile needs 0.66 us for 64 of the reduction: its 161 KiB at
1.98 GHz. That is 1.3 PFLOP/s dense-equivalent, 1.6-1.65 times cuBLAS. More wgmma in flight would gain nothing; what is
left at smaller shapes is the last, part-filled wave of tiles. With few rows of x the kernel streams w from device
memory at 2.6-3.0 TB/s. `measured/` has the figures.

Both orders of w's values work; outputs-contiguous (wgmma reads A transposed) was 2-3 % faster at 8192^3 and 4096^3.
Metadata in its natural order was within 1 % of words arranged for the threads: a transposed ldmatrix hands them out.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse.ops import _dispatch
from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.nm_matmul import _hopper_device as device
from jaxsparse.ops.nm_matmul import tuning as tunings
from jaxsparse.ops.nm_matmul._hopper_device import INSTRUCTION_ROWS, ROW
from jaxsparse.ops.nm_matmul._hopper_layout import ALIGNMENT, CHUNK, SparseTensorCoreLayout

ACTIVATIONS = {
  None: lambda y: y,
  "relu": lambda y: jnp.maximum(y, 0),
  "gelu": lambda y: jax.nn.gelu(y, approximate=True),
  "silu": lambda y: y * jax.nn.sigmoid(y),
}
_IN_DTYPES = {jnp.dtype(jnp.bfloat16): "bf16", jnp.dtype(jnp.float16): "f16"}
_OUT_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32))
_LOADER_REGISTERS = 40
# Registers of a multiplying thread, by the number of multiplying warpgroups: what is left of 64 Ki beside the loader's.
_COMPUTE_REGISTERS = {1: 240, 2: 232, 3: 152}


def supports(x, layout: SparseTensorCoreLayout, *, bias=None, activation=None, out_dtype=None) -> str | None:
  """Why `nm_matmul_sparse_core` cannot run here, as a sentence; None if it can. Arguments as there (or their types)."""
  if (reason := mg.unavailable()) is not None:
    return reason
  if (reason := _bad_arguments(x, layout, bias, activation, out_dtype)) is not None:
    return reason
  target = _dispatch.current_target()
  if target.capability != (9, 0):
    return f"the sparse tensor-core kernel needs a Hopper GPU (compute capability 9.0), this is {target}."
  return None


def nm_matmul_sparse_core(
  x, layout: SparseTensorCoreLayout, *, bias=None, activation=None, out_dtype=None, tuning=None, interpret=None
):
  """act(x @ w + bias) with w packed for the sparse tensor cores; accumulates in float32.

  Args:
    x: `[B, K]`, bfloat16 or float16, B >= 1.
    layout: w `[K, O]`, packed; values of x's dtype.
    bias: None or `[O]`; added in float32.
    activation: None, "relu", "gelu" (tanh form) or "silu", applied in float32.
    out_dtype: bfloat16, float16 or float32; x's dtype by default.
    tuning: a `tuning.Tuning`; chosen from the shape by default, also where dense would win.
    interpret: a `_mosaic_gpu.Interpret` to run on a CPU with a dense MMA in place of the sparse one.

  Returns:
    `[B, O]`.

  Raises:
    NotImplementedError: this JAX cannot build the kernel.
    ValueError: shapes, dtypes, activation or tuning do not fit.
  """
  if (reason := mg.unavailable()) is not None:
    raise NotImplementedError(reason)
  if (reason := _bad_arguments(x, layout, bias, activation, out_dtype)) is not None:
    raise ValueError(reason)
  batch, reduction = x.shape
  outputs = layout.outputs
  out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
  if tuning is None:
    tuning = tunings.best_tuning(batch, reduction, outputs)
  if reduction % 8:  # rows of x must start at multiples of 16 bytes
    x = jnp.pad(x, ((0, 0), (0, -reduction % 8)))
  if tuning.split_k == 1 or _parts_meet(tuning, layout, batch, interpret):
    fused_bias = None if bias is None else _pad_bias(bias, tuning.tile_m)
    run = _build(tuning, layout, x, fused_bias, activation, out_dtype, interpret)
    y = run(x, layout.values, layout.metadata, *([] if fused_bias is None else [fused_bias]))
    return y[:, :outputs]
  run = _build(tuning, layout, x, None, None, jnp.dtype(jnp.float32), interpret)
  y = run(x, layout.values, layout.metadata).sum(0)[:, :outputs]  # parts in a fixed order: the same bits every time
  if bias is not None:
    y = y + bias.astype(jnp.float32)
  return ACTIVATIONS[activation](y).astype(out_dtype)


def _bad_arguments(x, layout, bias, activation, out_dtype) -> str | None:
  if x.ndim != 2 or x.shape[0] < 1:
    return f"x has shape {tuple(x.shape)}; the sparse tensor-core kernel takes [B, K] with B >= 1."
  if x.shape[1] != layout.reduction:
    return f"x has shape {tuple(x.shape)} and w {layout.shape}; x's last axis must be w's first."
  if jnp.dtype(x.dtype) not in _IN_DTYPES:
    return f"x is {x.dtype}; the sparse tensor-core kernel takes bfloat16 or float16."
  if jnp.dtype(layout.values.dtype) != jnp.dtype(x.dtype):
    return f"w's values are {layout.values.dtype} and x is {x.dtype}; they must be equal."
  if bias is not None and tuple(bias.shape) != (layout.outputs,):
    return f"bias has shape {tuple(bias.shape)}; it must be ({layout.outputs},), one per output."
  if activation not in ACTIVATIONS:
    return f"activation is {activation!r}; it must be one of {list(ACTIVATIONS)}."
  if out_dtype is not None and jnp.dtype(out_dtype) not in _OUT_DTYPES:
    return f"out_dtype is {jnp.dtype(out_dtype)}; it must be bfloat16, float16 or float32."
  return None


def _pad_bias(bias, tile_m):
  return jnp.pad(bias.astype(jnp.float32), (0, -bias.shape[0] % tile_m))


def _build(tuning, layout, x, bias, activation, out_dtype, interpret):
  """The kernel for these shapes: takes x, values, metadata[, bias], gives `[B, O]`, or `[split_k, B, O]` parts."""
  pl, plgpu = mg.pl, mg.plgpu
  t = tuning
  if out_dtype.itemsize == 4:  # the same shared memory for twice the bytes
    t = dataclasses.replace(t, epilogue_n=max(8, t.epilogue_n // 16 * 8))
  batch, reduction = x.shape
  # Rows of y must be multiples of 16 bytes for the copy engine; what is added is cut off outside.
  out_columns = layout.outputs + -layout.outputs % (16 // out_dtype.itemsize)
  in_name = _IN_DTYPES[jnp.dtype(x.dtype)]
  k_major = layout.reduction_contiguous

  warpgroups = t.compute_warpgroups
  wg_rows = t.tile_m // warpgroups
  wg_blocks = wg_rows // INSTRUCTION_ROWS
  m_tiles, n_tiles = pl.cdiv(layout.outputs, t.tile_m), pl.cdiv(batch, t.tile_n)
  k_steps = pl.cdiv(pl.cdiv(reduction, t.tile_k), t.split_k)  # of one part
  work = m_tiles * n_tiles * t.split_k
  blocks = min(work, mg.sm_count() if interpret is None else 2)
  meet = _parts_meet(t, layout, batch, interpret)
  ranges = _column_ranges(t) if meet else [(0, t.tile_n)]

  # In shared memory, x is tile_k / 64 stacks of 128-byte rows; the copy engine can then clip a ragged B.
  x_copies = t.tile_k // ROW
  # y leaves in slices of 64 outputs x at most epilogue_n rows, staged as rows of 128 bytes (two groups of them in f32).
  out_row = mg.SWIZZLE_BYTES // out_dtype.itemsize
  out_rows = INSTRUCTION_ROWS // out_row
  out_shape = (warpgroups, t.epilogue_slots, out_rows, t.epilogue_n, out_row)
  a_shape = (t.tile_m, t.tile_k // 2) if k_major else (t.tile_k // 2, t.tile_m)
  a_transforms = _a_transforms(t, k_major)
  row_transforms = (plgpu.SwizzleTransform(mg.SWIZZLE_BYTES),)
  metadata_transforms = (plgpu.TilingTransform((ALIGNMENT // CHUNK, CHUNK)),)
  WGMMA = plgpu.Layout.WGMMA

  def kernel(
    x_gmem, a_gmem, metadata_gmem, *more, x_smem, a_smem, metadata_smem, out_smem, full, empty, dense_smem=None
  ):
    *bias_gmem, out_gmem = more[:-1] if meet else more
    warpgroup = lax.axis_index("warpgroup")

    def position(info):
      tile, part = lax.div(info.index[0], jnp.int32(t.split_k)), lax.rem(info.index[0], jnp.int32(t.split_k))
      m, n = plgpu.planar_snake(tile, (m_tiles, n_tiles), t.grid_minor, t.grid_width)
      return part, m * t.tile_m, n * t.tile_n

    def slot_of(info, k):
      return lax.rem(info.local_index * k_steps + k, jnp.int32(t.stages))

    def load_tiles():
      @plgpu.nd_loop((work,), collective_axes="block")
      def _tile(info):
        part, m, n = position(info)

        def step(k, _):
          slot = slot_of(info, k)
          k_start = (part * k_steps + k) * t.tile_k
          stored = pl.ds(lax.div(k_start, jnp.int32(2)), t.tile_k // 2)
          plgpu.barrier_wait(empty.at[slot])
          for i in range(x_copies):
            source = x_gmem.at[pl.ds(n, t.tile_n), pl.ds(k_start + i * ROW, ROW)]
            plgpu.copy_gmem_to_smem(source, x_smem.at[slot, i], full.at[slot])
          outputs = pl.ds(m, t.tile_m)
          plgpu.copy_gmem_to_smem(
            a_gmem.at[outputs, stored] if k_major else a_gmem.at[stored, outputs], a_smem.at[slot], full.at[slot]
          )
          chunks = pl.ds(lax.div(k_start, jnp.int32(CHUNK)), t.tile_k // CHUNK)
          plgpu.copy_gmem_to_smem(metadata_gmem.at[chunks, outputs], metadata_smem.at[slot], full.at[slot])

        lax.fori_loop(0, k_steps, step, None)

      for slot in range(t.stages):  # nobody leaves while a barrier is still to be signalled
        plgpu.barrier_wait(empty.at[slot])

    def multiply_tiles():
      for slot in range(t.stages):  # every slot is free at first
        plgpu.barrier_arrive(empty.at[slot])

      @plgpu.nd_loop((work,), collective_axes="block")
      def _tile(info):
        part, m, n = position(info)

        def step(k, accumulator):
          slot = slot_of(info, k)
          plgpu.barrier_wait(full.at[slot])
          own = pl.ds(warpgroup * wg_rows, wg_rows)
          a_own = a_smem.at[slot, own] if k_major else a_smem.at[slot, :, own]
          if interpret is None:
            accumulator = sparse_step(accumulator, a_own, x_smem.at[slot], metadata_smem.at[slot])
          else:
            accumulator += dense_step(a_own, x_smem.at[slot], metadata_smem.at[slot])
          plgpu.barrier_arrive(empty.at[slot])
          return accumulator

        zeros = plgpu.layout_cast(jnp.zeros((wg_rows, t.tile_n), jnp.float32), WGMMA)
        accumulator = lax.fori_loop(0, k_steps, step, zeros)
        if meet:
          exchange(accumulator, info, part, lambda total, start: store(total, info, out_gmem, m, n + start))
        else:
          store(accumulator, info, out_gmem.at[part] if t.split_k > 1 else out_gmem, m, n)

      plgpu.wait_smem_to_gmem(0)

    def store(accumulator, info, target, m, n):
      """Epilogue: sums `[wg_rows, columns]` -> y[n : n + columns, this warpgroup's outputs]."""
      columns = accumulator.shape[1]
      chunks = [(start, min(t.epilogue_n, columns - start)) for start in range(0, columns, t.epilogue_n)]
      for block in range(wg_blocks):
        row = m + warpgroup * wg_rows + block * INSTRUCTION_ROWS
        rows = slice(block * INSTRUCTION_ROWS, (block + 1) * INSTRUCTION_ROWS)
        if bias_gmem:
          bias_rows = plgpu.load(bias_gmem[0].at[pl.ds(row, INSTRUCTION_ROWS)], layout=WGMMA.reduce(1), optimized=False)
        for chunk, (start, size) in enumerate(chunks):
          y = accumulator[rows, start : start + size]
          if bias_gmem:
            y += lax.broadcast_in_dim(bias_rows, y.shape, [0])
          y = ACTIVATIONS[activation](y).astype(out_dtype)
          # Slots go round over all tiles, so that the oldest store in flight is always the one of this slot.
          count = block * len(chunks) + chunk
          if wg_blocks * len(chunks) % t.epilogue_slots:
            count += info.local_index * (wg_blocks * len(chunks))
          slot = count % t.epilogue_slots
          staged = out_smem.at[warpgroup, slot, :, pl.ds(0, size)]
          plgpu.wait_smem_to_gmem(t.epilogue_slots - 1, wait_read_only=True)
          if interpret is None:
            store_transposed(y, staged)
          else:
            for i in range(out_rows):
              staged[i] = y[i * out_row : (i + 1) * out_row].T
          plgpu.commit_smem()
          for i in range(out_rows):
            plgpu.copy_smem_to_gmem(
              staged.at[i],
              target.at[pl.ds(n + start, size), pl.ds(row + i * out_row, out_row)],
              commit_group=i == out_rows - 1,
            )

    def exchange(accumulator, info, part, finish):
      """The blocks that hold the parts of a tile meet: block p adds up, and finishes, columns `ranges[p]`.

      All blocks run at once (`_parts_meet`), so that waiting ends. Parts are added in a fixed order.
      """
      sums_gmem = more[-1]
      tile = info.index[0] - part
      arrived = pl.get_global(plgpu.SemaphoreType.REGULAR((work * warpgroups,)))
      for p, (start, size) in enumerate(ranges):

        @pl.when(part != p)
        def _send(p=p, start=start, size=size):
          mailbox = sums_gmem.at[info.index[0], warpgroup, p, pl.ds(0, wg_rows * size)]
          device.send_sums((wg_rows, size))(accumulator[:, start : start + size], mailbox)
          plgpu.semaphore_signal(arrived.at[(tile + p) * warpgroups + warpgroup], memory_scope="gpu")

      for p, (start, size) in enumerate(ranges):

        @pl.when(part == p)
        def _receive(p=p, start=start, size=size):
          plgpu.semaphore_wait(arrived.at[(tile + p) * warpgroups + warpgroup], t.split_k - 1, memory_scope="gpu")
          total = None
          for q in range(t.split_k):
            if q == p:
              sums = accumulator[:, start : start + size]
            else:
              mailbox = sums_gmem.at[tile + q, warpgroup, p, pl.ds(0, wg_rows * size)]
              sums = device.receive_sums((wg_rows, size))(mailbox)
            total = sums if total is None else total + sums
          finish(total, start)

    def dense_step(a_own, x_tile, metadata_tile):
      """The interpreter knows no sparse MMA: unpack this warpgroup's rows, then an ordinary wgmma."""
      a = a_own[...]
      words = metadata_tile[:, pl.ds(warpgroup * wg_rows, wg_rows)].T
      dense_smem[warpgroup] = _decompress_rows(a if k_major else a.T, words)
      plgpu.commit_smem()
      total = jnp.zeros((wg_rows, t.tile_n), jnp.float32)
      for i in range(x_copies):

        def multiply(accumulator, i=i):
          columns = pl.ds(i * ROW, ROW)
          plgpu.wgmma(accumulator, dense_smem.at[warpgroup, :, columns], x_tile.at[i].transpose((1, 0)))
          return accumulator[...]

        total += pl.run_scoped(multiply, plgpu.ACC((wg_rows, t.tile_n), jnp.float32))
      return total

    sparse_step = device.sparse_step(t, in_name, k_major, a_transforms, row_transforms, metadata_transforms)
    store_transposed = device.store_transposed(t.epilogue_n, out_dtype, row_transforms)

    if interpret is None and warpgroups > 1:  # one multiplying warpgroup has all it wants without asking

      @pl.when(warpgroup == warpgroups)
      def _():
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        load_tiles()

      @pl.when(warpgroup < warpgroups)
      def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS[warpgroups], action="increase")
        multiply_tiles()
    else:
      pl.when(warpgroup == warpgroups)(load_tiles)
      pl.when(warpgroup < warpgroups)(multiply_tiles)

  scratch = dict(
    x_smem=plgpu.SMEM((t.stages, x_copies, t.tile_n, ROW), x.dtype, transforms=row_transforms),
    a_smem=plgpu.SMEM((t.stages, *a_shape), x.dtype, transforms=a_transforms),
    metadata_smem=plgpu.SMEM((t.stages, t.tile_k // CHUNK, t.tile_m), jnp.uint16, transforms=metadata_transforms),
    out_smem=plgpu.SMEM(out_shape, out_dtype, transforms=row_transforms),
    full=plgpu.Barrier(num_arrivals=x_copies + 2, num_barriers=t.stages),
    empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=t.stages),
  )
  if interpret is not None:
    scratch["dense_smem"] = plgpu.SMEM((warpgroups, wg_rows, t.tile_k), x.dtype)
  parts = (t.split_k,) if t.split_k > 1 and not meet else ()
  y = jax.ShapeDtypeStruct((*parts, batch, out_columns), out_dtype)
  largest = wg_rows * max(size for _, size in ranges)
  sums = jax.ShapeDtypeStruct((work, warpgroups, t.split_k, largest), jnp.float32)
  run = plgpu.kernel(
    kernel,
    out_type=(y, sums) if meet else y,
    grid=(blocks,),
    grid_names=("block",),
    num_threads=warpgroups + 1,
    thread_name="warpgroup",
    compiler_params=mg.COMPILER_PARAMS,
    scratch_types=scratch,
    interpret=interpret,
    kernel_name="nm_matmul_sparse_core",
  )
  return (lambda *args: run(*args)[0]) if meet else run


def _parts_meet(t, layout, batch, interpret) -> bool:
  """Whether the parts of a split reduction are added inside the kernel: all of its blocks must run at once."""
  work = -(-layout.outputs // t.tile_m) * -(-batch // t.tile_n) * t.split_k
  return t.split_k > 1 and t.tile_n >= 8 * t.split_k and interpret is None and work <= mg.sm_count()


def _column_ranges(t):
  """(start, size) of the columns of a tile that each of its parts finishes: multiples of 8, as equal as can be."""
  bounds = [t.tile_n // 8 * p // t.split_k * 8 for p in range(t.split_k + 1)]
  return [(start, stop - start) for start, stop in zip(bounds, bounds[1:])]


def _a_transforms(t, k_major):
  plgpu = mg.plgpu
  if k_major:  # rows of tile_k / 2 stored entries
    return (plgpu.SwizzleTransform(t.tile_k),)
  return (plgpu.TilingTransform((8, ROW)), plgpu.SwizzleTransform(mg.SWIZZLE_BYTES))


def _decompress_rows(values, words):
  """Rows of stored entries `[M, K / 2]` and their metadata `[M, K / 16]` uint16 -> dense rows `[M, K]`."""
  rows, stored = values.shape
  nibbles = (words[:, :, None] >> (jnp.arange(4, dtype=jnp.uint16) * 4)) & jnp.uint16(15)
  first, second = nibbles & jnp.uint16(3), nibbles >> jnp.uint16(2)
  positions = jnp.stack([first, second], -1).reshape(rows, stored // 2, 2)
  slots = positions[..., None] == jnp.arange(4, dtype=jnp.uint16)
  spread = jnp.where(slots, values.reshape(rows, stored // 2, 2, 1), jnp.zeros((), values.dtype))
  return spread.sum(2, dtype=values.dtype).reshape(rows, 2 * stored)
