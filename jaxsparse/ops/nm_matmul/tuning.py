"""Tile sizes of the sparse tensor-core matmul, and which of them a shape gets."""

import dataclasses

_SHARED_BYTES = 227 * 1024 - 1024  # of one block, less barriers and alignment


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the kernel cuts a product.

  Attributes:
    tile_m: outputs to a tile; 64 or 128 for each multiplying warpgroup.
    tile_n: rows of x to a tile; a multiple of 8, at most 256.
    tile_k: reduction to a pipeline step, 64 or 128.
    stages: pipeline steps in shared memory.
    compute_warpgroups: warpgroups that multiply, 1 to 3.
    split_k: parts of the reduction computed apart and then added.
    grid_width: width of the stripes in which tiles are visited.
    grid_minor: axis that runs fastest inside a stripe: 0 outputs, 1 rows of x.
    epilogue_n: rows of x stored at a time; 0 for a default.
    epilogue_slots: stores in flight for each warpgroup.
  """

  tile_m: int
  tile_n: int
  tile_k: int = 64
  stages: int = 4
  compute_warpgroups: int = 2
  split_k: int = 1
  grid_width: int = 8
  grid_minor: int = 0
  epilogue_n: int = 0
  epilogue_slots: int = 2

  def __post_init__(self):
    if self.epilogue_n == 0:
      object.__setattr__(self, "epilogue_n", _epilogue_n(self.tile_n))
    rows = self.tile_m // self.compute_warpgroups
    if self.tile_m % self.compute_warpgroups or rows not in (64, 128):
      raise ValueError(f"{self} needs tile_m of 64 or 128 for each of its multiplying warpgroups.")
    if self.tile_n % 8 or not 8 <= self.tile_n <= 256:
      raise ValueError(f"{self} needs tile_n to be a multiple of 8 in [8, 256].")
    if self.tile_k not in (64, 128):
      raise ValueError(f"{self} needs tile_k of 64 or 128.")
    if self.epilogue_n % 8:
      raise ValueError(f"{self} needs epilogue_n to be a multiple of 8.")

  def shared_bytes(self, out_bytes: int = 2) -> int:
    """Shared memory of a block, in bytes."""
    step = self.tile_m * self.tile_k + self.tile_n * self.tile_k * 2 + self.tile_m * self.tile_k // 8
    out = self.compute_warpgroups * self.epilogue_slots * self.epilogue_n * 64 * out_bytes
    return self.stages * step + out


def _epilogue_n(tile_n: int) -> int:
  """Equal slices of at most 96 rows."""
  slices = -(-tile_n // 96)
  return -(-tile_n // (8 * slices)) * 8


def best_tuning(batch: int, reduction: int, outputs: int) -> Tuning:
  del reduction, outputs
  if batch <= 8:
    return Tuning(128, 8, 128, 6)
  return Tuning(256, 192)
