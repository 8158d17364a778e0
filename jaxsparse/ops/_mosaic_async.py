"""Copies, barriers and products that are placed by hand, inside `plgpu.inline_mgpu`; beside `_mosaic_gpu`.

Pallas lets every thread of a warpgroup signal a barrier for every copy, and awaits a product before it returns. Where a
kernel is so short that this counts, one thread signals once a step, and products stay in flight.
"""

import importlib

from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.mosaic.gpu import launch_context
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import gpu
from jaxlib.mlir.dialects import nvvm
import numpy as np

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops import _words

ir, arith = mg.ir, mg.arith


def init_barriers(words, arrivals) -> None:
  """Begins mbarriers, one for each entry of `arrivals`, in an int32 ref of two words each; for all threads of a block.

  Without the fence of all memory that a "fence.proxy.async" would be: nothing but barriers has been written.
  """
  i64 = ir.IntegerType.get_signless(64)
  base = utils.memref_ptr(words)
  one = utils.single_thread_predicate(scope=utils.ThreadSubset.BLOCK)
  for i, count in enumerate(arrivals):
    nvvm.mbarrier_init(utils.getelementptr(base, [i], i64), mg.const32(count), predicate=one)
  nvvm.fence_mbarrier_init()
  gpu.barrier()


def await_barrier(words, index: _words.Word, parity: _words.Word) -> None:
  """Waits for the end of a phase of barrier `index` of `words`."""
  _words.asm(
    "{ .reg .pred p;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;\n@p bra DONE;\nbra WAIT;\nDONE: }",
    "",
    [_words.Word(mg.shared_address(words)) + index * 8, parity],
  )


def arrive(words, index: _words.Word, predicate) -> None:
  """Threads for which the i1 holds arrive at barrier `index` of `words`."""
  ptx = "{ .reg .pred p; setp.ne.u32 p, $1, 0; @p mbarrier.arrive.shared::cta.b64 _, [$0]; }"
  _words.asm(ptx, "", [_words.Word(mg.shared_address(words)) + index * 8, _words.select(predicate, 1, 0)])


