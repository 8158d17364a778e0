"""y = act(x @ w + bias) on Hopper's sparse tensor cores, for weights packed as 2:4.

The sparse operand of `wgmma.sp` is always its A, so a block computes tiles of y^T = w^T x^T: rows of the accumulator
are outputs, columns are rows of x. The epilogue transposes on the way to shared memory (stmatrix .trans), so y leaves
row-major through the copy engine. One warpgroup loads, one to three multiply; blocks persist, and the loader runs into
the next tile while the others finish this one. The copy engine fills what lies outside an array with zeros and drops
what is stored outside, so B, O and K may be ragged.

What bounds it. The sparse instruction multiplies at twice the dense rate: 64 outputs x n rows of x x 32 of the
reduction take n / 2 clocks, and reading x's 64 n bytes from shared memory takes as many. Reading the stored values, and
the copy engine's writes of everything, come on top, so bytes through shared memory (128 a clock) decide, and tiles are
chosen for few of them (`tuning`). On an H100 the 256 x 200 tile needs 0.66 us for 64 of the reduction: its 161 KiB at
1.98 GHz. That is 1.3 PFLOP/s dense-equivalent, 1.6-1.65 times cuBLAS. More wgmma in flight would gain nothing; what is
left at smaller shapes is the last, part-filled wave of tiles. With few rows of x the kernel streams w from device
memory at 2.6-3.0 TB/s. `measured/` has the figures.

Both orders of w's values work; outputs-contiguous (wgmma reads A transposed) was 2-3 % faster at 8192^3 and 4096^3.
Metadata in its natural order was within 1 % of words arranged for the threads: a transposed ldmatrix hands them out.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxsparse.ops import _dispatch
from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.nm_matmul import _hopper_body as body
from jaxsparse.ops.nm_matmul import tuning as tunings
from jaxsparse.ops.nm_matmul._hopper_layout import SparseTensorCoreLayout

ACTIVATIONS = {
  None: lambda y: y,
  "relu": lambda y: jnp.maximum(y, 0),
  "gelu": lambda y: jax.nn.gelu(y, approximate=True),
  "silu": lambda y: y * jax.nn.sigmoid(y),
}
_IN_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_OUT_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32))
_LOADER_REGISTERS = 40
# Registers of a multiplying thread, by the number of multiplying warpgroups: what is left of 64 Ki beside the loader's.
_COMPUTE_REGISTERS = {1: 240, 2: 232, 3: 152}


def supports(x, layout: SparseTensorCoreLayout, *, bias=None, activation=None, out_dtype=None) -> str | None:
  """Why `nm_matmul_sparse_core` cannot run here, as a sentence; None if it can. Arguments as there (or their types)."""
  if (reason := mg.unavailable()) is not None:
    return reason
  if (reason := _bad_arguments(x, layout, bias, activation, out_dtype)) is not None:
    return reason
  target = _dispatch.current_target()
  if target.capability != (9, 0):
    return f"the sparse tensor-core kernel needs a Hopper GPU (compute capability 9.0), this is {target}."
  return None


def nm_matmul_sparse_core(
  x, layout: SparseTensorCoreLayout, *, bias=None, activation=None, out_dtype=None, tuning=None, interpret=None
):
  """act(x @ w + bias) with w packed for the sparse tensor cores; accumulates in float32.

  Args:
    x: `[B, K]`, bfloat16 or float16, B >= 1.
    layout: w `[K, O]`, packed; values of x's dtype.
    bias: None or `[O]`; added in float32.
    activation: None, "relu", "gelu" (tanh form) or "silu", applied in float32.
    out_dtype: bfloat16, float16 or float32; x's dtype by default.
    tuning: a `tuning.Tuning`; chosen from the shape by default, also where dense would win.
    interpret: a `_mosaic_gpu.Interpret` to run on a CPU with a dense MMA in place of the sparse one.

  Returns:
    `[B, O]`.

  Raises:
    NotImplementedError: this JAX cannot build the kernel.
    ValueError: shapes, dtypes, activation or tuning do not fit.
  """
  if (reason := mg.unavailable()) is not None:
    raise NotImplementedError(reason)
  if (reason := _bad_arguments(x, layout, bias, activation, out_dtype)) is not None:
    raise ValueError(reason)
  batch, reduction = x.shape
  outputs = layout.outputs
  out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
  if tuning is None:
    tuning = tunings.choose_tuning(batch, reduction, outputs)
  if reduction % 8:  # rows of x must start at multiples of 16 bytes
    x = jnp.pad(x, ((0, 0), (0, -reduction % 8)))
  if tuning.split_k == 1 or _parts_meet(tuning, layout, batch, interpret):
    fused_bias = None if bias is None else _pad_bias(bias, tuning.tile_m)
    run = _build(tuning, layout, x, fused_bias, activation, out_dtype, interpret)
    y = run(x, layout.values, layout.metadata, *([] if fused_bias is None else [fused_bias]))
    return y[:, :outputs]
  run = _build(tuning, layout, x, None, None, jnp.dtype(jnp.float32), interpret)
  y = run(x, layout.values, layout.metadata).sum(0)[:, :outputs]  # parts in a fixed order: the same bits every time
  if bias is not None:
    y = y + bias.astype(jnp.float32)
  return ACTIVATIONS[activation](y).astype(out_dtype)


def _bad_arguments(x, layout, bias, activation, out_dtype) -> str | None:
  if x.ndim != 2 or x.shape[0] < 1:
    return f"x has shape {tuple(x.shape)}; the sparse tensor-core kernel takes [B, K] with B >= 1."
  if x.shape[1] != layout.reduction:
    return f"x has shape {tuple(x.shape)} and w {layout.shape}; x's last axis must be w's first."
  if jnp.dtype(x.dtype) not in _IN_DTYPES:
    return f"x is {x.dtype}; the sparse tensor-core kernel takes bfloat16 or float16."
  if jnp.dtype(layout.values.dtype) != jnp.dtype(x.dtype):
    return f"w's values are {layout.values.dtype} and x is {x.dtype}; they must be equal."
  if bias is not None and tuple(bias.shape) != (layout.outputs,):
    return f"bias has shape {tuple(bias.shape)}; it must be ({layout.outputs},), one per output."
  if activation not in ACTIVATIONS:
    return f"activation is {activation!r}; it must be one of {list(ACTIVATIONS)}."
  if out_dtype is not None and jnp.dtype(out_dtype) not in _OUT_DTYPES:
    return f"out_dtype is {jnp.dtype(out_dtype)}; it must be bfloat16, float16 or float32."
  return None


def _pad_bias(bias, tile_m):
  return jnp.pad(bias.astype(jnp.float32), (0, -bias.shape[0] % tile_m))


def _build(tuning, layout, x, bias, activation, out_dtype, interpret):
  """The kernel for these shapes: takes x, values, metadata[, bias], gives `[B, O]`, or `[split_k, B, O]` parts."""
  plgpu = mg.plgpu
  t = tuning
  if out_dtype.itemsize == 4:  # the same shared memory for twice the bytes
    t = dataclasses.replace(t, epilogue_n=max(8, t.epilogue_n // 16 * 8))
  batch, reduction = x.shape
  meet = _parts_meet(t, layout, batch, interpret)
  k_major, dtype = layout.reduction_contiguous, jnp.dtype(x.dtype)
  plan = body.Plan(
    t, batch, reduction, layout.outputs, k_major, dtype, out_dtype, ACTIVATIONS[activation], meet, interpret
  )

  def kernel(x_gmem, values_gmem, metadata_gmem, *more, **scratch):
    *bias_gmem, out_gmem = more[:-1] if meet else more
    refs = dict(x=x_gmem, values=values_gmem, metadata=metadata_gmem, bias=bias_gmem, out=out_gmem, sums=more[-1])
    parts = body.Body(plan, refs, scratch)
    # One multiplying warpgroup has all the registers it wants without asking.
    share = interpret is None and plan.warpgroups > 1
    registers = (_LOADER_REGISTERS, _COMPUTE_REGISTERS[plan.warpgroups]) if share else None
    mg.split_roles(parts.warpgroup, plan.warpgroups, parts.load_tiles, parts.multiply_tiles, registers)

  # Rows of y must be multiples of 16 bytes for the copy engine; what is added is cut off outside.
  out_columns = layout.outputs + -layout.outputs % (16 // out_dtype.itemsize)
  parts = (t.split_k,) if t.split_k > 1 and not meet else ()
  y = jax.ShapeDtypeStruct((*parts, batch, out_columns), out_dtype)
  largest = plan.wg_rows * max(size for _, size in plan.ranges)
  sums = jax.ShapeDtypeStruct((plan.work, plan.warpgroups, t.split_k, largest), jnp.float32)
  run = plgpu.kernel(
    kernel,
    out_type=(y, sums) if meet else y,
    grid=(min(plan.work, mg.sm_count() if interpret is None else 2),),
    grid_names=("block",),
    num_threads=plan.warpgroups + 1,
    thread_name="warpgroup",
    compiler_params=mg.COMPILER_PARAMS,
    scratch_types=plan.scratch(),
    interpret=interpret,
    kernel_name="nm_matmul_sparse_core",
  )
  return (lambda *args: run(*args)[0]) if meet else run


def _parts_meet(t, layout, batch, interpret) -> bool:
  """Whether the parts of a split reduction are added inside the kernel: all of its blocks must run at once."""
  work = -(-layout.outputs // t.tile_m) * -(-batch // t.tile_n) * t.split_k
  return t.split_k > 1 and t.tile_n >= 8 * t.split_k and interpret is None and work <= mg.sm_count()
