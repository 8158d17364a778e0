"""The decode kernel's instructions: inline PTX inside one `plgpu.inline_mgpu` block.

A block of threads owns `rows` units of 64 outputs and a share of K; its warps split those units and, chunk by chunk in
turn, that share. Every warp streams its own chunks through a private ring in shared memory (bulk copies that complete on
the warp's own barriers, so warps never wait for each other), unpacks them (`_decode_program`) and multiplies. x is
copied to shared memory once per phase of K. Sums over warps go through shared memory, sums over the blocks of a cluster
through distributed shared memory; the epilogue is applied to the float32 sum.
"""

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops._words import (
  arith,
  asm,
  float32,
  floats,
  fma,
  loop,
  offset64,
  select,
  shared_load,
  when,
  Word,
)
from jaxsparse.ops.nm_matmul import _decode_epilogue
from jaxsparse.ops.nm_matmul import _decode_program as program


class Emitter:
  """The `ops` of `_decode_program`; `base` is the shared-memory address of the current chunk, a Word."""

  def __init__(self, dtype, lane):
    self.kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    self.lane, self.base = lane, None

  def _at(self, index, scale):
    lane = self.lane
    at = {"lane": lane, "g": lane >> 2, "gs": lane >> 1}[index]
    return self.base + at * scale

  def load(self, offset, index, count):
    if count == 8:
      address = self._at(index, 32)
      return [w for half in (0, 16) for w in self._vector(address, offset + half, 4)]
    return self._vector(self._at(index, 4 * count), offset, count)

  def _vector(self, address, offset, count):
    return shared_load(address, offset, count)

  def short(self, offset):
    ptx = f"{{ .reg .b16 t; ld.shared.u16 t, [$1 + {offset}]; cvt.u32.u16 $0, t; }}"
    return asm(ptx, "r", [self.base + self.lane * 2])[0]

  def prmt(self, a, selector, b=None):
    b = Word(0) if b is None else Word(b)
    return asm(f"prmt.b32 $0, $1, $2, {selector};", "r", [a, b], effects=False)[0]

  def sub2(self, a, b):
    b = Word(b) if isinstance(b, int) else b
    return asm(f"sub.rn.{self.kind}x2 $0, $1, $2;", "r", [a, b], effects=False)[0]


def mma_sp(kind, acc, a, b, meta, selector, ordered):
  """acc + A @ B, four floats."""
  variant = "sp::ordered_metadata" if ordered else "sp"
  return asm(
    f"mma.{variant}.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
    f"{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9, $10, $11}}, {{$12, $13, $14, $15}}, $16, {selector};",
    "ffff",
    [*a, *b, *acc, meta],
    effects=False,
  )


