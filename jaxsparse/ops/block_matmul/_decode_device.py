"""The pipeline of `_decode` on the GPU: one thread copies, a warpgroup multiplies without ever waiting for its last step.

Barriers are placed by hand, so that one thread signals each of them, once a step. Weights are operand A of wgmma, 64
outputs, and x is operand B, as wide as there are rows. A strip of 32 outputs multiplies 64 rows of w at a time: the two
halves of A and of B meet in four quadrants, of which two are wanted; in the end they are added up.
"""

import jax.numpy as jnp
from jax import lax

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops import _words
from jaxsparse.ops._words import Word
from jaxsparse.ops._words import arith
from jaxsparse.ops._words import asm

_ROWS = 64  # of operand A
_WARPS = 4


class Pipe:
  """See `_decode._Interpreted`, which does the same."""

  def __init__(self, p, transforms, x_gmem, w_gmem, y_gmem, *, x_smem, w_smem, barriers, sums):
    self.p, self.x_gmem, self.w_gmem, self.y_gmem = p, x_gmem, w_gmem, y_gmem
    self.x_smem, self.w_smem, self.barriers, self.sums = x_smem, w_smem, barriers, sums
    plgpu = mg.plgpu
    self.scalar, self.plain, self.tile = plgpu.Layout.WG_SPLAT(()), plgpu.RefType(), plgpu.RefType(transforms)
    self._inline(self._begin, self.plain)(barriers)

  @staticmethod
  def scratch(p):
    plgpu = mg.plgpu
    sums = _ROWS * p.columns // 2 if p.tuning.strip < _ROWS else 1
    return dict(barriers=plgpu.SMEM((4 * p.tuning.stages,), jnp.int32), sums=plgpu.SMEM((sums,), jnp.float32))

  def copy(self, slot, sources, at):
    scalars = [jnp.int32(s) for source in sources for s in source]
    types = [self.plain, self.plain, self.tile, self.tile, self.plain, self.scalar, self.scalar]
    run = self._inline(self._copy, *types, *[self.scalar] * len(scalars))
    run(self.x_gmem, self.w_gmem, self.x_smem.at[slot], self.w_smem.at[slot], self.barriers, jnp.int32(slot),
        jnp.int32(at), *scalars)  # fmt: skip

  def await_room(self, step):
    self._inline(self._await_room, self.plain, self.scalar)(self.barriers, step)

  def finish(self, steps):
    pass

  def multiply(self, steps):
    plgpu, p = mg.plgpu, self.p
    halves = max(1, _ROWS // p.tuning.strip)
    result = plgpu.ShapeDtypeStruct((_ROWS, halves * p.columns), jnp.float32, layout=plgpu.Layout.WGMMA)
    run = self._inline(self._multiply, self.tile, self.tile, self.plain, self.scalar, result=result)
    return run(self.x_smem, self.w_smem, self.barriers, steps)

  def store(self, accumulator, first):
    columns = self.p.columns
    parts = [accumulator[:, i : i + columns] for i in range(0, accumulator.shape[1], columns)]
    types = [mg.plgpu.Layout.WGMMA] * len(parts)
    self._inline(self._store, self.scalar, self.plain, self.plain, *types)(first, self.y_gmem, self.sums, *parts)

  def _inline(self, body, *types, result=None):
    return mg.plgpu.inline_mgpu(arg_types=types, return_type=result)(body)

  # -- Inside inline_mgpu ------------------------------------------------------------------------------------------------

  def _begin(self, ctx, barriers):
    """Barriers of full steps, then of empty ones."""
    del ctx
    stages, base = self.p.tuning.stages, Word(mg.shared_address(barriers))
    inits = "".join(
      f"@p mbarrier.init.shared::cta.b64 [$0 + {8 * s}], {1 if s < stages else _WARPS};\n" for s in range(2 * stages)
    )
    fence = "fence.mbarrier_init.release.cluster; fence.proxy.async; bar.sync 0;"
    asm("{ .reg .pred p; setp.eq.u32 p, $1, 0;\n" + inits + fence + "}", "", [base, Word(mg.thread_index())])

  def _copy(self, ctx, x_gmem, w_gmem, x_smem, w_smem, barriers, slot, at, *scalars):
    p, strip = self.p, self.p.tuning.strip
    slot, at, *scalars = (s.registers.item() for s in (slot, at, *scalars))
    barrier = mg.barrier(barriers, slot)
    size = jnp.dtype(p.dtype).itemsize * p.tuning.depth * (strip + p.columns)

    def issue():
      address = Word(mg.shared_address(barriers)) + Word(slot) * 8
      asm(f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size};", "", [address])
      for i in range(p.units):
        block, offset, k = scalars[3 * i : 3 * i + 3]
        mg.copy_tile(ctx, w_gmem, w_smem, (block, (offset, p.unit), (at, strip)), i * p.unit, barrier, 2 * strip)
        mg.copy_tile(
          ctx, x_gmem, x_smem, ((mg.const32(0), p.columns), (k, p.unit)), i * (p.unit // strip), barrier, 2 * strip,
          slabs=strip,
        )  # fmt: skip

    _words.when((Word(mg.thread_index()) & (mg.WARPGROUP - 1)).compare("eq", 0), issue)

  def _await_room(self, ctx, barriers, step):
    del ctx
    stages, step = self.p.tuning.stages, Word(step.registers.item())
    self._wait(barriers, stages, step, (step // stages + 1) & 1)

  def _wait(self, barriers, first, step, parity):
    address = Word(mg.shared_address(barriers)) + (step % self.p.tuning.stages + first) * 8
    asm(
      "{ .reg .pred p;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;\n@p bra DONE;\nbra WAIT;\nDONE: }",
      "",
      [address, parity],
    )

  def _multiply(self, ctx, x_smem, w_smem, barriers, steps):
    del ctx
    p, stages = self.p, self.p.tuning.stages
    halves = max(1, _ROWS // p.tuning.strip)
    empty = Word(mg.shared_address(barriers)) + 8 * stages
    first_lane = (Word(mg.thread_index()) & 31).compare("eq", 0)

    def body(step, accumulator):
      self._wait(barriers, 0, step, (step // stages) & 1)
      slot = step % stages
      accumulator = mg.issue_wgmma(
        accumulator, mg.at(w_smem, slot.v), mg.at(x_smem, slot.v), halves=halves, swizzle=2 * p.tuning.strip
      )
      # All but what was begun just now is done: the step before may be overwritten.
      free = arith.andi(first_lane, step.compare("ge", 1))
      asm(
        "{ .reg .pred p; setp.ne.u32 p, $1, 0; @p mbarrier.arrive.shared::cta.b64 _, [$0]; }",
        "",
        [empty + (step + (stages - 1)) % stages * 8, _words.select(free, 1, 0)],
      )
      return accumulator

    return mg.wgmma_loop((_ROWS, halves * p.columns), Word(steps.registers.item()), body)

  def _store(self, ctx, first, y, sums, *parts):
    del ctx
    p, thread = self.p, Word(mg.thread_index())
    base, first = mg.global_address(y), Word(first.registers.item())
    inbox = Word(mg.shared_address(sums)) + (thread & 63) * 4
    size = jnp.dtype(p.out_dtype).itemsize
    upper = []
    if len(parts) > 1:  # the lower half of the threads holds what the upper half has to add
      values = mg.elements(parts[1])
      push = lambda: [asm(f"st.shared.f32 [$0 + {256 * i}], $1;", "", [inbox, v]) for i, (v, _) in enumerate(values)]
      _words.when((thread & 64).compare("ne", 0), push)
      mg.warpgroup_barrier()

    def write():
      for i, (value, (o, b)) in enumerate(mg.elements(parts[0])):
        if len(parts) > 1:
          value = arith.addf(value, _words.shared_load(inbox, 256 * i, 1, "f")[0])
        o, b = Word(o), Word(b)
        inside = _words.select(b.compare("lt", p.batch), 1, 0) if p.batch % 8 else Word(1)
        _store_one(_words.offset64(base, b * p.o + first + o, size), value, inside, p.out_dtype)

    if len(parts) > 1:
      _words.when((thread & 64).compare("eq", 0), write)
    else:
      write()


def _store_one(address, value, inside, dtype):
  if dtype == "float32":
    store = "@p st.global.f32 [$0], $1;"
  else:
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    store = f".reg .b16 h; cvt.rn.{kind}.f32 h, $1; @p st.global.b16 [$0], h;"
  asm("{ .reg .pred p; setp.ne.u32 p, $2, 0; " + store + " }", "", [address, value, inside])
