"""The pipeline of `_decode` on the GPU: one thread copies, a warpgroup multiplies and does not wait for its last product.

Weights are operand A of wgmma, 64 outputs, and x is operand B, as wide as there are rows. A strip of 32 outputs multiplies 64
rows of w at a time: the two halves of A and of B meet in four quarters, of which two are wanted; in the end they are
added up.
"""

import functools

import jax.numpy as jnp

from jaxsparse.ops import _mosaic_async as async_ops
from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops import _mosaic_meeting as meeting
from jaxsparse.ops import _words
from jaxsparse.ops._words import arith
from jaxsparse.ops._words import asm
from jaxsparse.ops._words import Word
from jaxsparse.ops.block_matmul import _decode

_ROWS = 64  # of operand A
_WARPS = 4
_SUMS_AT_ONCE, _PIECES_AT_ONCE = 8, 2  # that a thread adds


class Pipeline:
  """See `_decode._Interpreted`, which says what the methods do. Barriers of full steps come first, then of empty ones."""

  def __init__(self, p, transforms, x_gmem, w_gmem, *results, x_smem, w_smem, barriers, inbox):
    self.p, self.x_gmem, self.w_gmem = p, x_gmem, w_gmem
    self.results = results  # y; or counters of pieces, y and sums of pieces
    self.x_smem, self.w_smem, self.barriers, self.inbox = x_smem, w_smem, barriers, inbox
    self.loaders = p.tuning.loaders
    plgpu = mg.plgpu
    self.scalar, self.ref, self.tile = plgpu.Layout.WG_SPLAT(()), plgpu.RefType(), plgpu.RefType(transforms)
    arrivals = [1] * p.tuning.stages + [_WARPS] * p.tuning.stages
    self._inline(lambda _, barriers: async_ops.init_barriers(barriers, arrivals), self.ref)(barriers)

  @staticmethod
  def scratch(p):
    plgpu = mg.plgpu
    words = _decode.inbox_words(p.tuning.strip, p.tuning.split, p.columns)
    return dict(barriers=plgpu.SMEM((4 * p.tuning.stages,), jnp.int32), inbox=plgpu.SMEM((words,), jnp.float32))

  def loader(self):
    result = mg.plgpu.ShapeDtypeStruct((), jnp.int32, layout=self.scalar)
    return self._inline(lambda _: mg.splat((Word(mg.warp_index()) & (_WARPS - 1)).v), result=result)()

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

  def store(self, accumulator, strip):
    p, columns = self.p, self.p.columns
    quarters = [accumulator[:, i : i + columns] for i in range(0, accumulator.shape[1], columns)]
    scalars = [strip.column * p.bo + strip.within]
    if p.places:
      scalars += [strip.sub, *(strip.heads[strip.line, i] for i in range(3, 6))]
    refs = self.inbox, *self.results
    types = [self.ref] * len(refs) + [self.scalar] * len(scalars) + [mg.plgpu.Layout.WGMMA] * len(quarters)
    self._inline(self._store, *types)(*refs, *map(jnp.int32, scalars), *quarters)

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

    _words.when(async_ops.elected() if self.loaders > 1 else async_ops.leader(), begin)

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

  def _store(self, ctx, inbox, *operands):
    """Everybody sends their sums to the first half of the first block of threads, which adds them up in a fixed order."""
    del ctx
    p, halves, split = self.p, _halves(self.p), self.p.tuning.split
    results, scalars, quarters = (
      operands[: len(self.results)],
      operands[len(self.results) : -halves],
      operands[-halves:],
    )
    y = results[1] if p.places else results[0]
    outputs, *piece = (Word(a.registers.item()) for a in scalars)
    threads = mg.WARPGROUP // halves
    thread = Word(mg.thread_index())
    place = Word(mg.shared_address(inbox)) + (thread & (threads - 1)) * 4
    mine = [async_ops.elements(quarter) for quarter in quarters]
    stride = 4 * threads  # bytes from one entry of a thread to its next one
    first, other = (thread.compare(kind, threads) for kind in ("lt", "ge"))
    root = None
    if split > 1:
      root = _send_to_cluster(place, mine, first, other, stride)
    elif halves > 1:
      _words.when(other, lambda: _send(place, mine[1], stride))
      mg.warpgroup_barrier()

    def sums_here():
      totals = []
      for i, (value, _) in enumerate(mine[0]):
        for sender in range(halves * split - 1):
          at = sender * stride * len(mine[0]) + stride * i
          value = arith.addf(value, _words.shared_load(place, at, 1, "f")[0])
        totals.append(value)
      return totals

    def store(totals, begin=0):
      size, (o, b) = jnp.dtype(p.out_dtype).itemsize, mine[0][0][1]
      address = _words.offset64(mg.global_address(y), b * p.o + outputs + o, size)
      for i, total in enumerate(totals, begin):
        down, across = async_ops.wgmma_offset(i)
        inside = _words.select((b + across).compare("lt", p.batch), 1, 0) if p.batch % 8 else Word(1)
        _store_one(address, size * (across * p.o + down), total, inside, p.out_dtype)

    only_first = first if halves > 1 else None
    if not p.places:
      _when([only_first, root], lambda: store(sums_here()))
      return
    pieces = piece[1]
    _when([pieces.compare("eq", 1), only_first, root], lambda: store(sums_here()))
    pieces_meet = _Meeting(p, results[0], results[2], mg.shared_address(inbox), piece, thread, threads)
    _when([pieces.compare("ne", 1), root], lambda: pieces_meet.run(only_first, sums_here, store))