def emit(plan, x_ref, data_ref, bias_ref, y_ref, smem_ref):
  """Emits the whole kernel for a `_decode.Plan`."""
  lay, chunk, T = plan.layout, plan.layout.chunk, plan.tuning
  tiles_n = plan.tiles_n
  thread = Word(mg.thread_index())
  lane = thread & 31
  warp = Word(mg.warp_index())
  g, c = lane >> 2, lane & 3
  smem = Word(mg.shared_address(smem_ref))
  x_base, data_base, y_base = mg.global_address(x_ref), mg.global_address(data_ref), mg.global_address(y_ref)
  (block,) = asm("mov.u32 $0, %ctaid.x;", "r", [], effects=False)
  if T.split > 1:
    (rank,) = asm("mov.u32 $0, %cluster_ctarank;", "r", [], effects=False)
    block = block // T.split
  else:
    rank = Word(0)
  wr, wk = warp % T.rows, warp // T.rows
  unit = block * T.rows + wr

  # The block's chunks are [first, first + count); this warp takes every `depth`-th step of T.chunks.
  share, depth = plan.share, T.depth
  first = rank * share
  count = (Word(plan.chunks) - first).min(share)
  mine = (count - wk * T.chunks + (depth * T.chunks - 1)).max(0) // (depth * T.chunks)
  mine = select(unit.compare("lt", plan.units), mine, 0)

  source = offset64(data_base, unit * plan.chunks + first + wk * T.chunks, chunk.nbytes)
  ring = _Ring(plan, smem, source, warp, lane, mine)
  for s in range(T.stages):
    ring.issue(Word(s), Word(s))

  # x: rows of `phase` chunks in the operand's order, zeros for batch entries that are not there.
  row_bytes = plan.row_bytes
  x_smem, zeros = smem + plan.x_offset, smem + plan.zero_offset

  def load_x(phase):
    buffer = x_smem + (phase & 1) * (plan.batch * row_bytes) if plan.phases > 1 else x_smem
    _load_x(plan, x_base, buffer, (first + phase * plan.phase) * lay.step, thread, block)

  load_x(Word(0))
  if plan.batch % 8:
    clear = thread.compare("lt", plan.zero_bytes // 4)
    when(clear, lambda: asm("st.shared.u32 [$0], $1;", "", [zeros + thread * 4, Word(0)]))

  ops = Emitter(plan.dtype, lane)
  rows = _x_rows(plan, x_smem, zeros, lane)
  acc = [float32(0.0)] * (16 * tiles_n)
  quota = plan.phase // (depth * T.chunks)  # steps of a warp in a phase

  def one_phase(phase, acc):
    asm("cp.async.wait_all; bar.sync 0;", "", [])
    buffer = (phase & 1) * (plan.batch * row_bytes) if plan.phases > 1 else Word(0)
    if plan.phases > 1:
      when((phase + 1).compare("lt", plan.phases), lambda: load_x(phase + 1))

    def step(i, acc):
      stage = i % T.stages
      ring.wait(stage, (i // T.stages) & 1)
      x_offset = buffer + ((i - phase * quota) * depth + wk) * (T.chunks * lay.step * 2)
      for j in range(T.chunks):
        ops.base = ring.at(stage) + j * chunk.nbytes
        acc = _multiply(plan, ops, rows, x_offset + j * lay.step * 2, acc)
      asm("bar.warp.sync 0xffffffff;", "", [])
      ring.issue(i + T.stages, stage)
      return acc

    return loop(phase * quota, (phase * quota + quota).min(mine), acc, step)

  if plan.phases > 1:
    acc = loop(Word(0), Word(plan.phases), acc, one_phase)
  else:
    acc = one_phase(Word(0), acc)
  _decode_epilogue.emit(plan, acc, thread, warp, g, c, block, rank, smem + plan.x_offset, bias_ref, y_base)


class _Ring:
  """The steps of one warp's chunks that are on their way through shared memory.

  Args:
    plan: of the launch.
    smem: address of the block's shared memory.
    source: address of the warp's first step in device memory; the next ones lie `depth` steps apart.
    warp, lane: of this thread.
    mine: how many steps the warp has.
  """

  def __init__(self, plan, smem, source, warp, lane, mine):
    T = plan.tuning
    self.leader = lane.compare("eq", 0)
    self.step_bytes = T.chunks * plan.layout.chunk.nbytes
    self.stride = T.depth * self.step_bytes
    self.barriers = smem + warp * (8 * T.stages)
    self.ring = smem + plan.ring_offset + warp * (T.stages * self.step_bytes)
    self.source, self.mine = source, mine
    # A "fence.proxy.async" would wait for all memory, up to half a microsecond: nothing but barriers has been written.
    asm(
      "{ .reg .pred p; setp.eq.u32 p, $1, 0;\n"
      + "\n".join(f"@p mbarrier.init.shared::cta.b64 [$0 + {8 * s}], 1;" for s in range(T.stages))
      + "\nfence.mbarrier_init.release.cluster; bar.warp.sync 0xffffffff; }",
      "",
      [self.barriers, lane],
    )
    (self.policy,) = asm("createpolicy.fractional.L2::evict_first.b64 $0, 1.0;", "l", [], effects=False)

  def at(self, stage):
    """Address of a stage."""
    return self.ring + stage * self.step_bytes

  def issue(self, step, stage):
    """Begins to copy a step to a stage, if there is such a step."""
    go = select(arith.andi(self.leader, step.compare("lt", self.mine)), 1, 0)
    asm(
      "{ .reg .pred p; setp.ne.u32 p, $4, 0;\n"
      f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], {self.step_bytes};\n"
      "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      f" [$0], [$1], {self.step_bytes}, [$2], $3; }}",
      "",
      [self.at(stage), offset64(self.source, step, self.stride), self.barriers + stage * 8, self.policy, go],
    )

  def wait(self, stage, parity):
    asm(
      "{ .reg .pred p;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;\n@p bra DONE;\nbra WAIT;\nDONE: }",
      "",
      [self.barriers + stage * 8, parity],
    )


def _x_rows(plan, x_smem, zeros, lane):
  """For each 8 rows of x: (address of this lane's, what to and an offset with; None for all of it)."""
  found = []
  for n in range(plan.tiles_n):
    # ldmatrix takes row lane % 8 of matrix lane // 8; matrices are 8 positions apart.
    row = (lane & 7) + 8 * n
    there = row.compare("lt", plan.batch)
    # Rows that are not there read zeros, each from banks of its own: ldmatrix does not merge equal rows.
    base = select(there, x_smem + row * plan.row_bytes, zeros + (lane & 7) * 16) + (lane >> 3) * 16
    found.append((base, select(there, 0xFFFFFFFF, 0) if 8 * n + 8 > plan.batch else None))
  return found


