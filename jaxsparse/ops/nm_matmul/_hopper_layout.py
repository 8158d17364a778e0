"""How Hopper's sparse tensor cores want an N:M matrix stored.

They multiply 2:4 only: of every 4 entries along the reduction, 2 are stored. Every N:M pattern that never keeps more
than 2 in an aligned group of 4 fits (1:2, 2:4, and n <= 2 of a multiple of 4); the slots it leaves free hold -0.0.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _nm_array

ALIGNMENT = 64  # K and O are padded to multiples of it: 128 bytes of 16-bit values, and the reach of a metadata word
CHUNK = 16  # entries of the reduction whose positions share a metadata entry
_FILLER_NIBBLE = 0b0100  # positions 0 and 1
_DTYPES = ("bfloat16", "float16")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseTensorCoreLayout:
  """w `[K, O]`, 2:4 along K, as `_hopper.nm_matmul_sparse_core` reads it.

  K' and O' are K and O rounded up to multiples of 64; what is added is zero. Where nothing is added and the pattern is
  2:4, `values` are the NMArray's own values, reshaped.

  Attributes:
    values: `[K' / 2, O']`, rows 2 i and 2 i + 1 are the kept entries of group i of 4; `[O', K' / 2]` when
      `reduction_contiguous`. bfloat16 or float16.
    metadata: `[K' / 16, O']` uint16: four groups of 4, the first in the low nibble; a nibble is i0 | i1 << 2 with
      positions i0 < i1 in [0, 4). The same for both orders of `values`.
    shape: (K, O), static.
    pattern: of the matrix that was packed, "2:4"; static.
    reduction_contiguous: order of `values`, static. The kernel takes both. The transposed one is what a product with
      w^T reads off a w that was packed along its own last axis.
  """

  values: jax.Array
  metadata: jax.Array
  shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
  pattern: str = dataclasses.field(default="2:4", metadata={"static": True})
  reduction_contiguous: bool = dataclasses.field(default=False, metadata={"static": True})

  @property
  def reduction(self) -> int:
    return self.shape[0]

  @property
  def outputs(self) -> int:
    return self.shape[1]

  @property
  def ndim(self) -> int:
    return 2

  @property
  def dtype(self):
    return jnp.dtype(self.values.dtype)

  @property
  def nbytes(self) -> int:
    return self.values.size * self.dtype.itemsize + self.metadata.size * 2

  def __repr__(self):
    return f"SparseTensorCoreLayout({self.pattern}, shape={self.shape}, dtype={getattr(self.values, 'dtype', None)})"

  def unpack(self) -> _nm_array.NMArray:
    """The NMArray that `pack` was given, bit for bit."""
    n, m = map(int, self.pattern.split(":"))
    values, positions = unpack_quads(self)
    values, indices = _from_quads(values, positions, n, m)
    return _nm_array.NMArray.tree_unflatten((n, m), (values, indices, None))


def fits_two_in_four(n: int, m: int) -> bool:
  """Whether every n:m matrix keeps at most 2 entries of each aligned 4."""
  return (n, m) == (1, 2) or (n <= 2 and m % 4 == 0)


def pack(w: _nm_array.NMArray, *, reduction_contiguous: bool = False) -> SparseTensorCoreLayout:
  """Packs an N:M matrix; `SparseTensorCoreLayout.unpack` is the inverse.

  Args:
    w: `[K, O]`, bfloat16 or float16. A kept -0.0 becomes 0.0 unless the pattern is 2:4 or 1:2.
    reduction_contiguous: see `SparseTensorCoreLayout`.

  Raises:
    ValueError: the values are quantised or have not 16 bits, or the pattern does not fit 2:4.
  """
  if w.scales is not None or jnp.dtype(w.values.dtype).name not in _DTYPES:
    raise ValueError(f"w's values are {w.values.dtype}; the sparse tensor cores' layout takes bfloat16 or float16.")
  if not fits_two_in_four(w.n, w.m):
    raise ValueError(f"{w.pattern} can keep more than 2 of 4 neighbours; the sparse tensor cores multiply 2:4 only.")
  reduction, outputs = w.shape
  if reduction % 4:
    raise ValueError(f"w has shape {w.shape}; the sparse tensor cores need its reduction axis (-2) divisible by 4.")
  values, positions = _to_quads(w.values, w.indices.astype(jnp.uint16), w.n, w.m)
  stored, metadata = pack_quads(values, positions, reduction_contiguous=reduction_contiguous)
  return SparseTensorCoreLayout(stored, metadata, (reduction, outputs), w.pattern, reduction_contiguous)


def _from_quads(values, positions, n, m):
  """Inverse of `_to_quads`: values and uint8 indices `[K / m, n, O]`."""
  quads, _, outputs = values.shape
  if (n, m) == (2, 4):
    return values, positions
  if (n, m) == (1, 2):
    offsets = jnp.array([0, 2], jnp.uint8)[:, None]
    return values.reshape(2 * quads, 1, outputs), (positions - offsets).reshape(2 * quads, 1, outputs)
  groups = quads * 4 // m
  offsets = jnp.arange(m // 4, dtype=jnp.uint8)[:, None, None] * 4
  positions = (positions.reshape(groups, m // 4, 2, outputs) + offsets).reshape(groups, m // 2, outputs)
  values = values.reshape(positions.shape)
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
    last_value = jnp.where(both, values[:, None, 1], free)
    last_at = jnp.where(both, position[:, None, 1], jnp.uint16(3))
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
