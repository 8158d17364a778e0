"""The end of the decode kernel: sums of the warps and the blocks of a cluster, bias, activation and store."""

import math

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops._words import (
  arith,
  asm,
  float32,
  floats,
  loop,
  offset64,
  shared_load,
  when,
  Word,
)


def emit(plan, acc, thread, warp, g, c, block, rank, slabs, bias_ref, y_base):
  """Sums the warps' and the cluster's parts, applies the epilogue and stores."""
  T, tiles_n = plan.tuning, plan.tiles_n
  stride = plan.slab_stride * 4
  slab = plan.slab_bytes
  asm("bar.sync 0;", "", [])  # everybody is done with x and the rings, which the slabs overlay
  mine = slabs + warp * slab + c * (2 * stride) + g * 4
  for t in range(4):
    for n in range(tiles_n):
      for i in range(4):
        offset = (8 * n + i % 2) * stride + (16 * t + 8 * (i // 2)) * 4
        asm(f"st.shared.f32 [$0 + {offset}], $1;", "", [mine, acc[4 * (t * tiles_n + n) + i]])
  asm("bar.sync 0;", "", [])

  def local_sum(wr, b, o):
    at = slabs + wr * slab + b * stride + o * 4
    total = None
    for k in range(T.depth):
      part = shared_load(at, k * T.rows * slab, 4, "f")
      total = part if total is None else [arith.addf(p, q) for p, q in zip(total, part, strict=True)]
    return total

  def items(total_items, body):
    def step(i, _):
      index = i * plan.threads + thread
      when(index.compare("lt", total_items), lambda: body(index))
      return []

    loop(Word(0), Word(-(-total_items // plan.threads)), [], step)

  quads = T.rows * 16  # of four outputs
  finish = lambda o4, b, sums: _store(plan, block * (T.rows * 64) + o4 * 4, b, sums, bias_ref, y_base)
  if T.split == 1:

    def whole(index):
      b, o4 = index // quads, index % quads
      sums = local_sum(o4 // 16, b, (o4 % 16) * 4)
      finish(o4, b, sums)

    items(plan.batch * quads, whole)
    return

  # Every block owns a share of the outputs and gets the others' sums pushed, so one barrier is enough.
  share = quads // T.split
  inbox = slabs - plan.x_offset + plan.inbox_offset
  per_rank = plan.batch * share * 16

  def push(index):
    b, o4 = index // quads, index % quads
    sums = local_sum(o4 // 16, b, (o4 % 16) * 4)
    to = inbox + rank * per_rank + (b * share + o4 % share) * 16
    ptx = "{ .reg .b32 a; mapa.shared::cluster.u32 a, $0, $1; st.shared::cluster.v4.f32 [a], {$2, $3, $4, $5}; }"
    asm(ptx, "", [to, o4 // share, *sums])

  items(plan.batch * quads, push)
  asm("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;", "", [])

  def owned(index):
    sums = None
    for r in range(T.split):
      part = shared_load(inbox + index * 16, r * per_rank, 4, "f")
      sums = part if sums is None else [arith.addf(p, q) for p, q in zip(sums, part, strict=True)]
    finish(index % share + rank * share, index // share, sums)

  items(plan.batch * share, owned)


def _activate(x, kind):
  """f32 activation; tanh-form gelu and silu through exp2 and a reciprocal."""
  if kind is None:
    return x
  if kind == "relu":
    return arith.maximumf(x, float32(0.0))
  z = x
  if kind == "gelu":
    cube = arith.mulf(arith.mulf(x, x), x)
    inner = arith.addf(x, arith.mulf(cube, float32(0.044715)))
    z = arith.mulf(inner, float32(2.0 * math.sqrt(2.0 / math.pi)))
  (power,) = asm("ex2.approx.ftz.f32 $0, $1;", "f", [arith.mulf(z, float32(-math.log2(math.e)))], effects=False)
  (sigmoid,) = asm("rcp.approx.ftz.f32 $0, $1;", "f", [arith.addf(power, float32(1.0))], effects=False)
  return arith.mulf(x, sigmoid)


def _store(plan, o, b, sums, bias_ref, y_base):
  """Bias, activation, cast and store of four outputs from `o` on."""
  outputs = plan.layout.shape[1]

  def out(values, count, o):
    values = [_activate(v, plan.activation) for v in values]
    at = offset64(y_base, b * outputs + o, {"float32": 4}.get(plan.out_dtype, 2))
    if plan.out_dtype == "float32":
      names = "{$1, $2, $3, $4}" if count == 4 else "$1"
      asm(f"st.global{'.v4' if count == 4 else ''}.f32 [$0], {names};", "", [at, *values])
      return
    kind = {"bfloat16": "bf16", "float16": "f16"}[plan.out_dtype]
    if count == 1:
      asm(f"{{ .reg .b16 h; cvt.rn.{kind}.f32 h, $1; st.global.b16 [$0], h; }}", "", [at, *values])
      return
    asm(
      f"{{ .reg .b32 l, h; cvt.rn.{kind}x2.f32 l, $2, $1; cvt.rn.{kind}x2.f32 h, $4, $3; st.global.v2.b32 [$0], {{l, h}}; }}",
      "",
      [at, *values],
    )

  def bias(o, count):
    base = mg.global_address(bias_ref)
    size = {"float32": 4}.get(plan.bias_dtype, 2)
    found = []
    for i in range(count):
      at = offset64(base, o + i, size)
      if size == 4:
        found += asm("ld.global.nc.f32 $0, [$1];", "f", [at])
      else:
        found.append(
          floats(asm("{ .reg .b16 h; ld.global.nc.b16 h, [$1]; mov.b32 $0, {h, h}; }", "r", [at])[0], plan.bias_dtype)[
            0
          ]
        )
    return found

  def with_bias(values, o):
    return values if bias_ref is None else [arith.addf(v, w) for v, w in zip(values, bias(o, len(values)), strict=True)]

  if outputs % 4 == 0:
    when(o.compare("lt", outputs), lambda: out(with_bias(sums, o), 4, o))
  else:
    for i in range(4):
      when((o + i).compare("lt", outputs), lambda i=i: out(with_bias([sums[i]], o + i), 1, o + i))
