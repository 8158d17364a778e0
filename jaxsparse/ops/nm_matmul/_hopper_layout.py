"""How Hopper's sparse tensor cores want an N:M matrix stored.

They multiply 2:4 only: of every 4 entries along the reduction, 2 are stored. Every N:M pattern that never keeps more
than 2 in an aligned group of 4 fits (1:2, 2:4, and n <= 2 of a multiple of 4); the slots it leaves free hold -0.0.
"""

import dataclasses

import jax
import jax.numpy as jnp

ALIGNMENT = 64  # K and O are padded to multiples of it; 128 bytes of 16-bit values, and the reach of a metadata word
CHUNK = 16  # entries of the reduction whose positions share a metadata entry
_FILLER_NIBBLE = 0b0100  # positions 0 and 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseTensorCoreLayout:
  """w `[K, O]`, 2:4 along K, as `_hopper.nm_matmul_sparse_core` reads it.

  K' and O' are K and O rounded up to multiples of 64; what is added is zero. Where nothing is added and the pattern is
  2:4, `values` are an NMArray's own values, reshaped.

  Attributes:
    values: `[K' / 2, O']`, rows 2 i and 2 i + 1 are the kept entries of group i of 4; `[O', K' / 2]` when
      `reduction_contiguous`. bfloat16 or float16.
    metadata: `[K' / 16, O']` uint16: four groups of 4, the first in the low nibble; a nibble is i0 | i1 << 2 with
      positions i0 < i1 in [0, 4). The same for both orders of `values`.
    shape: (K, O), static.
    pattern: (n, m) of the matrix that was packed, static.
    reduction_contiguous: order of `values`, static. The kernel is as fast on both. The transposed one is what a
      product with w^T reads off a w that was packed along its own last axis.
  """

  values: jax.Array
  metadata: jax.Array
  shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
  pattern: tuple[int, int] = dataclasses.field(default=(2, 4), metadata={"static": True})
  reduction_contiguous: bool = dataclasses.field(default=False, metadata={"static": True})

  @property
  def reduction(self) -> int:
    return self.shape[0]

  @property
  def outputs(self) -> int:
    return self.shape[1]

  @property
  def dtype(self):
    return self.values.dtype

  @property
  def nbytes(self) -> int:
    return self.values.size * self.values.dtype.itemsize + self.metadata.size * 2


def fits_two_in_four(n: int, m: int) -> bool:
  """Whether every n:m matrix keeps at most 2 entries of each aligned 4."""
  return (n, m) == (1, 2) or (n <= 2 and m % 4 == 0)


