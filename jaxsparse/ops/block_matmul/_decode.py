"""`x @ w` for few rows of x and block-sparse w at the speed of reading the blocks (Hopper, Pallas Mosaic GPU).

A block of threads computes a strip of 32 or 64 outputs of one block column from its whole list of blocks, and several of
them share a multiprocessor, so that all strips are under way at once: memory is kept busy whoever has the longest list, and
nobody waits for parts of sums. What bounds such a short kernel is one latency after the other, so there are two: a line
with everything that a strip must know to begin (`heads_of`), then the blocks and the parts of x themselves.

One warpgroup loads, another multiplies (`_decode_device`). The copy engine fills what lies outside of x and of the list
with zeros.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
import numpy as np

from jaxsparse.arrays import _block_array
from jaxsparse.ops import _mosaic_gpu as mg

HEAD = 32  # words of a line of `heads_of`: 128 bytes
_FIRST = HEAD - 3  # blocks of a list whose rows its line holds


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the work is cut.

  Attributes:
    strip: outputs of a block of threads: 32 or 64.
    depth: rows of w to a pipeline step, a multiple of 64.
    stages: pipeline steps in shared memory.
    prefetch: pieces of w that every block of threads asks memory for while it waits for its line.
  """

  strip: int
  depth: int
  stages: int
  prefetch: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything static about a launch: `[batch, k] @ [k, o]` with room for `capacity` blocks `bk x bo`."""

  tuning: Tuning
  batch: int
  k: int
  o: int
  capacity: int
  bk: int
  bo: int
  dtype: str
  out_dtype: str

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
  def slabs(self) -> int:
    """Rows of shared memory that the part of x of a pipeline step is wide."""
    return self.tuning.depth // self.tuning.strip

  @property
  def w_shape(self) -> tuple[int, ...]:
    return self.tuning.stages, self.tuning.depth, self.tuning.strip

  @property
  def x_shape(self) -> tuple[int, ...]:
    return self.tuning.stages, self.slabs, self.columns, self.tuning.strip


def heads_of(xp, rows, cols, block_cols: int):
  """Where the list of every block column begins, longest list first.

  Args:
    xp: NumPy or jax.numpy.
    rows, cols: `[N]`, of a `BlockArray` in its order.
    block_cols: block columns of the weight.

  Returns:
    int32 `[block_cols, HEAD]`: the column, the slot of its first block, how many there are, and the rows of the first of
    them.
  """
  counts = xp.bincount(cols, minlength=block_cols + 1, **({} if xp is np else {"length": block_cols + 1}))[:block_cols]
  order = xp.argsort(-counts, stable=True)
  starts = xp.cumsum(counts) - counts
  at = xp.minimum(starts[order][:, None] + xp.arange(_FIRST), rows.shape[0] - 1)
  lines = [order[:, None], starts[order][:, None], counts[order][:, None], xp.asarray(rows)[at]]
  return xp.concatenate([xp.asarray(a).astype(np.int32) for a in lines], 1)


def block_matmul_decode(x, w: _block_array.BlockArray, heads, *, out_dtype=None, tuning: Tuning, interpret=None):
  """`x @ w`."""
  out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
  plan = Plan(tuning, x.shape[0], *w.shape, *w.blocks.shape, jnp.dtype(x.dtype).name, out_dtype.name)
  return _build(plan, interpret)(x, w.blocks, jnp.asarray(w.rows), jnp.asarray(heads))


@functools.lru_cache(256)
def _build(p: Plan, interpret):
  """The kernel of a plan: (x, blocks, rows, heads) -> y."""
  plgpu, t = mg.plgpu, p.tuning
  transforms = (plgpu.SwizzleTransform(2 * t.strip),)
  if interpret is None:
    from jaxsparse.ops.block_matmul import _decode_device as device
  else:
    device = None
  def kernel(x_gmem, w_gmem, rows, heads, y_gmem, **scratch):
    index = lax.axis_index("strip")
    line, sub = _divmod(index, p.strips)
    # All that comes with the line, before anything else.
    column, start, count, *first = [heads[line, i] for i in range(3 + min(_FIRST, t.stages * t.depth // p.bk + 1))]
    pipe = (device.Pipe if device else _Interpreted)(p, transforms, x_gmem, w_gmem, y_gmem, **scratch)

    def load():
      if t.prefetch and interpret is None:
        _prefetch(p, w_gmem, index)
      _load(p, pipe, sub, start, count, rows, first)

    def multiply():
      accumulator = pipe.multiply(_steps(p, count))
      pipe.store(accumulator, column * p.bo + sub * t.strip)

    mg.split_roles(lax.axis_index("warpgroup"), 1, load, multiply, None)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((p.batch, p.o), p.out_dtype),
    grid=(p.o // t.strip,),
    grid_names=("strip",),
    num_threads=2,
    thread_name="warpgroup",
    compiler_params=mg.COMPILER_PARAMS,
    scratch_types=dict(
      x_smem=plgpu.SMEM(p.x_shape, p.dtype, transforms=transforms),
      w_smem=plgpu.SMEM(p.w_shape, p.dtype, transforms=transforms),
      **(device.Pipe if device else _Interpreted).scratch(p),
    ),
    interpret=interpret,
    kernel_name="block_matmul_decode",
  )


def _divmod(a, b: int):
  if b == 1:
    return a, 0
  return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))


def _steps(p, count):
  return lax.div(count * p.bk + p.tuning.depth - 1, jnp.int32(p.tuning.depth))


def _prefetch(p, w_gmem, index):
  """Asks for other pieces of w than everybody else, whoever will need them: memory begins to work at once."""
  pl, plgpu, t = mg.pl, mg.plgpu, p.tuning
  for i in range(t.prefetch):
    rest, sub = _divmod(index + i * (p.o // t.strip), p.strips)
    block, part = _divmod(rest, p.bk // p.unit)
    plgpu.async_prefetch(w_gmem.at[block, pl.ds(part * p.unit, p.unit), pl.ds(sub * t.strip, t.strip)])


def _load(p, pipe, sub, start, count, rows, first):
  """Copies the blocks of a list and their parts of x, step after step."""
  t = p.tuning
  steps = _steps(p, count)

  def copy(step, slot, row_of):
    sources = []
    for i in range(p.units):
      row = step * t.depth + i * p.unit  # of the column's blocks, one below the other
      entry, offset = (row // p.bk, row % p.bk) if isinstance(row, int) else _divmod(row, p.bk)
      block, k = start + entry, row_of(entry) * p.bk + offset
      if p.bk % t.depth:  # the last step may go beyond the list
        block, k = jnp.where(entry < count, block, p.capacity), jnp.where(entry < count, k, p.k)
      sources.append((block, offset, k))
    pipe.copy(slot, sources, sub * t.strip)

  def row_of(entry):
    return rows[jnp.minimum(start + entry, p.capacity - 1)]

  for s in range(t.stages):
    in_line = (s * t.depth + t.depth - 1) // p.bk < len(first)

    @mg.pl.when(s < steps)
    def _(s=s, in_line=in_line):
      if in_line:
        copy(s, s, lambda entry: first[entry])
      else:
        copy(jnp.int32(s), s, row_of)

  @functools.partial(lax.fori_loop, t.stages, jnp.maximum(steps, t.stages), init_val=())
  def _(step, _):
    pipe.await_room(step)
    copy(step, lax.rem(step, jnp.int32(t.stages)), row_of)
    return ()

  pipe.finish(steps)


class _Interpreted:
  """The pipeline on a CPU; `_decode_device.Pipe` is what runs on a GPU."""

  def __init__(self, p, transforms, x_gmem, w_gmem, y_gmem, *, x_smem, w_smem, full, empty):
    del transforms
    self.p, self.x_gmem, self.w_gmem, self.y_gmem = p, x_gmem, w_gmem, y_gmem
    self.x_smem, self.w_smem, self.full, self.empty = x_smem, w_smem, full, empty

  @staticmethod
  def scratch(p):
    """Types of what `__init__` takes beyond operands."""
    barrier = lambda arrivals: mg.plgpu.Barrier(num_arrivals=arrivals, num_barriers=p.tuning.stages)
    return dict(full=barrier(p.units + p.slabs), empty=barrier(1))

  def copy(self, slot, sources, at):
    """Begins to copy a step: of block, row of the block and column of x, for every unit; outputs from `at` on."""
    p, pl, row = self.p, mg.pl, self.p.tuning.strip
    for i, (block, offset, k) in enumerate(sources):
      w = self.w_gmem.at[block, pl.ds(offset, p.unit), pl.ds(at, row)]
      mg.plgpu.copy_gmem_to_smem(w, self.w_smem.at[slot, pl.ds(i * p.unit, p.unit)], self.full.at[slot])
      for j in range(p.unit // row):
        x = self.x_gmem.at[pl.ds(0, p.columns), pl.ds(k + j * row, row)]
        mg.plgpu.copy_gmem_to_smem(x, self.x_smem.at[slot, i * (p.unit // row) + j], self.full.at[slot])

  def await_room(self, step):
    mg.plgpu.barrier_wait(self.empty.at[lax.rem(step, jnp.int32(self.p.tuning.stages))])

  def finish(self, steps):
    for s in range(self.p.tuning.stages):  # nobody leaves while a barrier is still to be signalled
      mg.pl.when(s < steps)(lambda s=s: mg.plgpu.barrier_wait(self.empty.at[s]))

  def multiply(self, steps):
    """The sum of all steps, `[outputs, rows of x]`."""
    p = self.p

    def body(step, accumulator):
      slot = lax.rem(step, jnp.int32(p.tuning.stages))
      mg.plgpu.barrier_wait(self.full.at[slot])
      w, x = self.w_smem[slot], self.x_smem[slot]
      mg.plgpu.commit_smem()  # these were ordinary loads, the copy engine writes next; the tensor cores need none
      mg.plgpu.barrier_arrive(self.empty.at[slot])
      return accumulator + jnp.dot(w.T, x.transpose(0, 2, 1).reshape(p.tuning.depth, -1), preferred_element_type=jnp.float32)

    return lax.fori_loop(0, steps, body, jnp.zeros((p.tuning.strip, p.columns), jnp.float32))

  def store(self, accumulator, first):
    y = accumulator.T[: self.p.batch].astype(self.p.out_dtype)
    self.y_gmem[:, mg.pl.ds(first, self.p.tuning.strip)] = y
