"""N:M sparsity: n of every m consecutive entries along the reduction axis are kept."""

import dataclasses

from jaxsparse.structures import _base


@dataclasses.dataclass(frozen=True, repr=False)
class NM(_base.AbstractStructure):
  """Keeps n of every m consecutive entries along the axis that the matmul contracts.

  Only groups along the reduction axis can be used by a sparse matmul (`[B, K] @ [K, O]`: along K). The default,
  `axis=None`, is axis -2, which is right for Dense kernels `(in, out)` and convolution kernels `HWIO`; leaves of any
  other rank need `axis` (a tuple of adjacent axes where several are contracted, such as the `(heads, dim)` of an
  attention output projection) or `stack_axes`.

  Args:
    n: entries kept in each group, 0 < n < m.
    m: group size.
    axis: reduction axis, or adjacent axes, of one layer; negative counts from the end.
    stack_axes: leading axes that stack layers.

  Raises:
    ValueError: if not 0 < n < m.

  >>> NM(2, 4).view_shape((128, 64))
  (32, 4, 64)
  """

  n: int
  m: int
  axis: int | tuple[int, ...] | None = None

  def _check_fields(self):
    if not (isinstance(self.n, int) and isinstance(self.m, int) and 0 < self.n < self.m):
      raise ValueError(
        f"NM(n={self.n!r}, m={self.m!r}): n of every m entries are kept, so integers 0 < n < m are needed."
      )
    if isinstance(self.axis, list):
      object.__setattr__(self, "axis", tuple(self.axis))

  def _reduction(self, shape) -> tuple[int, int]:
    """First reduction axis and one past the last, in the whole leaf."""
    lead = len(self.stack_axes)
    ndim = len(shape) - lead
    if self.axis is None:
      if ndim not in (2, 4):
        raise ValueError(
          f"{self!r} finds the reduction axis by itself only in (in, out) and HWIO kernels: state it with axis=, "
          "or the axes that stack layers with stack_axes=."
        )
      return lead + ndim - 2, lead + ndim - 1
    given = self.axis if isinstance(self.axis, tuple) else (self.axis,)
    axes = [lead + _base.normalize_axis(a, ndim) for a in given]
    if not axes or axes != list(range(axes[0], axes[0] + len(axes))):
      raise ValueError(f"{self!r}: several reduction axes must be adjacent and in order.")
    return axes[0], axes[-1] + 1

  def _merged(self, shape) -> tuple[int, tuple[int, ...], int]:
    """(position, shape before the split, size) of the merged reduction axis."""
    lo, hi = self._reduction(shape)
    size = 1
    for a in range(lo, hi):
      size *= shape[a]
    return lo, (*shape[:lo], size, *shape[hi:]), size

  def validate(self, shape):
    _, _, size = self._merged(shape)
    if size % self.m:
      raise ValueError(f"{self!r} needs its reduction axis divisible by {self.m}.")

  def view_shape(self, shape):
    lo, merged, size = self._merged(shape)
    return (*merged[:lo], size // self.m, self.m, *merged[lo + 1 :])

  def unit_axes(self, shape):
    return (self._merged(shape)[0] + 1,)

  def to_units(self, scores):
    return scores.reshape(self.view_shape(scores.shape))

  def from_units(self, units, shape):
    return units.reshape(shape)

  def mask_to_units(self, mask):
    return mask.reshape(self.view_shape(mask.shape))

  def implied_keep(self, shape):
    return self.n

  @property
  def swaps_within_groups(self):
    return True
