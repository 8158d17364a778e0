"""Whole channels: every entry with the same index on one axis."""

import dataclasses

import jax.numpy as jnp

from jaxsparse.structures import _base


@dataclasses.dataclass(frozen=True, repr=False)
class Channel(_base.AbstractStructure):
  """Removes whole channels (output features by default) of a leaf.

  Args:
    axis: the channel axis of one layer; -1 is the output axis of `(in, out)` and HWIO kernels.
    stack_axes: leading axes that stack layers, each ranked by itself.

  >>> Channel().view_shape((3, 3, 16, 32))
  (32,)
  """

  axis: int = -1

  def _axis(self, shape) -> int:
    lead = len(self.stack_axes)
    return lead + _base.normalize_axis(self.axis, len(shape) - lead)

  def _others(self, shape) -> tuple[int, ...]:
    return tuple(a for a in range(len(self.stack_axes), len(shape)) if a != self._axis(shape))

  def validate(self, shape):
    if len(shape) - len(self.stack_axes) < 2:
      raise ValueError(f"{self!r} needs a leaf with two dimensions or more.")
    self._axis(shape)

  def view_shape(self, shape):
    return (*shape[: len(self.stack_axes)], shape[self._axis(shape)])

  def unit_axes(self, shape):
    return (len(self.stack_axes),)

  def to_units(self, scores):
    return _base.sum_scores(scores, self._others(scores.shape))

  def from_units(self, units, shape):
    return jnp.broadcast_to(jnp.expand_dims(units, self._others(shape)), shape)

  def mask_to_units(self, mask):
    index = [slice(None)] * mask.ndim
    for a in self._others(mask.shape):
      index[a] = 0
    return mask[tuple(index)]
