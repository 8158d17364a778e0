"""Pipeline of the sampled matmul, what a shape gets, and how the last tiles are cut."""

import dataclasses
import math

_MOST_PARTS = 8  # of a tile


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the kernel cuts a product.

  Attributes:
    step: rows of x and dy to a pipeline step: 32 or 64.
    stages: pipeline steps in shared memory; 0 for as many as there is room for.
    epilogue_slots: stores in flight for each warpgroup.
    meeting: what adding up one part of a tile costs, in rows of x; infinity: tiles are never cut.
    pace: in rows of x, how often blocks of threads look how far the others are; 0: never.

  Raises:
    ValueError: the kernel does not know such a pipeline.
  """

  step: int = 64
  stages: int = 0
  epilogue_slots: int = 2
  meeting: float = 200.0
  pace: int = 0

  def __post_init__(self):
    if self.step not in (32, 64) or not 0 <= self.stages <= 8 or not 1 <= self.epilogue_slots <= 2:
      raise ValueError(f"{self} needs step of 32 or 64, stages in [0, 8] and epilogue_slots of 1 or 2.")
    if not self.meeting >= 0:
      raise ValueError(f"{self} needs meeting of at least 0.")


def cuts(threads: int, steps: int, meeting: float) -> list[tuple[int, int, int]]:
  """How tiles that do not fill a round are cut: `n` blocks of threads share `m` tiles, the rows going on from one to the next.

  Args:
    threads: blocks of threads.
    steps: of a tile.
    meeting: steps that adding up one part costs.

  Returns:
    (most tiles, m, n), ascending, the last one being (threads, 1, 1): the first that has room for the tiles is the fastest.
  """
  best = []
  ways = [
    (m, n) for n in range(1, 1 + min(_MOST_PARTS, steps, threads)) for m in range(1, n + 1) if math.gcd(m, n) == 1
  ]
  cost = lambda way: way[0] / way[1] * steps + (meeting * -(-way[1] // way[0]) if way[1] > 1 else 0)
  most = 0
  for m, n in sorted(ways, key=cost):
    if (room := threads // n * m) > most:
      most = room
      best.append((room, m, n))
  return best
