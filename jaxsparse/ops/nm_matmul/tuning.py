"""Tile sizes of the sparse tensor-core matmul, and which of them a shape gets.

The kernel is bound by the bytes that pass through shared memory, or, for few rows of x, by device memory; `_estimate`
counts both, and waves of tiles. Its constants were fitted on an H100: within 15 % of what was measured, and the tile it
takes within 8 % of the best tried, on every shape of `measured/nvidia_h100.json` (a test checks that).
"""

import dataclasses
import functools
import math

SHARED_BYTES = 227 * 1024  # of one block on Hopper
_BARRIER_BYTES = 1024
_SMS = 132
# Sparse won from this many weights on, whatever the batch; smaller ones were not measured.
_SMALL_WEIGHT = 1 << 20
_SMALL_SIDE = 256
_LAUNCH_NS = 2000
_MEETING_NS = 6000  # parts of a tile exchange their sums through the L2 cache
_MOST_PARTS = 4
_NARROW_TILES_DRIFT = 1.15
_SHORTEST_STEP_NS = 240  # a barrier, positions, a wgmma and its wait
# Up to here x's tile is small and weights stream from device memory.
_DECODE_BATCH = 64


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

  Raises:
    ValueError: the instruction, the registers or shared memory do not allow it.
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
    rows, rest = divmod(self.tile_m, self.compute_warpgroups)
    if self.compute_warpgroups not in (1, 2, 3) or rest or rows not in (64, 128):
      raise ValueError(f"{self} needs tile_m of 64 or 128 for each of 1 to 3 multiplying warpgroups.")
    if self.tile_n % 8 or not 8 <= self.tile_n <= 256:
      raise ValueError(f"{self} needs tile_n to be a multiple of 8 in [8, 256].")
    # A thread holds tile_n / 2 sums for every 64 rows; beyond this ptxas spills, and the kernel is 10 times slower.
    if rows // 64 * self.tile_n // 2 > (200 if self.compute_warpgroups < 3 else 96):
      raise ValueError(f"{self} needs more registers than a thread has: use a smaller tile_n.")
    if self.tile_k not in (64, 128):
      raise ValueError(f"{self} needs tile_k of 64 or 128.")
    if self.epilogue_n % 8:
      raise ValueError(f"{self} needs epilogue_n to be a multiple of 8.")
    if min(self.stages, self.split_k, self.grid_width, self.epilogue_slots) < 1 or self.stages > 32:
      raise ValueError(f"{self} needs stages in [1, 32], and split_k, grid_width and epilogue_slots of at least 1.")
    if self.shared_bytes() > SHARED_BYTES:
      raise ValueError(f"{self} needs {self.shared_bytes()} bytes of shared memory; there are {SHARED_BYTES}.")

  def shared_bytes(self) -> int:
    """Shared memory of a block, in bytes, for a 16-bit result (a 32-bit one stages fewer rows)."""
    step = _step_bytes(self.tile_m, self.tile_n) * self.tile_k // 64
    out = self.compute_warpgroups * self.epilogue_slots * self.epilogue_n * 128
    return self.stages * step + out + _BARRIER_BYTES


def choose_tuning(batch: int, reduction: int, outputs: int) -> Tuning | None:
  """The tiles expected to be fastest for `x [batch, reduction] @ w [reduction, outputs]`; None where dense wins."""
  if reduction * outputs < _SMALL_WEIGHT or min(reduction, outputs) < _SMALL_SIDE:
    return None
  return best_tuning(batch, reduction, outputs)


@functools.cache
def best_tuning(batch: int, reduction: int, outputs: int) -> Tuning:
  """As `choose_tuning`, also where dense wins."""
  if batch <= _DECODE_BATCH:
    return _decode_tuning(batch, outputs)
  best = min(_candidates(batch, outputs), key=lambda t: _estimate(t, batch, reduction, outputs))
  # Wide stripes share more of x and w in the L2 cache; with few columns of tiles, narrow ones leave fewer rags.
  wide = _waves(best, batch, outputs) == 1 or math.ceil(batch / best.tile_n) >= 32
  return dataclasses.replace(best, grid_width=8 if wide else 4)


