"""Prune a dense weight to 2:4 and pack it for the sparse tensor cores, in one pass over the weight.

Training needs this every step: the weight has moved, so the mask may have. The plain jnp functions here are the
specification and run everywhere; `_prune_pack_gpu` does the same in one pass at memory speed.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxsparse.ops import _dispatch
from jaxsparse.ops.nm_matmul import _hopper_layout
from jaxsparse.ops.nm_matmul import _transposable

MASKS = ("transposable", "columnwise", "bdwp")
Mask = Literal["transposable", "columnwise", "bdwp"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrunedWeight:
  """A weight `[K, O]` pruned to 2:4, as the two operands that a training step multiplies with.

  Attributes:
    forward: for `y = x @ w`: a `SparseTensorCoreLayout` of w, reduced along K.
    backward: for `dx = dy @ w.T`: one of w.T, reduced along O, with the reduction contiguous; None for a columnwise
      mask, whose transpose is not 2:4.
    mask: how the two masks relate, static; see `prune_and_pack`.
  """

  forward: _hopper_layout.SparseTensorCoreLayout
  backward: _hopper_layout.SparseTensorCoreLayout | None
  mask: Mask = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, int]:
    """(K, O)."""
    return self.forward.shape

  def dense(self) -> jax.Array:
    """The weight of the forward product, `[K, O]`, with zeros where it is pruned."""
    return _hopper_layout.to_dense(self.forward)

  def dense_backward(self) -> jax.Array:
    """The weight of the backward product, `[K, O]`."""
    return self.dense() if self.backward is None else _hopper_layout.to_dense(self.backward).T


def prune_and_pack(
  w: jax.Array, *, mask: Mask = "transposable", dtype: Any = None, implementation: str | None = None
) -> PrunedWeight:
  """Keeps 2 of 4 weights by magnitude and packs them for the products of a training step.

  Args:
    w: `[K, O]` bf16, f16 or f32 (a master copy); K and, unless the mask is columnwise, O divisible by 4. (Where one is
      not divisible by 64, w is padded first, which costs a copy.)
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
    ValueError: unknown mask or implementation, or a shape that does not divide.
    NotImplementedError: the named implementation cannot run here.

  >>> w = jnp.arange(4096.0).reshape(64, 64).astype(jnp.bfloat16)
  >>> prune_and_pack(w).forward.values.shape
  (32, 64)

  References:
    Hubara et al., "Accelerated sparse neural training" (https://arxiv.org/abs/2102.08124), for transposable masks; they
    search by min-cost flow or 2-approximately, here the search is exact. Fang et al., "Bidirectional weight pruning"
    (https://arxiv.org/abs/2309.13015), for bdwp.
  """
  w = jnp.asarray(w)
  choice = which_prune_and_pack(w, mask=mask, dtype=dtype, implementation=implementation)
  return _run(w, mask, _value_dtype(w, dtype), choice.implementation)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _run(w, mask, dtype, implementation):
  pad = [(0, -n % _hopper_layout.ALIGNMENT) for n in w.shape]
  padded = jnp.pad(w, pad) if any(n for _, n in pad) else w
  if implementation == "mosaic_gpu":
    from jaxsparse.ops.nm_matmul import _prune_pack_gpu

    packed = _prune_pack_gpu.prune_and_pack(padded, mask, dtype)
  else:
    packed = _reference(padded, mask, dtype)
  layout = _hopper_layout.SparseTensorCoreLayout
  forward = layout(*packed[:2], shape=w.shape)
  backward = layout(*packed[2:], shape=w.shape[::-1], reduction_contiguous=True) if packed[2:] else None
  return PrunedWeight(forward, backward, mask)


def which_prune_and_pack(
  w: Any, *, mask: Mask = "transposable", dtype: Any = None, implementation: str | None = None
) -> _dispatch.Choice:
  """Which implementation `prune_and_pack` takes for these arguments here, and why not the other.

  Args:
    w: as in `prune_and_pack`; a `jax.ShapeDtypeStruct` will do.
    mask, dtype, implementation: as in `prune_and_pack`.

  Returns:
    A `Choice` with `implementation`, `reason`, `rejected` and `target`; prints as a list.

  Raises:
    As `prune_and_pack`.
  """
  _check(w, mask)
  dtype = _value_dtype(w, dtype)
  target = _dispatch.current_target()
  reasons = {"xla": lambda: None, "mosaic_gpu": lambda: _gpu_problem(w, dtype, target)}
  preference = [("mosaic_gpu", "it reads the weight once."), ("xla", "it runs everywhere.")]
  return _dispatch.choose("prune_and_pack", implementation, reasons, preference, target)


@jax.jit
def transposable_mask(w: jax.Array) -> jax.Array:
  """Bool `[K, O]`: 2 kept in each row and column of every 4x4 block, of the largest total magnitude.

  Args:
    w: `[K, O]` float; K and O divisible by 4. NaN counts as 0.

  Returns:
    The mask; every 4 aligned entries of a row or column keep exactly 2.

  Raises:
    ValueError: w is not a matrix or its sides are not divisible by 4.
  """
  if w.ndim != 2 or w.shape[0] % 4 or w.shape[1] % 4:
    raise ValueError(f"w has shape {w.shape}; a transposable 2:4 mask needs [K, O] with K and O divisible by 4.")
  rows, cols = w.shape[0] // 4, w.shape[1] // 4
  blocks = _magnitude(w).astype(jnp.float32).reshape(rows, 4, cols, 4)
  word = _transposable.best_mask(
    [[blocks[:, r, :, c] for c in range(4)] for r in range(4)], lambda r, c: jnp.uint32(1 << (4 * r + c)), jnp.where
  )
  bit = jnp.arange(16, dtype=jnp.uint32).reshape(1, 4, 1, 4)
  return ((word[:, None, :, None] >> bit) & 1).astype(bool).reshape(w.shape)


def _gpu_problem(w, dtype, target) -> str | None:
  from jaxsparse.ops import _mosaic_gpu

  if target.platform != "gpu":
    return f"it needs an NVIDIA GPU; this is {target}."
  if target.capability is None or target.capability < (9, 0):
    return f"it needs compute capability 9.0, for comparisons of packed bfloat16; this is {target}."
  if reason := _mosaic_gpu.unavailable():
    return reason
  if dtype not in (jnp.bfloat16, jnp.float16) or (w.dtype != jnp.float32 and w.dtype != dtype):
    return f"it packs bfloat16 and float16 as they are and float32 as one of them, not {w.dtype} as {dtype}."
  return None


def _check(w, mask):
  if mask not in MASKS:
    raise ValueError(f"mask must be one of {MASKS}, got {mask!r}.")
  if w.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    raise TypeError(f"w has dtype {w.dtype}; prune_and_pack takes bfloat16, float16 or float32.")
  if w.ndim != 2 or w.shape[0] % 4 or (mask != "columnwise" and w.shape[1] % 4):
    need = "K divisible by 4" if mask == "columnwise" else "K and O divisible by 4"
    raise ValueError(f"w has shape {w.shape}; a {mask} mask needs [K, O] with {need}.")


def _value_dtype(w, dtype):
  dtype = jnp.dtype(dtype or (jnp.bfloat16 if w.dtype == jnp.float32 else w.dtype))
  if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    raise TypeError(f"packed values can be bfloat16, float16 or float32 (on XLA only), not {dtype}.")
  return dtype


def _reference(w, mask, dtype):
  """values and metadata of the forward operand and, unless columnwise, of the backward one; both sides of w full."""
  if mask == "transposable":
    keep = transposable_mask(w)
    forward, backward = _pack(w, keep, dtype), _pack(w.T, keep.T, dtype)
  else:
    forward = _pack(w, None, dtype)
    backward = _pack(w.T, None, dtype) if mask == "bdwp" else ()
  return (*forward, backward[0].T, backward[1]) if backward else forward


def _pack(w, keep, dtype):
  """Packs along axis 0; without a mask, the two largest of every four."""
  groups, cols = w.shape[0] // 4, w.shape[1]
  rows = [w.reshape(groups, 4, cols)[:, r] for r in range(4)]
  kept = _keep_two(*map(_magnitude, rows)) if keep is None else keep.reshape(groups, 4, cols).transpose(1, 0, 2)
  low = jnp.where(kept[0], rows[0], jnp.where(kept[1], rows[1], rows[2]))
  high = jnp.where(kept[3], rows[3], jnp.where(kept[2], rows[2], rows[1]))
  first = jnp.where(kept[0], 0, jnp.where(kept[1], 1, 2)).astype(jnp.uint16)
  second = jnp.where(kept[3], 3, jnp.where(kept[2], 2, 1)).astype(jnp.uint16)
  nibbles = (first | second << 2).reshape(groups // 4, 4, cols)
  words = nibbles[:, 0] | nibbles[:, 1] << 4 | nibbles[:, 2] << 8 | nibbles[:, 3] << 12
  return jnp.stack([low, high], 1).reshape(2 * groups, cols).astype(dtype), words


def _keep_two(a, b, c, d):
  """Which two of four magnitudes are largest; a tie goes to the lower index. Each pair is compared once."""
  ab, ac, ad, bc, bd, cd = b > a, c > a, d > a, c > b, d > b, d > c  # xy: y beats x
  two_of = lambda x, y, z: (x & y) | (z & (x | y))
  return ~two_of(ab, ac, ad), ~two_of(~ab, bc, bd), ~two_of(~ac, ~bc, cd), two_of(ad, bd, cd)


def _magnitude(w):
  return jnp.where(jnp.isnan(w), 0, jnp.abs(w))
