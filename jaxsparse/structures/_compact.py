"""A structure whose kept entries alone are stored as the parameter."""

import dataclasses
import math

from jaxsparse.structures import _base
from jaxsparse.structures import _block
from jaxsparse.structures import _fixed_fan_in


@dataclasses.dataclass(frozen=True, repr=False)
class Compact(_base.AbstractStructure):
  """A leaf of which only the kept entries exist: weights, gradients and optimizer moments are as small as what is kept.

  The parameter is a float array of kept values; where they lie is in the optimizer state, as a `Positions` node in the
  place of a mask. `Updater.compact_init` makes both, `Updater.forward_params` joins them to the array that an op
  understands:

  - `FixedFanIn(fan_in)`: values `[fan_in, O]`, joined to a `FixedFanInArray` for `js.ops.fan_in_matmul`;
  - `Block((bk, bo))`: values `[kept blocks, bk, bo]`, joined to a `BlockArray` for `js.ops.block_matmul`.

  Args:
    structure: `FixedFanIn` with outputs on the last axis and without ablation, or `Block`.
    shape: `(K, O)`, of the dense weight.

  Raises:
    TypeError, ValueError: another structure, or a shape that is not two positive integers.

  >>> Compact(_fixed_fan_in.FixedFanIn(128), (4096, 1_000_000))
  Compact(structure=FixedFanIn(fan_in=128), shape=(4096, 1000000))
  """

  structure: _fixed_fan_in.FixedFanIn | _block.Block
  shape: tuple[int, int]

  def _check_fields(self):
    shape = tuple(self.shape) if isinstance(self.shape, (tuple, list)) else self.shape
    if not (isinstance(shape, tuple) and len(shape) == 2 and all(isinstance(s, int) and s > 0 for s in shape)):
      raise ValueError(f"Compact(shape={self.shape!r}): the dense shape (K, O), two positive integers, is needed.")
    object.__setattr__(self, "shape", shape)
    inner = self.structure
    if not isinstance(inner, (_fixed_fan_in.FixedFanIn, _block.Block)):
      raise TypeError(f"Compact stores FixedFanIn(...) or Block(...), got {inner!r}.")
    if self.stack_axes or inner.stack_axes:
      raise ValueError(f"{self!r}: stacked layers are not stored compactly; use one leaf for each layer.")
    if isinstance(inner, _fixed_fan_in.FixedFanIn):
      if inner.output_axis not in (-1, 1, (-1,), (1,)):
        raise ValueError(f"{self!r}: outputs must be on the last axis, output_axis=-1.")
      if inner.min_salient:
        raise ValueError(
          f"{self!r}: an ablated output gives its inputs to others, which have no room for them here: min_salient=0."
        )
    if math.prod(inner.view_shape(shape)) >= 2**31 and isinstance(inner, _block.Block):
      raise ValueError(f"{self!r} has 2**31 blocks or more; use larger ones.")

  def validate(self, shape):
    if tuple(shape) != self.shape:
      raise ValueError(f"{self!r} states another.")
    self.structure.validate(shape)

  def view_shape(self, shape):
    return self.structure.view_shape(shape)

  def unit_axes(self, shape):
    return self.structure.unit_axes(shape)

  def to_units(self, scores):
    return self.structure.to_units(scores)

  def from_units(self, units, shape):
    return self.structure.from_units(units, shape)

  def mask_to_units(self, mask):
    return self.structure.mask_to_units(mask)

  def implied_keep(self, shape):
    return self.structure.implied_keep(shape)

  @property
  def swaps_within_groups(self):
    return self.structure.swaps_within_groups
