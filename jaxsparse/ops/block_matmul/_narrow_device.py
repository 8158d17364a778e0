"""Device code of the kernel for narrow blocks that Pallas has no words for; see `_narrow`.

Barriers of its ring of steps are set by hand: those of Pallas count an arrival of every thread for every copy, which takes
longer than loading small blocks does. The ring's words in shared memory are a barrier for every slot that is full, one for
every slot that is empty, and what is present in every slot.

A block comes as 16 rows of 128 bytes, two rows of the block each, since the copy engine is no slower with these than with
64. The products read it in rows of 64 bytes, which the swizzle of such rows puts elsewhere: of rows 8 to 15, and 24 to 31,
each has changed places with its neighbour. Where rows are what is summed over, neighbouring columns of x change places as
well, in registers; that those rows of w make up one instruction, the copy engine sees to (`load_step`). Where rows
are columns of the result, its registers do.
"""

import jax.numpy as jnp
import numpy as np

from jaxsparse.ops import _mosaic_gpu as mg

if mg.unavailable() is None:
  from jaxsparse.ops import _mosaic_async as hand
  from jaxsparse.ops import _words

ROWS = 64  # of x, to a warpgroup
CHUNK = 64  # entries of lists that are fetched at a time
LAST = 1 << 16  # of what is present: the tile ends with this step
_WARPS = 4  # that load
_AHEAD = 5  # blocks whose presence is looked up before they are reached


def words_of_ring(stages: int) -> int:
  """Words of shared memory for a ring of so many steps."""
  return 5 * stages


def init(launch):
  """`(words)`: sets barriers up, for all threads of a block."""
  stages = launch.stages

  def run(_, words):
    hand.init_barriers(words, [_WARPS] * stages + [4 * launch.multiplying] * stages)

  return mg.plgpu.inline_mgpu(arg_types=(mg.plgpu.RefType(),))(run)


def await_empty(launch):
  """`(words, slot, parity)`: waits until a slot has been read."""
  scalar = mg.plgpu.Layout.WG_SPLAT(())

  def run(_, words, slot, parity):
    hand.await_barrier(words, _word(slot) + launch.stages, _word(parity))

  return mg.plgpu.inline_mgpu(arg_types=(mg.plgpu.RefType(), scalar, scalar))(run)


def await_lists():
  """What `fetch_lists` began is there, for all threads of the warpgroup."""

  def run(_):
    mg.inline_ptx("cp.async.wait_all;", [], "")
    mg.warpgroup_barrier()

  return mg.plgpu.inline_mgpu()(run)


def fetch_lists(columns: int, entries: int):
  """`(minor, present, slots, target, first)`: begins to copy `CHUNK` entries to `target`, int32 `[2 + columns, CHUNK]`.

  Rows 0 and 1 get `minor` and `present`, the rest the slots, entry by entry. What lies behind the last of `entries` is
  never used, and something that is there is read for it.
  """
  plgpu, pieces = mg.plgpu, columns // 4  # of 16 bytes, to an entry: one for each thread

  def run(_, minor, present, slots, target, first):
    first, base = _word(first), _address(target)
    thread = _words.Word(mg.thread_index()) & (mg.WARPGROUP - 1)
    entry = lambda index: (first + index).min(entries - 1)
    upper = thread.compare("ge", CHUNK)
    source = mg.arith.select(upper, mg.global_address(present), mg.global_address(minor))
    copy = lambda source, offset, target, size: _words.asm(
      f"cp.async.ca.shared.global [$0], [$1], {size};", "", [target, _words.offset64(source, offset)]
    )
    copy(source, entry(thread & (CHUNK - 1)) * 4, base + thread * 4, 4)
    inside = thread % pieces * 16
    copy(mg.global_address(slots), entry(thread // pieces) * (4 * columns) + inside, base + 8 * CHUNK + thread * 16, 16)

  return plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 4, plgpu.Layout.WG_SPLAT(())))(run)


