"""The pipeline of `_decode` on the GPU: one thread copies, a warpgroup multiplies and does not wait for its last product.

Weights are operand A of wgmma, 64 outputs, and x is operand B, as wide as there are rows. A strip of 32 outputs multiplies 64
rows of w at a time: the two halves of A and of B meet in four quarters, of which two are wanted; in the end they are
added up.
"""

import jax.numpy as jnp

from jaxsparse.ops import _mosaic_async as async_ops
from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops import _words
from jaxsparse.ops._words import arith
from jaxsparse.ops._words import asm
from jaxsparse.ops._words import Word
from jaxsparse.ops.block_matmul import _decode

_ROWS = 64  # of operand A
_WARPS = 4


class Pipeline:
  """See `_decode._Interpreted`, which says what the methods do. Barriers of full steps come first, then of empty ones."""

  def __init__(self, p, transforms, x_gmem, w_gmem, y_gmem, *, x_smem, w_smem, barriers, inbox):
    self.p, self.x_gmem, self.w_gmem, self.y_gmem = p, x_gmem, w_gmem, y_gmem
    self.x_smem, self.w_smem, self.barriers, self.inbox = x_smem, w_smem, barriers, inbox
    plgpu = mg.plgpu
    self.scalar, self.ref, self.tile = plgpu.Layout.WG_SPLAT(()), plgpu.RefType(), plgpu.RefType(transforms)
    arrivals = [1] * p.tuning.stages + [_WARPS] * p.tuning.stages
    self._inline(lambda _, barriers: async_ops.init_barriers(barriers, arrivals), self.ref)(barriers)

  @staticmethod
  def scratch(p):
    plgpu = mg.plgpu
    words = _decode.inbox_words(p.tuning.strip, p.tuning.split, p.columns)
    return dict(barriers=plgpu.SMEM((4 * p.tuning.stages,), jnp.int32), inbox=plgpu.SMEM((words,), jnp.float32))

  def copy(self, slot, sources, within):
    scalars = [jnp.int32(s) for s in (slot, within, *(s for source in sources for s in source))]
    types = [self.ref, self.ref, self.tile, self.tile, self.ref, *[self.scalar] * len(scalars)]
    targets = self.x_smem.at[slot], self.w_smem.at[slot]
    self._inline(self._copy, *types)(self.x_gmem, self.w_gmem, *targets, self.barriers, *scalars)

  def await_room(self, step):
    self._inline(self._await_room, self.ref, self.scalar)(self.barriers, step)

  def finish(self, steps):
    del steps  # barriers live as long as the block of threads

  def multiply(self, steps):
    plgpu = mg.plgpu
    shape = (_ROWS, _halves(self.p) * self.p.columns)
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA)
    run = self._inline(self._multiply, self.tile, self.tile, self.ref, self.scalar, result=result)
    return run(self.x_smem, self.w_smem, self.barriers, steps)

  def store(self, accumulator, outputs, part):
    del part
    columns = self.p.columns
    quarters = [accumulator[:, i : i + columns] for i in range(0, accumulator.shape[1], columns)]
    types = [mg.plgpu.Layout.WGMMA] * len(quarters)
    self._inline(self._store, self.scalar, self.ref, self.ref, *types)(outputs, self.y_gmem, self.inbox, *quarters)

  def _inline(self, body, *types, result=None):
    return mg.plgpu.inline_mgpu(arg_types=types, return_type=result)(body)

  # -- Inside inline_mgpu ------------------------------------------------------------------------------------------------

  def _copy(self, ctx, x_gmem, w_gmem, x_smem, w_smem, barriers, *scalars):
    p, width = self.p, self.p.tuning.strip
    slot, within, *sources = (s.registers.item() for s in scalars)
    size = jnp.dtype(p.dtype).itemsize * p.tuning.depth * (width + p.columns)
    swizzle, slabs = 2 * width, p.unit // width

    def begin():
      async_ops.expect_bytes(barriers, Word(slot), size)
      for i in range(p.units):
        block, offset, k = sources[3 * i : 3 * i + 3]
        w_window = block, (offset, p.unit), (within, width)
        x_window = (mg.const32(0), p.columns), (k, p.unit)
        async_ops.copy_tile(ctx, w_gmem, w_smem, w_window, i * p.unit, barriers, slot, swizzle)
        async_ops.copy_tile(ctx, x_gmem, x_smem, x_window, i * slabs, barriers, slot, swizzle, slabs=width)

    _words.when(async_ops.leader(), begin)

  def _await_room(self, ctx, barriers, step):
    del ctx
    stages, step = self.p.tuning.stages, Word(step.registers.item())
    async_ops.await_barrier(barriers, step % stages + stages, (step // stages + 1) & 1)

  def _multiply(self, ctx, x_smem, w_smem, barriers, steps):
    del ctx
    p, stages = self.p, self.p.tuning.stages
    first_lane = (Word(mg.thread_index()) & 31).compare("eq", 0)

    def body(step, registers):
      slot = step % stages
      async_ops.await_barrier(barriers, slot, (step // stages) & 1)
      w, x = async_ops.at(w_smem, slot), async_ops.at(x_smem, slot)
      registers = async_ops.begin_wgmma(registers, w, x, 2 * p.tuning.strip)
      # All but what was begun just now is done: the step before may be overwritten.
      before = (step + (stages - 1)) % stages + stages
      async_ops.arrive(barriers, before, arith.andi(first_lane, step.compare("ge", 1)))
      return registers

    return async_ops.wgmma_loop((_ROWS, _halves(p) * p.columns), Word(steps.registers.item()), body)

  def _store(self, ctx, outputs, y, inbox, *quarters):
    """Everybody sends their sums to the first half of the first block of threads, which adds them up in a fixed order."""
    del ctx
    p, halves, split = self.p, len(quarters), self.p.tuning.split
    threads = mg.WARPGROUP // halves
    thread = Word(mg.thread_index())
    place = Word(mg.shared_address(inbox)) + (thread & (threads - 1)) * 4
    mine = [async_ops.elements(quarter) for quarter in quarters]
    stride = 4 * threads  # bytes from one entry of a thread to its next one
    first, other = (thread.compare(kind, threads) for kind in ("lt", "ge"))
    if split > 1:
      first = _send_to_cluster(place, mine, first, other, stride)
    elif halves > 1:
      _words.when(other, lambda: _send(place, mine[1], stride))
      mg.warpgroup_barrier()

    def add_and_store():
      base, o_first = mg.global_address(y), Word(outputs.registers.item())
      size = jnp.dtype(p.out_dtype).itemsize
      for i, (value, (o, b)) in enumerate(mine[0]):
        for sender in range(halves * split - 1):
          at = sender * stride * len(mine[0]) + stride * i
          value = arith.addf(value, _words.shared_load(place, at, 1, "f")[0])
        inside = _words.select(b.compare("lt", p.batch), 1, 0) if p.batch % 8 else Word(1)
        _store_one(_words.offset64(base, b * p.o + o_first + o, size), value, inside, p.out_dtype)

    if halves * split > 1:
      _words.when(first, add_and_store)
    else:
      add_and_store()


def _halves(p):
  return _ROWS // p.tuning.strip


def _send(place, values, stride, where="shared"):
  for i, (value, _) in enumerate(values):
    asm(f"st.{where}.f32 [$0 + {stride * i}], $1;", "", [place, value])


def _send_to_cluster(place, mine, first, other, stride):
  """All but the first half of the first block of threads send to that one; returns who receives."""
  (rank,) = asm("mov.u32 $0, %cluster_ctarank;", "r", [], effects=False)
  halves, size = len(mine), stride * len(mine[0])

  def send(half):
    sender = rank * halves + (half - 1)
    (remote,) = asm("mapa.shared::cluster.u32 $0, $1, 0;", "r", [place + sender * size])
    _send(remote, mine[half], stride, "shared::cluster")

  if halves > 1:
    _words.when(other, lambda: send(1))
  _words.when(arith.andi(first, rank.compare("ne", 0)), lambda: send(0))
  asm("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;", "", [])
  return arith.andi(first, rank.compare("eq", 0))


def _store_one(address, value, inside, dtype):
  """Stores an f32 as `dtype` where `inside` is not 0."""
  if dtype == "float32":
    store = "@p st.global.f32 [$0], $1;"
  else:
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    store = f".reg .b16 h; cvt.rn.{kind}.f32 h, $1; @p st.global.b16 [$0], h;"
  asm("{ .reg .pred p; setp.ne.u32 p, $2, 0; " + store + " }", "", [address, value, inside])
