"""Prune a dense weight to 2:4 and pack it for sparse tensor cores, in one pass over the weight.

Training needs this every step: the weight has moved, so the mask may have. The plain jnp functions here are the
specification and run everywhere; `_prune_pack_gpu` does the same in one pass at memory speed.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxsparse.ops.nm_matmul import _transposable

MASKS = ("transposable", "columnwise", "bdwp")
Mask = Literal["transposable", "columnwise", "bdwp"]
IMPLEMENTATIONS = ("xla", "mosaic_gpu")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed24:
  """One 2:4 operand of the sparse tensor cores, as plain arrays.

  With R the reduction axis and M the other one:

  Attributes:
    values: the kept entries, ascending along R; `[R/2, M]` for a forward operand and `[M, R/2]` for a transposed one.
    metadata: uint16 `[R/16, M]`; a word holds the positions of 4 groups of 4, the first group in the low nibble; a
      nibble is `i0 | i1 << 2` with i0 < i1.
  """

  values: jax.Array
  metadata: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrunedWeight:
  """A weight `[K, O]` pruned to 2:4, as the two operands that a training step multiplies with.

  Attributes:
    forward: for `y = x @ w`, reduced along K: values `[K/2, O]`, metadata `[K/16, O]`.
    backward: for `dx = dy @ w.T`, reduced along O: values `[K, O/2]`, metadata `[O/16, K]`; None for a columnwise mask,
      whose transpose is not 2:4.
    mask: how the two masks relate, static; see `prune_and_pack`.
  """

  forward: Packed24
  backward: Packed24 | None
  mask: Mask = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, int]:
    """(K, O)."""
    rows, cols = self.forward.values.shape
    return 2 * rows, cols


def prune_and_pack(
  w: jax.Array, *, mask: Mask = "transposable", dtype=None, implementation: str | None = None
) -> PrunedWeight:
  """Keeps 2 of 4 weights by magnitude and packs them for the products of a training step.

  Args:
    w: `[K, O]` bf16, f16 or f32 (a master copy); K and, unless the mask is columnwise, O divisible by 16.
    mask: which entries survive.
      "transposable": one mask for both products, 2 kept in each row and column of every 4x4 block, of the largest
        total magnitude. dx is then the exact gradient of the forward product.
      "columnwise": the 2 largest of every 4 along K; forward only.
      "bdwp": the 2 largest of every 4 along K for the forward product, and, separately, along O for the backward one:
        keeps more in each, but dx is not the gradient of the forward product.
    dtype: of the packed values; None is w's own, and bf16 for f32. Magnitudes are compared before the cast.
    implementation: "xla", "mosaic_gpu", or None for the best that can run here.

  Returns:
    A PrunedWeight. Ties go to the lower index, NaN counts as 0.

  Raises:
    TypeError: unsupported dtype.
    ValueError: unknown mask, bad shape, or the named implementation cannot run here.

  Example:
    >>> w = jnp.arange(256.0).reshape(16, 16).astype(jnp.bfloat16)
    >>> prune_and_pack(w).forward.values.shape
    (8, 16)

  References:
    Hubara et al., "Accelerated sparse neural training" (https://arxiv.org/abs/2102.08124), for transposable masks; they
    search 2-approximately or by integer programming, here the search is exact. Fang et al., "Bidirectional weight
    pruning" (https://arxiv.org/abs/2309.13015), for bdwp.
  """
  w = jnp.asarray(w)
  dtype = _check(w, mask, dtype)
  if implementation is None:
    implementation = "xla" if unsupported(w, mask=mask, dtype=dtype) else "mosaic_gpu"
  if implementation == "xla":
    return _reference(w, mask, dtype)
  if implementation != "mosaic_gpu":
    raise ValueError(f"prune_and_pack has implementations {IMPLEMENTATIONS}, got {implementation!r}")
  if reason := unsupported(w, mask=mask, dtype=dtype):
    raise ValueError(f"prune_and_pack cannot run as 'mosaic_gpu': {reason}")
  from jaxsparse.ops.nm_matmul import _prune_pack_gpu

  return _prune_pack_gpu.prune_and_pack(w, mask, dtype)


def transposable_mask(w: jax.Array) -> jax.Array:
  """Bool `[K, O]`: 2 kept in each row and column of every 4x4 block, of the largest total magnitude.

  Args:
    w: `[K, O]` float; K and O divisible by 4. NaN counts as 0.

  Returns:
    The mask; every 4 aligned entries of a row or column keep exactly 2.

  Raises:
    ValueError: w is not a matrix or its sides are not divisible by 4.
  """
  w = jnp.asarray(w)
  if w.ndim != 2 or w.shape[0] % 4 or w.shape[1] % 4:
    raise ValueError(f"w has shape {w.shape}; a transposable 2:4 mask needs [K, O] with K and O divisible by 4.")
  rows, cols = w.shape[0] // 4, w.shape[1] // 4
  blocks = _magnitude(w).astype(jnp.float32).reshape(rows, 4, cols, 4)
  word = _transposable.best_mask(
    [[blocks[:, r, :, c] for c in range(4)] for r in range(4)], lambda r, c: jnp.uint32(1 << (4 * r + c)), jnp.where
  )
  bit = jnp.arange(16, dtype=jnp.uint32).reshape(1, 4, 1, 4)
  return ((word[:, None, :, None] >> bit) & 1).astype(bool).reshape(w.shape)


def columnwise_mask(w: jax.Array) -> jax.Array:
  """Bool `[K, O]`: the 2 largest magnitudes of every aligned 4 along K; ties to the lower index, NaN counts as 0."""
  groups = _magnitude(w).reshape(w.shape[0] // 4, 4, w.shape[1])
  return jnp.stack(_keep_two(*(groups[:, r] for r in range(4))), 1).reshape(w.shape)


def training_masks(w: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array]:
  """Bool masks `[K, O]` of the forward and of the backward product."""
  if mask == "transposable":
    both = transposable_mask(w)
    return both, both
  forward = columnwise_mask(w)
  return forward, columnwise_mask(w.T).T if mask == "bdwp" else forward


def unpack(packed: Packed24, *, transposed: bool = False) -> jax.Array:
  """Packed24 -> the dense weight `[K, O]` with zeros where it was pruned.

  Args:
    packed: `PrunedWeight.forward`, or `.backward` with `transposed=True`.
    transposed: the reduction runs along the columns of the weight.
  """
  values = packed.values.T if transposed else packed.values
  groups, cols = values.shape[0] // 2, values.shape[1]
  nibbles = packed.metadata[:, None, :] >> (4 * jnp.arange(4, dtype=jnp.uint16))[None, :, None] & jnp.uint16(15)
  nibbles = nibbles.reshape(groups, 1, cols)
  position = jnp.arange(4, dtype=jnp.uint16)[None, :, None]
  low, high = values.reshape(groups, 2, 1, cols)[:, 0], values.reshape(groups, 2, 1, cols)[:, 1]
  dense = jnp.where(position == nibbles & 3, low, jnp.where(position == nibbles >> 2, high, 0))
  dense = dense.reshape(4 * groups, cols)
  return dense.T if transposed else dense


def unsupported(w: jax.Array, *, mask: Mask, dtype) -> str | None:
  """Why the GPU kernel cannot take this weight here, or None."""
  return "the kernel is not built yet"


def _check(w, mask, dtype):
  if mask not in MASKS:
    raise ValueError(f"mask must be one of {MASKS}, got {mask!r}")
  if w.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    raise TypeError(f"w has dtype {w.dtype}; prune_and_pack takes bfloat16, float16 or float32.")
  if w.ndim != 2 or w.shape[0] % 16 or (mask != "columnwise" and w.shape[1] % 16):
    need = "K divisible by 16" if mask == "columnwise" else "K and O divisible by 16"
    raise ValueError(f"w has shape {w.shape}; a {mask} mask needs [K, O] with {need}.")
  dtype = jnp.dtype(dtype or (jnp.bfloat16 if w.dtype == jnp.float32 else w.dtype))
  if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    raise TypeError(f"packed values can be bfloat16, float16 or float32, not {dtype}.")
  return dtype


def _reference(w, mask, dtype):
  if mask == "transposable":
    keep = transposable_mask(w)
    forward, backward = _pack(w, keep, dtype), _pack(w.T, keep.T, dtype)
  else:
    forward = _pack(w, None, dtype)
    backward = _pack(w.T, None, dtype) if mask == "bdwp" else None
  if backward is not None:
    backward = Packed24(backward.values.T, backward.metadata)
  return PrunedWeight(forward, backward, mask)


def _pack(w, keep, dtype):
  """Packs along axis 0; `keep` None is the columnwise mask."""
  groups, cols = w.shape[0] // 4, w.shape[1]
  rows = [w.reshape(groups, 4, cols)[:, r] for r in range(4)]
  if keep is None:
    kept = _keep_two(*map(_magnitude, rows))
  else:
    kept = [keep.reshape(groups, 4, cols)[:, r] for r in range(4)]
  k0, k1, k2, k3 = kept
  low = jnp.where(k0, rows[0], jnp.where(k1, rows[1], rows[2]))
  high = jnp.where(k3, rows[3], jnp.where(k2, rows[2], rows[1]))
  first = jnp.where(k0, 0, jnp.where(k1, 1, 2)).astype(jnp.uint16)
  second = jnp.where(k3, 3, jnp.where(k2, 2, 1)).astype(jnp.uint16)
  nibbles = (first | second << 2).reshape(groups // 4, 4, cols)
  words = nibbles[:, 0] | nibbles[:, 1] << 4 | nibbles[:, 2] << 8 | nibbles[:, 3] << 12
  return Packed24(jnp.stack([low, high], 1).reshape(2 * groups, cols).astype(dtype), words)


def _keep_two(m0, m1, m2, m3):
  """Which two of four magnitudes are largest; a tie goes to the lower index. Each pair is compared once."""
  b01, b02, b03, b12, b13, b23 = m1 > m0, m2 > m0, m3 > m0, m2 > m1, m3 > m1, m3 > m2  # bij: j beats i
  return (
    ~_two_of(b01, b02, b03),
    ~_two_of(~b01, b12, b13),
    ~_two_of(~b02, ~b12, b23),
    _two_of(b03, b13, b23),
  )


def _two_of(a, b, c):
  return (a & b) | (c & (a | b))


def _magnitude(w):
  return jnp.where(jnp.isnan(w), 0, jnp.abs(w))
