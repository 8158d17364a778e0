"""What the warpgroups of the sparse tensor-core kernel do: bring tiles in, multiply, meet, store (`_hopper` says why).

One warpgroup runs `Body.load_tiles`, the others `Body.multiply_tiles`; both walk the same tiles and hand slots of a ring in
shared memory to each other.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.nm_matmul import _hopper_device as device
from jaxsparse.ops.nm_matmul import tuning as tunings
from jaxsparse.ops.nm_matmul._hopper_device import INSTRUCTION_ROWS, ROW
from jaxsparse.ops.nm_matmul._hopper_layout import ALIGNMENT, CHUNK

_NAMES = {"bfloat16": "bf16", "float16": "f16"}  # of dtypes in instructions


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything static about one launch.

  Attributes:
    t: how the product is cut.
    batch, reduction, outputs: its shape.
    k_major: whether the reduction runs fastest in the stored values.
    dtype, out_dtype: of x and y.
    activation: applied to float32 sums.
    meet: whether the parts of a split reduction are added inside the kernel.
    interpret: an `Interpret`, or None.
  """

  t: tunings.Tuning
  batch: int
  reduction: int
  outputs: int
  k_major: bool
  dtype: Any
  out_dtype: Any
  activation: Callable[[Any], Any]
  meet: bool
  interpret: Any

  @property
  def warpgroups(self) -> int:
    return self.t.compute_warpgroups

  @property
  def wg_rows(self) -> int:
    """Outputs of a warpgroup."""
    return self.t.tile_m // self.warpgroups

  @property
  def tiles(self) -> tuple[int, int]:
    """Along outputs and along rows of x."""
    return -(-self.outputs // self.t.tile_m), -(-self.batch // self.t.tile_n)

  @property
  def k_steps(self) -> int:
    """Pipeline steps of one part of the reduction."""
    return -(-(-(-self.reduction // self.t.tile_k)) // self.t.split_k)

  @property
  def work(self) -> int:
    """Tiles times parts."""
    return self.tiles[0] * self.tiles[1] * self.t.split_k

  @property
  def ranges(self) -> list[tuple[int, int]]:
    """(start, size) of the columns of a tile that each of its parts finishes: multiples of 8, as equal as can be."""
    if not self.meet:
      return [(0, self.t.tile_n)]
    bounds = [self.t.tile_n // 8 * p // self.t.split_k * 8 for p in range(self.t.split_k + 1)]
    return [(start, stop - start) for start, stop in zip(bounds, bounds[1:])]

  @property
  def x_copies(self) -> int:
    """In shared memory, x is tile_k / 64 stacks of 128-byte rows; the copy engine can then clip a ragged B."""
    return self.t.tile_k // ROW

  @property
  def out_row(self) -> int:
    """y leaves in slices of 64 outputs x at most epilogue_n rows, staged as rows of 128 bytes (two groups of them in f32)."""
    return mg.SWIZZLE_BYTES // self.out_dtype.itemsize

  @property
  def out_rows(self) -> int:
    return INSTRUCTION_ROWS // self.out_row

  @property
  def values_transforms(self):
    plgpu = mg.plgpu
    if self.k_major:  # rows of tile_k / 2 stored entries
      return (plgpu.SwizzleTransform(self.t.tile_k),)
    return (plgpu.TilingTransform((8, ROW)), plgpu.SwizzleTransform(mg.SWIZZLE_BYTES))

  @property
  def row_transforms(self):
    return (mg.plgpu.SwizzleTransform(mg.SWIZZLE_BYTES),)

  @property
  def metadata_transforms(self):
    return (mg.plgpu.TilingTransform((ALIGNMENT // CHUNK, CHUNK)),)

  def scratch(self) -> dict[str, Any]:
    """Shared memory and barriers of a block."""
    plgpu, t = mg.plgpu, self.t
    values = (t.tile_m, t.tile_k // 2) if self.k_major else (t.tile_k // 2, t.tile_m)
    out = (self.warpgroups, t.epilogue_slots, self.out_rows, t.epilogue_n, self.out_row)
    metadata = (t.stages, t.tile_k // CHUNK, t.tile_m)
    scratch = dict(
      x_smem=plgpu.SMEM((t.stages, self.x_copies, t.tile_n, ROW), self.dtype, transforms=self.row_transforms),
      a_smem=plgpu.SMEM((t.stages, *values), self.dtype, transforms=self.values_transforms),
      metadata_smem=plgpu.SMEM(metadata, jnp.uint16, transforms=self.metadata_transforms),
      out_smem=plgpu.SMEM(out, self.out_dtype, transforms=self.row_transforms),
      full=plgpu.Barrier(num_arrivals=self.x_copies + 2, num_barriers=t.stages),
      empty=plgpu.Barrier(num_arrivals=self.warpgroups, num_barriers=t.stages),
    )
    if self.interpret is not None:
      scratch["dense_smem"] = plgpu.SMEM((self.warpgroups, self.wg_rows, t.tile_k), self.dtype)
    return scratch


class Body:
  """The kernel's body, while it is traced.

  Args:
    plan: what is static.
    refs: x, values, metadata, bias (a list of none or one), out and sums in device memory.
    scratch: what `Plan.scratch` asked for.
  """

  def __init__(self, plan: Plan, refs: dict[str, Any], scratch: dict[str, Any]):
    self.plan, self.t, self.refs, self.smem = plan, plan.t, refs, scratch
    self.full, self.empty = scratch["full"], scratch["empty"]
    self.warpgroup = lax.axis_index("warpgroup")
    transforms = plan.values_transforms, plan.row_transforms, plan.metadata_transforms
    self.sparse_step = device.sparse_step(plan.t, _NAMES[plan.dtype.name], plan.k_major, *transforms)
    self.store_transposed = device.store_transposed(plan.t.epilogue_n, plan.out_dtype, plan.row_transforms)

  def _position(self, info):
    """(part of the reduction, first output, first row of x) of a tile."""
    split_k = jnp.int32(self.t.split_k)
    tile, part = lax.div(info.index[0], split_k), lax.rem(info.index[0], split_k)
    m, n = mg.plgpu.planar_snake(tile, self.plan.tiles, self.t.grid_minor, self.t.grid_width)
    return part, m * self.t.tile_m, n * self.t.tile_n

  def _slot(self, info, k):
    return lax.rem(info.local_index * self.plan.k_steps + k, jnp.int32(self.t.stages))

  def load_tiles(self):
    plan, t, plgpu, pl = self.plan, self.t, mg.plgpu, mg.pl
    x_gmem, values_gmem, metadata_gmem = (self.refs[name] for name in ("x", "values", "metadata"))

    @plgpu.nd_loop((plan.work,), collective_axes="block")
    def _tile(info):
      part, m, n = self._position(info)

      def step(k, _):
        slot = self._slot(info, k)
        k_start = (part * plan.k_steps + k) * t.tile_k
        stored = pl.ds(lax.div(k_start, jnp.int32(2)), t.tile_k // 2)
        full = self.full.at[slot]
        plgpu.barrier_wait(self.empty.at[slot])
        for i in range(plan.x_copies):
          source = x_gmem.at[pl.ds(n, t.tile_n), pl.ds(k_start + i * ROW, ROW)]
          plgpu.copy_gmem_to_smem(source, self.smem["x_smem"].at[slot, i], full)
        outputs = pl.ds(m, t.tile_m)
        values = values_gmem.at[outputs, stored] if plan.k_major else values_gmem.at[stored, outputs]
        plgpu.copy_gmem_to_smem(values, self.smem["a_smem"].at[slot], full)
        chunks = pl.ds(lax.div(k_start, jnp.int32(CHUNK)), t.tile_k // CHUNK)
        plgpu.copy_gmem_to_smem(metadata_gmem.at[chunks, outputs], self.smem["metadata_smem"].at[slot], full)

      lax.fori_loop(0, plan.k_steps, step, None)

    for slot in range(t.stages):  # nobody leaves while a barrier is still to be signalled
      plgpu.barrier_wait(self.empty.at[slot])

  def multiply_tiles(self):
    plan, t, plgpu, pl = self.plan, self.t, mg.plgpu, mg.pl
    for slot in range(t.stages):  # every slot is free at first
      plgpu.barrier_arrive(self.empty.at[slot])

    @plgpu.nd_loop((plan.work,), collective_axes="block")
    def _tile(info):
      part, m, n = self._position(info)

      def step(k, accumulator):
        slot = self._slot(info, k)
        plgpu.barrier_wait(self.full.at[slot])
        own = pl.ds(self.warpgroup * plan.wg_rows, plan.wg_rows)
        a_smem = self.smem["a_smem"]
        a_own = a_smem.at[slot, own] if plan.k_major else a_smem.at[slot, :, own]
        x, metadata = self.smem["x_smem"].at[slot], self.smem["metadata_smem"].at[slot]
        if plan.interpret is None:
          accumulator = self.sparse_step(accumulator, a_own, x, metadata)
        else:
          accumulator += self._dense_step(a_own, x, metadata)
        plgpu.barrier_arrive(self.empty.at[slot])
        return accumulator

      zeros = plgpu.layout_cast(jnp.zeros((plan.wg_rows, t.tile_n), jnp.float32), plgpu.Layout.WGMMA)
      accumulator = lax.fori_loop(0, plan.k_steps, step, zeros)
      out = self.refs["out"]
      if plan.meet:
        self._exchange(accumulator, info, part, lambda total, start: self._store(total, info, out, m, n + start))
      else:
        self._store(accumulator, info, out.at[part] if t.split_k > 1 else out, m, n)

    plgpu.wait_smem_to_gmem(0)

  def _store(self, accumulator, info, target, m, n):
    """Epilogue: sums `[wg_rows, columns]` -> y[n : n + columns, this warpgroup's outputs]."""
    plan, t, plgpu, pl = self.plan, self.t, mg.plgpu, mg.pl
    columns, wg_blocks = accumulator.shape[1], plan.wg_rows // INSTRUCTION_ROWS
    chunks = [(start, min(t.epilogue_n, columns - start)) for start in range(0, columns, t.epilogue_n)]
    for block in range(wg_blocks):
      row = m + self.warpgroup * plan.wg_rows + block * INSTRUCTION_ROWS
      rows = slice(block * INSTRUCTION_ROWS, (block + 1) * INSTRUCTION_ROWS)
      bias = None
      if self.refs["bias"]:
        source = self.refs["bias"][0].at[pl.ds(row, INSTRUCTION_ROWS)]
        bias = plgpu.load(source, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
      for chunk, (start, size) in enumerate(chunks):
        y = accumulator[rows, start : start + size]
        if bias is not None:
          y += lax.broadcast_in_dim(bias, y.shape, [0])
        y = plan.activation(y).astype(plan.out_dtype)
        # Slots go round over all tiles, so that the oldest store in flight is always the one of this slot.
        count = block * len(chunks) + chunk
        if wg_blocks * len(chunks) % t.epilogue_slots:
          count += info.local_index * (wg_blocks * len(chunks))
        staged = self.smem["out_smem"].at[self.warpgroup, count % t.epilogue_slots, :, pl.ds(0, size)]
        plgpu.wait_smem_to_gmem(t.epilogue_slots - 1, wait_read_only=True)
        self._stage(y, staged)
        plgpu.commit_smem()
        for i in range(plan.out_rows):
          plgpu.copy_smem_to_gmem(
            staged.at[i],
            target.at[pl.ds(n + start, size), pl.ds(row + i * plan.out_row, plan.out_row)],
            commit_group=i == plan.out_rows - 1,
          )

  def _stage(self, y, staged):
    """Sums `[64, columns]` to shared memory, transposed."""
    if self.plan.interpret is None:
      self.store_transposed(y, staged)
    else:
      for i in range(self.plan.out_rows):
        staged[i] = y[i * self.plan.out_row : (i + 1) * self.plan.out_row].T

  def _exchange(self, accumulator, info, part, finish):
    """The blocks that hold the parts of a tile meet: block p adds up, and finishes, columns `ranges[p]`.

    All blocks run at once (`_hopper._parts_meet`), so that waiting ends. Parts are added in a fixed order.
    """
    plan, split_k, plgpu, pl = self.plan, self.t.split_k, mg.plgpu, mg.pl
    warpgroup, wg_rows = self.warpgroup, plan.wg_rows
    sums_gmem = self.refs["sums"]
    tile = info.index[0] - part
    arrived = pl.get_global(plgpu.SemaphoreType.REGULAR((plan.work * plan.warpgroups,)))
    for p, (start, size) in enumerate(plan.ranges):

      @pl.when(part != p)
      def _send(p=p, start=start, size=size):
        mailbox = sums_gmem.at[info.index[0], warpgroup, p, pl.ds(0, wg_rows * size)]
        device.send_sums((wg_rows, size))(accumulator[:, start : start + size], mailbox)
        plgpu.semaphore_signal(arrived.at[(tile + p) * plan.warpgroups + warpgroup], memory_scope="gpu")

    for p, (start, size) in enumerate(plan.ranges):

      @pl.when(part == p)
      def _receive(p=p, start=start, size=size):
        ready = arrived.at[(tile + p) * plan.warpgroups + warpgroup]
        plgpu.semaphore_wait(ready, split_k - 1, memory_scope="gpu")
        total = None
        for q in range(split_k):
          if q == p:
            sums = accumulator[:, start : start + size]
          else:
            mailbox = sums_gmem.at[tile + q, warpgroup, p, pl.ds(0, wg_rows * size)]
            sums = device.receive_sums((wg_rows, size))(mailbox)
          total = sums if total is None else total + sums
        finish(total, start)

  def _dense_step(self, a_own, x_tile, metadata_tile):
    """The interpreter knows no sparse MMA: unpack this warpgroup's rows, then an ordinary wgmma."""
    plan, plgpu, pl = self.plan, mg.plgpu, mg.pl
    a = a_own[...]
    words = metadata_tile[:, pl.ds(self.warpgroup * plan.wg_rows, plan.wg_rows)].T
    dense_smem = self.smem["dense_smem"]
    dense_smem[self.warpgroup] = _decompress_rows(a if plan.k_major else a.T, words)
    plgpu.commit_smem()
    shape = plan.wg_rows, self.t.tile_n
    total = jnp.zeros(shape, jnp.float32)
    for i in range(plan.x_copies):

      def multiply(accumulator, i=i):
        columns = pl.ds(i * ROW, ROW)
        plgpu.wgmma(accumulator, dense_smem.at[self.warpgroup, :, columns], x_tile.at[i].transpose((1, 0)))
        return accumulator[...]

      total += pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
    return total


def _decompress_rows(values, words):
  """Rows of stored entries `[M, K / 2]` and their metadata `[M, K / 16]` uint16 -> dense rows `[M, K]`."""
  rows, stored = values.shape
  nibbles = (words[:, :, None] >> (jnp.arange(4, dtype=jnp.uint16) * 4)) & jnp.uint16(15)
  first, second = nibbles & jnp.uint16(3), nibbles >> jnp.uint16(2)
  positions = jnp.stack([first, second], -1).reshape(rows, stored // 2, 2)
  slots = positions[..., None] == jnp.arange(4, dtype=jnp.uint16)
  spread = jnp.where(slots, values.reshape(rows, stored // 2, 2, 1), jnp.zeros((), values.dtype))
  return spread.sum(2, dtype=values.dtype).reshape(rows, 2 * stored)
