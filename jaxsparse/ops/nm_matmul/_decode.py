"""Matmul of a small batch with N:M weights at the speed of reading the packed bytes (Hopper, Pallas Mosaic GPU).

y[B, O] = x[B, K] @ w[K, O] for a `DecodeLayout`. Weights go from memory through shared memory to registers once, are
completed there to the 2:4 operand of `mma.sp` and meet x on the tensor cores, so that any pattern costs its packed bytes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxsparse.ops.nm_matmul._decode_layout import DecodeLayout

_MAX_BATCH = 64
_SLICE = 32  # batch entries of one launch: more would not fit the registers
_SMEM = 227 * 1024 - 1024
_SMS = 132
_CLUSTERED_SMS = 112  # that clusters of more than two surely fill
_WORTH_A_CLUSTER = 16 << 20  # bytes of x through the L2 cache
_STEP_BYTES = 2560  # a step of at most this, so that patterns with small chunks wait less often
# Weights in flight in a block. Fewer where x is much beside them: they would come before it.
_SMALL_RING_BYTES, _RING_BYTES, _LARGE_RING_BYTES = 60_000, 77_000, 112_000
_PHASE_K = 1024  # K of x in shared memory at a time ...
_WHOLE_X = 64 * 1024  # ... unless the whole of it has at most these bytes
_ACTIVATIONS = (None, "relu", "gelu", "silu")
_FLOATS = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the work is cut.

  Attributes:
   rows: units of 64 outputs per thread block.
   depth: warps that split the K of a unit; the block has rows * depth warps, a multiple of 4.
   split: thread blocks of a cluster that split K, 1 to 8.
   stages: steps in flight per warp.
   chunks: chunks of a step; more than 1 only where it divides the chunks of every block.
   phase: chunks of x held in shared memory at a time, a multiple of depth * chunks; 0: as many as there are, or fit.
  """

  rows: int
  depth: int
  split: int = 1
  stages: int = 4
  chunks: int = 1
  phase: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything static about one launch."""

  layout: DecodeLayout
  tuning: Tuning
  batch: int
  units: int
  chunks: int
  share: int
  phase: int
  phases: int
  dtype: str
  out_dtype: str
  bias_dtype: str
  activation: str | None

  @property
  def tiles_n(self):
    return -(-self.batch // 8)

  @property
  def threads(self):
    return 32 * self.tuning.rows * self.tuning.depth

  slab_stride = 68  # floats between batch rows of the sums of 64 outputs: a warp's stores hit all banks once

  @property
  def slab_bytes(self):
    return 8 * self.tiles_n * self.slab_stride * 4

  @property
  def row_bytes(self):
    # 16 more than a multiple of 128, so that rows start in different banks.
    return 2 * self.phase * self.layout.step + 16

  @property
  def x_offset(self):
    return _round_up(8 * self.tuning.stages * self.tuning.rows * self.tuning.depth, 128)

  @property
  def zero_bytes(self):
    return 2 * self.layout.step + 128  # a row's reads, from eight starts

  @property
  def zero_offset(self):
    buffers = 2 if self.phases > 1 else 1
    return _round_up(self.x_offset + buffers * self.batch * self.row_bytes, 128)

  @property
  def ring_offset(self):
    return _round_up(self.zero_offset + self.zero_bytes, 128)

  @property
  def inbox_offset(self):
    T = self.tuning
    warps = T.rows * T.depth
    ring = self.ring_offset + warps * T.stages * T.chunks * self.layout.chunk.nbytes
    return _round_up(max(ring, self.x_offset + warps * self.slab_bytes), 128)

  @property
  def smem_bytes(self):
    # The inbox has room for the sums of a cluster's blocks; it overlays nothing, as blocks end at different times.
    return self.inbox_offset + (self.tuning.rows * self.batch * 256 if self.tuning.split > 1 else 0)


def _round_up(x, to):
  return -(-x // to) * to


def supports(x, layout, *, bias=None, activation=None, out_dtype=None) -> str | None:
  """Whether `nm_matmul_decode` takes these arguments.

  Args:
   x: array or ShapeDtypeStruct [B, K].
   layout: a DecodeLayout.
   bias, activation, out_dtype: as for `nm_matmul_decode`.

  Returns:
   None if it does, else the reason as a sentence.
  """
  k, outputs = layout.shape
  dtype = jnp.dtype(x.dtype).name
  if len(x.shape) != 2 or x.shape[1] != k:
    return f"x has shape {x.shape}; the weight {layout.shape} needs [B, {k}]."
  if not 1 <= x.shape[0] <= _MAX_BATCH:
    return f"The decode kernel takes a batch of 1 to {_MAX_BATCH}, got {x.shape[0]}."
  if dtype not in ("bfloat16", "float16"):
    return f"x is {dtype}; the decode kernel takes bfloat16 or float16."
  if layout.bits == 16 and dtype != layout.dtype:
    return f"x is {dtype} and the weight {layout.dtype}; cast x to the weight's dtype."
  if activation not in _ACTIVATIONS:
    return f"activation is {activation!r}; the decode kernel fuses {', '.join(map(repr, _ACTIVATIONS))}."
  if bias is not None and (bias.shape != (outputs,) or jnp.dtype(bias.dtype).name not in _FLOATS):
    return f"bias is {jnp.dtype(bias.dtype).name} {bias.shape}; it must be a float of shape ({outputs},)."
  if out_dtype is not None and jnp.dtype(out_dtype).name not in _FLOATS:
    return f"out_dtype is {jnp.dtype(out_dtype).name}; the decode kernel writes {', '.join(_FLOATS)}."
  return None


def nm_matmul_decode(x, layout, *, bias=None, activation=None, out_dtype=None, tuning=None):
  """activation(x @ w + bias) for few rows of x.

  Args:
   x: [B, K] bfloat16 or float16, B <= 64; the dtype of the weight unless that is quantised.
   layout: a DecodeLayout of the weight [K, O].
   bias: None or [O], added in float32.
   activation: None, "relu", "gelu" (tanh form) or "silu", in float32.
   out_dtype: dtype of the result, x's by default.
   tuning: a Tuning; None chooses one for the shape.

  Returns:
   [B, O].

  Raises:
   ValueError: arguments that `supports` gives a reason against.
  """
  reason = supports(x, layout, bias=bias, activation=activation, out_dtype=out_dtype)
  if reason:
    raise ValueError(reason)
  batch, k = x.shape
  if batch > _SLICE:
    parts = [
      nm_matmul_decode(x[i : i + _SLICE], layout, bias=bias, activation=activation, out_dtype=out_dtype, tuning=tuning)
      for i in range(0, batch, _SLICE)
    ]
    return jnp.concatenate(parts)
  if k % 8:
    # Rows of x must start at multiples of 16 bytes.
    x = jnp.pad(x, ((0, 0), (0, -k % 8)))
    layout = dataclasses.replace(layout, shape=(k + -k % 8, layout.shape[1]))
  plan = make_plan(batch, layout, jnp.dtype(x.dtype).name, bias, activation, out_dtype, tuning)
  return _call(plan)(x, layout.data, *([] if bias is None else [bias]))


def make_plan(batch, layout, dtype, bias=None, activation=None, out_dtype=None, tuning=None) -> Plan:
  """The Plan of a launch.

  Raises:
   ValueError: a tuning that does not fit the shape or the shared memory.
  """
  units, chunks = layout.data.shape[:2]
  static = dataclasses.replace(layout, data=None)
  T = tuning or default_tuning(batch, layout)
  share = -(-chunks // T.split)
  stride = T.depth * T.chunks
  if T.chunks > 1 and (chunks % T.chunks or share % T.chunks):
    raise ValueError(f"{T}: steps of {T.chunks} chunks do not divide the {chunks} chunks (or {share} per block)")
  if T.rows * T.depth % 4 or T.rows * 16 % T.split:
    raise ValueError(f"{T}: rows * depth must be a multiple of 4 and split must divide 16 * rows")
  whole = _round_up(share, stride)
  phase = min(whole, T.phase or whole)
  names = (jnp.dtype(out_dtype or dtype).name, "" if bias is None else jnp.dtype(bias.dtype).name)
  while True:
    plan = Plan(static, T, batch, units, chunks, share, phase, -(-share // phase), dtype, *names, activation)
    if plan.smem_bytes <= _SMEM:
      return plan
    if T.phase or phase <= stride:
      raise ValueError(f"{T} needs {plan.smem_bytes} bytes of shared memory of {_SMEM}")
    phase = min(phase - stride, _round_up(-(-share // (plan.phases + 1)), stride))


def default_tuning(batch, layout) -> Tuning:
  """A tuning by counting thread blocks and bytes, for the 132 SMs of an H100 or H200.

  One block per SM with some 70 KB of weights in flight keeps the memory busy. Clusters that split K cost 1 to 2 us, so
  they are for weights with too few outputs to go round, and for those so sparse that the x that every row of blocks reads
  would be most of the traffic. Clusters of four do not fill the chip: some of its parts have no multiple of four SMs.

  Raises:
   ValueError: shared memory cannot hold any.
  """
  batch = min(batch, _SLICE)
  units, chunks = layout.data.shape[:2]
  chunk, singles = layout.chunk, layout.m > 4 or layout.n == 1
  rows = next((r for r in (1, 2, 4) if -(-units // r) <= _SMS), 8)
  blocks = -(-units // rows)
  split = next((s for s in (8, 4) if s * blocks <= _CLUSTERED_SMS), 2 if 2 * blocks <= _SMS else 1)
  split = next(s for s in (8, 4, 2, 1) if s <= split and (s == 1 or chunks >= 8 * s))
  x_bytes = blocks * chunks * layout.step * 2 * batch
  if split == 1 and 1 < 2 * rows <= 8 and x_bytes > max(_WORTH_A_CLUSTER, 0.6 * layout.nbytes):
    rows, split = 2 * rows, 2
  share = -(-chunks // split)
  depth = 8 // rows
  if batch <= 8 and singles and layout.bits == 16 and share * layout.step >= 64 * 48 * depth:
    depth *= 2  # long runs: more warps hide the unpacking better
  size = next(c for c in (4, 2, 1) if c == 1 or c * chunk.nbytes <= _STEP_BYTES and not (chunks % c or share % c))
  ring = _RING_BYTES if batch > 8 or singles or layout.bits < 16 else _LARGE_RING_BYTES
  if 8 < batch <= 16 and layout.bits == 4:  # more rows have no register left for what this ring's addresses need
    ring = _SMALL_RING_BYTES
  stages = max(2, min(8, ring // (rows * depth * size * chunk.nbytes)))
  # Small parts of x start soon and do not hold up the weights.
  phase = _round_up(max(_PHASE_K // layout.step, depth * size * (2 if size == 4 else 1)), depth * size)
  if share * layout.step * batch * 2 <= _WHOLE_X:
    phase = 0
  while True:
    tuning = Tuning(rows, depth, split, stages, size, phase)
    if _fits(batch, layout, tuning):
      return tuning
    if phase > depth * size:
      phase = _round_up(phase // 2, depth * size)
    elif stages > 2:
      stages -= 1
    elif size > 1 or phase == 0:
      size, phase = 1, depth
    elif rows * depth > 4:
      depth //= 2
      phase = depth
    else:
      raise ValueError(f"no tuning fits {batch} rows of x and the weight {layout.shape}, {layout.n}:{layout.m}")


def _fits(batch, layout, tuning):
  try:
    make_plan(batch, layout, "bfloat16", tuning=tuning)
  except ValueError:
    return False
  return True


@functools.lru_cache(maxsize=256)
def _call(plan: Plan):
  """The compiled-on-use kernel of a plan: (x, data, bias?) -> y."""
  # Only here, as both import Pallas.
  from jaxsparse.ops import _mosaic_gpu as mg
  from jaxsparse.ops.nm_matmul import _decode_device

  plgpu = mg.plgpu
  has_bias = bool(plan.bias_dtype)

  def nm_matmul_decode_kernel(*refs, smem):
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (4 + has_bias))
    def everything(ctx, *refs):
      del ctx
      x, data, *bias, y, smem = refs
      _decode_device.emit(plan, x, data, bias[0] if has_bias else None, y, smem)

    everything(*refs, smem)

  blocks = -(-plan.units // plan.tuning.rows)
  return plgpu.kernel(
    nm_matmul_decode_kernel,
    out_type=jax.ShapeDtypeStruct((plan.batch, plan.layout.shape[1]), plan.out_dtype),
    grid=(blocks,),
    grid_names=("block",),
    **(dict(cluster=(plan.tuning.split,), cluster_names=("split",)) if plan.tuning.split > 1 else {}),
    num_threads=plan.threads // 128,
    thread_name="warpgroup",
    compiler_params=mg.COMPILER_PARAMS,
    scratch_types=dict(smem=plgpu.SMEM((plan.smem_bytes // 4,), jnp.int32)),
  )
