"""`x @ w` and `dy @ w.T` for block-sparse w on Hopper's tensor cores.

A block of threads computes tiles of the transposed result: 128 outputs x up to 256 rows of x, 64 outputs to each of two
multiplying warpgroups; a third warpgroup loads. So one block column of 128 fills the tile, and narrower ones share it: the
tile walks over the union of their rows and each part of x is loaded once. What loads of x through the L2 cache cost is the
bound of such blocks, so the plan puts block columns together that have rows in common. Absent blocks are neither loaded
nor multiplied: the copy engine is slower at writing zeros than at loading. Of two blocks of 32 that one instruction
covers, one may be absent; w then goes through registers, where the half of it is zeroed.

Blocks of threads persist and take their tiles from a counter, as late as hides the time that this takes, so that nobody
holds a tile that another one could begin. Tiles come in stripes along B, longest first, so that what runs at a time shares
x in the L2 cache. A tile whose list is far longer than the others walks slowly, shares no x with them, and would
read it from memory by itself: such lists are cut (`_plan`). Their parts meet two by two: the first to come leaves float32
sums in memory, the second adds them, which gives the same bits in either order. Lengths, positions and order are read
from memory: masks change without compiling. The copy engine fills what lies outside of x with zeros and drops what is
stored outside, so B may be ragged. A few hundred rows of x leave most multiprocessors without such a tile: `_hopper_once` cuts
them lower and runs all of them at once.

What bounds it at 8192 x 8192 x 8192 (counters, and runs with parts left out). Blocks of 128 and 64 at densities from 0.1: what
comes through the L2 cache, 8 to 9 TB/s. Blocks of 128 at 0.05: device memory, of which the kernel moves 282 MB at 2.5 TB/s, 268
being x and y; without its products it is no faster, without its stores it takes 0.78 of the time. What did not help:
staging y in slots of the pipeline so that no tile waits for stores, bringing x to the L2 cache ahead (it reads more from
memory), three pipeline steps, taking tiles earlier (5 to 20 % slower).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.arrays import _block_array
from jaxsparse.ops import _dispatch
from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _decode
from jaxsparse.ops.block_matmul import _hopper_body as body
from jaxsparse.ops.block_matmul import _hopper_once as once
from jaxsparse.ops.block_matmul import _narrow
from jaxsparse.ops.block_matmul import _narrow_plan
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.block_matmul import tuning as tunings
from jaxsparse.ops.block_matmul._hopper_tiles import WARPGROUPS

BLOCK_SIDES = (32, 64, 128, 256)
_IN_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_OUT_DTYPES = (*_IN_DTYPES, jnp.dtype(jnp.float32))
_LOADER_REGISTERS = 40
_COMPUTE_REGISTERS = 232
# Longest list over the mean from which blocks of 32 are left to the kernel that knows parts of lists; measured: the other one takes as
# long at 8192^3 and density 0.1, and longer where tiles are fewer.
_UNEVEN = 2


def supports(x, w: _block_array.BlockArray, *, transposed: bool = False, out_dtype=None) -> str | None:
  """Why `block_matmul_hopper` cannot run here, as a sentence; None if it can. Arguments as there (or their types)."""
  return unsupported(x, w, w.shape[1] if transposed else w.shape[0], out_dtype)


def unsupported(x, w, width, out_dtype) -> str | None:
  """As `supports`, for an operand `[B, width]`."""
  if (reason := mg.unavailable()) is not None:
    return reason
  if (reason := _bad_arguments(x, w, width, out_dtype)) is not None:
    return reason
  target = _dispatch.current_target()
  if target.capability != (9, 0):
    return f"the block-sparse kernel needs a Hopper GPU (compute capability 9.0), this is {target}."
  return None


def _bad_arguments(x, w, width, out_dtype) -> str | None:
  if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] != width:
    return f"x has shape {tuple(x.shape)}; the kernel takes [B, {width}] with B >= 1."
  if jnp.dtype(x.dtype) not in _IN_DTYPES:
    return f"x is {x.dtype}; the block-sparse kernel takes bfloat16 or float16."
  if jnp.dtype(w.dtype) != jnp.dtype(x.dtype):
    return f"w is {w.dtype} and x is {x.dtype}; they must be equal."
  if not all(side in BLOCK_SIDES for side in w.block_shape):
    return f"blocks are {w.block_shape[0]}x{w.block_shape[1]}; the kernel takes sides of 32, 64, 128 and 256."
  if out_dtype is not None and jnp.dtype(out_dtype) not in _OUT_DTYPES:
    return f"out_dtype is {jnp.dtype(out_dtype)}; it must be bfloat16, float16 or float32."
  return None


def block_matmul_hopper(
  x, w: _block_array.BlockArray, *, transposed: bool = False, out_dtype=None, tuning=None, interpret=None
):
  """`x @ w`, or `x @ w.T`; accumulates in float32.

  Args:
    x: `[B, K]` (`[B, O]` where transposed), bfloat16 or float16, B >= 1.
    w: `[K, O]`, blocks of x's dtype with sides of 32, 64, 128 or 256.
    transposed: which product.
    out_dtype: bfloat16, float16 or float32; x's dtype by default.
    tuning: a `tuning.Tuning`, or a `_narrow.Tuning` for the other kernel of blocks of 32 x 32; chosen from the shape by
      default: then `x @ w` for few rows is `_decode`'s.
    interpret: a `_mosaic_gpu.Interpret` to run on a CPU with a plain dot in place of the tensor cores.

  Returns:
    `[B, O]` (`[B, K]` where transposed).

  Raises:
    NotImplementedError: this JAX cannot build the kernel.
    ValueError: shapes, dtypes or tuning do not fit.
  """
  if (reason := mg.unavailable()) is not None:
    raise NotImplementedError(reason)
  if (reason := _bad_arguments(x, w, w.shape[1] if transposed else w.shape[0], out_dtype)) is not None:
    raise ValueError(reason)
  out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
  plans = _plan.plans_of(w)
  few_rows = tunings.takes_few_rows(x.shape[0], w.shape[1], min(w.block_shape), w.density)
  if tuning is None and not transposed and few_rows and plans.heads is not None:
    return _decode.block_matmul_decode(x, w, plans.heads, out_dtype=out_dtype, interpret=interpret)
  outputs = w.shape[0] if transposed else w.shape[1]
  if tuning is None:
    tuning = tuning_for(x.shape[0], w, transposed)
  if isinstance(tuning, _narrow.Tuning):
    if w.block_shape != (_narrow_plan.SIZE,) * 2:
      raise ValueError(f"{tuning} is for blocks of 32x32; these are {w.block_shape[0]}x{w.block_shape[1]}.")
    options = dict(transposed=transposed, out_dtype=out_dtype, tuning=tuning, interpret=interpret)
    return _narrow.matmul(x, w.blocks, _plan.narrow_of(w, transposed), outputs, **options)
  plan = plans.transposed if transposed else plans.forward
  # The interpreter knows no clusters: there, what they add up is added here.
  apart = interpret is not None and tuning.split_k > 1
  stored = jnp.dtype(jnp.float32) if apart else out_dtype
  run, launch = _build(tuning, x, w, plan, outputs, transposed, stored, interpret)
  lists = [jnp.asarray(a) for a in (plan.minor, plan.slots, plan.parts, plan.units)]
  if tuning.once:
    y = run(x, w.blocks, *lists, jnp.asarray(plan.whole))
    return y.sum(0).astype(out_dtype) if apart else y
  counter = jax.new_ref(jnp.zeros((launch.counters,), jnp.int32))  # fresh zeros in every call
  return run(x, w.blocks, *lists, counter)[0]


def tuning_for(batch: int, w: _block_array.BlockArray, transposed: bool) -> tunings.Tuning | _narrow.Tuning:
  """The tiles that a product gets where none are named; their type says which of the two kernels it gets."""
  depth, size = w.block_shape[::-1] if transposed else w.block_shape
  # Narrower blocks share a tile, which walks over all rows where one of them has a block.
  share = 1 - (1 - min(w.density, 1)) ** max(1, tunings.TILE // size)
  blocks = share * w.grid[1 if transposed else 0]
  outputs = w.shape[0] if transposed else w.shape[1]
  longest, uneven = None, False
  if w.static:
    plans = _plan.plans_of(w)
    lengths = np.diff((plans.transposed if transposed else plans.forward).starts)
    longest = int(lengths.max(initial=0))
    uneven = longest > _UNEVEN * lengths.mean()
  if _narrow.pays(batch, outputs, w.block_shape, w.density) and not uneven:
    return _narrow.Tuning()
  return tunings.best_tuning(batch, outputs, blocks, depth, size, longest)


def _build(t, x, w, plan, outputs, transposed, out_dtype, interpret):
  """The kernel for these shapes, and what is static in it.

  The kernel takes x, blocks, a plan and counters, and gives `[B, outputs]` and sums of parts of lists. With `t.once` it takes
  whole lists in place of counters and gives `[B, outputs]`, which the interpreter leaves as `[split_k, B, outputs]`.
  """
  plgpu = mg.plgpu
  (batch, _), (capacity, bk, bo) = x.shape, w.blocks.shape
  if out_dtype.itemsize == 4:  # the same shared memory for twice the bytes
    t = dataclasses.replace(t, epilogue_n=max(8, t.epilogue_n // 16 * 8))
  depth, size = (bo, bk) if transposed else (bk, bo)  # of a block: along the sum, along the result
  if t.step < min(depth, 64):
    raise ValueError(f"{t} has steps of {t.step}; blocks of {bk}x{bo} need 64.")
  lists = plan.starts.shape[0] - 1
  launch = (once.Launch if t.once else body.Launch)(
    t=t,
    batch=batch,
    lists=lists,
    extra=_plan.extra_parts(lists),
    size=size,
    # The interpreter knows no copies to a whole cluster, and no waiting for another block of threads.
    cluster=t.cluster if interpret is None else 1,
    processors=mg.sm_count() if interpret is None else 1,
    depth=depth,
    row=64 if bk % 64 == 0 and bo % 64 == 0 else 32,
    capacity=capacity,
    transposed=transposed,
    dtype=jnp.dtype(x.dtype),
    out_dtype=out_dtype,
    interpret=interpret,
  )

  names = ["x", "w", "minor", "slots", "parts", "units", *(("whole", "out") if t.once else ("counter", "out", "sums"))]

  def kernel(*refs, **smem):
    work = (once.Body if t.once else body.Body)(launch, dict(zip(names, refs, strict=True)), smem)
    registers = (_LOADER_REGISTERS, _COMPUTE_REGISTERS) if interpret is None else None
    mg.split_roles(work.warpgroup, WARPGROUPS, work.load_tiles, work.multiply_tiles, registers)

  apart = (t.split_k,) if interpret is not None and t.split_k > 1 else ()
  y = jax.ShapeDtypeStruct((*apart, batch, outputs), out_dtype)
  members = launch.cluster if interpret is not None else launch.cluster * t.split_k  # one of them is 1
  clusters = dict(cluster=(members,), cluster_names=("member",)) if members > 1 else {}
  run = plgpu.kernel(
    kernel,
    out_type=y if t.once else (y, jax.ShapeDtypeStruct(launch.sums, jnp.float32)),
    grid=(launch.threads,),
    grid_names=("block",),
    **clusters,
    num_threads=WARPGROUPS + 1,
    thread_name="warpgroup",
    compiler_params=mg.COMPILER_PARAMS,
    scratch_types=launch.scratch(),
    interpret=interpret,
    kernel_name="block_matmul_transposed" if transposed else "block_matmul",
  )
  return run, launch
