"""Tile sizes of the block-sparse matmul, and which of them a shape gets."""

import dataclasses

SHARED_BYTES = 227 * 1024  # of one block on Hopper
_BARRIER_BYTES = 1024
_SMS = 132
# Of the model that decides whether lists are split: to be fitted to measurements.
_STEP_US, _SMALL_STEP_US = 0.65, 0.35  # 64 of the sum: bound by tensor cores, and by what one multiprocessor loads
_LAUNCH_US = 4.0  # adding up the parts is a kernel of its own
_BYTES_PER_US = 2.5e6
TILE = 128  # of the result, along its blocks: 64 for each of the two warpgroups that multiply


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the kernel cuts a product.

  Attributes:
    tile_b: rows of x to a tile; a multiple of 8, at most 256.
    stages: pipeline steps in shared memory.
    split_k: parts of every list of blocks that are computed apart and then added.
    tail: of at most so many tiles along B, the last ones, the long tiles are visited before the others.
    cluster: tiles along B that are computed side by side and share what is loaded of w: 1, 2 or 4.
    epilogue_n: rows of x stored at a time; 0 for a default.
    epilogue_slots: stores in flight for each warpgroup.

  Raises:
    ValueError: the instruction or shared memory do not allow it.
  """

  tile_b: int
  stages: int = 4
  split_k: int = 1
  tail: int = 8
  cluster: int = 1
  epilogue_n: int = 0
  epilogue_slots: int = 2

  def __post_init__(self):
    if self.tile_b % 8 or not 8 <= self.tile_b <= 256:
      raise ValueError(f"{self} needs tile_b to be a multiple of 8 in [8, 256].")
    if self.epilogue_n == 0:
      object.__setattr__(self, "epilogue_n", _epilogue_n(self.tile_b))
    if self.epilogue_n % 8 or self.epilogue_n < 8:
      raise ValueError(f"{self} needs epilogue_n to be a positive multiple of 8.")
    if min(self.stages, self.split_k, self.tail, self.epilogue_slots) < 1 or self.stages > 32:
      raise ValueError(f"{self} needs stages in [1, 32], and split_k, tail and epilogue_slots of at least 1.")
    if self.cluster not in (1, 2, 4):
      raise ValueError(f"{self} needs a cluster of 1, 2 or 4.")
    if self.shared_bytes() > SHARED_BYTES:
      raise ValueError(f"{self} needs {self.shared_bytes()} bytes of shared memory; there are {SHARED_BYTES}.")

  def shared_bytes(self) -> int:
    """Shared memory of a block, in bytes, for steps of 64 and a 16-bit result (a 32-bit one stages fewer rows)."""
    step = (self.tile_b + TILE) * 64 * 2
    out = 2 * self.epilogue_slots * self.epilogue_n * 128
    return self.stages * step + out + _BARRIER_BYTES


def best_tuning(batch: int, outputs: int, blocks: float, depth: int, size: int) -> Tuning:
  """Tiles for `batch` rows of x.

  Args:
    batch: rows of x.
    outputs: width of the result.
    blocks: entries of the list of a tile, on average.
    depth: of a block along the sum.
    size: of a block along the result.
  """
  tile_b = min(256, -(-batch // 8) * 8)
  if 256 < batch < 1024 and 0 < batch % 256 <= 128:
    # A last tile that is nearly empty costs as much as a full one.
    tile_b = -(-batch // (8 * -(-batch // 256))) * 8
  steps = blocks * max(1, depth // 64)
  tiles = -(-outputs // TILE) * -(-batch // tile_b)
  # Measured: short tiles are bound by device memory and what a tile costs beside its steps, and lower ones hide that better.
  # Where tiles are few, they also leave less to the last of them.
  if tile_b == 256 and steps < (12 if size >= TILE and tiles < 4 * _SMS else 6):
    tile_b, tiles = 128, -(-outputs // TILE) * -(-batch // 128)
  across = -(-batch // tile_b)

  def microseconds(split):
    step = _STEP_US if tile_b > 64 else _SMALL_STEP_US
    lists = -(-tiles * split // _SMS) / split * steps * step
    return lists + (0 if split == 1 else _LAUNCH_US + split * batch * outputs * 8 / _BYTES_PER_US)

  stages = 4 if tile_b > 128 else 6 if tile_b > 64 else 8
  split = min((1, 2, 4, 8), key=microseconds)
  # Measured: neighbours that share w gain 2 to 13 %, but in each tile they wait for each other, and lose up to 10 % where
  # tiles are short. Narrower blocks share less: few of them are in the same rows. Blocks of 32 lose always.
  pays = size >= 64 and steps > (11 if size >= TILE else 22)
  cluster = 2 if pays and across % 2 == 0 and split == 1 and tiles >= 2 * _SMS else 1
  return Tuning(tile_b, stages, split, cluster=cluster)


def _epilogue_n(tile_b: int) -> int:
  """Equal slices of at most 64 rows."""
  slices = -(-tile_b // 64)
  return -(-tile_b // (8 * slices)) * 8
