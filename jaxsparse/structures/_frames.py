"""A pattern schedule: one structure after another."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxsparse.structures import _base
from jaxsparse.structures import _nm


@dataclasses.dataclass(frozen=True, repr=False)
class Frames(_base.AbstractStructure):
  """The pattern of a leaf changes during training: `frames[i]` from count `boundaries[i - 1]` on.

  A refresh chooses masks of the frame it falls in, so a mask fits the frame of the last refresh. Everything that looks
  at the end (final counts, `instant_sparsify`, compressed storage) uses the last frame. Made for methods with dense
  storage, where a finer pattern may bring back what a coarser one removed.

  Args:
    frames: two or more N:M structures.
    boundaries: increasing counts of updates, one less than frames.

  Raises:
    ValueError: if there are fewer than two frames, or boundaries are missing or out of order.

  >>> from jaxsparse.structures import NM
  >>> frames = Frames((NM(4, 8), NM(2, 4)), (100,))
  >>> [int(frames.index(t)) for t in (0, 99, 100)]
  [0, 0, 1]
  """

  frames: tuple[_nm.NM, ...]
  boundaries: tuple[int, ...]

  def _check_fields(self):
    for name in ("frames", "boundaries"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if len(self.frames) < 2 or not all(isinstance(f, _nm.NM) for f in self.frames):
      raise ValueError(f"Frames needs two or more NM structures, got {self.frames!r}.")
    whole = all(isinstance(b, int) and not isinstance(b, bool) and b > 0 for b in self.boundaries)
    if not whole or list(self.boundaries) != sorted(set(self.boundaries)):
      raise ValueError(f"Frames: boundaries={self.boundaries!r} must be increasing, positive counts of updates.")
    if len(self.boundaries) != len(self.frames) - 1:
      raise ValueError(f"Frames: {len(self.frames)} frames need {len(self.frames) - 1} boundaries between them.")
    if self.stack_axes or any(f.stack_axes != self.last.stack_axes for f in self.frames):
      raise ValueError("Frames: state stack_axes in the frames, the same in all of them.")

  @property
  def last(self) -> _nm.NM:
    return self.frames[-1]

  def index(self, count: jax.Array | int) -> jax.Array:
    """shape=(), int32: position of the frame at this count."""
    return jnp.sum(jnp.asarray(count) >= jnp.asarray(self.boundaries, jnp.int32), dtype=jnp.int32)

  def validate(self, shape):
    for frame in self.frames:
      frame.validate(shape)

  def to_units(self, scores):
    return self.last.to_units(scores)

  def from_units(self, units, shape):
    return self.last.from_units(units, shape)

  def mask_to_units(self, mask):
    return self.last.mask_to_units(mask)

  def view_shape(self, shape):
    return self.last.view_shape(shape)

  def unit_axes(self, shape):
    return self.last.unit_axes(shape)

  def implied_keep(self, shape):
    return self.last.implied_keep(shape)

  def layer_shape(self, shape):
    return self.last.layer_shape(shape)
