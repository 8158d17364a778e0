"""Argument shapes of the block-sparse products: one list for tests (at toy size), benchmarks and tuning."""

import dataclasses

DENSITIES = (0.5, 0.25, 0.1, 0.05, 0.02)
BLOCKS = ((128, 128), (64, 64), (32, 32))
BATCHES = (16, 64, 256, 1024, 4096, 8192)
_TOY = 32  # toy dimensions are real ones divided by this


@dataclasses.dataclass(frozen=True)
class ArgSpec:
  """A weight and the numbers of rows that it is multiplied with.

  Attributes:
    name: "llama3-8b/up".
    k: reduction.
    o: outputs.
    batches: rows of x.
  """

  name: str
  k: int
  o: int
  batches: tuple[int, ...] = BATCHES

  def toy(self) -> "ArgSpec":
    """About the same proportions at a size for tests: multiples of 128 that blocks of every size tile, odd rows.

    >>> ArgSpec("w", 4096, 14336).toy()
    ArgSpec(name='w', k=128, o=384, batches=(13,))
    """
    side = lambda n: max(1, n // (128 * _TOY)) * 128
    return ArgSpec(self.name, side(self.k), side(self.o), (13,))


ARG_SPECS = (
  ArgSpec("square/4096", 4096, 4096, (16, 256, 4096)),
  ArgSpec("square/8192", 8192, 8192, (8192,)),
  ArgSpec("llama3-8b/up", 4096, 14336),
  ArgSpec("llama3-8b/down", 14336, 4096),
  ArgSpec("llama3-70b/up", 8192, 28672, (16, 64, 4096)),
  ArgSpec("llama3-70b/down", 28672, 8192, (16, 64, 4096)),
)
