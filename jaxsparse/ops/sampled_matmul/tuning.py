"""Pipeline of the sampled matmul, and what a shape gets."""

import dataclasses

_SMS = 132


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


def best_tuning(batch: int, items: int) -> Tuning:
  """Pipeline for `batch` rows and about `items` tiles: few tiles are split along the rows."""
  split = 1
  while items * split < _SMS and split < 8 and batch // (2 * split) >= 512:
    split *= 2
  return Tuning(split_b=split)
