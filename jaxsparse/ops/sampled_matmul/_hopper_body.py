"""What the warpgroups of the sampled product do: load, multiply, add up what was cut, store (`_hopper` says why).

One warpgroup runs `Body.load`, the others `Body.multiply`; both walk the same segments of tiles and hand slots of a ring
in shared memory to each other.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.nm_matmul import _hopper_device as device
from jaxsparse.ops.sampled_matmul import tuning as tunings

WARPGROUPS = 2  # that multiply
_ROWS = _plan.UNIT  # of w for one wgmma, and so for each warpgroup
_COLUMNS = _plan.SAMPLED_COLUMNS  # of a warpgroup
_SHARED_BYTES = 226 * 1024  # of a block of threads on Hopper, less barriers


def _div(a, b):
  return lax.div(a, jnp.int32(b))


def _rem(a, b):
  return lax.rem(a, jnp.int32(b))


@dataclasses.dataclass(frozen=True)
class Launch:
  """Everything static about one launch.

  Attributes:
    t: how the product is cut.
    batch: rows of x and dy.
    capacity, bk, bo: of the blocks.
    block_cols: of w.
    height: of a tile: `_plan.TILE` or `_plan.UNIT`, half of which warpgroups share.
    dtype, out_dtype: of x and dy, and of the result.
    threads: blocks of threads that the tiles are dealt to.
    interpret: an `Interpret`, or None.
  """

  t: tunings.Tuning
  batch: int
  capacity: int
  bk: int
  bo: int
  block_cols: int
  height: int
  dtype: Any
  out_dtype: Any
  threads: int
  interpret: Any

  @property
  def flat(self) -> bool:
    """Whether the warpgroups share x, each with columns of its own; else they share the columns of dy."""
    return self.height < _plan.TILE

  @property
  def shared(self) -> int:
    """Block rows of a list."""
    return max(1, self.height // self.bk)

  @property
  def tiles_of_list(self) -> int:
    return max(1, self.bk // self.height)

  @property
  def entries(self) -> int:
    """Of a list, that a warpgroup takes at most."""
    return _COLUMNS // self.bo

  @property
  def steps(self) -> int:
    return -(-self.batch // self.t.step)

  @property
  def row(self) -> int:
    """Entries to a row of shared memory; equal for both operands."""
    return 64 if self.bk % 64 == 0 and self.bo % 64 == 0 else 32

  @property
  def x_units(self) -> int:
    return 1 if self.flat else WARPGROUPS

  @property
  def dy_groups(self) -> int:
    return WARPGROUPS if self.flat else 1

  @property
  def out_columns(self) -> int:
    """That are stored at a time; narrow where the ring leaves little room."""
    return min(self.bo, (64 if self.flat and self.t.step == 64 else 128) // self.out_dtype.itemsize)

  @property
  def out_piece(self) -> int:
    """Rows of a block in a warpgroup."""
    return min(self.bk, _ROWS)

  @property
  def epilogue_slots(self) -> int:
    return 1 if self.flat and self.t.step == 64 else self.t.epilogue_slots

  @property
  def stages(self) -> int:
    step = (self.x_units * _ROWS + self.dy_groups * _COLUMNS) * self.t.step * 2
    out = WARPGROUPS * self.epilogue_slots * _ROWS * self.out_columns * self.out_dtype.itemsize
    return self.t.stages or min((_SHARED_BYTES - out) // step, 8)

  @property
  def row_transforms(self):
    return (mg.plgpu.SwizzleTransform(2 * self.row),)

  @property
  def out_transforms(self):
    width = self.out_columns
    return mg.plgpu.TilingTransform((8, width)), mg.plgpu.SwizzleTransform(width * self.out_dtype.itemsize)

  def scratch(self) -> dict[str, Any]:
    """Shared memory and barriers of a block."""
    plgpu, step, row, stages = mg.plgpu, self.t.step, self.row, self.stages
    slabs = _COLUMNS // row
    copies = self.x_units * (_ROWS // row) + self.dy_groups * slabs
    transforms, out_shape = self.row_transforms, (WARPGROUPS, self.epilogue_slots, _ROWS, self.out_columns)
    return dict(
      x_smem=plgpu.SMEM((stages, self.x_units, _ROWS // row, step, row), self.dtype, transforms=transforms),
      dy_smem=plgpu.SMEM((stages, self.dy_groups, slabs, step, row), self.dtype, transforms=transforms),
      out_smem=plgpu.SMEM(out_shape, self.out_dtype, transforms=self.out_transforms),
      full=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
      empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )


class Segment(NamedTuple):
  """Rows of x that a block of threads sums over for one tile.

  Attributes:
    tile: which.
    first, last: step, and one past the last.
    ends: whether it is the last segment of its tile: then this block finishes the tile.
    earlier: how many of the blocks before this one hold the tile's earlier segments, where it ends.
  """

  tile: Any
  first: Any
  last: Any
  ends: Any
  earlier: Any


class Tile(NamedTuple):
  """What a tile is.

  Attributes:
    which: its list.
    sub: which part of block rows that are higher than a tile.
    begins, counts: for each group of dy's columns, its first entry and how many entries it has.
  """

  which: Any
  sub: Any
  begins: list[Any]
  counts: list[Any]


class Body:
  """The kernel's body, while it is traced.

  Args:
    launch: what is static.
    refs: in device memory: x, dy, lists (minor, slots, units, items, empty, counts), out, sums.
    scratch: what `Launch.scratch` asked for.
  """

  def __init__(self, launch: Launch, refs: dict[str, Any], scratch: dict[str, Any]):
    self.launch, self.refs, self.smem = launch, refs, scratch
    self.full, self.empty = scratch["full"], scratch["empty"]
    self.warpgroup, self.block = lax.axis_index("warpgroup"), lax.axis_index("block")
    self.rounds = _div(refs["counts"][0] * launch.tiles_of_list, launch.threads)
    self.rest = refs["counts"][0] * launch.tiles_of_list - self.rounds * launch.threads
    if launch.interpret is None:
      self.arrived = mg.pl.get_global(mg.plgpu.SemaphoreType.REGULAR((launch.threads * WARPGROUPS,)))
      self.product = _product(launch)

  def _segments(self, body):
    """`body(i, segment, block, steps so far) -> steps so far` for the segments of this block of threads.

    Whole tiles first. What is left fills no round: n blocks of threads, a group, share m tiles, each an equal part of their
    steps; all groups are alike, so that few places of x and dy are read at a time. A block takes its parts from the last
    one on, and so never waits for one that waits.
    """
    launch = self.launch
    if launch.interpret is None:
      return self._segments_of(self.block, body, jnp.int32(0))
    # The interpreter knows no semaphores: one block of threads plays all of them, in an order in which nobody waits.
    return lax.fori_loop(0, launch.threads, lambda block, count: self._segments_of(block, body, count), jnp.int32(0))

  def _segments_of(self, block, body, count):
    launch, steps, rounds, rest = self.launch, self.launch.steps, self.rounds, self.rest
    m = n = jnp.int32(1)
    for room, tiles, blocks in reversed(tunings.cuts(launch.threads, steps, launch.t.meeting / launch.t.step)):
      m, n = (jnp.where(rest <= room, a, b) for a, b in ((tiles, m), (blocks, n)))
    group = lax.div(block, n)
    member = block - group * n
    base = group * m  # its first tile, of the rest
    shared = jnp.clip(rest - base, 0, m) * steps
    low, high = lax.div(member * shared, n), lax.div((member + 1) * shared, n)
    last_tile = _div(high - 1, steps)
    parts = jnp.where(high > low, last_tile - _div(low, steps) + 1, 0)

    def one(i, count):
      cut = i >= rounds
      j = last_tile - (i - rounds)
      begin = j * steps
      before = member - lax.div((begin + 1) * n - 1, jnp.maximum(shared, 1))
      first, last = jnp.maximum(low - begin, 0), jnp.minimum(high - begin, steps)
      segment = Segment(
        tile=jnp.where(cut, rounds * launch.threads + base + j, i * launch.threads + block),
        first=jnp.where(cut, first, 0),
        last=jnp.where(cut, last, steps),
        ends=~cut | (last == steps),
        earlier=jnp.where(cut & (last == steps), before, 0),
      )
      return body(i, segment, block, count)

    return lax.fori_loop(0, rounds + parts, one, count)

  def _tile(self, segment) -> Tile:
    launch, items = self.launch, self.refs["items"]
    item = 3 * _div(segment.tile, launch.tiles_of_list)
    which, begin, end = (items[item + i] for i in range(3))
    begins, counts = [begin], [end - begin]
    if launch.flat:
      half = _div(end - begin + 1, 2)
      begins, counts = [begin, begin + half], [half, end - begin - half]
    return Tile(which, _rem(segment.tile, launch.tiles_of_list), begins, counts)

  def _x_start(self, tile, unit, column):
    """Column of x at a column of a unit."""
    launch, units = self.launch, self.refs["units"]
    if launch.shared == 1:
      return tile.which * launch.bk + tile.sub * launch.height + unit * _ROWS + column
    width = launch.height // 2
    at = unit * _ROWS + column
    return units[tile.which * 2 + at // width] * width + at % width

  def load(self):
    launch, plgpu, pl = self.launch, mg.plgpu, mg.pl
    row, bo = launch.row, launch.bo
    x_gmem, dy_gmem, x_smem, dy_smem = self.refs["x"], self.refs["dy"], self.smem["x_smem"], self.smem["dy_smem"]

    def segment(i, at, block, count):
      tile = self._tile(at)
      x_starts = [[self._x_start(tile, u, k) for k in range(0, _ROWS, row)] for u in range(launch.x_units)]
      entries = [(g, j) for g in range(launch.dy_groups) for j in range(launch.entries)]
      minor = lambda e: self.refs["minor"][jnp.minimum(e, launch.capacity - 1)]
      columns = {(g, j): minor(tile.begins[g] + j) * bo for g, j in entries}

      def step(s, count):
        slot = _rem(count, launch.stages)
        full, rows = self.full.at[slot], pl.ds(s * launch.t.step, launch.t.step)
        plgpu.barrier_wait(self.empty.at[slot])
        for u, starts in enumerate(x_starts):
          for k, start in enumerate(starts):
            plgpu.copy_gmem_to_smem(x_gmem.at[rows, pl.ds(start, row)], x_smem.at[slot, u, k], full)
        for g, j in entries:
          # Absent columns are not loaded: what is multiplied in their place is not stored.
          @pl.when(j < tile.counts[g])
          def _(g=g, j=j):
            for k in range(0, bo, row):
              source = dy_gmem.at[rows, pl.ds(columns[g, j] + k, row)]
              plgpu.copy_gmem_to_smem(source, dy_smem.at[slot, g, (j * bo + k) // row], full)

          @pl.when(j >= tile.counts[g])
          def _():
            for _ in range(0, bo, row):
              plgpu.barrier_arrive(full)

        return count + 1

      return lax.fori_loop(at.first, at.last, step, count)

    self._segments(segment)
    for slot in range(launch.stages):  # nobody leaves while a barrier is still to be signalled
      plgpu.barrier_wait(self.empty.at[slot])

  def multiply(self):
    launch, plgpu = self.launch, mg.plgpu
    for slot in range(launch.stages):  # every slot is free at first
      plgpu.barrier_arrive(self.empty.at[slot])
    self._clear()
    x_unit, dy_group = (0, self.warpgroup) if launch.flat else (self.warpgroup, 0)

    def segment(i, at, block, count):
      tile = self._tile(at)
      begin, entries = tile.begins[0], tile.counts[0]
      if launch.flat:
        begin, entries = (jnp.where(self.warpgroup == 0, *pair) for pair in (tile.begins, tile.counts))
      slots = self._slots(begin)

      def step(s, carry):
        count, accumulator = carry
        slot = _rem(count, launch.stages)
        plgpu.barrier_wait(self.full.at[slot])
        accumulator = self._multiply(
          accumulator, self.smem["x_smem"].at[slot, x_unit], self.smem["dy_smem"].at[slot, dy_group]
        )
        plgpu.barrier_arrive(self.empty.at[slot])
        return count + 1, accumulator

      zeros = plgpu.layout_cast(jnp.zeros((_ROWS, _COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
      count, accumulator = lax.fori_loop(at.first, at.last, step, (count, zeros))
      accumulator = lax.fori_loop(1, at.earlier + 1, lambda back, a: self._receive(a, block - back), accumulator)

      @mg.pl.when(at.ends)
      def _finish():
        self._store(i, accumulator, tile, slots, entries)

      @mg.pl.when(~at.ends)
      def _pass_on():
        self._send(accumulator, block)

      return count

    self._segments(segment)
    plgpu.wait_smem_to_gmem(0)

  def _multiply(self, accumulator, x_ref, dy_ref):
    launch, plgpu = self.launch, mg.plgpu
    if launch.interpret is None:
      return self.product(accumulator, x_ref, dy_ref)
    a, b = x_ref[...].transpose(0, 2, 1), dy_ref[...].transpose(1, 0, 2)
    plgpu.commit_smem()  # these were ordinary loads, the copy engine writes next; the tensor cores need none
    a, b = a.reshape(_ROWS, launch.t.step), b.reshape(launch.t.step, _COLUMNS)
    return accumulator + jnp.dot(a, b, preferred_element_type=jnp.float32)

  def _mailbox(self, block):
    return self.refs["sums"].at[block, self.warpgroup]

  def _send(self, accumulator, block):
    """To the block of threads that finishes the tile; one sends at most one segment."""
    if self.launch.interpret is not None:
      self._mailbox(block)[...] = accumulator.reshape(-1)
      return
    device.send_sums(accumulator.shape)(accumulator, self._mailbox(block))
    mg.plgpu.semaphore_signal(self.arrived.at[block * WARPGROUPS + self.warpgroup], memory_scope="gpu")

  def _receive(self, accumulator, block):
    """Adds what a block has sent. The order is fixed, and so are the bits."""
    if self.launch.interpret is not None:
      return accumulator + self._mailbox(block)[...].reshape(accumulator.shape)
    mg.plgpu.semaphore_wait(self.arrived.at[block * WARPGROUPS + self.warpgroup], memory_scope="gpu")
    return device.add_sums(accumulator.shape)(accumulator, self._mailbox(block))

  def _slots(self, begin):
    """For every entry of this warpgroup and every block row in it, the slot of the block; the capacity: absent."""
    launch, slots = self.launch, self.refs["slots"]
    rows = _ROWS // launch.out_piece
    place = self.warpgroup * rows if launch.shared > rows else 0
    entry = lambda j: jnp.minimum(begin + j, launch.capacity - 1) * launch.shared
    return [[slots[entry(j) + place + r] for r in range(rows)] for j in range(launch.entries)]

  def _store(self, i, accumulator, tile, slots, entries):
    launch, plgpu, pl, out_smem = self.launch, mg.plgpu, mg.pl, self.smem["out_smem"]
    width, piece = launch.out_columns, launch.out_piece
    first_row = 0 if launch.shared > 1 else tile.sub * launch.height
    if launch.shared == 1 and not launch.flat:
      first_row += self.warpgroup * _ROWS
    chunks = _COLUMNS // width
    for chunk in range(chunks):
      column = chunk * width
      staged = out_smem.at[self.warpgroup, _rem(i * chunks + chunk, launch.epilogue_slots)]
      self._wait_for_staging()
      staged[...] = accumulator[:, column : column + width].astype(launch.out_dtype)
      plgpu.commit_smem()
      for r, own in enumerate(slots[column // launch.bo]):

        @pl.when((column // launch.bo < entries) & (own < launch.capacity))
        def _(r=r, own=own):
          target = self.refs["out"].at[own, pl.ds(first_row, piece), pl.ds(column % launch.bo, width)]
          plgpu.copy_smem_to_gmem(staged.at[pl.ds(r * piece, piece)], target, commit_group=False)

      plgpu.commit_smem_to_gmem_group()

  def _wait_for_staging(self):
    # The interpreter knows no empty groups of stores, which are what a block that is absent leaves.
    in_flight = self.launch.epilogue_slots - 1 if self.launch.interpret is None else 0
    mg.plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)

  def _clear(self):
    """Zeros to slots without a block."""
    launch, plgpu, pl = self.launch, mg.plgpu, mg.pl
    workers = (launch.threads if launch.interpret is None else 1) * WARPGROUPS
    own = self.block * WARPGROUPS + self.warpgroup
    piece, width = launch.out_piece, launch.out_columns
    staged = self.smem["out_smem"].at[self.warpgroup, launch.epilogue_slots - 1]  # the last that `_store` comes to
    zeros = jnp.zeros((_ROWS, width), launch.out_dtype)
    staged[...] = zeros if launch.interpret is not None else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    plgpu.commit_smem()

    def one(i, _):
      block = self.refs["out"].at[self.refs["empty"][own + i * workers]]
      for row in range(0, launch.bk, piece):
        for column in range(0, launch.bo, width):
          target = block.at[pl.ds(row, piece), pl.ds(column, width)]
          plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, piece)], target, commit_group=False)

    number = jnp.maximum(self.refs["counts"][1] - own + workers - 1, 0)
    lax.fori_loop(0, _div(number, workers), one, None)
    plgpu.commit_smem_to_gmem_group()


def _product(launch):
  """accumulator [64, 256] + (64 columns of x)^T @ (gathered columns of dy), over the rows of a step."""
  plgpu = mg.plgpu
  WGMMA, ref = plgpu.Layout.WGMMA, plgpu.RefType(launch.row_transforms)

  def product(_, accumulator, x_ref, dy_ref):
    return mg.wgmma(accumulator, x_ref, dy_ref, a_transposed=True, b_transposed=False, swizzle=2 * launch.row)

  return plgpu.inline_mgpu(
    arg_types=(WGMMA, ref, ref),
    return_type=plgpu.ShapeDtypeStruct((_ROWS, _COLUMNS), jnp.float32, layout=WGMMA),
  )(product)


def mailboxes(launch: Launch) -> jax.ShapeDtypeStruct:
  """Where blocks of threads put parts of tiles that others finish."""
  return jax.ShapeDtypeStruct((launch.threads, WARPGROUPS, _ROWS * _COLUMNS), jnp.float32)
