"""What the warpgroups of the kernel for narrow blocks do: bring steps in, multiply, store (`_narrow` says why).

One warpgroup runs `Body.load_tiles`, the others `Body.multiply_tiles`; both walk the same tiles (`_tile_queue`) and hand
slots of a ring in shared memory to each other.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _narrow_device as device
from jaxsparse.ops.block_matmul import _narrow_plan
from jaxsparse.ops.block_matmul import _tile_queue
from jaxsparse.ops.block_matmul._narrow_device import ROWS
from jaxsparse.ops.block_matmul._tile_queue import div
from jaxsparse.ops.block_matmul._tile_queue import rem

_STAGING_BYTES = 8 * 1024  # of a warpgroup: results on their way to memory


class Tile(NamedTuple):
  """One tile.

  Attributes:
    which: list.
    b: first row of x.
    begin, end: its entries.
  """

  which: Any
  b: Any
  begin: Any
  end: Any


@dataclasses.dataclass(frozen=True)
class Launch:
  """Everything static about one launch.

  Attributes:
    stages: pipeline steps in shared memory.
    grid_width: tiles along B that are visited for all block columns before the next ones.
    batch: rows of x.
    lists: of blocks, in the plan.
    multiplying: warpgroups that multiply.
    processors: blocks of threads that run at once.
    capacity: blocks that w has room for.
    transposed: which product.
    dtype, out_dtype: of x and y.
    interpret: an `Interpret`, or None.
  """

  stages: int
  grid_width: int
  batch: int
  lists: int
  multiplying: int
  processors: int
  capacity: int
  transposed: bool
  dtype: Any
  out_dtype: Any
  interpret: Any

  cluster = 1
  size = _narrow_plan.SIZE
  columns = _narrow_plan.COLUMNS
  parts = 2  # block rows of a step, at most
  room = 12  # blocks of a step, at most
  block_lines = (2, 2, 4, 64)  # a block as 16 rows of 128 bytes

  @property
  def tile_b(self) -> int:
    """Rows of x to a tile."""
    return ROWS * self.multiplying

  @property
  def across(self) -> int:
    """Tiles along B."""
    return -(-self.batch // self.tile_b)

  @property
  def threads(self) -> int:
    """Blocks of threads."""
    return min(self.lists * self.across, self.processors)

  @property
  def x_transforms(self):
    return (mg.plgpu.SwizzleTransform(2 * self.size),)

  @property
  def w_transforms(self):
    return (mg.plgpu.SwizzleTransform(mg.SWIZZLE_BYTES),)

  @property
  def out_transforms(self):
    # Rows alone: tiles of 8 rows, which Pallas' own stores need, it would ask of B too.
    return (mg.plgpu.SwizzleTransform(self.size * self.out_dtype.itemsize),)

  def scratch(self) -> dict[str, Any]:
    """Shared memory and barriers of a block of threads."""
    plgpu, stages = mg.plgpu, self.stages
    out_transforms = self.out_transforms
    out_slots = _STAGING_BYTES // (ROWS * self.size * self.out_dtype.itemsize)
    if self.interpret is None:
      barriers = dict(words=plgpu.SMEM((device.words_of_ring(stages),), jnp.int32))
    else:
      barriers = dict(
        here=plgpu.SMEM((stages,), jnp.int32),
        full=plgpu.Barrier(num_arrivals=1 + self.parts * (1 + self.columns), num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=self.multiplying, num_barriers=stages),
      )
    return dict(
      x_smem=plgpu.SMEM((stages, self.parts, self.tile_b, self.size), self.dtype, transforms=self.x_transforms),
      w_smem=plgpu.SMEM((stages, self.room, *self.block_lines), self.dtype, transforms=self.w_transforms),
      out_smem=plgpu.SMEM((self.multiplying, out_slots, ROWS, self.size), self.out_dtype, transforms=out_transforms),
      lists=plgpu.SMEM((2, 2 + self.columns, device.CHUNK), jnp.int32),
      **barriers,
      **_tile_queue.scratch(plgpu.Barrier, self.multiplying),
    )


class Body(_tile_queue.Queue):
  """The kernel's body, while it is traced.

  Args:
    launch: what is static.
    refs: x, w, out, counter and a plan's lists in device memory.
    smem: what `Launch.scratch` asked for.
  """

  def __init__(self, launch: Launch, refs: dict[str, Any], smem: dict[str, Any]):
    super().__init__(launch, refs, smem, launch.lists * launch.across)
    self.real = launch.interpret is None
    if self.real:
      device.init(launch)(smem["words"])

  def tile_of(self, item) -> Tile:
    """Stripes along B, in each of which longest lists come first."""
    launch, refs = self.launch, self.refs
    stripe = div(item, launch.lists * launch.grid_width)
    inside = item - stripe * (launch.lists * launch.grid_width)
    width = jnp.minimum(launch.grid_width, launch.across - stripe * launch.grid_width)
    which = refs["order"][lax.div(inside, width)]
    b = stripe * launch.grid_width + lax.rem(inside, width)
    return Tile(which, b * launch.tile_b, refs["starts"][which], refs["starts"][which + 1])

  def _next(self, place):
    """The place in the ring behind this one: (slot, parity of its phase)."""
    slot, parity = place
    last = slot == self.launch.stages - 1
    return jnp.where(last, 0, slot + 1), jnp.where(last, 1 - parity, parity)

  def _walk(self, body, loads):
    return self.walk(body, loads, (jnp.int32(0), jnp.int32(0)))

  # -- The warpgroup that loads ----------------------------------------------------------------------------------------

  def load_tiles(self):
    launch, plgpu = self.launch, mg.plgpu
    self.free_queue()

    def tile(i, at, place, publish):
      publish()
      if self.real:
        device.await_lists()()  # nobody reads the last list any more
        self._fetch_lists(0, at.begin)
      chunks = div(at.end - at.begin + device.CHUNK - 1, device.CHUNK)
      return lax.fori_loop(0, chunks, functools.partial(self._load_chunk, at), place)

    place = self._walk(tile, loads=True)
    for _ in range(self.launch.stages):  # nobody leaves while a barrier is still to be signalled
      slot, parity = place
      if self.real:
        device.await_empty(launch)(self.smem["words"], slot, 1 - parity)
      else:
        plgpu.barrier_wait(self.smem["empty"].at[slot])
      place = self._next(place)
    self.drain_queue()

  def _fetch_lists(self, chunk, first):
    """Begins to copy a chunk of entries to shared memory."""
    launch, refs = self.launch, self.refs
    target = self.smem["lists"].at[rem(chunk, 2)]
    device.fetch_lists(launch.columns, launch.capacity)(refs["minor"], refs["present"], refs["slots"], target, first)

  def _load_chunk(self, at, i, place):
    first = at.begin + i * device.CHUNK
    if self.real:
      device.await_lists()()
      self._fetch_lists(i + 1, first + device.CHUNK)
    present = (
      self.smem["lists"].at[rem(i, 2), 1] if self.real else self.refs["present"].at[mg.pl.ds(first, device.CHUNK)]
    )
    left = at.end - first
    inside = jnp.minimum(left, device.CHUNK)

    def step(carry):
      e, place = carry
      one, two = present[e], present[jnp.minimum(e + 1, inside - 1)]
      both = (e + 1 < inside) & (_narrow_plan.count_of(one) + _narrow_plan.count_of(two) <= self.launch.room)
      taken = jnp.where(both, 2, 1)
      bits = _narrow_plan.bits_of(one) | jnp.where(both, _narrow_plan.bits_of(two) << self.launch.columns, 0)
      bits |= jnp.where(e + taken >= left, device.LAST, 0)
      if self.real:
        (slot, parity), smem = place, self.smem
        rings, lists = (smem["x_smem"].at[slot], smem["w_smem"].at[slot]), smem["lists"].at[rem(i, 2)]
        device.load_step(self.launch)(
          smem["words"],
          lists,
          self.refs["x"],
          self.refs["w"],
          *rings,
          slot,
          1 - parity,
          at.b,
          e,
          taken,
          bits,
        )
      else:
        self._load_interpreted(place[0], at.b, first + e, taken, bits)
      return e + taken, self._next(place)

    return lax.while_loop(lambda carry: carry[0] < inside, step, (jnp.int32(0), place))[1]

  def _load_interpreted(self, slot, b, entry, taken, bits):
    launch, refs, smem, plgpu, pl = self.launch, self.refs, self.smem, mg.plgpu, mg.pl
    full = smem["full"].at[slot]
    plgpu.barrier_wait(smem["empty"].at[slot])

    def load(condition, source, target):
      pl.when(condition)(lambda: plgpu.copy_gmem_to_smem(source, target, full))
      pl.when(~condition)(lambda: plgpu.barrier_arrive(full))

    before = jnp.int32(0)
    for part in range(launch.parts):
      e = entry + jnp.minimum(part, taken - 1)
      columns = pl.ds(refs["minor"][e] * launch.size, launch.size)
      load(part < taken, refs["x"].at[pl.ds(b, self.launch.tile_b), columns], smem["x_smem"].at[slot, part])
      for j in range(launch.columns):
        here = (bits >> (part * launch.columns + j)) & 1
        target = smem["w_smem"].at[slot, jnp.minimum(before, launch.room - 1)]
        load(here == 1, refs["w"].at[refs["slots"][e * launch.columns + j]], target)
        before += here
    smem["here"][slot] = bits
    plgpu.barrier_arrive(full)

  # -- The warpgroups that multiply --------------------------------------------------------------------------------------

  def multiply_tiles(self):
    self.free_queue()
    if not self.real:
      for slot in range(self.launch.stages):  # every slot is free at first
        mg.plgpu.barrier_arrive(self.smem["empty"].at[slot])

    def tile(i, at, place, publish):
      zeros = jnp.zeros((ROWS, _narrow_plan.WIDTH), jnp.float32)
      zeros = mg.plgpu.layout_cast(zeros, mg.plgpu.Layout.WGMMA)
      steps = functools.partial(self._multiply if self.real else self._interpreted, zeros, place)
      accumulator, place = lax.cond(at.end > at.begin, steps, lambda: (zeros, place))
      self._store(accumulator, at)
      return place

    self._walk(tile, loads=False)
    mg.plgpu.wait_smem_to_gmem(0)

  def _multiply(self, accumulator, place):
    smem = self.smem
    rings = smem["words"], smem["x_smem"], smem["w_smem"]
    accumulator, *place = device.multiply_steps(self.launch)(accumulator, *rings, *place, self.warpgroup)
    return accumulator, tuple(place)

  def _interpreted(self, accumulator, place):
    """`_multiply` on a CPU."""
    launch, smem, plgpu = self.launch, self.smem, mg.plgpu

    def step(carry):
      accumulator, place, _ = carry
      slot, _ = place
      plgpu.barrier_wait(smem["full"].at[slot])
      bits = smem["here"][slot]
      x = smem["x_smem"][slot, :, mg.pl.ds(self.warpgroup * ROWS, ROWS)]
      there = ((bits >> jnp.arange(launch.parts * launch.columns)) & 1) == 1
      w = smem["w_smem"][slot].reshape(launch.room, launch.size, launch.size)[jnp.maximum(jnp.cumsum(there) - 1, 0)]
      # What was not loaded may be anything.
      w = jnp.where(there[:, None, None], w.transpose(0, 2, 1) if launch.transposed else w, 0)
      x = jnp.where(there.reshape(launch.parts, launch.columns).any(1)[:, None, None], x, 0)
      for x, w in zip(x, w.reshape(launch.parts, launch.columns, launch.size, launch.size), strict=True):
        w = w.transpose(1, 0, 2).reshape(launch.size, _narrow_plan.WIDTH)
        accumulator += jnp.dot(x, w, preferred_element_type=jnp.float32)
      plgpu.commit_smem()  # these were ordinary loads, the copy engine writes next; the tensor cores need none
      plgpu.barrier_arrive(smem["empty"].at[slot])
      return accumulator, self._next(place), bits & device.LAST

    return lax.while_loop(lambda carry: carry[2] == 0, step, (accumulator, place, jnp.int32(0)))[:2]

  def _store(self, accumulator, at):
    """Sums `[64, 256]` -> y[rows of this warpgroup, outputs of the tile's block columns]."""
    launch, plgpu, pl, staging = self.launch, mg.plgpu, mg.pl, self.smem["out_smem"]
    slots = staging.shape[1]
    for j in range(launch.columns):
      staged = staging.at[self.warpgroup, j % slots]
      y = accumulator[:, j * launch.size : (j + 1) * launch.size].astype(launch.out_dtype)
      plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
      if self.real:
        device.stage(launch)(y, staged)
      else:
        staged[...] = y
      plgpu.commit_smem()
      column = self.refs["units"][at.which * launch.columns + j]
      rows, columns = pl.ds(at.b + self.warpgroup * ROWS, ROWS), pl.ds(column * launch.size, launch.size)
      plgpu.copy_smem_to_gmem(staged, self.refs["out"].at[rows, columns])
