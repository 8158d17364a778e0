"""`x @ w` for few rows of x and block-sparse w, at about the speed of reading the blocks (Hopper, Pallas Mosaic GPU).

A block of threads computes a strip of 32 or 64 outputs of one block column from its whole list of blocks, and several of
them share a multiprocessor, so that all strips are under way at once. What bounds such a short kernel is one latency after
the other, so there are two: a line with everything that a strip must know to begin (`_heads`), then the blocks and the parts
of x themselves. A list that is known to be much longer than the others is cut in pieces, which leave their sums in device
memory; the last one to come there adds them, in their order. Where there are few strips, clusters of two share a list and
add up their sums through distributed shared memory.

One warpgroup loads, another multiplies. The copy engine fills what lies outside of x and of a list with zeros.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
from jax import lax

from jaxsparse.arrays import _block_array
from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _heads

MAX_BATCH = 64
_SMS = 132
_SHARED_BYTES = 228 * 1024  # of a multiprocessor; each block of threads needs so much beside what is counted here:
_RESERVED_BYTES = 1024 + 1024 + 128  # CUDA's own, barriers, and a static byte that the backend declares
_REGISTERS = 65536
_THREADS = 256
_LOADERS = 4
_MOST_STAGES = 10
_FIRST_ROW = _heads.LINE - _heads.ROWS  # in a line
_WORTH_A_CLUSTER = 0.08  # density; below, meeting costs more than it gains


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the work is cut.

  Attributes:
    strip: outputs of a block of threads: 64, or 32 where blocks have a side of 32.
    depth: rows of w to a pipeline step: 64 or 128.
    stages: pipeline steps in shared memory, at least 2.
    split: blocks of threads that share a list, in a cluster: 1, 2 or 4.
    loaders: warps that copy, a step each: 1 or 4. Several gain 3 to 7 % where a step has many small copies, and cost 0.1 us.

  Raises:
    ValueError: the kernel does not know such values.
  """

  strip: int
  depth: int
  stages: int
  split: int = 1
  loaders: int = 1

  def __post_init__(self):
    if self.strip not in (32, 64) or self.depth not in (64, 128) or self.split not in (1, 2, 4):
      raise ValueError(f"{self} needs strip in (32, 64), depth in (64, 128) and split in (1, 2, 4).")
    if not 2 <= self.stages <= 32:
      raise ValueError(f"{self} needs stages in [2, 32].")
    # A warp that waits for a slot knows only that the one it used before is free. With more warps than slots a slot could
    # come free twice meanwhile, which looks like never.
    if self.loaders not in (1, _LOADERS) or self.loaders > self.stages:
      raise ValueError(f"{self} needs loaders in (1, {_LOADERS}), and no more than stages.")


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything static about a launch: `[batch, k] @ [k, o]` with room for `capacity` blocks `bk x bo`, in `lines` pieces of lists."""

  tuning: Tuning
  batch: int
  k: int
  o: int
  capacity: int
  bk: int
  bo: int
  lines: int
  dtype: str
  out_dtype: str

  @property
  def lists(self) -> int:
    """Block columns."""
    return self.o // self.bo

  @property
  def places(self) -> int:
    """Pieces, at most, of lists that are cut: one in n pieces has n - 1 lines more than lists that are not."""
    return 2 * (self.lines - self.lists)

  @property
  def columns(self) -> int:
    """Rows of x as the instruction counts them."""
    return -(-self.batch // 8) * 8

  @property
  def strips(self) -> int:
    """Strips of a block column."""
    return self.bo // self.tuning.strip

  @property
  def unit(self) -> int:
    """Rows of w that one copy brings."""
    return min(self.bk, self.tuning.depth)

  @property
  def units(self) -> int:
    """Copies of w in a pipeline step."""
    return self.tuning.depth // self.unit

  @property
  def w_shape(self) -> tuple[int, int, int]:
    """Of w in shared memory."""
    return self.tuning.stages, self.tuning.depth, self.tuning.strip

  @property
  def x_shape(self) -> tuple[int, int, int, int]:
    """Of x in shared memory: its parts are cut to rows as wide as those of w."""
    return self.tuning.stages, self.tuning.depth // self.tuning.strip, self.columns, self.tuning.strip


def best_tuning(batch: int, w: _block_array.BlockArray, lines: int | None = None) -> Tuning:
  """Fills the multiprocessors' shared memory: with as many strips as there are, or as registers allow.

  `lines` are pieces of lists; default: as many as there are block columns.
  """
  strip = 64 if min(w.block_shape) >= 64 else 32
  columns = -(-batch // 8) * 8
  sums = 64 // strip * columns // 2
  # Beyond 64 rows, sums of strips of 32 would take the room of pipeline steps.
  meet = w.density >= _WORTH_A_CLUSTER and columns * (64 // strip) <= 128
  split = 2 if w.shape[1] // strip <= _SMS and meet else 1
  strips = (w.grid[1] if lines is None else lines) * (w.block_shape[1] // strip)
  # What the compiler takes, and more; of wide strips, fewer at a time with more steps each were faster.
  resident = int(_REGISTERS / (_THREADS * (28 + 1.8 * sums if strip == 64 else 34 + 1.1 * sums)))
  resident = max(1, min(resident, -(-strips * split // _SMS)))
  room = _SHARED_BYTES // resident - _RESERVED_BYTES - 4 * inbox_words(strip, split, columns)
  step = lambda depth: 2 * depth * (strip + columns)
  depth = 128 if room >= 4 * step(128) else 64
  stages = max(2, min(_MOST_STAGES, room // step(depth)))
  return Tuning(strip, depth, stages, split, _LOADERS if strip == 32 and stages >= _LOADERS else 1)


def inbox_words(strip: int, split: int, columns: int) -> int:
  """Sums that others send to a block of threads: its own other half, for strips of 32, and the others of its cluster."""
  halves = 64 // strip
  return max(1, (halves * split - 1) * mg.WARPGROUP // halves * columns // 2)


def block_matmul_decode(
  x, w: _block_array.BlockArray, heads, *, out_dtype=None, tuning: Tuning | None = None, interpret=None
):
  """`x @ w` for few rows of x; accumulates in float32. Equal arguments give equal bits.

  Args:
    x: `[B, K]`, bfloat16 or float16, B in [1, 128].
    w: `[K, O]`, blocks of x's dtype with sides of 32, 64, 128 or 256, in a `BlockArray`'s order.
    heads: of `_plan.plans_of(w)`.
    out_dtype: bfloat16, float16 or float32; x's dtype by default.
    tuning: chosen from the shape by default.
    interpret: a `_mosaic_gpu.Interpret` to run on a CPU with a plain dot in place of the tensor cores.

  Returns:
    `[B, O]`.

  Raises:
    ValueError: the tuning does not fit the blocks.
  """
  out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
  t = best_tuning(x.shape[0], w, heads.shape[0]) if tuning is None else tuning
  if t.strip > min(w.block_shape):
    raise ValueError(f"{t} has strips that are wider than a side of blocks {w.block_shape[0]}x{w.block_shape[1]}.")
  dtypes = jnp.dtype(x.dtype).name, out_dtype.name
  plan = Plan(t, x.shape[0], *w.shape, *w.blocks.shape, heads.shape[0], *dtypes)
  operands = [x, w.blocks, jnp.asarray(w.rows), jnp.asarray(heads)]
  if interpret is None:
    if plan.places:  # counters begin at zero in every call
      operands.append(jax.new_ref(jnp.zeros((plan.places * plan.strips,), jnp.int32)))
    return _build(plan, None)(*operands)[0]
  # The interpreter knows neither clusters nor counters: there, what they add up is added here.
  (out,) = _build(plan, interpret)(*operands)
  y = jnp.zeros((plan.lists, *out.shape[2:])).at[heads[:, 0]].add(out.sum(0))
  return y.swapaxes(0, 1).reshape(plan.batch, plan.o).astype(out_dtype)


@functools.lru_cache(256)
def _build(p: Plan, interpret):
  """The kernel of a plan: (x, blocks, rows, heads, counters) -> (y, sums of pieces); without counters and sums where no list
  is cut. Interpreted: (x, blocks, rows, heads) -> sums of all parts of all lines, in a tuple."""
  plgpu, t, grid = mg.plgpu, p.tuning, p.lines * p.strips
  clusters, pipeline = {}, _Interpreted
  out = (jax.ShapeDtypeStruct((t.split, p.lines, p.batch, p.bo), jnp.float32),)
  if interpret is None:
    pipeline = importlib.import_module("jaxsparse.ops.block_matmul._decode_device").Pipeline
    clusters = dict(cluster=(t.split,), cluster_names=("part",)) if t.split > 1 else {}
    sums = jax.ShapeDtypeStruct((p.places, p.strips, t.strip * p.columns), jnp.float32)
    out = (jax.ShapeDtypeStruct((p.batch, p.o), p.out_dtype), *([sums] if p.places else []))
  else:
    grid *= t.split
  transforms = (plgpu.SwizzleTransform(2 * t.strip),)

  def kernel(x_gmem, w_gmem, rows, heads, *rest, **scratch):
    index, part = lax.axis_index("strip"), 0
    if clusters:
      part = lax.axis_index("part")
    elif t.split > 1:
      index, part = _divmod(index, t.split)
    strip = _Strip(p, index, part, rows, heads)
    strip.attach(pipeline(p, transforms, x_gmem, w_gmem, *rest, **scratch))
    mg.split_roles(lax.axis_index("warpgroup"), 1, strip.load, strip.multiply, None)

  return plgpu.kernel(
    kernel,
    out_type=out,
    grid=(grid,),
    grid_names=("strip",),
    **clusters,
    num_threads=2,
    thread_name="warpgroup",
    compiler_params=mg.COMPILER_PARAMS,
    scratch_types=dict(
      x_smem=plgpu.SMEM(p.x_shape, p.dtype, transforms=transforms),
      w_smem=plgpu.SMEM(p.w_shape, p.dtype, transforms=transforms),
      **pipeline.scratch(p),
    ),
    interpret=interpret,
    kernel_name="block_matmul_decode",
  )


class _Strip:
  """What a block of threads does: a part of a piece of a list, for some outputs of its column, by way of `pipe`."""

  def __init__(self, p: Plan, index, part, rows, heads):
    t = p.tuning
    self.p, self.part, self.rows, self.heads = p, part, rows, heads
    self.line, self.sub = _divmod(index, p.strips)
    # All at once and before anything else, so that barriers begin meanwhile; a part's first rows are known only then.
    early = min(_heads.ROWS, t.stages * t.depth // p.bk + 1) if t.split == 1 else 0
    self.column, self.start, self.count = (heads[self.line, i] for i in range(3))
    self.first = [heads[self.line, _FIRST_ROW + i] for i in range(early)]

  def attach(self, pipe):
    """What follows from the line, after the pipeline has begun."""
    p, t = self.p, self.p.tuning
    self.pipe, self.within = pipe, self.sub * t.strip
    self.outputs = self.column * p.bo + self.within
    steps = lax.div(self.count * p.bk + t.depth - 1, jnp.int32(t.depth))
    self.begin, self.steps = 0, steps
    if t.split > 1:
      self.begin, end = (lax.div(steps * i, jnp.int32(t.split)) for i in (self.part, self.part + 1))
      self.steps = end - self.begin

  def load(self):
    stages, loaders, mine = self.p.tuning.stages, self.pipe.loaders, self.pipe.loader()
    for s in range(stages):
      go = s < self.steps if loaders == 1 else jnp.logical_and(s < self.steps, mine == s % loaders)
      mg.pl.when(go)(lambda s=s: self.pipe.copy(s, self._sources(s, self._early_row), self.within))
    first = stages if loaders == 1 else stages + lax.rem(mine + (loaders - stages % loaders), jnp.int32(loaders))
    rounds = lax.div(jnp.maximum(self.steps - first + (loaders - 1), 0), jnp.int32(loaders))

    @functools.partial(lax.fori_loop, 0, rounds, init_val=())
    def _(i, _):
      step = first + i * loaders
      sources = self._sources(step, self._row)  # on their way while this waits
      self.pipe.await_room(step)
      self.pipe.copy(lax.rem(step, jnp.int32(stages)), sources, self.within)
      return ()

    self.pipe.finish(self.steps)

  def multiply(self):
    self.pipe.store(self.pipe.multiply(self.steps), self)

  def _sources(self, step, row_of):
    """(block, row of the block, column of x) of every unit of a step; `row_of(i)` is the block row of the list's i-th block."""
    p, sources = self.p, []
    for i in range(p.units):
      row = (self.begin + step) * p.tuning.depth + i * p.unit  # of the list's blocks, one below the other
      entry, offset = (row // p.bk, row % p.bk) if isinstance(row, int) else _divmod(row, p.bk)
      block, k = self.start + entry, row_of(entry) * p.bk + offset
      if p.units > 1:  # the last step may go beyond the list
        there = entry < self.count
        block, k = jnp.where(there, block, p.capacity), jnp.where(there, k, p.k)
      sources.append((block, offset, k))
    return sources

  def _row(self, entry):
    return self.rows[jnp.minimum(self.start + entry, self.p.capacity - 1)]

  def _early_row(self, entry):
    """From the line, which is at hand, where it holds it."""
    if isinstance(entry, int):
      return self.first[entry] if entry < len(self.first) else self._row(entry)
    last = _heads.ROWS - 1
    in_line = lambda: self.heads[self.line, _FIRST_ROW + jnp.minimum(entry, last)]
    return lax.cond(entry <= last, in_line, lambda: self._row(entry))


def _divmod(a, b: int):
  if b == 1:
    return a, 0
  return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))


