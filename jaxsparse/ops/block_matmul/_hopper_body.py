"""What the warpgroups of the block-sparse matmul do: bring tiles in, multiply, add up parts, store (`_hopper` says why).

One warpgroup runs `Body.load_tiles`, the others `Body.multiply_tiles`; both walk the same tiles (`_hopper_tiles`) and hand
slots of a ring in shared memory to each other.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _hopper_device as device
from jaxsparse.ops.block_matmul import _hopper_tiles as tiles
from jaxsparse.ops.block_matmul import _tile_queue
from jaxsparse.ops.block_matmul import tuning as tunings
from jaxsparse.ops.block_matmul._hopper_device import ROWS
from jaxsparse.ops.block_matmul._hopper_tiles import WARPGROUPS
from jaxsparse.ops.block_matmul._tile_queue import rem
from jaxsparse.ops.nm_matmul import _hopper_device as nm_device


@dataclasses.dataclass(frozen=True)
class Launch(tiles.Grid):
  """Everything static about one launch.

  Attributes:
    depth: of a block along the sum.
    row: entries to a row of shared memory, equal for both operands.
    capacity: blocks that w has room for.
    transposed: which product.
    dtype, out_dtype: of x and y.
    interpret: an `Interpret`, or None.
  """

  depth: int
  row: int
  capacity: int
  transposed: bool
  dtype: Any
  out_dtype: Any
  interpret: Any

  @property
  def shared(self) -> int:
    """Block columns of a list."""
    return max(1, tunings.TILE // self.size)

  @property
  def own(self) -> int:
    """Block columns of a warpgroup."""
    return max(1, ROWS // self.size)

  @property
  def step(self) -> int:
    """Of the sum, to a pipeline step."""
    return min(self.depth, 64)

  @property
  def x_copies(self) -> int:
    return self.step // self.row

  @property
  def piece(self) -> int:
    """Outputs that a copy of w brings."""
    return min(self.size, ROWS) if self.transposed else self.row

  @property
  def w_copies(self) -> int:
    """Of each warpgroup."""
    return ROWS // self.piece * (self.x_copies if self.transposed else 1)

  @property
  def out_row(self) -> int:
    """y leaves in slices of 64 outputs x at most epilogue_n rows, staged as rows of 128 bytes (two groups of them in f32)."""
    return mg.SWIZZLE_BYTES // self.out_dtype.itemsize

  @property
  def chunks(self) -> list[tuple[int, int]]:
    """(start, length) of these slices along B."""
    size = self.t.epilogue_n
    return [(start, min(size, self.t.tile_b - start)) for start in range(0, self.t.tile_b, size)]

  @property
  def row_transforms(self):
    return (mg.plgpu.SwizzleTransform(2 * self.row),)

  @property
  def out_transforms(self):
    return (mg.plgpu.SwizzleTransform(mg.SWIZZLE_BYTES),)

  def scratch(self) -> dict[str, Any]:
    """Shared memory and barriers of a block of threads."""
    plgpu, t = mg.plgpu, self.t
    w_shape = (self.x_copies, ROWS, self.row) if self.transposed else (ROWS // self.row, self.step, self.row)
    out = (WARPGROUPS, t.epilogue_slots, ROWS // self.out_row, t.epilogue_n, self.out_row)
    barrier = plgpu.Barrier
    if self.cluster > 1:
      barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("member",))
    return dict(
      x_smem=plgpu.SMEM((t.stages, self.x_copies, t.tile_b, self.row), self.dtype, transforms=self.row_transforms),
      w_smem=plgpu.SMEM((t.stages, WARPGROUPS, *w_shape), self.dtype, transforms=self.row_transforms),
      out_smem=plgpu.SMEM(out, self.out_dtype, transforms=self.out_transforms),
      full=plgpu.Barrier(num_arrivals=self.x_copies + WARPGROUPS * self.w_copies, num_barriers=t.stages),
      empty=barrier(num_arrivals=WARPGROUPS, num_barriers=t.stages),
      **_tile_queue.scratch(barrier, WARPGROUPS),
    )


class Body(tiles.Tiles):
  """The kernel's body, while it is traced.

  Args:
    launch: what is static.
    refs: x, w, out, sums, counter and a plan's lists in device memory.
    smem: what `Launch.scratch` asked for.
  """

  def __init__(self, launch: Launch, refs: dict[str, Any], smem: dict[str, Any]):
    super().__init__(launch, refs, smem)
    self.full, self.empty = smem["full"], smem["empty"]
    self.product, self.store_transposed = _device_code(launch)

  # -- The warpgroup that loads ----------------------------------------------------------------------------------------

  def load_tiles(self):
    self.free_queue()

    def tile(i, at, count, publish):
      # The next tile is taken as late as hides the time that it takes: whoever comes early gets more of them.
      last = jnp.maximum(at.begin, at.end - self.launch.ahead)
      count = lax.fori_loop(at.begin, last, functools.partial(self._load_entry, at), count)
      publish()
      return lax.fori_loop(last, at.end, functools.partial(self._load_entry, at), count)

    self.walk(tile, loads=True)
    for slot in range(self.t.stages):  # nobody leaves while a barrier is still to be signalled
      mg.plgpu.barrier_wait(self.empty.at[slot])
    self.drain_queue()

  def _load_entry(self, at, e, count):
    launch, t, plgpu, pl = self.launch, self.t, mg.plgpu, mg.pl
    depth_start = self.refs["minor"][e] * launch.depth
    slots = [self.refs["slots"][e * launch.shared + j] for j in range(launch.shared)]
    for k in range(0, launch.depth, launch.step):
      slot = rem(count, t.stages)
      full = self.full.at[slot]
      plgpu.barrier_wait(self.empty.at[slot])
      for j in range(launch.x_copies):
        source = self.refs["x"].at[pl.ds(at.b, t.tile_b), pl.ds(depth_start + k + j * launch.row, launch.row)]
        plgpu.copy_gmem_to_smem(source, self.smem["x_smem"].at[slot, j], full)
      for warpgroup in range(WARPGROUPS):
        for output in range(0, ROWS, launch.piece):
          self._load_w(at, slots, k, slot, warpgroup, output)
      count += 1
    return count

  def _load_w(self, at, slots, k, slot, warpgroup, output):
    """`piece` of the 64 outputs of a warpgroup, from the block that holds them."""
    launch, pl, full = self.launch, mg.pl, self.full.at[slot]
    target = self.smem["w_smem"].at[slot, warpgroup]
    first = warpgroup * ROWS + output
    w_slot = slots[first // launch.size if launch.shared > 1 else 0]
    first = first % launch.size if launch.shared > 1 else at.sub * tunings.TILE + first
    block = self.refs["w"].at[w_slot]
    if not launch.transposed:
      source = block.at[pl.ds(k, launch.step), pl.ds(first, launch.row)]
      return self._copy_w(w_slot, source, target.at[output // launch.row], full)
    for r in range(launch.x_copies):
      source = block.at[pl.ds(first, launch.piece), pl.ds(k + r * launch.row, launch.row)]
      self._copy_w(w_slot, source, target.at[r, pl.ds(output, launch.piece)], full)

  def _copy_w(self, w_slot, source, target, full):
    axes = "member" if self.launch.cluster > 1 else None
    copy = lambda: mg.plgpu.copy_gmem_to_smem(source, target, full, collective_axes=axes)
    if self.launch.shared == 1:
      return copy()
    mg.pl.when(w_slot < self.launch.capacity)(copy)
    mg.pl.when(w_slot >= self.launch.capacity)(lambda: mg.plgpu.barrier_arrive(full))

  # -- The warpgroups that multiply --------------------------------------------------------------------------------------

  def multiply_tiles(self):
    t, plgpu = self.t, mg.plgpu
    for slot in range(t.stages):  # every slot is free at first
      self.arrive(self.empty.at[slot])
    self.free_queue()

    def tile(i, at, count, publish):
      del publish
      zeros = plgpu.layout_cast(jnp.zeros((ROWS, t.tile_b), jnp.float32), plgpu.Layout.WGMMA)
      entry = functools.partial(self._multiply_entry, at)
      count, accumulator = lax.fori_loop(at.begin, at.end, entry, (count, zeros))
      self._finish(i, accumulator, at)
      return count

    self.walk(tile, loads=False)
    plgpu.wait_smem_to_gmem(0)

  def _multiply_entry(self, at, e, carry):
    launch, plgpu = self.launch, mg.plgpu
    count, accumulator = carry
    present = None
    if launch.shared > 1:
      first = e * launch.shared + self.warpgroup * launch.own
      present = [self.refs["slots"][first + j] < launch.capacity for j in range(launch.own)]
    for _ in range(0, launch.depth, launch.step):
      slot = rem(count, self.t.stages)
      plgpu.barrier_wait(self.full.at[slot])
      w_ref, x_ref = self.smem["w_smem"].at[slot, self.warpgroup], self.smem["x_smem"].at[slot]
      multiply = lambda a, w_ref=w_ref, x_ref=x_ref: self.product(a, present, w_ref, x_ref)
      if launch.shared == 1:
        accumulator = multiply(accumulator)
      else:
        accumulator = lax.cond(functools.reduce(jnp.logical_or, present), multiply, lambda a: a, accumulator)
      self.arrive(self.empty.at[slot])
      count += 1
    return count, accumulator

  def _finish(self, i, accumulator, at):
    """Parts of a list meet two by two: who comes first leaves its sums in memory, the other adds them, and the last stores.

    a + b is b + a: whoever comes first, the bits are the same, and nobody waits for a part that is still at work.
    """

    def meet(carry):
      index, parts, place, accumulator = carry
      alone = lambda accumulator: (jnp.int32(1), accumulator)
      pair = lambda accumulator: self._meet(at, index, place + tiles.div(index, 2), accumulator)
      goes_on, accumulator = lax.cond((index ^ 1) < parts, pair, alone, accumulator)
      return tiles.div(index, 2), goes_on * tiles.div(parts + 1, 2), place + tiles.div(parts, 2), accumulator

    start = (at.index, at.parts, at.place, accumulator)
    _, parts, _, accumulator = lax.while_loop(lambda carry: carry[1] > 1, meet, start)
    mg.pl.when(parts == 1)(lambda: self._store(i, accumulator, at))

  def _meet(self, at, index, place, accumulator):
    """(1 or 0: whether this part goes on, sums of both if it does)."""
    sums, flag, turn = self.sums_of(at, place)
    on_gpu = self.launch.interpret is None

    def leave(accumulator):
      if on_gpu:
        device.leave_sums()(accumulator, flag, sums)
      else:
        sums[...] = accumulator.reshape(-1)
      return accumulator

    def add(accumulator):
      if on_gpu:
        return device.add_sums(self.t.tile_b)(accumulator, flag, turn + tiles.WRITTEN, sums)
      return accumulator + sums[...].reshape(accumulator.shape)

    # The interpreter's one block of threads takes parts in their order.
    second = device.comes_second()(flag, turn) if on_gpu else tiles.rem(index, 2)
    return second, lax.cond(second == 1, add, leave, accumulator)

  def _store(self, i, accumulator, at):
    """Sums `[64, tile_b]` -> y[rows of the tile, outputs of this warpgroup]."""
    launch, t, plgpu, pl = self.launch, self.t, mg.plgpu, mg.pl
    if launch.shared > 1:
      first = self.refs["units"][at.which * WARPGROUPS + self.warpgroup] * ROWS
    else:
      first = (at.which * launch.tiles_of_list + at.sub) * tunings.TILE + self.warpgroup * ROWS
    target = self.refs["out"]
    for chunk, (start, length) in enumerate(launch.chunks):
      y = accumulator[:, start : start + length].astype(launch.out_dtype)
      # Slots go round over all tiles, so that the oldest store in flight is always the one of this slot.
      slot = rem(i * len(launch.chunks) + chunk, t.epilogue_slots)
      staged = self.smem["out_smem"].at[self.warpgroup, slot, :, pl.ds(0, length)]
      plgpu.wait_smem_to_gmem(t.epilogue_slots - 1, wait_read_only=True)
      self._stage(y, staged)
      plgpu.commit_smem()
      copies = ROWS // launch.out_row
      for j in range(copies):
        plgpu.copy_smem_to_gmem(
          staged.at[j],
          target.at[pl.ds(at.b + start, length), pl.ds(first + j * launch.out_row, launch.out_row)],
          commit_group=j == copies - 1,
        )

  def _stage(self, y, staged):
    """Sums `[64, columns]` to shared memory, transposed."""
    if self.launch.interpret is None:
      self.store_transposed(y, staged)
    else:
      row = self.launch.out_row
      for j in range(ROWS // row):
        staged[j] = y[j * row : (j + 1) * row].T


def _device_code(launch):
  """(`product(accumulator, present, w, x)`, `store_transposed(y, staged)`)."""
  if launch.interpret is not None:

    def product(accumulator, present, w_ref, x_ref):
      w, x = w_ref[...], x_ref[...]
      mg.plgpu.commit_smem()  # these were ordinary loads, the copy engine writes next; the tensor cores need none
      present = [jnp.bool_(True)] if present is None else present
      return accumulator + device.interpreted_product(w, x, launch.transposed, present)

    return product, None
  shape = launch.t.tile_b, launch.transposed, 2 * launch.row, launch.row_transforms
  if launch.own > 1:
    tile_b, transposed, swizzle, transforms = shape
    product = device.product_in_halves(tile_b, launch.step, transposed, swizzle, transforms, launch.dtype)
  else:
    multiply = device.product(*shape)
    product = lambda accumulator, present, w_ref, x_ref: multiply(accumulator, w_ref, x_ref)
  return product, nm_device.store_transposed(launch.t.epilogue_n, launch.out_dtype, launch.out_transforms)