def _multiply(plan, ops, rows, x_offset, acc):
  """acc after the chunk at `ops.base`, with x at byte `x_offset` of its buffers."""
  lay, chunk, tiles_n = plan.layout, plan.layout.chunk, plan.tiles_n
  fragments = []  # [step of 32][tile n]
  for step in range(2 * chunk.parts):
    row = []
    for base, keep in rows:
      address = base + (x_offset if keep is None else x_offset & keep)
      ptx = f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0, $1, $2, $3}}, [$4 + {64 * step}];"
      row.append(asm(ptx, "rrrr", [address]))
    fragments.append(row)
  scales = [_scale_floats(ops, plan, r) for r in range(chunk.scales)]
  operands = [
    [program.operand(ops, layer, lay.m, lay.bits, plan.dtype, part * chunk.part) for layer in chunk.layers]
    for part in range(chunk.parts)
  ]
  for t in range(4):
    for n in range(tiles_n):
      at = 4 * (t * tiles_n + n)
      total = acc[at : at + 4]
      for r in range(max(1, chunk.scales)):
        steps = 2 * chunk.parts // max(1, chunk.scales)
        sums = [float32(0.0)] * 4 if chunk.scales else total
        for step in range(r * steps, r * steps + steps):
          for layer, (registers, metas) in zip(chunk.layers, operands[step // 2], strict=True):
            a, b = registers[t][step % 2], fragments[step][n]
            sums = mma_sp(ops.kind, sums, a, b, metas[t], step % 2, layer.pairs)
        if chunk.scales:
          factor = scales[r][2 * t : 2 * t + 2]
          total = [fma(sums[i], factor[i // 2], total[i]) for i in range(4)]
        else:
          total = sums
      acc[at : at + 4] = total
  return acc


def _load_x(plan, x_base, buffer, start, thread, block):
  """Asynchronous copies of a phase of x, from k = `start` on, to the shared-memory address `buffer`."""
  reduction, threads = plan.layout.shape[0], plan.threads
  piece = 16 if plan.layout.m == 4 else 8
  per_row = plan.phase * plan.layout.step * 2 // piece
  # A thread keeps its place in the row; if that does not come out even, some threads have none.
  wide = per_row > threads
  across = threads if wide else per_row
  down = 1 if wide else threads // per_row
  column, row0 = (thread, Word(0)) if wide else (thread % across, thread // across)

  def copy(row, at, k):
    to = at * piece
    if piece == 8:
      # Group 4 c + 2 s + h of 64 goes to position 8 s + 4 h + c.
      to = (at >> 4 << 7) + ((at & 2) << 5) + ((at & 1) << 5) + ((at >> 2 & 3) << 3)
    inside = select(k.compare("lt", reduction), piece, 0)
    source = offset64(x_base, row * reduction + k.min(reduction - piece // 2), 2)
    asm(f"cp.async.ca.shared.global [$0], [$1], {piece}, $2;", "", [buffer + row * plan.row_bytes + to, source, inside])

  def columns(j, _):
    at = column + j * threads
    k = start + at * (piece // 2)

    def rows(i, _):
      row = row0 + i * down
      there = arith.andi(row.compare("lt", plan.batch), at.compare("lt", per_row))
      # Blocks start at different rows, so that not all of them ask for the same lines at once.
      turned = (row + block) % plan.batch if plan.batch & plan.batch - 1 else (row + block) & plan.batch - 1
      if plan.batch % down or per_row % across or (not wide and threads % per_row):
        when(there, lambda: copy(turned, at, k))
      else:
        copy(turned, at, k)
      return []

    steps = -(-plan.batch // down)
    if steps <= 16:
      for i in range(steps):
        rows(Word(i), None)
      return []
    return loop(Word(0), Word(steps), [], rows)

  if wide and per_row > threads:
    loop(Word(0), Word(-(-per_row // threads)), [], columns)
  else:
    columns(Word(0), None)


def _scale_floats(ops, plan, row):
  """The eight scales of a lane, (mt, e) in order."""
  size = {"float32": 4}.get(plan.layout.scale_dtype, 2)
  words = program.scale_words(ops, plan.layout.chunk, size, 0, row)
  return [f for w in words for f in floats(w, plan.layout.scale_dtype)]