class _Interpreted:
  """The pipeline on a CPU; `_decode_device.Pipeline` is what runs on a GPU."""

  loaders = 1  # who share the copies, a step each

  def __init__(self, p, transforms, x_gmem, w_gmem, sums, *, x_smem, w_smem, full, empty):
    del transforms
    self.p, self.x_gmem, self.w_gmem, self.sums = p, x_gmem, w_gmem, sums
    self.x_smem, self.w_smem, self.full, self.empty = x_smem, w_smem, full, empty

  @staticmethod
  def scratch(p):
    """Types of what `__init__` takes beyond operands."""
    barrier = lambda arrivals: mg.plgpu.Barrier(num_arrivals=arrivals, num_barriers=p.tuning.stages)
    return dict(full=barrier(p.units + p.x_shape[1]), empty=barrier(1))

  def loader(self):
    """Which of the loaders this thread belongs to."""
    return 0

  def copy(self, slot, sources, within):
    """Begins to copy a step.

    Args:
      slot: where to.
      sources: (block, row of the block, column of x) for every unit.
      within: first output, of the block's.
    """
    p, pl, width = self.p, mg.pl, self.p.tuning.strip
    slabs = p.unit // width
    # The copy engine may go beyond x, which JAX allows only where it does not know the beginning.
    first = 0 * lax.axis_index("strip")
    for i, (block, offset, k) in enumerate(sources):
      w = self.w_gmem.at[block, pl.ds(offset, p.unit), pl.ds(within, width)]
      mg.plgpu.copy_gmem_to_smem(w, self.w_smem.at[slot, pl.ds(i * p.unit, p.unit)], self.full.at[slot])
      for j in range(slabs):
        x = self.x_gmem.at[pl.ds(first, p.columns), pl.ds(k + j * width, width)]
        mg.plgpu.copy_gmem_to_smem(x, self.x_smem.at[slot, i * slabs + j], self.full.at[slot])

  def await_room(self, step):
    """Waits until the slot of a step, which is not one of the first, is free."""
    mg.plgpu.barrier_wait(self.empty.at[lax.rem(step, jnp.int32(self.p.tuning.stages))])

  def finish(self, steps):
    """Nobody leaves while a barrier is still to be signalled."""
    for s in range(self.p.tuning.stages):
      mg.pl.when(s < steps)(lambda s=s: mg.plgpu.barrier_wait(self.empty.at[s]))

  def multiply(self, steps):
    """The sum of all steps; only `store` knows how it lies."""
    p = self.p

    def body(step, accumulator):
      slot = lax.rem(step, jnp.int32(p.tuning.stages))
      mg.plgpu.barrier_wait(self.full.at[slot])
      w, x = self.w_smem[slot], self.x_smem[slot].transpose(0, 2, 1).reshape(p.tuning.depth, -1)
      mg.plgpu.commit_smem()  # these were ordinary loads, the copy engine writes next; the tensor cores need none
      mg.plgpu.barrier_arrive(self.empty.at[slot])
      return accumulator + jnp.dot(w.T, x, preferred_element_type=jnp.float32)

    return lax.fori_loop(0, steps, body, jnp.zeros((p.tuning.strip, p.columns), jnp.float32))

  def store(self, accumulator, strip):
    """Stores the sum of a `_Strip`, or leaves it to the one that adds the pieces of the list."""
    y = self.sums.at[strip.part, strip.line]
    y[:, mg.pl.ds(strip.within, self.p.tuning.strip)] = accumulator.T[: self.p.batch]
