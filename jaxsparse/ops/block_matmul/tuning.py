"""Tile sizes of the block-sparse matmul, and which of them a shape gets."""

import dataclasses
import math

SHARED_BYTES = 227 * 1024  # of one block on Hopper
_BARRIER_BYTES = 1024
_SMS = 132
_SOME_ROWS = 1024  # of x: up to here, all tiles run at once if they fill the multiprocessors so many times or less;
_ROUNDS_AT_ONCE = 2
_IDLE = 0.5  # beyond, if half of the multiprocessors would be idle
_LONG = 1536  # rows of the sum, from which on a list that is longer than the others is better cut
TILE = 128  # of the result, along its blocks: 64 for each of the two warpgroups that multiply


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the kernel cuts a product.

  Attributes:
    tile_b: rows of x to a tile; a multiple of 8, at most 256.
    stages: pipeline steps in shared memory.
    step: of the sum, to a pipeline step: 64, or 32 for blocks of 32.
    split_k: blocks of threads, in a cluster, that share every list of blocks (`_hopper_once`): 1, 2, 4 or 8.
    once: a block of threads works on one tile, or its share of one, and another one on the next.
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
  once: bool = False
  step: int = 64
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
    if min(self.stages, self.tail, self.epilogue_slots) < 1 or self.stages > 32:
      raise ValueError(f"{self} needs stages in [1, 32], and tail and epilogue_slots of at least 1.")
    if self.split_k not in (1, 2, 4, 8) or self.tile_b % (8 * self.split_k):
      raise ValueError(f"{self} needs a split_k of 1, 2, 4 or 8, and tile_b to be a multiple of 8 of it.")
    if self.step not in (32, 64):
      raise ValueError(f"{self} needs a step of 32 or 64.")
    # Shares of a list need a kernel that knows them, and room for sums where x was.
    if self.split_k > 1 and (not self.once or self.stages * self.step < 256) or self.once and self.cluster > 1:
      raise ValueError(
        f"{self} needs once and stages of 256 of the sum for a split_k above 1, a cluster of 1 for once."
      )
    if self.cluster not in (1, 2, 4):
      raise ValueError(f"{self} needs a cluster of 1, 2 or 4.")
    if self.shared_bytes() > SHARED_BYTES:
      raise ValueError(f"{self} needs {self.shared_bytes()} bytes of shared memory; there are {SHARED_BYTES}.")

  def shared_bytes(self) -> int:
    """Shared memory of a block, in bytes, for a 16-bit result (a 32-bit one stages fewer rows)."""
    step = (self.tile_b + TILE) * self.step * 2
    out = 2 * self.epilogue_slots * self.epilogue_n * 128
    return self.stages * step + out + _BARRIER_BYTES


def takes_few_rows(batch: int, outputs: int, side: int, density: float) -> bool:
  """Whether `x @ w` is left to the kernel for few rows of x (`_decode`).

  Args:
    batch: rows of x.
    outputs: width of the result.
    side: the shorter one of a block.
    density: of w.
  """
  # Measured with 128 rows: it is 1.1 to 3 times as fast as tiles, but for many strips that have next to nothing to do.
  return batch <= 64 or batch <= 128 and (density > 0.03 or outputs <= _SMS * min(64, side))


def best_tuning(batch: int, outputs: int, blocks: float, depth: int, size: int, longest: int | None = None) -> Tuning:
  """Tiles for `batch` rows of x.

  Args:
    batch: rows of x.
    outputs: width of the result.
    blocks: entries of the list of a tile, on average.
    depth: of a block along the sum.
    size: of a block along the result.
    longest: entries of the longest list; None where that is not known.
  """
  steps = blocks * max(1, depth // 64)
  lists = -(-outputs // TILE)
  rounds = lists * -(-batch // 256) / _SMS
  if rounds <= (_ROUNDS_AT_ONCE if batch <= _SOME_ROWS else _IDLE):
    t = _at_once(batch, lists, steps, depth, size)
    if longest is not None and longest > 3 * blocks and longest * depth >= _LONG:
      return Tuning(t.tile_b, _stages(t.tile_b))  # tiles from a counter know parts of lists
    return t
  tile_b = min(256, -(-batch // 8) * 8)
  if 256 < batch < 1024 and 0 < batch % 256 <= 128:
    # A last tile that is nearly empty costs as much as a full one.
    tile_b = -(-batch // (8 * -(-batch // 256))) * 8
  # Measured: short tiles are bound by device memory and what a tile costs beside its steps, and lower ones hide that better.
  # Where tiles are few, they also leave less to the last of them.
  few = lists * -(-batch // tile_b) < 4 * _SMS
  if batch > _SOME_ROWS and steps < (12 if size >= TILE and few else 6):
    tile_b = 128
  across = -(-batch // tile_b)
  # Measured: neighbours that share w gain 2 to 13 %, but in each tile they wait for each other, and lose up to 10 % where
  # tiles are short. Narrower blocks share less: few of them are in the same rows. Blocks of 32 lose always.
  pays = size >= 64 and steps > (11 if size >= TILE else 22)
  cluster = 2 if pays and across % 2 == 0 and lists * across >= 2 * _SMS else 1
  return Tuning(tile_b, _stages(tile_b), cluster=cluster)


def _at_once(batch: int, lists: int, steps: float, depth: int, size: int) -> Tuning:
  """As low tiles as all run at once; where half of the multiprocessors would be idle, two share the list of each.

  What one multiprocessor can load bounds such a product, and of low tiles each has less to load. That outweighs that w is
  loaded more often. The figures are in `benchmarks/results/block_matmul_some_rows_h100.json`.
  """
  # Equal tiles of at most so many rows, in halves of 8 rows each.
  heights = sorted({-(-batch // (16 * -(-batch // most))) * 16 for most in (64, 128, 256)})
  tiles = {rows: lists * -(-batch // rows) for rows in heights}

  def fits(rows):
    rounds = tiles[rows] / _SMS
    if rounds <= 1 or rows <= 64:
      return rounds <= 1
    # A second round of short tiles costs less than tiles twice as high.
    return (
      rounds <= 1.75 and (size >= TILE or size == 64 and steps <= 16) or rounds <= 2 and size >= TILE and steps <= 12
    )

  rows = next(filter(fits, heights), heights[-1])
  halved = next((rows for rows in heights if 2 * tiles[rows] <= _SMS), None)
  if halved == rows:
    least = 16 if size >= 64 else 12
  else:  # tiles are twice as high, which loads less, but only narrow blocks with long lists make up for the meeting
    least = 12 if size < 64 else 40 if size < TILE and rows == heights[0] else math.inf
  split = 2 if halved is not None and steps > least else 1
  rows, step = halved if split == 2 else rows, min(64, depth)
  return Tuning(rows, _stages(rows) * 64 // step, split, once=True, step=step)


def _stages(tile_b: int) -> int:
  """Pipeline steps of 64 that fit."""
  return 4 if tile_b > 128 else 6 if tile_b > 64 else 8


def _epilogue_n(tile_b: int) -> int:
  """Equal slices of at most 64 rows."""
  slices = -(-tile_b // 64)
  return -(-tile_b // (8 * slices)) * 8
