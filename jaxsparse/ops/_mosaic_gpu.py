"""The one module that touches Pallas' Mosaic GPU backend and what lies under it.

That backend moves between releases of JAX, so kernels import it from here: `pl` and `plgpu` are Pallas, the functions
below are the few MLIR and PTX words that Pallas has no name for (sparse tensor cores, transposing stores). They are
meant to be called inside `plgpu.inline_mgpu`. Importing this module imports Pallas: do it where a kernel is built.

Where `unavailable()` is not None nothing else in this module may be used.
"""

import functools
import importlib

import jax
import numpy as np

MINIMUM_JAX = (0, 11)
WARPGROUP = 128  # threads that issue one wgmma together
SWIZZLE_BYTES = 128  # row of a swizzled shared-memory tile: one bank sweep
ATOM_BYTES = 8 * SWIZZLE_BYTES  # the swizzle pattern repeats after 8 rows
_SWIZZLE_CODES = {128: 1, 64: 2, 32: 3}  # of a wgmma matrix descriptor, bits 62-63


@functools.cache
def unavailable() -> str | None:
  """Why Mosaic GPU kernels cannot be built with this JAX, as a sentence; None if they can."""
  if jax.__version_info__[:2] < MINIMUM_JAX:
    needed = ".".join(map(str, MINIMUM_JAX))
    return f"GPU kernels need jax >= {needed} (and so Python >= 3.12), this is {jax.__version__}."
  try:
    importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    importlib.import_module("jax.experimental.mosaic.gpu.fragmented_array")
  except ImportError as error:
    return f"Pallas' Mosaic GPU backend cannot be imported: {error}."
  return None


if unavailable() is None:
  from jax.experimental import pallas as pl  # noqa: F401  (kernels take it from here)
  from jax.experimental.mosaic.gpu import fragmented_array as _fragments
  from jax.experimental.mosaic.gpu import utils as _utils
  from jax.experimental.pallas import mosaic_gpu as plgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith, llvm, nvvm

  Interpret = plgpu.InterpretGPUParams
  # Kernels here never read shared memory that they wrote themselves, so they place their barriers by hand.
  COMPILER_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
  )
else:  # kernel modules can then still be imported, to be asked why they cannot run
  pl = plgpu = ir = arith = llvm = nvvm = None


def split_roles(warpgroup, multiplying: int, load, multiply, registers: tuple[int, int] | None) -> None:
  """In a kernel body: the last warpgroup runs `load()`, the `multiplying` ones before it `multiply()`.

  Args:
    warpgroup: index of this one.
    multiplying: warpgroups that multiply.
    load, multiply: the bodies.
    registers: of a loading and of a multiplying thread; None leaves them as they are (in the interpreter).
  """

  @pl.when(warpgroup == multiplying)
  def _load():
    if registers is not None:
      plgpu.set_max_registers(registers[0], action="decrease")
    load()

  @pl.when(warpgroup < multiplying)
  def _multiply():
    if registers is not None:
      plgpu.set_max_registers(registers[1], action="increase")
    multiply()


def sm_count() -> int:
  """Streaming multiprocessors of the GPU that is lowered for; 132 (H100, H200) where none is at hand."""
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    return abstract.num_cores or 132
  device = jax.devices()[0]
  return device.core_count if device.platform == "gpu" else 132


# -- Words of the device code (only inside inline_mgpu) ---------------------------------------------------------------


def const32(value: int):
  """The constant as an i32."""
  return arith.constant(ir.IntegerType.get_signless(32), value)


def const64(value: int):
  """The constant as an i64."""
  return arith.constant(ir.IntegerType.get_signless(64), value)


def add64(x, offset: int):
  """An i64 plus a constant."""
  return arith.addi(x, const64(offset)) if offset else x


def thread_index():
  """Index of this thread in its block, i32."""
  return _utils.thread_idx()


def shared_address(ref):
  """Byte address of a shared-memory ref inside the shared window, i32."""
  return llvm.ptrtoint(ir.IntegerType.get_signless(32), _utils.memref_ptr(ref))


def inline_ptx(instruction: str, operands, constraints: str, result=None):
  """One volatile PTX instruction; `result` is an MLIR type or None."""
  return llvm.inline_asm(
    ir.Type.parse("!llvm.void") if result is None else result,
    operands,
    instruction,
    constraints,
    asm_dialect=0,
    has_side_effects=True,
  )


