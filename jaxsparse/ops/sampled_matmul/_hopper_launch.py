"""What is static about a launch of the sampled product: tiles, shared memory, how many parts a tile may have."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.sampled_matmul import tuning as tunings

WARPGROUPS = 2  # that multiply
ROWS = _plan.UNIT  # of w for one wgmma, and so for each warpgroup
COLUMNS = _plan.SAMPLED_COLUMNS  # of a warpgroup
STEP = 64  # rows of x and dy to a pipeline step
CHUNK = 32  # columns that are added up at a time
CHUNKS = COLUMNS // CHUNK
_MOST_PARTS = 8  # of a tile


@dataclasses.dataclass(frozen=True)
class Launch:
  """Everything static about one launch.

  Attributes:
    t: how the product is cut.
    batch: rows of x and dy.
    capacity, bk, bo: of the blocks.
    block_cols: of w.
    height: of a tile: `_plan.TILE` or `_plan.UNIT`, half of which warpgroups share.
    dtype, out_dtype: of x and dy, and of the result.
    threads: blocks of threads that the tiles are dealt to.
    interpret: an `Interpret`, or None.
  """

  t: tunings.Tuning
  batch: int
  capacity: int
  bk: int
  bo: int
  block_cols: int
  height: int
  dtype: Any
  out_dtype: Any
  threads: int
  interpret: Any

  @property
  def flat(self) -> bool:
    """Whether the warpgroups share x, each with columns of its own; else they share the columns of dy."""
    return self.height < _plan.TILE

  @property
  def shared(self) -> int:
    """Block rows of a list."""
    return max(1, self.height // self.bk)

  @property
  def tiles_of_list(self) -> int:
    return max(1, self.bk // self.height)

  @property
  def entries(self) -> int:
    """Of a list, that a warpgroup takes at most."""
    return COLUMNS // self.bo

  @property
  def steps(self) -> int:
    return -(-self.batch // STEP)

  @property
  def dy_row(self) -> int:
    """Entries to a row of dy in shared memory; rows of x have the 64 columns of a unit."""
    return min(64, self.bo)

  @property
  def x_units(self) -> int:
    return 1 if self.flat else WARPGROUPS

  @property
  def dy_groups(self) -> int:
    return WARPGROUPS if self.flat else 1

  @property
  def out_columns(self) -> int:
    """That are stored at a time."""
    return 16 if self.flat and self.out_dtype.itemsize == 4 else 32

  @property
  def out_piece(self) -> int:
    """Rows of a block in a warpgroup."""
    return min(self.bk, ROWS)

  @property
  def epilogue_slots(self) -> int:
    """Stores in flight for each warpgroup; the ring of a flat tile leaves little room."""
    return 1 if self.flat else 2

  @property
  def stages(self) -> int:
    """Pipeline steps in shared memory."""
    return self.t.stages or (3 if self.flat else 4)

  @property
  def parts(self) -> list[int]:
    """Among how many blocks of threads a tile may be cut, where that saves more than meeting costs."""
    most = min(_MOST_PARTS, self.steps, self.threads)
    return [n for n in range(2, most + 1) if (self.steps - self.steps / n) * STEP > self.t.meeting]

  @property
  def dy_slabs(self) -> int:
    """Slabs of shared memory, 64 rows of dy by `dy_row` of its columns each, of a group of dy's columns."""
    return COLUMNS // self.dy_row

  @property
  def x_transforms(self):
    return (mg.plgpu.SwizzleTransform(2 * ROWS),)

  @property
  def dy_transforms(self):
    return (mg.plgpu.SwizzleTransform(2 * self.dy_row),)

  @property
  def out_transforms(self):
    width = self.out_columns
    return mg.plgpu.TilingTransform((8, width)), mg.plgpu.SwizzleTransform(width * self.out_dtype.itemsize)

  def scratch(self) -> dict[str, Any]:
    """Shared memory and barriers of a block."""
    plgpu, stages = mg.plgpu, self.stages
    out_shape = (WARPGROUPS, self.epilogue_slots, ROWS, self.out_columns)
    copies = self.x_units + self.dy_groups * self.dy_slabs
    x_shape, dy_shape = (stages, self.x_units, STEP, ROWS), (stages, self.dy_groups, self.dy_slabs, STEP, self.dy_row)
    return dict(
      x_smem=plgpu.SMEM(x_shape, self.dtype, transforms=self.x_transforms),
      dy_smem=plgpu.SMEM(dy_shape, self.dtype, transforms=self.dy_transforms),
      out_smem=plgpu.SMEM(out_shape, self.out_dtype, transforms=self.out_transforms),
      full=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
      empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )

  def mailboxes(self) -> jax.ShapeDtypeStruct:
    """Where blocks of threads put their parts of tiles."""
    return jax.ShapeDtypeStruct((self.threads, WARPGROUPS, CHUNKS, ROWS * CHUNK), jnp.float32)
