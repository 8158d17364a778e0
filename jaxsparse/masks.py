"""Trees of masks: their nodes, packing, and masks that come from somewhere else.

A mask tree has the structure of the parameters. Its leaves are bool arrays (True = kept), `PackedMask` where eight
entries share a byte, `Positions` where a parameter holds only what is kept, and `optax.MaskedNode()` where a leaf is not
sparsified.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import _tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMask:
  """A mask at one bit per entry.

  Bytes run along the last axis, so leading axes keep their sharding; a leaf that is split along its last axis exchanges
  bits whenever its mask is unpacked (keep bool masks there). With C columns and B = ceil(C / 8) bytes a row,
  bit b of byte j holds column b * B + j: unpacking then reads whole contiguous rows, once per bit.

  Attributes:
    data: uint8, `[*leading, B]`.
    shape: shape of the mask, static.
  """

  data: jax.Array
  shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
  """Where the values of a compactly stored parameter lie in the dense weight; no two are equal.

  A value keeps its slot: what is dropped is replaced in place, so slots are in no order.

  Attributes:
    indices: of `Compact(FixedFanIn(F), (K, O))`, `[F, O]`, the smallest unsigned integers that hold K: the input of each
      value. Of `Compact(Block((bk, bo)), (K, O))`, int32 `[N]`: block column * (K / bk) + block row; K / bk * O / bo
      where a slot holds no block.
    plan: what kernels derive from the indices; () where there is nothing.
    shape: shape of the parameter, the stored values, static.
    structure: the `Compact` structure with the dense shape, static.
  """

  indices: jax.Array
  plan: Any
  shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  structure: Any = dataclasses.field(metadata={"static": True})

  @property
  def size(self) -> int:
    """Entries of the dense weight."""
    return math.prod(self.structure.shape)

  @property
  def kept_units(self) -> jax.Array:
    """int32, shape=(): kept entries of a fixed fan-in, or kept blocks."""
    if self.indices.ndim == 2:
      return jnp.int32(self.indices.size)
    return jnp.sum(self.indices < math.prod(self.structure.view_shape(self.structure.shape)), dtype=jnp.int32)

  @property
  def unit_size(self) -> int:
    """Entries of a unit: 1, or those of a block."""
    return math.prod(self.shape[1:]) if self.indices.ndim == 1 else 1

  def problem(self) -> str:
    """What is wrong with the indices, in words; "" where they are different places of the dense weight."""
    rows, cols = self.structure.view_shape(self.structure.shape)
    fan_in = self.indices.ndim == 2
    # Slots that hold no block may share their number, one past the last.
    end = rows if fan_in else rows * cols
    if not bool(_flawed(jnp.asarray(self.indices), end, not fan_in)):
      return ""
    what = "of an output" if fan_in else "of blocks"
    return f"the indices {what} must be different numbers in [0, {end})."

  def to_mask(self) -> jax.Array:
    """bool `[K, O]`, True = kept: as large as the dense weight, so for small ones only."""
    rows, cols = self.structure.view_shape(self.structure.shape)
    if self.indices.ndim == 2:
      units = jnp.zeros((rows, cols), bool).at[self.indices, jnp.arange(cols)].set(True)
    else:
      flat = jnp.zeros(rows * cols, bool).at[self.indices].set(True, mode="drop")
      units = flat.reshape(cols, rows).T
    return self.structure.from_units(units, self.structure.shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _flawed(indices, end, may_be_empty):
  """Whether an index is named twice, or lies outside of [0, end)."""
  ordered = jnp.sort(indices, axis=0)
  outside = jnp.any(ordered[0] < 0) | jnp.any(ordered[-1] >= end + may_be_empty)
  return outside | jnp.any((ordered[1:] == ordered[:-1]) & (ordered[1:] < end))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnsetMask:
  """Stands for a mask that must be given with `set_masks` before training (pruning at initialisation).

  Attributes:
    shape: shape of the mask, static.
    owner: the updater, as it prints.
    packed: whether the mask will be stored packed, static.
    structure: the `Compact` structure of a leaf that needs `Positions`; None where a mask is needed, static.
  """

  shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  owner: str = dataclasses.field(metadata={"static": True})
  packed: bool = dataclasses.field(default=False, metadata={"static": True})
  structure: Any = dataclasses.field(default=None, metadata={"static": True})


def pack(mask: jax.Array) -> PackedMask:
  """bool `[*leading, C]` -> PackedMask."""
  *lead, cols = mask.shape
  width = -(-cols // 8)
  padded = jnp.pad(mask, [(0, 0)] * len(lead) + [(0, 8 * width - cols)])
  bits = padded.reshape(*lead, 8, width).astype(jnp.uint8)
  weights = (jnp.uint8(1) << jnp.arange(8, dtype=jnp.uint8))[:, None]
  return PackedMask((bits * weights).sum(-2, dtype=jnp.uint8), tuple(mask.shape))


def unpack(mask: PackedMask | jax.Array) -> jax.Array:
  """PackedMask -> bool `[*leading, C]`; a bool array passes."""
  if not isinstance(mask, PackedMask):
    return mask
  # Eight slices side by side: XLA on a CPU vectorises this, and not one shift by a broadcast index.
  bits = [(mask.data & jnp.uint8(1 << bit)) != 0 for bit in range(8)]
  return jnp.concatenate(bits, axis=-1)[..., : mask.shape[-1]]


def unpack_tree(masks: Any) -> Any:
  """A mask tree with every PackedMask as a bool array."""
  return jax.tree.map(lambda m: unpack(m) if isinstance(m, PackedMask) else m, masks, is_leaf=_tree.is_mask_leaf)


def masks_from_zeros(params: Any) -> Any:
  """Masks of a pruned model: True where a parameter is not zero.

  Args:
    params: tree of arrays: JAX, NumPy, or anything `numpy.asarray` takes (CPU torch tensors).

  Returns:
    A tree of bool arrays for leaves with two dimensions or more, `optax.MaskedNode()` for the others; to be passed to
    `set_masks`, `Updater.export` or `summarize_sparsity`.
  """

  def mask(leaf):
    leaf = _tree.to_array(leaf)
    return jnp.asarray(leaf) != 0 if np.ndim(leaf) >= 2 else optax.MaskedNode()

  return jax.tree.map(mask, params)