class _Meeting:
  """Pieces of one list, for the same outputs, leave their sums in device memory; the last to come adds them, in their order.

  A counter, 0 before the launch, says who is the last.
  """

  def __init__(self, p, counters, sums, told, piece, thread, threads):
    self.p, self.told, self.thread, self.threads = p, told, thread, threads
    self.sub, self.pieces, self.place, self.index = piece
    self.values = p.tuning.strip * p.columns // threads  # of each thread
    self.sums = mg.global_address(sums)
    self.counter = _words.offset64(mg.global_address(counters), self.place * p.strips + self.sub, 4)

  def run(self, predicate, sums_here, store):
    def leave():
      totals = sums_here()
      for i in range(0, self.values, 4):
        meeting.store_global_f32x4(self._address(self.index), 4 * i * self.threads, totals[i : i + 4])

    _when([predicate], leave)
    mg.warpgroup_barrier()
    _words.when(mg.is_thread(0), self._count)
    mg.warpgroup_barrier()
    (before,) = _words.shared_load(Word(self.told), 0, 1)

    def add():
      for i in range(0, self.values, _SUMS_AT_ONCE):  # few registers: those of all sums would cost others their place
        end = min(i + _SUMS_AT_ONCE, self.values)
        store(self._totals(i, end), i)

    _when([(before + 1 - self.pieces).compare("eq", 0), predicate], add)

  def _count(self):
    """For one thread: all that its warpgroup wrote is there for whoever counts after it, and the other way round."""
    ptx = "{ .reg .u32 v; fence.acq_rel.gpu; atom.relaxed.gpu.global.add.u32 v, [$0], 1; fence.acq_rel.gpu; st.shared.u32 [$1], v; }"
    asm(ptx, "", [self.counter, Word(self.told)])

  def _address(self, piece):
    """Of this thread's first sums of a piece."""
    p = self.p
    slot = (self.place + piece) * p.strips + self.sub
    return _words.offset64(self.sums, slot * (p.tuning.strip * p.columns) + self.thread * 4, 4)

  def _totals(self, begin, end):
    """Of the thread's sums `begin` to `end`, over all pieces."""

    def some(i, totals):
      loaded = []
      for j in range(_PIECES_AT_ONCE):
        piece = i * _PIECES_AT_ONCE + j
        address = self._address(piece.min(self.pieces - 1))
        fours = [meeting.load_global_f32x4(address, 4 * k * self.threads) for k in range(begin, end, 4)]
        loaded.append((piece, [value for four in fours for value in four]))
      for piece, values in loaded:
        there = (piece - self.pieces).compare("lt", 0)
        values = [arith.select(there, value, _words.float32(0.0)) for value in values]
        totals = [arith.addf(total, value) for total, value in zip(totals, values, strict=True)]
      return totals

    rounds = (self.pieces + (_PIECES_AT_ONCE - 1)) // _PIECES_AT_ONCE
    return _words.loop(Word(0), rounds, [_words.float32(0.0)] * (end - begin), some)


def _when(conditions, body):
  """Runs body() where all i1s hold that are not None."""
  conditions = [c for c in conditions if c is not None]
  if conditions:
    _words.when(functools.reduce(arith.andi, conditions), body)
  else:
    body()


def _halves(p):
  return _ROWS // p.tuning.strip


def _send(place, values, stride, where="shared"):
  for i, (value, _) in enumerate(values):
    asm(f"st.{where}.f32 [$0 + {stride * i}], $1;", "", [place, value])


def _send_to_cluster(place, mine, first, other, stride):
  """All but the first half of the first block of threads send to that one; returns whether this block is it."""
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
  return rank.compare("eq", 0)


def _store_one(address, offset, value, inside, dtype):
  """Stores an f32 as `dtype` where `inside` is not 0."""
  if dtype == "float32":
    store = f"@p st.global.f32 [$0 + {offset}], $1;"
  else:
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    store = f".reg .b16 h; cvt.rn.{kind}.f32 h, $1; @p st.global.b16 [$0 + {offset}], h;"
  asm("{ .reg .pred p; setp.ne.u32 p, $2, 0; " + store + " }", "", [address, value, inside])
