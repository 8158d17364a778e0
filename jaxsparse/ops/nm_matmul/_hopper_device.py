"""Device code of the sparse tensor-core matmul that Pallas has no words for: one warpgroup's MMA and its epilogue.

Each function returns an `inline_mgpu` callable for a kernel body; refs and arrays are those of `_hopper`.
"""

import jax.numpy as jnp

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops import _mosaic_meeting as meeting
from jaxsparse.ops.nm_matmul._hopper_layout import ALIGNMENT, CHUNK

INSTRUCTION_ROWS = 64  # outputs that one wgmma covers
INSTRUCTION_K = 32  # reduction that one sparse wgmma covers; it reads 16 stored entries
ROW = 64  # 16-bit entries in a 128-byte row of shared memory


def sparse_step(t, in_name, k_major, a_transforms, x_transforms, metadata_transforms):
  """The product of one pipeline step: accumulator += a @ x^T, with A 2:4 and its positions in `metadata`."""
  plgpu = mg.plgpu
  wg_rows = t.tile_m // t.compute_warpgroups
  wg_blocks = wg_rows // INSTRUCTION_ROWS
  stored_bytes = t.tile_k  # of one row of stored entries: tile_k / 2 entries of two bytes
  if k_major:
    a_block, a_instruction = INSTRUCTION_ROWS * stored_bytes, INSTRUCTION_K
    a_descriptor = dict(leading=0, stride=8 * stored_bytes, swizzle=stored_bytes)
  else:  # atoms of 8 stored rows x 64 outputs, outputs first
    a_block = mg.ATOM_BYTES
    a_stride = t.tile_m // ROW * a_block
    a_instruction = INSTRUCTION_K // 2 // 8 * a_stride
    a_descriptor = dict(leading=a_block, stride=a_stride, swizzle=mg.SWIZZLE_BYTES)
  x_block = t.tile_n * mg.SWIZZLE_BYTES

  def step(_, accumulator, a_ref, x_ref, metadata_ref):
    words = _load_metadata(metadata_ref, t.tile_m, wg_blocks, t.tile_k // 64)
    a_base = mg.matrix_descriptor(a_ref, **a_descriptor)
    x_base = mg.matrix_descriptor(x_ref, leading=0, stride=8 * mg.SWIZZLE_BYTES, swizzle=mg.SWIZZLE_BYTES)
    accumulator, registers = mg.accumulator_registers(accumulator)
    for block in range(wg_blocks):
      for k in range(t.tile_k // INSTRUCTION_K):
        registers[block] = mg.sparse_wgmma(
          list(registers[block]),
          mg.add64(a_base, mg.descriptor_offset(block * a_block + k * a_instruction)),
          mg.add64(x_base, mg.descriptor_offset(k // 2 * x_block + k % 2 * 2 * INSTRUCTION_K)),
          words[block][k // 2],
          selector=k % 2,
          columns=t.tile_n,
          dtype=in_name,
          a_transposed=not k_major,
        )
    return mg.finish_wgmma(accumulator, registers)

  WGMMA = plgpu.Layout.WGMMA
  return plgpu.inline_mgpu(
    arg_types=(WGMMA, plgpu.RefType(a_transforms), plgpu.RefType(x_transforms), plgpu.RefType(metadata_transforms)),
    return_type=plgpu.ShapeDtypeStruct((wg_rows, t.tile_n), jnp.float32, layout=WGMMA),
  )(step)


def _load_metadata(ref, tile_m, blocks, k_blocks):
  """The positions of this thread, one word for each 64 rows and 64 of the reduction: `words[block][k_block]`.

  Lane 4 g + c of a warp holds the positions of reduction chunk c (16 wide): row g of the warp's 16 in the low half, row
  g + 8 in the high half. In shared memory the 4 chunks x 16 rows of a warp are one line of 128 bytes, that is an 8 x 8
  matrix whose row 2 c + h holds rows 8 h ... 8 h + 7 of chunk c: exactly what a transposed ldmatrix hands out.
  """
  strip_bytes = ALIGNMENT // CHUNK * CHUNK * 2
  lane = mg.arith.andi(mg.thread_index(), mg.const32(31))
  warp = mg.arith.shrui(mg.thread_index(), mg.const32(5))
  # Warps of a warpgroup own neighbouring strips of 16 rows; warpgroup w starts at strip w * 4 * blocks.
  warpgroup, warp = mg.arith.shrui(warp, mg.const32(2)), mg.arith.andi(warp, mg.const32(3))
  strip = mg.arith.addi(mg.arith.muli(warpgroup, mg.const32(4 * blocks)), warp)
  row = mg.arith.muli(mg.arith.andi(lane, mg.const32(7)), mg.const32(16))
  # Lanes 8 i ... 8 i + 7 address matrix i; matrices run over blocks first, then over the reduction.
  matrix = mg.arith.shrui(lane, mg.const32(3))
  block_of = mg.arith.remui(matrix, mg.const32(blocks))
  k_of = mg.arith.divui(matrix, mg.const32(blocks))
  strip = mg.arith.addi(strip, mg.arith.muli(block_of, mg.const32(4)))
  strip = mg.arith.addi(strip, mg.arith.muli(k_of, mg.const32(tile_m // CHUNK)))
  offset = mg.arith.addi(mg.arith.muli(strip, mg.const32(strip_bytes)), row)
  count = blocks * k_blocks
  words = mg.load_matrices_transposed(mg.arith.addi(mg.shared_address(ref), offset), count)
  return [[words[k * blocks + block] for k in range(k_blocks)] for block in range(blocks)]


def store_transposed(group_rows, dtype, transforms):
  """Stores a `[64, columns]` accumulator slice as `columns` swizzled rows of 128 bytes; in f32 as two groups of them.

  Groups lie `group_rows` rows apart.
  """
  plgpu = mg.plgpu

  def store(_, y, ref):
    registers = y.registers.reshape(-1, 2)  # [8 columns, rows 0-7 or 8-15 of the warp's 16]
    lane = mg.arith.andi(mg.thread_index(), mg.const32(31))
    warp = mg.arith.andi(mg.arith.shrui(mg.thread_index(), mg.const32(5)), mg.const32(3))
    base = mg.shared_address(ref)
    if dtype.itemsize == 2:
      _store_16bit(registers, base, warp, lane)
    else:
      _store_32bit(registers, base, warp, lane, group_rows)

  return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(transforms)))(store)


def _store_16bit(registers, base, warp, lane):
  # Lane 8 i + r addresses row r of matrix i; matrices alternate between the upper and the lower 8 outputs of the warp.
  arith, const = mg.arith, mg.const32
  row, matrix = arith.andi(lane, const(7)), arith.shrui(lane, const(3))
  half, group = arith.andi(matrix, const(1)), arith.shrui(matrix, const(1))
  chunk = arith.xori(arith.addi(arith.muli(warp, const(2)), half), row)
  address = arith.addi(base, arith.muli(row, const(128)))
  address = arith.addi(address, arith.muli(chunk, const(16)))
  paired = arith.addi(address, arith.muli(group, const(mg.ATOM_BYTES)))
  groups = registers.shape[0]
  for i in range(0, groups - 1, 2):
    words = [mg.as_i32(r) for r in registers[i : i + 2].flat]
    mg.store_matrices_transposed(paired, i * mg.ATOM_BYTES, words)
  if groups % 2:
    mg.store_matrices_transposed(address, (groups - 1) * mg.ATOM_BYTES, [mg.as_i32(r) for r in registers[-1]])


def _store_32bit(registers, base, warp, lane, group_rows):
  # Lane 4 g + c holds columns 2 c and 2 c + 1 of rows g and g + 8: banks of one store are all different.
  arith, const = mg.arith, mg.const32
  g, c = arith.shrui(lane, const(2)), arith.andi(lane, const(3))
  box = arith.muli(arith.shrui(warp, const(1)), const(group_rows * 128))  # 32 outputs to a row of 128 bytes
  for half in range(2):
    output = arith.addi(arith.muli(arith.andi(warp, const(1)), const(16)), arith.addi(g, const(8 * half)))
    for entry in range(2):
      row = arith.addi(arith.muli(c, const(2)), const(entry))
      chunk = arith.xori(arith.shrui(output, const(2)), row)
      address = arith.addi(arith.addi(base, box), arith.muli(row, const(128)))
      address = arith.addi(address, arith.muli(chunk, const(16)))
      address = arith.addi(address, arith.muli(arith.andi(output, const(3)), const(4)))
      for i in range(registers.shape[0]):
        mg.store_f32(address, i * mg.ATOM_BYTES, mg.extract(registers[i, half], entry))


def send_sums(shape):
  """Writes a float32 accumulator `shape` to a ref `[prod(shape)]` in device memory, register by register.

  Thread t's i-th four sums lie at 4 * (128 i + t): the same thread of another block takes them back in full sectors.
  """
  plgpu = mg.plgpu

  def send(_, sums, ref):
    write_sums(sums, ref)
    mg.warpgroup_barrier()  # all of it is written before one thread says so

  return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))(send)


def write_sums(sums, ref):
  """What `send_sums` does, for a function inside `inline_mgpu` that lets the threads meet afterwards."""
  registers = list(sums.registers.flat)
  address = sums_address(ref)
  for i in range(0, len(registers), 2):
    four = [mg.extract(registers[i + j // 2], j % 2) for j in range(4)]
    meeting.store_global_f32x4(address, i // 2 * 16 * mg.WARPGROUP, four)


def receive_sums(shape):
  """What `send_sums` wrote, as an accumulator `shape`."""
  plgpu = mg.plgpu
  WGMMA = plgpu.Layout.WGMMA

  def receive(_, ref):
    address = sums_address(ref)
    count = shape[0] * shape[1] // mg.WARPGROUP
    sums = [meeting.load_global_f32x4(address, i * 16 * mg.WARPGROUP) for i in range(count // 4)]
    return mg.accumulator([value for four in sums for value in four], shape)

  return plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=WGMMA)
  )(receive)


def sums_address(ref):
  """Where this thread's first four sums lie in such a ref: byte address, i64."""
  thread = mg.arith.andi(mg.thread_index(), mg.const32(mg.WARPGROUP - 1))
  offset = mg.arith.extui(mg.ir.IntegerType.get_signless(64), mg.arith.muli(thread, mg.const32(16)))
  return mg.arith.addi(mg.global_address(ref), offset)