def pack(values, indices, *, m: int, reduction_contiguous: bool = False) -> SparseTensorCoreLayout:
  """Packs an N:M matrix; the inverse of `unpack`.

  Args:
    values: `[K / m, n, O]`, bfloat16 or float16. A kept -0.0 becomes 0.0 unless the pattern is 2:4 or 1:2.
    indices: `[K / m, n, O]`, integer, strictly increasing along axis 1, in [0, m).
    m: group size.
    reduction_contiguous: see `SparseTensorCoreLayout`.

  Raises:
    ValueError: shapes disagree, the dtype has not 16 bits, or the pattern does not fit 2:4.
  """
  if values.ndim != 3 or values.shape != indices.shape:
    raise ValueError(f"values have shape {values.shape} and indices {indices.shape}; both must be [K / m, n, O].")
  if jnp.dtype(values.dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
    raise ValueError(f"values are {values.dtype}; the sparse tensor cores' layout takes bfloat16 or float16.")
  groups, n, outputs = values.shape
  if not fits_two_in_four(n, m):
    raise ValueError(f"{n}:{m} can keep more than 2 of 4 neighbours; the sparse tensor cores multiply 2:4 only.")
  if groups * m % 4:
    raise ValueError(f"{n}:{m} with K = {groups * m}: K must be divisible by 4.")
  quads_values, quads_positions = _to_quads(values, indices.astype(jnp.uint16), n, m)
  stored, metadata = pack_quads(quads_values, quads_positions, reduction_contiguous=reduction_contiguous)
  return SparseTensorCoreLayout(stored, metadata, (groups * m, outputs), (n, m), reduction_contiguous)


def unpack(layout: SparseTensorCoreLayout):
  """(values `[K / m, n, O]`, indices `[K / m, n, O]` uint8): what `pack` was given."""
  (reduction, outputs), (n, m) = layout.shape, layout.pattern
  values, positions = unpack_quads(layout)
  if (n, m) == (2, 4):
    return values, positions
  if (n, m) == (1, 2):
    offsets = jnp.array([0, 2], jnp.uint8)[:, None]
    return values.reshape(reduction // 2, 1, outputs), (positions - offsets).reshape(reduction // 2, 1, outputs)
  slots = m // 2
  values = values.reshape(reduction // m, slots, outputs)
  offsets = jnp.arange(m // 4, dtype=jnp.uint8)[:, None, None] * 4
  positions = (positions.reshape(reduction // m, m // 4, 2, outputs) + offsets).reshape(values.shape)
  free = (values == 0) & jnp.signbit(values)
  order = jnp.argsort(free, axis=1, stable=True)[:, :n]  # kept slots first, ascending
  return jnp.take_along_axis(values, order, 1), jnp.take_along_axis(positions, order, 1)


def _to_quads(values, indices, n, m):
  """values and positions `[K / 4, 2, O]` of the same matrix as 2:4."""
  groups, _, outputs = values.shape
  if (n, m) == (2, 4):
    return values, indices
  if (n, m) == (1, 2):
    offsets = jnp.array([0, 2], jnp.uint16)[:, None]
    quads = values.reshape(groups // 2, 2, outputs)
    return quads, indices.reshape(quads.shape) + offsets
  values = jnp.where(values == 0, jnp.zeros((), values.dtype), values)  # no -0.0: that is how a free slot looks
  quad, position = indices // 4, indices % 4
  here = quad[:, None] == jnp.arange(m // 4, dtype=jnp.uint16)[:, None, None]  # [K / m, m / 4, n, O]
  count = here.sum(2)
  free = jnp.array(-0.0, values.dtype)
  pick = lambda array, i, empty: jnp.where(here[:, :, i], array[:, None, i], empty)
  value, at = pick(values, 0, free), pick(position, 0, jnp.uint16(0))
  last_value, last_at = free, jnp.uint16(3)
  if n == 2:
    alone = here[:, :, 1] & ~here[:, :, 0]
    value, at = jnp.where(alone, values[:, None, 1], value), jnp.where(alone, position[:, None, 1], at)
    both = count == 2
    last_value, last_at = jnp.where(both, values[:, None, 1], free), jnp.where(both, position[:, None, 1], jnp.uint16(3))
  # One kept entry at position 3 leaves position 0 free, before it.
  swap = (count == 1) & (at == 3)
  first = jnp.where(swap, free, value), jnp.where(swap, jnp.uint16(0), at)
  second = jnp.where(swap, value, last_value), jnp.where(swap, jnp.uint16(3), last_at)
  join = lambda a, b: jnp.stack([a, b], 2).reshape(groups * m // 4, 2, outputs)
  return join(first[0], second[0]), join(first[1], second[1])


def pack_quads(values, positions, *, reduction_contiguous: bool = False):
  """(values, metadata) of a layout from values and positions `[K / 4, 2, O]`, K divisible by 4."""
  quads, _, outputs = values.shape
  pad_quads, pad_outputs = -quads % (ALIGNMENT // 4), -outputs % ALIGNMENT
  stored = values.reshape(2 * quads, outputs)
  nibbles = positions[:, 0].astype(jnp.uint16) | (positions[:, 1].astype(jnp.uint16) << 2)
  if pad_quads or pad_outputs:
    stored = jnp.pad(stored, ((0, 2 * pad_quads), (0, pad_outputs)))
    nibbles = jnp.pad(nibbles, ((0, pad_quads), (0, pad_outputs)), constant_values=_FILLER_NIBBLE)
  nibbles = nibbles.reshape(-1, 4, nibbles.shape[1])
  metadata = nibbles[:, 0] | (nibbles[:, 1] << 4) | (nibbles[:, 2] << 8) | (nibbles[:, 3] << 12)
  return (stored.T if reduction_contiguous else stored), metadata


def unpack_quads(layout: SparseTensorCoreLayout):
  """(values, positions uint8) `[K / 4, 2, O]` of a layout."""
  quads = layout.reduction // 4
  stored = layout.values.T if layout.reduction_contiguous else layout.values
  values = stored[: 2 * quads, : layout.outputs].reshape(quads, 2, layout.outputs)
  nibbles = layout.metadata[:, None] >> jnp.array([0, 4, 8, 12], jnp.uint16)[:, None]
  nibbles = nibbles.reshape(-1, layout.metadata.shape[1])[:quads, : layout.outputs] & jnp.uint16(15)
  return values, jnp.stack([nibbles & 3, nibbles >> 2], 1).astype(jnp.uint8)


def to_dense(layout: SparseTensorCoreLayout):
  """w `[K, O]`, dense."""
  values, positions = unpack_quads(layout)
  kept = positions[:, :, None] == jnp.arange(4, dtype=jnp.uint8)[:, None]  # [K / 4, 2, 4, O]
  # Zeros of either sign add nothing, but a -0.0 that fills a slot must not show.
  spread = jnp.where(kept, values[:, :, None], jnp.zeros((), values.dtype))
  return (spread[:, 0] + spread[:, 1]).reshape(layout.shape)