def _decode_tuning(batch, outputs):
  """Few rows: weights are read once, so what counts is long rows of w in one request and enough blocks at work."""
  tile_n = next(n for n in (8, 16, 32, 64) if batch <= n)
  if outputs <= 64 * _SMS:
    return Tuning(64, tile_n, 128, 8 if tile_n <= 32 else 6, compute_warpgroups=1)
  if outputs <= 128 * _SMS or tile_n == 64:
    few = outputs < 128 * 0.8 * _SMS  # the fewer blocks, the more each must have on its way
    return Tuning(128, tile_n, 128, (8 if few else 3) if tile_n <= 16 else 4)
  return Tuning(256, tile_n, 64, 4)


def _candidates(batch, outputs):
  for tile_m, warpgroups, largest in ((128, 2, 256), (192, 3, 176), (256, 2, 200)):
    for tile_n in range(64, min(largest, -(-batch // 8) * 8) + 1, 8):
      whole = _largest_pipeline(tile_m, tile_n, warpgroups)
      yield whole
      for parts in range(2, min(_MOST_PARTS, _SMS // _tiles(whole, batch, outputs)) + 1):
        yield dataclasses.replace(whole, split_k=parts)  # its blocks all run at once: parts are added inside the kernel


def _tiles(t, batch, outputs):
  return math.ceil(batch / t.tile_n) * math.ceil(outputs / t.tile_m)


def _waves(t, batch, outputs):
  return math.ceil(_tiles(t, batch, outputs) * t.split_k / _SMS)


def _largest_pipeline(tile_m, tile_n, warpgroups):
  # Small tiles spend their time waiting between steps: longer ones.
  tile_k = 128 if tile_m * tile_n <= 128 * 128 else 64
  out = Tuning(tile_m, tile_n, tile_k, 1, warpgroups).shared_bytes()
  step = _step_bytes(tile_m, tile_n) * tile_k // 64
  return Tuning(tile_m, tile_n, tile_k, min(6, 1 + (SHARED_BYTES - out) // step), warpgroups)


def _estimate(t: Tuning, batch, reduction, outputs) -> float:
  """Nanoseconds, within some per cent."""
  waves = _waves(t, batch, outputs)
  steps = math.ceil(reduction / 64 / t.split_k)
  # Between tiles the tensor cores wait for the stores of y; least where a warpgroup has two blocks of rows to store.
  between = {256: 1500, 192: 3000}.get(t.tile_m, 4000)
  compute = waves * steps * _step_ns(t) + (waves - 1) * between
  if waves > 2 and t.tile_m == 128:  # asks most of the L2 cache, and more than it has once waves drift apart
    compute *= _NARROW_TILES_DRIFT
  memory = (reduction * outputs * 9 / 8 + 2 * batch * (reduction + outputs)) / 2.9e3
  return max(compute, memory) + _LAUNCH_NS + (_MEETING_NS if t.split_k > 1 else 0)


def _step_bytes(tile_m, tile_n):
  """Bytes of 64 of the reduction: values, x, metadata."""
  return tile_m * 64 + tile_n * 128 + tile_m * 8


def _step_ns(t: Tuning) -> float:
  """Time of 64 of the reduction: what shared memory writes and reads.

  w is written and read once, x is written once and read once for every 64 outputs. Nanoseconds per kilobyte, fitted; an
  SM's shared memory moves 128 bytes a clock, 4 ns per kilobyte.
  """
  w, x = t.tile_m * 72 / 1024, t.tile_n * 128 / 1024
  return max(_SHORTEST_STEP_NS, 2 * w * 3.8 + x * 1.6 + x * (t.tile_m // 64) * 4.7)


def _epilogue_n(tile_n: int) -> int:
  """Equal slices of at most 96 rows."""
  slices = -(-tile_n // 96)
  return -(-tile_n // (8 * slices)) * 8
