"""Fixed fan-in: every output keeps the same number of inputs."""

import dataclasses
import math

import jax.numpy as jnp

from jaxsparse import selection
from jaxsparse.structures import _base


@dataclasses.dataclass(frozen=True, repr=False)
class FixedFanIn(_base.AbstractStructure):
  """Keeps the same number of inputs for every output (Lasby et al., 2023, https://arxiv.org/abs/2305.02299).

  Args:
    fan_in: inputs kept per output; None takes the number from the sparsity of the leaf.
    output_axis: the axis, or axes, that index outputs in one layer; -1 is right for `(in, out)` and HWIO kernels.
    min_salient: in dynamic sparse training, outputs with fewer than `min_salient * fan_in` salient inputs (those that
      survive the drop, or that would grow if the whole layer competed) are ablated: they keep no input, and the others
      share what is freed evenly. 0 never ablates.
    stack_axes: leading axes that stack layers, each with its own outputs.

  Raises:
    ValueError: if `fan_in` is not a positive integer, or `min_salient` is not in [0, 1].

  >>> FixedFanIn(8).units_per_group((128, 64))
  128
  """

  fan_in: int | None = None
  output_axis: int | tuple[int, ...] = -1
  min_salient: float = 0.0

  def _check_fields(self):
    if self.fan_in is not None and not (isinstance(self.fan_in, int) and self.fan_in > 0):
      raise ValueError(
        f"FixedFanIn(fan_in={self.fan_in!r}): a positive integer, or None to follow the sparsity, is needed."
      )
    if not 0.0 <= self.min_salient <= 1.0:
      raise ValueError(f"FixedFanIn(min_salient={self.min_salient!r}) must be in [0, 1].")
    if isinstance(self.output_axis, list):
      object.__setattr__(self, "output_axis", tuple(self.output_axis))

  def _outputs(self, shape) -> tuple[int, ...]:
    lead = len(self.stack_axes)
    given = self.output_axis if isinstance(self.output_axis, tuple) else (self.output_axis,)
    return tuple(lead + _base.normalize_axis(a, len(shape) - lead) for a in given)

  def validate(self, shape):
    if len(shape) - len(self.stack_axes) < 2:
      raise ValueError(f"{self!r} needs a leaf with two dimensions or more.")
    inputs = math.prod(shape[a] for a in self.unit_axes(shape))
    if self.fan_in is not None and self.fan_in > inputs:
      raise ValueError(f"{self!r} keeps more inputs than the {inputs} there are.")

  def view_shape(self, shape):
    return tuple(shape)

  def unit_axes(self, shape):
    outputs = self._outputs(shape)
    return tuple(a for a in range(len(self.stack_axes), len(shape)) if a not in outputs)

  def to_units(self, scores):
    return scores

  def from_units(self, units, shape):
    return units

  def mask_to_units(self, mask):
    return mask

  def implied_keep(self, shape):
    return self.fan_in

  @property
  def swaps_within_groups(self):
    return True

  def counts_around_swap(self, mask, drop, grow, keep, swaps, axes):
    if not self.min_salient:
      return _base.swap_evenly(mask, drop, grow, keep, swaps, axes)
    layer = tuple(range(len(self.stack_axes), mask.ndim))
    outputs = tuple(a for a in layer if a not in axes)
    count = lambda m, along: jnp.sum(m, along, dtype=jnp.int32, keepdims=True)
    swaps = -(-swaps // math.prod(mask.shape[: len(self.stack_axes)]))
    stay = count(mask, layer) - swaps
    survive = mask & selection.topk_mask(drop, stay, layer, where=mask)
    promising = ~survive & selection.topk_mask(grow, jnp.broadcast_to(swaps, stay.shape), layer, where=~survive)
    # 0.3 * 10 may be a little above 3 in float32; the slack keeps whole products whole.
    enough = self.min_salient * (1 - 1e-6) * keep.astype(jnp.float32)
    active = count(survive | promising, axes).astype(jnp.float32) >= enough
    active |= ~jnp.any(active, outputs, keepdims=True)
    room = math.prod(mask.shape[a] for a in axes)
    fan_in = jnp.minimum(keep * math.prod(mask.shape[a] for a in outputs) // count(active, outputs), room)
    # Weights of ablated outputs go first, so fewer of the others have to.
    left = mask & active
    left &= selection.topk_mask(drop, stay, layer, where=left)
    return jnp.minimum(count(left, axes), fan_in), jnp.where(active, fan_in, 0)