def load_step(launch):
  """`(words, lists, x, w, x_smem, w_smem, slot, parity, b, entry, taken, bits)`: loads a step.

  Each of the four warps loads the blocks of two columns, the first ones also x; one thread of each works, and tells how many
  bytes will come.

  Args:
    launch: `_narrow_body.Launch`.

  The function gets the words of the ring, a chunk of the lists, x and blocks in device memory, the slot's part of both
  rings; the slot, the parity of its last phase, the first row of x, the first entry of the step in the chunk, how many
  entries it takes, and what is present.
  """
  plgpu, parts, columns, size = mg.plgpu, launch.parts, launch.columns, launch.size
  ref, scalar = plgpu.RefType, plgpu.Layout.WG_SPLAT(())
  own = columns // _WARPS
  # Rows of a block that change places lie in lines 4 to 7 and 12 to 15: these get the second half of the sum.
  order = (0, 1, 2, 3, 4) if launch.transposed else (0, 2, 1, 3, 4)

  def run(ctx, words, lists, x, w, x_smem, w_smem, *scalars):
    slot, parity, b, entry, taken, bits = (_word(a) for a in scalars)
    warp, lists = _words.Word(mg.warp_index()) & (_WARPS - 1), _address(lists)
    first, zero = warp * own, mg.const32(0)
    minor, slots = lists + entry * 4, lists + 8 * CHUNK + entry * (4 * columns) + first * 4
    everywhere = sum(((1 << own) - 1) << (part * columns) for part in range(parts))
    mine = bits & _words.shift_left(everywhere, first)
    loads_x = [mg.arith.andi(warp.compare("eq", part), taken.compare("ge", part + 1)) for part in range(parts)]
    num_bytes = _words.population_count(mine) * (2 * size * size)
    for is_mine in loads_x:
      num_bytes = num_bytes + _words.select(is_mine, launch.tile_b * 2 * size, 0)
    hand.await_barrier(words, slot + launch.stages, parity)

    def copy_x(part):
      row = _words.shared_load(minor, 4 * part, 1)[0] * size  # here, for lack of registers
      window = ((b.v, launch.tile_b), (row.v, size))
      hand.copy_tile(ctx, x, hand.at(x_smem, _words.Word(part)), window, 0, words, slot.v, 2 * size)

    def copy_block(part, j, bit):
      before = _words.population_count(bits & (bit - 1))
      (block,) = _words.shared_load(slots, 4 * (columns * part + j), 1)
      window = ((block.v, 1), *((zero, length) for length in launch.block_lines))
      hand.copy_tile(ctx, w, w_smem, window, before, words, slot.v, mg.SWIZZLE_BYTES, order=order)

    def issue():
      place = _address(words) + slot * 4 + 16 * launch.stages
      tell = lambda: _words.asm("st.shared.u32 [$0], $1;", "", [place, bits])
      _words.when(warp.compare("eq", 0), tell)
      hand.expect_bytes(words, slot, num_bytes)
      for part in range(parts):
        _words.when(loads_x[part], lambda part=part: copy_x(part))
      for part in range(parts):
        for j in range(own):
          bit = _words.shift_left(1 << (part * columns + j), first)
          _words.when((mine & bit).compare("ne", 0), lambda part=part, j=j, bit=bit: copy_block(part, j, bit))

    _words.when(hand.elected(), issue)

  return plgpu.inline_mgpu(
    arg_types=(*[ref()] * 4, ref(launch.x_transforms), ref(launch.w_transforms), *[scalar] * 6),
  )(run)


