"""Weights in the order in which the decode kernel's lanes consume them.

The decode kernel multiplies with `mma.sp` (m16n8k32): A = 16 outputs x 32 entries of K, of which each aligned group of
four holds at most two. Any N:M is a sum of *layers* that satisfy this: 2:4 is one layer of pairs, every other pattern
is `n` layers of single entries (entry j of each group). A chunk is 64 outputs x 64 of K (128 with scales), stored as one
flat run of bytes that a bulk copy brings into shared memory, so that each lane finds its own data by its lane number.

Names used throughout: a lane is `4 * g + c`; a row of a chunk is `16 * mt + 8 * e + g`; `s` is the mma.sp step (K 32) in
64 of K; `h` the half (K 16) of a step. Register `(e, h)` of lane `(g, c)` in step `s` holds the group of four at position
`8 s + 4 h + c`. With m = 4 positions are the groups in order; with m = 8 and 16 group `4 c + 2 s + h` sits there, so
that a block of 8 or 16 belongs to one lane. The kernel stores x in the same order.

Sections of a chunk, per layer (v = bits of a value; "word" is 32 bits, every section is read by one load per lane):
  pairs, m = 4:    values [pieces, lane, <= 4 words], then metadata [lane, 4 words], word mt: four nibbles per row half,
                   as mma.sp wants them from lane c (step c // 2, half c % 2).
  singles, m = 4:  values, then metadata bits [lane, 2 words].
  singles, m = 8:  values, then metadata bits [g, s, 2 words], then [lane] half bits (16).
  singles, m = 16: values, then metadata bits [g, 2 words], then [lane] step and half bits (16).
A single entry stays in the half of the register in which it was loaded: row half e = 0 in the low one, e = 1 in the high
one. The other half is zero and points at a neighbour (its index xor 1), which `mma.sp` allows: it wants two different
positions, in any order. So two metadata bits per entry are enough.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

ROWS = 64  # outputs of a chunk
STEP = 64  # K of a chunk without scales
SCALED_STEP = 128
VALUE_DTYPES = {"bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["data"],
  meta_fields=["n", "m", "shape", "dtype", "group", "scale_dtype"],
)
@dataclasses.dataclass(frozen=True)
class DecodeLayout:
  """An N:M weight [K, O] packed for the decode kernel.

  Attributes:
   data: int32 [ceil(O / 64), ceil(K / step), words], the chunks; step is 64, or 128 with scales.
   n: kept entries per group.
   m: group size along K: 4, 8 or 16.
   shape: (K, O) of the dense weight.
   dtype: name of the value dtype: bfloat16, float16, int8 or int4.
   group: K entries that share a scale; 0 without scales.
   scale_dtype: name of the scales' dtype; "" without scales.
  """

  data: jax.Array
  n: int
  m: int
  shape: tuple[int, int]
  dtype: str
  group: int = 0
  scale_dtype: str = ""

  @property
  def bits(self) -> int:
    """Bits of one stored value."""
    return VALUE_DTYPES[self.dtype]

  @property
  def step(self) -> int:
    """K entries of one chunk."""
    return SCALED_STEP if self.group else STEP

  @property
  def nbytes(self) -> int:
    """Bytes of the packed array, padding included."""
    return self.data.size * 4

  @property
  def chunk(self) -> "Chunk":
    """Where things lie in a chunk."""
    return chunk_of(self.n, self.m, self.bits, self.group, self.scale_dtype)


@dataclasses.dataclass(frozen=True)
class Layer:
  """One mma.sp operand of a chunk of K 64.

  Attributes:
   pairs: whether entries come in pairs (m = 4) or singly.
   first: index of its first kept entry in each group.
   values: byte offset of the values, from the start of the K-64 part.
   words: 32-bit words of values per lane.
   meta: byte offset of the metadata.
   place: byte offset of the bits that choose the register (m = 8 and 16).
  """

  pairs: bool
  first: int
  values: int
  words: int
  meta: int
  place: int


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Byte map of a chunk.

  Attributes:
   layers: the layers of each K-64 part.
   part: bytes of one K-64 part.
   parts: K-64 parts in the chunk.
   scales: number of scale rows (each of 64 outputs), 0 without scales.
   nbytes: bytes of the whole chunk.
  """

  layers: tuple[Layer, ...]
  part: int
  parts: int
  scales: int
  nbytes: int


def check_pattern(n: int, m: int) -> str | None:
  """The reason why a pattern cannot be packed, or None."""
  if m not in (4, 8, 16):
    return f"the decode layout takes groups of m = 4, 8 or 16, got {n}:{m}; use implementation='xla'"
  if not 1 <= n <= m // 2:
    return f"the decode layout takes 1 <= n <= m / 2, got {n}:{m}; a denser weight is read faster dense"
  return None


@functools.cache
def chunk_of(n: int, m: int, bits: int, group: int, scale_dtype: str) -> Chunk:
  """The byte map of a chunk for a pattern, value width and scale group."""
  layers, offset = [], 0
  pairs = n == 2 and m == 4
  for first in range(0, n, 2 if pairs else 1):
    words = (32 if pairs else 64 // m) * bits // 16
    meta = offset + words * 128
    place = meta + {(True, 4): 512, (False, 4): 256, (False, 8): 128, (False, 16): 64}[pairs, m]
    end = place + {(True, 4): 0, (False, 4): 0, (False, 8): 64, (False, 16): 64}[pairs, m]
    layers.append(Layer(pairs, first, offset, words, meta, place))
    offset = end
  parts = 2 if group else 1
  scales = SCALED_STEP // min(group, SCALED_STEP) if group else 0
  nbytes = offset * parts + (scales * ROWS * jnp.dtype(scale_dtype).itemsize if group else 0)
  return Chunk(tuple(layers), offset, parts, scales, nbytes)