def is_thread(index: int):
  """Whether this is thread `index` of its warpgroup, i1."""
  return arith.cmpi(arith.CmpIPredicate.eq, arith.andi(thread_index(), const32(WARPGROUP - 1)), const32(index))


def matrix_descriptor(ref, *, leading: int, stride: int, swizzle: int):
  """wgmma descriptor of a swizzled tile in shared memory (PTX ISA, "Matrix descriptor format"), i64.

  Args:
    ref: shared-memory memref whose rows are `swizzle` bytes; aligned to 8 rows.
    leading: bytes between swizzle atoms along the dimension that runs fastest (0 where an instruction meets only one).
    stride: bytes between swizzle atoms along the other dimension.
    swizzle: 128, 64 or 32.
  """
  address = arith.extui(ir.IntegerType.get_signless(64), shared_address(ref))
  base = arith.shrui(arith.andi(address, const64(0x3FFFF)), const64(4))
  constant = (_encode(leading) << 16) | (_encode(stride) << 32)
  # The code lies in the sign bits, which the constant builder does not take as a positive number.
  code = arith.shli(const64(_SWIZZLE_CODES[swizzle]), const64(62))
  return arith.ori(base, arith.ori(const64(constant), code))


def _encode(num_bytes: int) -> int:
  if num_bytes % 16 or not 0 <= num_bytes < 1 << 18:
    raise ValueError(f"A matrix descriptor cannot hold an offset of {num_bytes} bytes.")
  return num_bytes >> 4


def descriptor_offset(num_bytes: int) -> int:
  """What to add to a descriptor to move its base by `num_bytes`."""
  return _encode(num_bytes)


def load_matrices_transposed(address, count: int):
  """ldmatrix of `count` (1, 2, 4) transposed 8x8 matrices of 16-bit entries: a list of i32."""
  return _load_matrices(address, count, ".trans")


def load_matrices(address, count: int):
  """As `load_matrices_transposed`, without transposing."""
  return _load_matrices(address, count, "")


def store_matrices_transposed(address, offset: int, words):
  """stmatrix of `len(words)` (1, 2, 4) transposed 8x8 matrices of 16-bit entries, two to a word."""
  names = ", ".join(f"${i + 1}" for i in range(len(words)))
  ptx = f"stmatrix.sync.aligned.m8n8.x{len(words)}.trans.shared.b16 [$0 + {offset}], {{{names}}};"
  inline_ptx(ptx, [address, *words], ",".join(["r"] * (1 + len(words))))


def _load_matrices(address, count, transposed):
  i32 = ir.IntegerType.get_signless(32)
  names = ", ".join(f"${i}" for i in range(count))
  ptx = f"ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {{{names}}}, [${count}];"
  if count == 1:
    return [inline_ptx(ptx, [address], "=r,r", i32)]
  struct = llvm.StructType.get_literal([i32] * count)
  words = inline_ptx(ptx, [address], ",".join(["=r"] * count + ["r"]), struct)
  return [llvm.extractvalue(i32, words, [i]) for i in range(count)]


def store_f32(address, offset: int, value):
  """Stores one f32 to shared memory."""
  inline_ptx(f"st.shared.f32 [$0 + {offset}], $1;", [address, value], "r,f")


def accumulator_registers(accumulator):
  """Fences an f32 accumulator against wgmma; returns its registers, one f32 each, as an array [rows / 64, columns / 2].

  LLVM may pack neighbouring registers into vectors before wgmma, and ptxas then serialises the instructions: the
  one-element layout keeps them apart.
  """
  accumulator = accumulator.to_layout(_fragments.WGMMA_LAYOUT_ACC_32BIT)
  accumulator = _fragments.optimization_barrier(accumulator)
  nvvm.wgmma_fence_aligned()
  registers = accumulator.registers
  return accumulator, registers.reshape(registers.shape[0], -1)


def finish_wgmma(accumulator, registers):
  """Commits and awaits the wgmma instructions of this warpgroup; returns the accumulator with its new registers."""
  nvvm.wgmma_commit_group_sync_aligned()
  nvvm.wgmma_wait_group_sync_aligned(0)
  result = _fragments.FragmentedArray(
    _registers=registers.reshape(accumulator.registers.shape), _layout=accumulator.layout, _is_signed=None
  )
  # Nothing may read the registers before the wait above.
  return _fragments.optimization_barrier(result).to_layout(_fragments.WGMMA_LAYOUT)