def multiply_steps(launch):
  """`(accumulator, words, x_smem, w_smem, slot, parity, warpgroup)`: adds the products of all steps of a tile; awaited.

  Instructions for absent blocks are jumped over. All is one piece of PTX: what ptxas sees as a whole it does not serialise.
  A quarter of x fits in registers beside the 128 sums: of 32 of the sum, 16, one part after the other.

  Args:
    launch: `_narrow_body.Launch`.

  The function gets sums `[64, 256]`, the words of the ring, the rings, where the first step is, and whose rows of x these
  are. It returns the sums, and where the next tile's first step will be.
  """
  plgpu = mg.plgpu
  WGMMA, scalar, ref = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(()), plgpu.RefType

  def run(_, accumulator, words, x_smem, w_smem, slot, parity, warpgroup):
    accumulator, registers = mg.accumulator_registers(accumulator)
    count, first_row = registers.size, _word(warpgroup) * ROWS
    in_out = [*registers.flat, _word(slot).v, _word(parity).v]
    inputs = [_address(words), _fragment_address(x_smem, first_row, launch), _descriptor(x_smem), _descriptor(w_smem)]
    inputs[2] = inputs[2] + first_row * (2 * launch.size // 16)
    ptx = _steps(launch, [f"${i}" for i in range(count)], *(f"${i}" for i in (count, count + 1)), 2 * len(in_out))
    field, i32 = registers.flat[0].type, _words.i32()
    constraints = ["=f"] * count + ["=r"] * 2 + [str(i) for i in range(len(in_out))] + ["r"] * len(inputs)
    types = [field] * count + [i32] * 2
    result = mg.inline_ptx(
      ptx, [*in_out, *(word.v for word in inputs)], ",".join(constraints), mg.llvm.StructType.get_literal(types)
    )
    out = [mg.llvm.extractvalue(type_, result, [i]) for i, type_ in enumerate(types)]
    # Columns of every other 8 have changed places with their neighbours where they are rows of blocks.
    sums = [out[i ^ (i >> 2 & 1)] if launch.transposed else out[i] for i in range(count)]
    return mg.finish_wgmma(accumulator, np.array(sums, dtype=object)), mg.splat(out[count]), mg.splat(out[count + 1])

  number = plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar)
  width = launch.columns * launch.size
  return plgpu.inline_mgpu(
    arg_types=(WGMMA, ref(), ref(launch.x_transforms), ref(launch.w_transforms), *[scalar] * 3),
    return_type=(plgpu.ShapeDtypeStruct((ROWS, width), jnp.float32, layout=WGMMA), number, number),
  )(run)


def stage(launch):
  """`(y, staged)`: stores results of a block column, `[64, 32]`, to swizzled rows in shared memory."""
  plgpu, row = mg.plgpu, launch.size * launch.out_dtype.itemsize

  def run(_, y, staged):
    mg.store_rows(y, staged, row)

  return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(launch.out_transforms)))(run)


def _steps(launch, sums, slot, parity, inputs):
  """PTX of `multiply_steps`: the loop over steps.

  Args:
    launch: as there.
    sums: names of the registers of the sums.
    slot, parity: names of those of the place in the ring.
    inputs: number of the first operand that is only read: the words of the ring; then what a thread gives `ldmatrix` for the
      first slot, and descriptors of x and blocks there.
  """
  row, stages = 2 * launch.size, launch.stages
  words, line, x, w = (f"${inputs + i}" for i in range(4))
  part_bytes, offset = launch.tile_b * row, mg.descriptor_offset
  code = 2 << 30  # rows of 64 bytes
  # w lies in two halves of the sum, 4 lines in turn, where its rows are what is summed over.
  stride = 8 * row if launch.transposed else 16 * row
  ptx = "{ .reg .pred p, p<8>; .reg .b32 t, bits, lo, line, line2, xd, wd, hx, hw, a<4>; .reg .b64 da, db; "
  ptx += f"mov.u32 hx, {offset(8 * row) | code}; mov.u32 hw, {offset(stride) | code}; "
  ptx += f"STEP: mad.lo.u32 t, {slot}, 8, {words}; "
  ptx += f"WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [t], {parity}; @!p bra WAIT; "
  ptx += f"mad.lo.u32 t, {slot}, 4, {words}; ld.shared.b32 bits, [t + {16 * stages}]; "
  ptx += f"mad.lo.u32 line, {slot}, {launch.parts * part_bytes}, {line}; add.u32 line2, line, {part_bytes}; "
  ptx += f"mad.lo.u32 xd, {slot}, {offset(launch.parts * part_bytes)}, {x}; "
  ptx += f"mad.lo.u32 wd, {slot}, {offset(launch.room * launch.size * row)}, {w}; "
  for part in range(launch.parts):
    if part:
      ptx += f"and.b32 t, bits, {(1 << launch.columns) - 1 << part * launch.columns}; setp.eq.u32 p, t, 0; "
      ptx += f"@p bra.uni DONE; add.u32 xd, xd, {offset(part_bytes)}; mov.u32 line, line2; "
    ptx += _part(launch, sums, part)
  ptx += f"DONE: mad.lo.u32 lo, {slot}, 8, {words}; mov.u32 t, %laneid; setp.eq.u32 p, t, 0; "
  ptx += f"@p mbarrier.arrive.shared::cta.b64 _, [lo + {8 * stages}]; "
  ptx += f"add.u32 {slot}, {slot}, 1; setp.eq.u32 p, {slot}, {stages}; @p xor.b32 {parity}, {parity}, 1; "
  return ptx + f"@p mov.u32 {slot}, 0; and.b32 t, bits, {LAST}; setp.eq.u32 p, t, 0; @p bra STEP; }}"


