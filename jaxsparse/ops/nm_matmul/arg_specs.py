"""Argument shapes of `nm_matmul`: one list for tests (at toy size), benchmarks and tuning."""

import dataclasses

BATCHES = (1, 8, 16, 64, 128, 512, 2048, 4096, 8192)
PATTERNS = ((2, 4), (1, 4), (2, 8), (4, 8), (1, 8), (1, 16))
_TOY = 64  # toy dimensions are real ones divided by this


@dataclasses.dataclass(frozen=True)
class ArgSpec:
  """A weight and the numbers of rows that it is multiplied with.

  Attributes:
    name: "llama3-8b/gate_up".
    k: reduction.
    o: outputs.
    batches: rows of x.
  """

  name: str
  k: int
  o: int
  batches: tuple[int, ...] = BATCHES

  def toy(self) -> "ArgSpec":
    """The same proportions at a size for tests: K and O divided by 64 (K at least 16), few and odd rows.

    >>> ArgSpec("w", 4096, 14336).toy()
    ArgSpec(name='w', k=64, o=224, batches=(1, 8, 13))
    """
    batches = tuple(sorted({b if b <= 8 else 13 for b in self.batches}))
    return ArgSpec(self.name, max(16, self.k // _TOY // 16 * 16), max(8, self.o // _TOY), batches)


# Fused projections (q, k and v; gate and up) as inference code runs them, and their parts.
ARG_SPECS = (
  ArgSpec("llama3-8b/q", 4096, 4096),
  ArgSpec("llama3-8b/qkv", 4096, 6144),
  ArgSpec("llama3-8b/up", 4096, 14336),
  ArgSpec("llama3-8b/gate_up", 4096, 28672),
  ArgSpec("llama3-8b/down", 14336, 4096),
  ArgSpec("llama3-70b/q", 8192, 8192),
  ArgSpec("llama3-70b/qkv", 8192, 10240),
  ArgSpec("llama3-70b/up", 8192, 28672),
  ArgSpec("llama3-70b/down", 28672, 8192),
  ArgSpec("vit-l/qkv", 1024, 3072),
  ArgSpec("vit-l/out", 1024, 1024),
  ArgSpec("vit-l/up", 1024, 4096),
  ArgSpec("vit-l/down", 4096, 1024),
  ArgSpec("square/4096", 4096, 4096, (4096,)),
  ArgSpec("square/8192", 8192, 8192, (8192,)),
)