def sparse_wgmma(registers, a, b, metadata, *, selector: int, columns: int, dtype: str, a_transposed: bool):
  """wgmma.mma_async.sp of 64 x columns x 32: returns the accumulator's new registers.

  Args:
    registers: `columns / 2` accumulator registers (vectors of one f32).
    a: descriptor of the 2:4 operand, 64 x 16 stored entries.
    b: descriptor of the dense operand, columns x 32 with the reduction contiguous.
    metadata: i32, 64 x 64 positions shared by two instructions.
    selector: 0 for the first 32 of the reduction that `metadata` covers, 1 for the rest.
    columns: multiple of 8, at most 256.
    dtype: "bf16" or "f16".
    a_transposed: whether rows, not the reduction, run fastest in `a`.
  """
  # The last two immediates say which operands are transposed.
  return _issue_wgmma(
    f"wgmma.mma_async.sp.sync.aligned.m64n{columns}k32.f32.{dtype}.{dtype}",
    registers,
    [a, b, metadata],
    "llr",
    f"{selector}, 1, 1, 1, {int(a_transposed)}, 0",
  )


def dense_wgmma(registers, a, b, *, columns: int, dtype: str):
  """wgmma.mma_async of 64 x columns x 16, rows of a and columns of b running fastest: the accumulator's new registers.

  Args:
    registers: `columns / 2` accumulator registers (vectors of one f32).
    a, b: descriptors of operands whose swizzles may differ.
    columns: multiple of 8, at most 256.
    dtype: "bf16" or "f16".
  """
  instruction = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype}"
  return _issue_wgmma(instruction, registers, [a, b], "ll", "1, 1, 1, 1, 1")


def _issue_wgmma(instruction: str, registers, operands, constraints: str, immediates: str):
  """A wgmma on accumulator registers, vectors of one f32: the new ones. Immediates begin with scale-d or what precedes it."""
  count = len(registers)
  field = ir.VectorType.get((1,), ir.F32Type.get())
  names = ", ".join(f"${i}" for i in range(count))
  inputs = ", ".join(f"${2 * count + i}" for i in range(len(operands)))
  constraints = ["=f"] * count + [str(i) for i in range(count)] + list(constraints)
  struct = llvm.StructType.get_literal([field] * count)
  ptx = f"{instruction} {{{names}}}, {inputs}, {immediates};"
  result = inline_ptx(ptx, [*registers, *operands], ",".join(constraints), struct)
  return [llvm.extractvalue(field, result, [i]) for i in range(count)]


def as_i32(register):
  """A register of two 16-bit entries as one word."""
  return llvm.bitcast(ir.IntegerType.get_signless(32), register)


def splat(value):
  """An i32 as what `inline_mgpu` returns for a scalar."""
  return _fragments.FragmentedArray.splat(value, (), is_signed=True)


def extract(register, index: int):
  """Entry `index` of a register that is a vector."""
  return llvm.extractelement(register, const32(index))


def accumulator(values, shape):
  """f32 values of this thread, in the order of a wgmma accumulator's registers, as an array `shape` of that layout."""
  layout = _fragments.WGMMA_LAYOUT
  pair = ir.VectorType.get((2,), ir.F32Type.get())
  registers = []
  for i in range(0, len(values), 2):
    register = llvm.mlir_undef(pair)
    for j in range(2):
      register = llvm.insertelement(register, values[i + j], const32(j))
    registers.append(register)
  registers = np.array(registers, dtype=object).reshape(layout.registers_shape(shape))
  return _fragments.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def global_address(ref):
  """Byte address of a ref in device memory, i64."""
  return llvm.ptrtoint(ir.IntegerType.get_signless(64), _utils.memref_ptr(ref))


def warpgroup_barrier():
  """All threads of the warpgroup have come here."""
  _utils.warpgroup_barrier()


def warp_index():
  """Index of this thread's warp in its block, i32, known to be the same across the warp."""
  return _utils.warp_idx()


def pointer(ref):
  """LLVM pointer to the first element of a ref, in its address space."""
  return _utils.memref_ptr(ref)