def _part(launch, sums, part):
  """PTX: products of one block row of a step."""
  size, columns = launch.size, launch.columns
  dtype = "bf16" if launch.dtype == jnp.bfloat16 else "f16"
  across = int(not launch.transposed)  # whether columns of the result run fastest in a block
  half = 4 * mg.SWIZZLE_BYTES if across else 32  # bytes to the second half of the sum
  # The word is the same in all threads of a warp, and tested as a float it still comes to a predicate of each thread, which a
  # jump can use at once; one of the whole warp would have to be moved first. Small floats are not taken for 0 here.
  test = lambda j: f"and.b32 t, bits, {1 << part * columns + j}; setp.eq.f32 p{j}, t, 0f00000000; "
  ptx = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {a0, a1, a2, a3}, [line]; "
  if across:
    ptx += "".join(f"prmt.b32 a{i}, a{i}, a{i}, 0x1032; " for i in range(4))
  ptx += "".join(test(j) for j in range(_AHEAD)) + "wgmma.fence.sync.aligned; "
  for j in range(columns):
    if 1 <= j <= columns - _AHEAD:
      ptx += test(j + _AHEAD - 1)
    ptx += f"@p{j} bra.uni SKIP{part}_{j}; "
    mine = ", ".join(sums[j * size // 2 : (j + 1) * size // 2])
    for n in (across, 1 - across):  # first the half that is in registers
      x, flags = ("{a0, a1, a2, a3}", f"{across}") if n == across else ("da", f"0, {across}")
      if n != across:
        ptx += f"add.u32 lo, xd, {mg.descriptor_offset(32 * n)}; mov.b64 da, {{lo, hx}}; "
      ptx += f"add.u32 lo, wd, {mg.descriptor_offset(half * n)}; mov.b64 db, {{lo, hw}}; "
      ptx += f"wgmma.mma_async.sync.aligned.m64n{size}k16.f32.{dtype}.{dtype} {{{mine}}}, {x}, db, 1, 1, 1, {flags}; "
    ptx += f"add.u32 wd, wd, {mg.descriptor_offset(2 * size * size)}; SKIP{part}_{j}: "
  return ptx + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; "


def _fragment_address(ref, first_row, launch):
  """What this thread gives `ldmatrix` for the half of 64 rows of x that comes from registers."""
  lane, warp = _words.Word(mg.thread_index()) & 31, _words.Word(mg.thread_index()) >> 5 & 3
  # Lanes 8 i ... 8 i + 7 address the rows of matrix i: rows 0-7 and 8-15 of the warp's 16, then the same 8 further on.
  row, matrix = lane & 7, lane >> 3
  line = first_row + warp * 16 + (matrix & 1) * 8 + row
  piece = (matrix >> 1) + (0 if launch.transposed else 2)
  return _address(ref) + line * (2 * launch.size) + (piece ^ (row >> 1 & 3)) * 16


def _descriptor(ref):
  """The lower half of a matrix descriptor whose leading offset is 0."""
  return (_address(ref) & 0x3FFFF) >> 4


def _address(ref):
  return _words.Word(mg.shared_address(ref))


def _word(value):
  """The register of a scalar."""
  return _words.Word(value.registers.item())
