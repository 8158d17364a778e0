"""Every entry on its own."""

import dataclasses

from jaxsparse.structures import _base


@dataclasses.dataclass(frozen=True, repr=False)
class Unstructured(_base.AbstractStructure):
  """Any entry may be removed; all entries of a leaf (of a layer, with `stack_axes`) are ranked together.

  >>> Unstructured().units_per_group((3, 5))
  15
  """

  def validate(self, shape):
    if len(shape) < len(self.stack_axes):
      raise ValueError(f"{self!r} needs at least {len(self.stack_axes)} dimensions.")

  def to_units(self, scores):
    return scores

  def from_units(self, units, shape):
    return units

  def mask_to_units(self, mask):
    return mask

  def view_shape(self, shape):
    return tuple(shape)

  def unit_axes(self, shape):
    return tuple(range(len(self.stack_axes), len(shape)))
