"""What the warpgroups of the sampled product do: load, multiply, add up what was cut, store (`_hopper` says why).

One warpgroup runs `Body.load`, the others `Body.multiply`; both walk the same segments of tiles and hand slots of a ring
in shared memory to each other.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.nm_matmul import _hopper_device as device
from jaxsparse.ops.sampled_matmul import tuning as tunings

WARPGROUPS = 2  # that multiply
_LOADERS = 4  # warps of the loading warpgroup
STEP = 64  # rows of x and dy to a pipeline step
_ROWS = _plan.UNIT  # of w for one wgmma, and so for each warpgroup
_COLUMNS = _plan.SAMPLED_COLUMNS  # of a warpgroup
_MOST_PARTS = 8  # of a tile
_CHUNK = 32  # columns that are added up at a time
_CHUNKS = _COLUMNS // _CHUNK


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
    return -(-self.batch // STEP)

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
    """That are stored at a time."""
    return 16 if self.flat and self.out_dtype.itemsize == 4 else 32

  @property
  def out_piece(self) -> int:
    """Rows of a block in a warpgroup."""
    return min(self.bk, _ROWS)

  @property
  def epilogue_slots(self) -> int:
    """Stores in flight for each warpgroup; the ring of a flat tile leaves little room."""
    return 1 if self.flat else 2

  @property
  def stages(self) -> int:
    """Pipeline steps in shared memory."""
    return self.t.stages or (3 if self.flat else 4)

  @property
  def parts(self) -> list[int]:
    """Among how many blocks of threads a tile may be cut, where that saves more than meeting costs."""
    most = min(_MOST_PARTS, self.steps, self.threads)
    return [n for n in range(2, most + 1) if (self.steps - self.steps / n) * STEP > self.t.meeting]

  @property
  def x_slabs(self) -> int:
    """Slabs of shared memory, 64 rows of x by `row` of its columns each, of a unit."""
    return _ROWS // self.row

  @property
  def dy_slabs(self) -> int:
    """Likewise, of a group of dy's columns."""
    return _COLUMNS // self.row

  @property
  def row_transforms(self):
    return (mg.plgpu.SwizzleTransform(2 * self.row),)

  @property
  def out_transforms(self):
    width = self.out_columns
    return mg.plgpu.TilingTransform((8, width)), mg.plgpu.SwizzleTransform(width * self.out_dtype.itemsize)

  def scratch(self) -> dict[str, Any]:
    """Shared memory and barriers of a block."""
    plgpu, row, stages, transforms = mg.plgpu, self.row, self.stages, self.row_transforms
    out_shape = (WARPGROUPS, self.epilogue_slots, _ROWS, self.out_columns)
    copies = self.x_units * self.x_slabs + self.dy_groups * self.dy_slabs
    return dict(
      x_smem=plgpu.SMEM((stages, self.x_units, self.x_slabs, STEP, row), self.dtype, transforms=transforms),
      dy_smem=plgpu.SMEM((stages, self.dy_groups, self.dy_slabs, STEP, row), self.dtype, transforms=transforms),
      out_smem=plgpu.SMEM(out_shape, self.out_dtype, transforms=self.out_transforms),
      full=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
      empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )


