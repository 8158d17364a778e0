"""Pipeline of the sampled matmul."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the kernel cuts a product.

  Attributes:
    stages: pipeline steps, of 64 rows of x and dy, in shared memory; 0: as many as there is room for.
    meeting: what adding up the parts of a tile costs, in rows of x that could be multiplied in that time; a tile is cut
      along its rows only where that saves more.

  Raises:
    ValueError: shared memory does not allow it.
  """

  stages: int = 0
  meeting: float = 640.0

  def __post_init__(self):
    if not 0 <= self.stages <= 4 or not self.meeting >= 0:
      raise ValueError(f"{self} needs stages in [0, 4] and meeting of at least 0.")