def expect_bytes(words, index: _words.Word, count: int | _words.Word) -> None:
  """Arrives at barrier `index` of `words`, whose phase ends when so many bytes have come; for one thread."""
  barrier, count = (
    _words.Word(mg.shared_address(words)) + index * 8,
    _words.Word(count) if isinstance(count, int) else count,
  )
  _words.asm("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "", [barrier, count])


def leader():
  """i1: one thread of the warpgroup, known to the compiler as such."""
  return utils.single_thread_predicate(scope=utils.ThreadSubset.WARPGROUP)


def elected():
  """i1: one thread of each warp, known to the compiler as such."""
  return utils.single_thread_predicate(scope=utils.ThreadSubset.WARP)


def copy_tile(
  ctx, source, target, window, row, words, index, swizzle: int, slabs: int | None = None, order=None
) -> None:
  """Begins to copy a window of device memory, filled with zeros outside of `source`; for one thread.

  Args:
    ctx: first argument of an `inline_mgpu` function.
    source: an operand of the kernel.
    target: in shared memory.
    window: an index or (first, size) for every axis of `source`; i32.
    row: of `target`'s first axis, where the window begins; a `Word` where an order is given.
    words, index: the barrier that it completes on.
    swizzle: 128, 64 or 32.
    slabs: the last axis of the window is split into parts of this length, which become the first axis.
    order: of the window's axes in `target`; the first has size 1.
  """
  as_index = lambda i: arith.index_cast(ir.IndexType.get(), i)
  window = tuple(utils.ds(as_index(w[0]), w[1]) if isinstance(w, tuple) else as_index(w) for w in window)
  transform, rows = (), window[-2].length
  if slabs is not None:
    rows = window[-1].length // slabs
    transform = (launch_context.TileTransform((slabs,)), launch_context.TransposeTransform((1, 0, 2)))
  if order is not None:
    transform = (launch_context.TransposeTransform(order),)
  place = slice(row, row + rows) if order is None else utils.ds(as_index(row.v), 1)
  ctx.async_copy(
    src_ref=source,
    dst_ref=utils.memref_slice(target, place),
    gmem_slice=window,
    gmem_transform=transform,
    barrier=utils.BarrierRef(utils.memref_ptr(words), index, None, 1),
    swizzle=swizzle,
    arrive=False,
    predicate=None,
  )


def at(ref, index: _words.Word):
  """`ref[index]`."""
  return utils.memref_slice(ref, arith.index_cast(ir.IndexType.get(), index.v))


def wgmma_loop(shape, steps: _words.Word, body):
  """`for i in range(steps): registers = body(i, registers)` from zeros; an f32 array `shape` of the layout WGMMA.

  Args:
    shape: of the accumulator.
    steps: how many.
    body: (Word, registers) -> registers, by `begin_wgmma`.
  """
  zero = _wgmma().WGMMAAccumulator.zero(*shape)._value
  as_array = lambda registers: np.array(registers, dtype=object).reshape(zero.registers.shape)
  step = lambda i, registers: list(body(i, as_array(registers)).flat)
  registers = _words.loop(_words.Word(0), steps, list(zero.registers.flat), step)
  nvvm.wgmma_wait_group_sync_aligned(0)
  result = fragmented_array.FragmentedArray(_registers=as_array(registers), _layout=zero.layout, _is_signed=None)
  # Nothing may read the registers before the wait above.
  return fragmented_array.optimization_barrier(result).to_layout(fragmented_array.WGMMA_LAYOUT)


def begin_wgmma(registers, w, x, swizzle: int):
  """Begins `accumulator + w.T @ x` and awaits what was begun before it; returns the accumulator's registers.

  Args:
    registers: of the accumulator, `[64, N]`, or `[64, 2 N]` where e is 32: then rows of w alternate between its halves,
      32 by 32, and so does x, so that of its quarters two have a meaning.
    w: `[K, e]` in shared memory, rows of `swizzle` bytes.
    x: `[K / e, N, e]`, likewise.
    swizzle: 128 or 64.
  """
  depth, e = ir.MemRefType(w.type).shape
  columns = ir.MemRefType(x.type).shape[1]
  halves = 64 // e
  layout = fragmented_array.WGMMA_LAYOUT_ACC_32BIT
  value = fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
  accumulator = _wgmma().WGMMAAccumulator(_value=value, _original_layout=layout, _sync=False)
  nvvm.wgmma_fence_aligned()
  step = depth if halves == 1 else 64
  for k in range(0, depth, step):
    a = utils.memref_unfold(utils.memref_slice(w, slice(k, k + step)), 0, (halves, None))
    b = utils.memref_fold(utils.memref_slice(x, slice(k // e, (k + step) // e)), 0, 2)
    b = utils.memref_unfold(b, 0, (None, halves * columns))
    # mgpu wants tiles by row and column, whatever their place in memory: (M, K) of a, (K, N) of b.
    a, b = (utils.memref_transpose(utils.memref_unfold(ref, 1, (None, 8)), (0, 1, 3, 2)) for ref in (a, b))
    accumulator = _wgmma().wgmma(accumulator, a, b, swizzle=swizzle)
  nvvm.wgmma_commit_group_sync_aligned()
  nvvm.wgmma_wait_group_sync_aligned(1)
  return accumulator._value.registers


def elements(array):
  """(value, (row, column)) of all entries that this thread holds; columns and rows as `Word`s."""
  found = []
  word = lambda index: _words.Word(arith.index_cast(_words.i32(), index))
  array.foreach(lambda value, place: found.append((value, tuple(map(word, place)))))
  return found


def wgmma_offset(i: int) -> tuple[int, int]:
  """How many rows and columns an accumulator's i-th entry of a thread lies behind its first one (`elements`)."""
  return 8 * (i // 2 % 2), 8 * (i // 4) + i % 2


def _wgmma():
  return importlib.import_module("jax.experimental.mosaic.gpu.wgmma")  # the package has a function of this name