def wgmma(accumulator, a, b, *, a_transposed: bool, b_transposed: bool, swizzle: int):
  """`accumulator + a @ b` on the dense tensor cores, awaited; operands are stacks of slabs in shared memory.

  A slab is `[rows, e]` with rows of `swizzle` bytes, e entries, as the copy engine writes it; its number of rows is a
  multiple of 8. So an operand may consist of pieces that were loaded apart, whichever of its axes runs fastest.

  Args:
    accumulator: f32 `[M, N]`, M a multiple of 64, N of 8 and at most 256.
    a: `[K / e, M, e]`, or `[M / e, K, e]` where transposed; or an array in registers, `a_transposed` then being None.
    b: `[N / e, K, e]`, or `[K / e, N, e]` where transposed.
    a_transposed, b_transposed: which of these it is.
    swizzle: 128, 64 or 32.
  """
  fold = lambda ref: _utils.memref_unfold(ref, 1, (None, 8))
  # mgpu wants tiles by row and column, whatever their place in memory: (M, K) of a, (K, N) of b.
  if a_transposed is not None:
    a = _utils.memref_transpose(fold(a), (0, 1, 3, 2) if a_transposed else (1, 0, 2, 3))
  b = _utils.memref_transpose(fold(b), (0, 1, 3, 2) if b_transposed else (1, 0, 2, 3))
  module = importlib.import_module("jax.experimental.mosaic.gpu.wgmma")  # the package has a function of this name
  result = module.wgmma(module.WGMMAAccumulator.from_registers(accumulator), a, b, swizzle=swizzle)
  nvvm.wgmma_commit_group_sync_aligned()
  nvvm.wgmma_wait_group_sync_aligned(0)
  # Nothing may read the registers before the wait above.
  return _fragments.optimization_barrier(result._value).to_layout(_fragments.WGMMA_LAYOUT)


def store_rows(value, ref, swizzle: int):
  """Stores an accumulator's `[rows, columns]` to shared memory `[rows, columns]`, in rows of `swizzle` bytes."""
  tiles = _utils.memref_unsqueeze(_utils.memref_unfold(ref, 0, (None, 8)), 1)
  value.store_tiled(tiles, swizzle)


def halves_of_rows(ref, halves, depth: int, dtype, *, transposed: bool, swizzle: int):
  """A tile of 64 rows from shared memory as operand A of wgmma in registers; rows of absent halves are 0.

  Args:
    ref: `[depth / e, 64, e]`, or `[64 / e, depth, e]` where transposed, in rows of `swizzle` bytes, e entries.
    halves: i32 splat; bit 0: rows 0-31 are there, bit 1: rows 32-63.
    depth: of the sum.
    dtype: bfloat16 or float16.
    transposed: whether rows run fastest.
    swizzle: 64, so e = 32.
  """
  if swizzle != 64:
    raise ValueError(f"halves_of_rows takes rows of 64 bytes, got {swizzle}.")
  lane = arith.andi(thread_index(), const32(31))
  warp = arith.andi(arith.shrui(thread_index(), const32(5)), const32(3))
  row, matrix = arith.andi(lane, const32(7)), arith.shrui(lane, const32(3))
  # Lanes 8 i ... 8 i + 7 address the rows of matrix i: rows 0-7 and 8-15 of the warp's 16, then the same 8 further on.
  row_half, depth_half = arith.andi(matrix, const32(1)), arith.shrui(matrix, const32(1))
  half = arith.shrui(warp, const32(1))
  bit = arith.andi(arith.shrui(halves.registers.item(), half), const32(1))
  keep = arith.subi(const32(0), bit)
  scaled = lambda x, factor: arith.muli(x, const32(factor))
  base = shared_address(ref)
  words = []
  for start in range(0, depth, 16):
    if transposed:  # slab of 32 rows, then the sum, then 16-byte pieces of 8 rows
      line = arith.addi(const32(start), arith.addi(scaled(depth_half, 8), row))
      piece = arith.addi(scaled(arith.andi(warp, const32(1)), 2), row_half)
      slab = scaled(half, depth * swizzle)
    else:
      line = arith.addi(scaled(warp, 16), arith.addi(scaled(row_half, 8), row))
      piece = arith.addi(const32(start % 32 // 8), depth_half)
      slab = const32(start // 32 * 64 * swizzle)
    piece = arith.xori(piece, arith.andi(arith.shrui(line, const32(1)), const32(3)))
    address = arith.addi(arith.addi(base, slab), arith.addi(scaled(line, swizzle), scaled(piece, 16)))
    words += _load_matrices(address, 4, ".trans" if transposed else "")
  pair = ir.VectorType.get((2,), ir.BF16Type.get() if dtype == "bfloat16" else ir.F16Type.get())
  layout = _fragments.WGMMA_LAYOUT
  registers = np.array([llvm.bitcast(pair, arith.andi(word, keep)) for word in words], dtype=object)
  return _fragments.FragmentedArray(
    _registers=registers.reshape(layout.registers_shape((64, depth))), _layout=layout, _is_signed=None
  )