class Segment(NamedTuple):
  """Rows of x that a block of threads sums over for one tile.

  Attributes:
    tile: which.
    first, last: step, and one past the last.
    whole: whether that is all of them; else other blocks have the rest.
  """

  tile: Any
  first: Any
  last: Any
  whole: Any


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
    tiles = refs["counts"][0] * launch.tiles_of_list
    self.rounds = _div(tiles, launch.threads)
    self.rest = tiles - self.rounds * launch.threads
    # What is left after whole rounds fills none: n blocks of threads, a group, share each of these tiles.
    self.members = jnp.int32(1)
    for n in launch.parts:
      self.members = jnp.where(self.rest <= launch.threads // n, n, self.members)
    if launch.interpret is None:
      self.arrived = mg.pl.get_global(mg.plgpu.SemaphoreType.REGULAR((launch.threads * WARPGROUPS,)))
      self.product = _product(launch)

  def _blocks(self, body, carry):
    """`body(block, carry) -> carry` for this block of threads; the interpreter knows no semaphores: one plays them all."""
    if self.launch.interpret is None:
      return body(self.block, carry)
    return lax.fori_loop(0, self.launch.threads, body, carry)

  def _segments(self, body):
    """`body(i, segment, block, steps so far) -> steps so far` for the segments of this block of threads."""
    launch, steps, members = self.launch, self.launch.steps, self.members

    def of_block(block, count):
      group = lax.div(block, members)
      member = block - group * members

      def one(i, count):
        whole = (i < self.rounds) | (members == 1)
        first, last = (lax.div(steps * p, members) for p in (member, member + 1))
        tile = i * launch.threads + jnp.where(whole, block, group)
        first, last = jnp.where(whole, 0, first), jnp.where(whole, steps, last)
        return body(i, Segment(tile, first, last, whole), block, count)

      return lax.fori_loop(0, self.rounds + (group < self.rest).astype(jnp.int32), one, count)

    self._blocks(of_block, jnp.int32(0))

  def _tile(self, segment) -> Tile:
    launch, items = self.launch, self.refs["items"]
    item = 3 * _div(segment.tile, launch.tiles_of_list)
    which, begin, end = (items[item + i] for i in range(3))
    begins, counts = [begin], [end - begin]
    if launch.flat:
      half = _div(end - begin + 1, 2)
      begins, counts = [begin, begin + half], [half, end - begin - half]
    return Tile(which, _rem(segment.tile, launch.tiles_of_list), begins, counts)

  def _x_start(self, tile, unit: int, column: int):
    """Column of x at a column of a unit."""
    launch = self.launch
    if launch.shared > 1 and not launch.flat:
      return self.refs["units"][tile.which * WARPGROUPS + unit] * _ROWS + column
    return tile.which * max(launch.bk, launch.height) + tile.sub * launch.height + unit * _ROWS + column

  def load(self):
    # Copies of 32 columns are many: all warps issue some.
    @mg.pl.core_map(mg.plgpu.WarpMesh(axis_name="warp"))
    def _():
      warp = lax.axis_index("warp")
      for loader in range(_LOADERS):
        mg.pl.when(warp == loader)(functools.partial(self._load, loader))

  def _load(self, loader: int):
    """What one warp does: every fourth slab of x and of dy is its own."""
    launch, plgpu, pl = self.launch, mg.plgpu, mg.pl
    x_gmem, dy_gmem, x_smem, dy_smem = self.refs["x"], self.refs["dy"], self.smem["x_smem"], self.smem["dy_smem"]
    x_own = list(itertools.product(range(launch.x_units), range(launch.x_slabs)))[loader::_LOADERS]
    dy_own = list(range(launch.dy_groups * launch.dy_slabs))[loader::_LOADERS]

    def segment(i, at, block, count):
      tile = self._tile(at)
      x_starts = [self._x_start(tile, u, k * launch.row) for u, k in x_own]
      dy_starts = [self._dy_start(tile, slab) for slab in dy_own]

      def step(s, count):
        slot = _rem(count, launch.stages)
        full, rows = self.full.at[slot], pl.ds(s * STEP, STEP)
        plgpu.barrier_wait(self.empty.at[slot])
        for (u, k), start in zip(x_own, x_starts):
          plgpu.copy_gmem_to_smem(x_gmem.at[rows, pl.ds(start, launch.row)], x_smem.at[slot, u, k], full)
        for slab, start in zip(dy_own, dy_starts):
          target = dy_smem.at[slot, slab // launch.dy_slabs, slab % launch.dy_slabs]

          # What is multiplied in place of absent columns is not stored.
          @pl.when(start >= 0)
          def _(start=start, target=target):
            plgpu.copy_gmem_to_smem(dy_gmem.at[rows, pl.ds(start, launch.row)], target, full)

          @pl.when(start < 0)
          def _():
            plgpu.barrier_arrive(full)

        return count + 1

      return lax.fori_loop(at.first, at.last, step, count)

    self._segments(segment)
    for slot in range(launch.stages):  # nobody leaves while a barrier is still to be signalled
      plgpu.barrier_wait(self.empty.at[slot])

  def _dy_start(self, tile, slab: int):
    """Column of dy at a slab; -1 where the list has none."""
    launch = self.launch
    group, column = divmod(slab * launch.row, _COLUMNS)
    entry, inside = divmod(column, launch.bo)
    minor = self.refs["minor"][jnp.minimum(tile.begins[group] + entry, launch.capacity - 1)]
    return jnp.where(entry < tile.counts[group], minor * launch.bo + inside, -1)

  def multiply(self):
    launch, plgpu = self.launch, mg.plgpu
    for slot in range(launch.stages):  # every slot is free at first
      plgpu.barrier_arrive(self.empty.at[slot])
    self._clear()
    x_unit, dy_group = (0, self.warpgroup) if launch.flat else (self.warpgroup, 0)

    def segment(i, at, block, count):
      tile = self._tile(at)
      begin, entries = self._own(tile)

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

      @mg.pl.when(at.whole)
      def _finish():
        self._store(i, accumulator, tile, begin, entries)

      @mg.pl.when(~at.whole)
      def _pass_on():
        self._send(accumulator, block)

      return count

    self._segments(segment)
    self._meet()
    plgpu.wait_smem_to_gmem(0)

  def _multiply(self, accumulator, x_ref, dy_ref):
    launch, plgpu = self.launch, mg.plgpu
    if launch.interpret is None:
      return self.product(accumulator, x_ref, dy_ref)
    a, b = x_ref[...].transpose(0, 2, 1), dy_ref[...].transpose(1, 0, 2)
    plgpu.commit_smem()  # these were ordinary loads, the copy engine writes next; the tensor cores need none
    a, b = a.reshape(_ROWS, STEP), b.reshape(STEP, _COLUMNS)
    return accumulator + jnp.dot(a, b, preferred_element_type=jnp.float32)

  def _own(self, tile):
    """First entry of this warpgroup, and how many it has."""
    if not self.launch.flat:
      return tile.begins[0], tile.counts[0]
    return tuple(jnp.where(self.warpgroup == 0, *pair) for pair in (tile.begins, tile.counts))

  def _send(self, accumulator, block):
    """Part of a tile, to where all blocks of a group find it."""
    sums = self.refs["sums"].at[block, self.warpgroup]
    if self.launch.interpret is not None:
      for chunk in range(_CHUNKS):
        sums[chunk] = accumulator[:, chunk * _CHUNK : (chunk + 1) * _CHUNK].reshape(-1)
      return
    device.send_sums(accumulator.shape)(accumulator, sums)
    first = lax.div(block, self.members) * self.members

    def tell(member, _):
      signal = self.arrived.at[(first + member) * WARPGROUPS + self.warpgroup]
      mg.plgpu.semaphore_signal(signal, memory_scope="gpu")

    lax.fori_loop(0, self.members, tell, None)

  def _meet(self):
    """Each block of a group adds up some columns of the tile that they share, in a fixed order, and stores them."""

    def of_block(block, _):
      group = lax.div(block, self.members)

      @mg.pl.when((self.members > 1) & (group < self.rest))
      def _():
        if self.launch.interpret is None:
          ready = self.arrived.at[block * WARPGROUPS + self.warpgroup]
          mg.plgpu.semaphore_wait(ready, self.members, memory_scope="gpu")
        self._add_up(group, block - group * self.members)

    self._blocks(of_block, None)

  def _add_up(self, group, member):
    launch, plgpu, sums = self.launch, mg.plgpu, self.refs["sums"]
    tile = self._tile(Segment(self.rounds * launch.threads + group, 0, 0, False))
    begin, entries = self._own(tile)
    receive = (
      device.receive_sums((_ROWS, _CHUNK)) if launch.interpret is None else lambda a: a[...].reshape(_ROWS, _CHUNK)
    )

    first, last = (lax.div(_CHUNKS * p, self.members) for p in (member, member + 1))

    def chunk(c, _):
      def add(q, total):
        return total + receive(sums.at[group * self.members + q, self.warpgroup, c])

      zeros = jnp.zeros((_ROWS, _CHUNK), jnp.float32)
      if launch.interpret is None:
        zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
      total = lax.fori_loop(0, self.members, add, zeros)
      slots = self._slots(begin + _div(c * _CHUNK, launch.bo))
      width = launch.out_columns
      for i in range(_CHUNK // width):
        turn = (c - first) * (_CHUNK // width) + i
        part = total[:, i * width : (i + 1) * width]
        self._store_columns(turn, part, c * _CHUNK + i * width, tile, slots, entries)

    lax.fori_loop(first, last, chunk, None)

  def _slots(self, entry):
    """For every block row of this warpgroup in an entry of a list, the slot of the block; the capacity: absent."""
    launch = self.launch
    rows = _ROWS // launch.out_piece
    place = self.warpgroup * rows if launch.shared > rows else 0
    first = jnp.minimum(entry, launch.capacity - 1) * launch.shared + place
    return [self.refs["slots"][first + r] for r in range(rows)]

  def _store(self, i, accumulator, tile, begin, entries):
    launch = self.launch
    width, chunks = launch.out_columns, _COLUMNS // launch.out_columns
    slots = [self._slots(begin + j) for j in range(launch.entries)]  # at once: each would wait for memory
    for chunk in range(chunks):
      column = chunk * width
      sums = accumulator[:, column : column + width]
      self._store_columns(i * chunks + chunk, sums, column, tile, slots[column // launch.bo], entries)

  def _store_columns(self, turn, sums, column, tile, slots, entries):
    """Some columns of a tile to the blocks that are there; `turn` counts the stores of this warpgroup."""
    launch, plgpu, pl = self.launch, mg.plgpu, mg.pl
    piece = launch.out_piece
    first_row = 0 if launch.shared > 1 else tile.sub * launch.height
    if launch.shared == 1 and not launch.flat:
      first_row += self.warpgroup * _ROWS
    staged = self.smem["out_smem"].at[self.warpgroup, _rem(turn, launch.epilogue_slots)]
    self._wait_for_staging()
    staged[...] = sums.astype(launch.out_dtype)
    plgpu.commit_smem()
    for r, own in enumerate(slots):

      @pl.when((column // launch.bo < entries) & (own < launch.capacity))
      def _(r=r, own=own):
        target = self.refs["out"].at[own, pl.ds(first_row, piece), pl.ds(column % launch.bo, launch.out_columns)]
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
  """Where blocks of threads put their parts of tiles."""
  return jax.ShapeDtypeStruct((launch.threads, WARPGROUPS, _CHUNKS, _ROWS * _CHUNK), jnp.float32)
