"""Block sparsity: whole tiles of the last two axes."""

import dataclasses

import jax.numpy as jnp

from jaxsparse.structures import _base


@dataclasses.dataclass(frozen=True, repr=False)
class Block(_base.AbstractStructure):
  """Removes whole `shape[0] x shape[1]` tiles of the last two axes (`(in, out)` of a kernel).

  A block's score is the sum of its entries' scores. Leading axes (the spatial ones of HWIO) hold more blocks, all
  ranked together; axes named in `stack_axes` are layers, ranked apart.

  Args:
    shape: rows and columns of a block.

  Raises:
    ValueError: if a side is not a positive integer.

  >>> Block((4, 8)).view_shape((16, 32))
  (4, 4)
  """

  shape: tuple[int, int]

  def _check_fields(self):
    shape = tuple(self.shape) if isinstance(self.shape, (tuple, list)) else self.shape
    if not (isinstance(shape, tuple) and len(shape) == 2 and all(isinstance(s, int) and s > 0 for s in shape)):
      raise ValueError(f"Block(shape={self.shape!r}): two positive integers are needed, such as Block((16, 16)).")
    object.__setattr__(self, "shape", shape)

  def validate(self, shape):
    if len(shape) - len(self.stack_axes) < 2:
      raise ValueError(f"{self!r} needs a leaf with two dimensions that blocks can tile.")
    rows, cols = self.shape
    if shape[-2] % rows or shape[-1] % cols:
      raise ValueError(f"{self!r} needs its last two axes divisible by {rows} and {cols}.")

  def _split(self, shape):
    rows, cols = self.shape
    return (*shape[:-2], shape[-2] // rows, rows, shape[-1] // cols, cols)

  def view_shape(self, shape):
    rows, cols = self.shape
    return (*shape[:-2], shape[-2] // rows, shape[-1] // cols)

  def unit_axes(self, shape):
    return tuple(range(len(self.stack_axes), len(shape)))

  def to_units(self, scores):
    return _base.sum_scores(scores.reshape(self._split(scores.shape)), (-3, -1))

  def from_units(self, units, shape):
    return jnp.broadcast_to(units[..., :, None, :, None], self._split(shape)).reshape(shape)

  def mask_to_units(self, mask):
    rows, cols = self.shape
    return mask[..., ::rows, ::cols]
