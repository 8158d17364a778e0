"""What the warpgroups of the sampled product do: load, multiply, add up what was cut, store (`_hopper` says why).

One warpgroup runs `Body.load`, the others `Body.multiply`; both walk the same segments of tiles and hand slots of a ring
in shared memory to each other.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul._hopper_tiles import div, rem
from jaxsparse.ops.nm_matmul import _hopper_device as device
from jaxsparse.ops.sampled_matmul._hopper_launch import CHUNK, CHUNKS, COLUMNS, Launch, ROWS, STEP, WARPGROUPS

_LOADERS = 4  # warps of the loading warpgroup


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
    self.rounds = div(tiles, launch.threads)
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
    item = 3 * div(segment.tile, launch.tiles_of_list)
    which, begin, end = (items[item + i] for i in range(3))
    begins, counts = [begin], [end - begin]
    if launch.flat:
      half = div(end - begin + 1, 2)
      begins, counts = [begin, begin + half], [half, end - begin - half]
    return Tile(which, rem(segment.tile, launch.tiles_of_list), begins, counts)

  def _x_start(self, tile, unit: int):
    """First column of x of a unit."""
    launch = self.launch
    if launch.shared > 1 and not launch.flat:
      return self.refs["units"][tile.which * WARPGROUPS + unit] * ROWS
    return tile.which * max(launch.bk, launch.height) + tile.sub * launch.height + unit * ROWS

  def load(self):
    # Copies of 32 columns are many: all warps issue some.
    @mg.plgpu.warp_map
    def _(warp):
      for loader in range(_LOADERS):
        mg.pl.when(warp == loader)(functools.partial(self._load, loader))

  def _load(self, loader: int):
    """What one warp does: every fourth slab is its own."""
    launch, plgpu, pl = self.launch, mg.plgpu, mg.pl
    x_gmem, dy_gmem, x_smem, dy_smem = self.refs["x"], self.refs["dy"], self.smem["x_smem"], self.smem["dy_smem"]
    x_own = range(launch.x_units)[loader::_LOADERS]
    dy_own = range(launch.dy_groups * launch.dy_slabs)[(loader - launch.x_units) % _LOADERS :: _LOADERS]

    def segment(i, at, block, count):
      tile = self._tile(at)
      x_starts = [self._x_start(tile, u) for u in x_own]
      dy_starts = [self._dy_start(tile, slab) for slab in dy_own]

      def step(s, count):
        slot = rem(count, launch.stages)
        full, rows = self.full.at[slot], pl.ds(s * STEP, STEP)
        plgpu.barrier_wait(self.empty.at[slot])
        for u, start in zip(x_own, x_starts):
          plgpu.copy_gmem_to_smem(x_gmem.at[rows, pl.ds(start, ROWS)], x_smem.at[slot, u], full)
        for slab, start in zip(dy_own, dy_starts):
          target = dy_smem.at[slot, slab // launch.dy_slabs, slab % launch.dy_slabs]

          # What is multiplied in place of absent columns is not stored.
          @pl.when(start >= 0)
          def _(start=start, target=target):
            plgpu.copy_gmem_to_smem(dy_gmem.at[rows, pl.ds(start, launch.dy_row)], target, full)

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
    group, column = divmod(slab * launch.dy_row, COLUMNS)
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
        slot = rem(count, launch.stages)
        plgpu.barrier_wait(self.full.at[slot])
        accumulator = self._multiply(
          accumulator, self.smem["x_smem"].at[slot, x_unit], self.smem["dy_smem"].at[slot, dy_group]
        )
        plgpu.barrier_arrive(self.empty.at[slot])
        return count + 1, accumulator

      zeros = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
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
    a, b = x_ref[...].T, dy_ref[...].transpose(1, 0, 2)
    plgpu.commit_smem()  # these were ordinary loads, the copy engine writes next; the tensor cores need none
    b = b.reshape(STEP, COLUMNS)
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
      for chunk in range(CHUNKS):
        sums[chunk] = accumulator[:, chunk * CHUNK : (chunk + 1) * CHUNK].reshape(-1)
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
    receive = device.receive_sums((ROWS, CHUNK)) if launch.interpret is None else lambda a: a[...].reshape(ROWS, CHUNK)

    first, last = (lax.div(CHUNKS * p, self.members) for p in (member, member + 1))

    def chunk(c, _):
      def add(q, total):
        return total + receive(sums.at[group * self.members + q, self.warpgroup, c])

      zeros = jnp.zeros((ROWS, CHUNK), jnp.float32)
      if launch.interpret is None:
        zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
      total = lax.fori_loop(0, self.members, add, zeros)
      slots = self._slots(begin + div(c * CHUNK, launch.bo))
      width = launch.out_columns
      for i in range(CHUNK // width):
        turn = (c - first) * (CHUNK // width) + i
        part = total[:, i * width : (i + 1) * width]
        self._store_columns(turn, part, c * CHUNK + i * width, tile, slots, entries)

    lax.fori_loop(first, last, chunk, None)

  def _slots(self, entry):
    """For every block row of this warpgroup in an entry of a list, the slot of the block; the capacity: absent."""
    launch = self.launch
    rows = ROWS // launch.out_piece
    place = self.warpgroup * rows if launch.shared > rows else 0
    first = jnp.minimum(entry, launch.capacity - 1) * launch.shared + place
    return [self.refs["slots"][first + r] for r in range(rows)]

  def _store(self, i, accumulator, tile, begin, entries):
    launch = self.launch
    width, chunks = launch.out_columns, COLUMNS // launch.out_columns
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
      first_row += self.warpgroup * ROWS
    staged = self.smem["out_smem"].at[self.warpgroup, rem(turn, launch.epilogue_slots)]
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
    zeros = jnp.zeros((ROWS, width), launch.out_dtype)
    staged[...] = zeros if launch.interpret is not None else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    plgpu.commit_smem()

    def one(i, _):
      block = self.refs["out"].at[self.refs["empty"][own + i * workers]]
      for row in range(0, launch.bk, piece):
        for column in range(0, launch.bo, width):
          target = block.at[pl.ds(row, piece), pl.ds(column, width)]
          plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, piece)], target, commit_group=False)

    number = jnp.maximum(self.refs["counts"][1] - own + workers - 1, 0)
    lax.fori_loop(0, div(number, workers), one, None)
    plgpu.commit_smem_to_gmem_group()


def _product(launch):
  """accumulator [64, 256] + (64 columns of x)^T @ (gathered columns of dy), over the rows of a step."""
  plgpu = mg.plgpu
  WGMMA, dtype = plgpu.Layout.WGMMA, {"bfloat16": "bf16", "float16": "f16"}[launch.dtype.name]
  x_row, dy_row = 2 * ROWS, 2 * launch.dy_row  # bytes

  def product(_, accumulator, x_ref, dy_ref):
    # Rows of x and dy are what is summed over: in both operands it is columns that run fastest.
    a = mg.matrix_descriptor(x_ref, leading=0, stride=8 * x_row, swizzle=x_row)
    b = mg.matrix_descriptor(dy_ref, leading=STEP * dy_row, stride=8 * dy_row, swizzle=dy_row)
    accumulator, registers = mg.accumulator_registers(accumulator)
    for k in range(0, STEP, 16):
      a_k, b_k = (mg.add64(base, mg.descriptor_offset(k * row)) for base, row in ((a, x_row), (b, dy_row)))
      registers[0] = mg.dense_wgmma(list(registers[0]), a_k, b_k, columns=COLUMNS, dtype=dtype)
    return mg.finish_wgmma(accumulator, registers)

  return plgpu.inline_mgpu(
    arg_types=(WGMMA, plgpu.RefType(launch.x_transforms), plgpu.RefType(launch.dy_transforms)),
    return_type=plgpu.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, layout=WGMMA),
  )(product)
