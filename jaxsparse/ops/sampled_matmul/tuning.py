"""Pipeline of the sampled matmul, and what a shape gets."""

import dataclasses

_SMS = 132
# Of the model that decides whether the rows are split: to be fitted to measurements.
_STEP_US = 0.75  # 64 rows of x and dy
_LAUNCH_US = 4.0  # adding up the parts is a kernel of its own
_BYTES_PER_US = 2.5e6


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the kernel cuts a product.

  Attributes:
    stages: pipeline steps, of 64 rows of x and dy, in shared memory.
    split_b: parts of the sum over rows that are computed apart and then added.
    epilogue_slots: stores in flight for each warpgroup.

  Raises:
    ValueError: shared memory does not allow it.
  """

  stages: int = 4
  split_b: int = 1
  epilogue_slots: int = 2

  def __post_init__(self):
    if not 1 <= self.stages <= 4 or self.split_b < 1 or not 1 <= self.epilogue_slots <= 2:
      raise ValueError(f"{self} needs stages in [1, 4], split_b of at least 1 and epilogue_slots of 1 or 2.")


def best_tuning(batch: int, items: int, entries: int) -> Tuning:
  """Pipeline for `batch` rows and about `items` tiles that hold `entries` kept entries in all."""

  def microseconds(split):
    tiles = -(-items * split // _SMS) / split * (batch / 64) * _STEP_US
    return tiles + (0 if split == 1 else _LAUNCH_US + split * entries * 8 / _BYTES_PER_US)

  return Tuning(split_b=min((1, 2, 4, 8), key=microseconds))
