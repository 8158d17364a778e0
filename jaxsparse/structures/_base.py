"""What a structure is: a view of a leaf in which whole units are kept or removed."""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxsparse import selection


@dataclasses.dataclass(frozen=True, repr=False)
class AbstractStructure(abc.ABC):
  """How the entries of a leaf are tied together when it is pruned.

  A structure turns the scores of a leaf into scores of *units* (`to_units`), and a mask of units back into a mask of
  the leaf (`from_units`). Units are ranked against each other along `unit_axes` of that view; the other axes of the
  view are independent groups. The view keeps the natural axes of the leaf, so that no transpose or flattening is
  needed and sharded leaves stay sharded.

  `stack_axes` are leading axes that stack layers (`nn.scan`, `nnx.vmap`); each layer is then ranked on its own.
  """

  stack_axes: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)

  def __post_init__(self):
    axes = (self.stack_axes,) if isinstance(self.stack_axes, int) else tuple(self.stack_axes)
    if axes != tuple(range(len(axes))):
      raise ValueError(
        f"{type(self).__name__}: stack_axes={self.stack_axes!r} must be the leading axes (0,), (0, 1), ...; "
        "move the stacked axes to the front of the leaf."
      )
    object.__setattr__(self, "stack_axes", axes)
    self._check_fields()

  def __repr__(self):
    shown = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
    shown.sort(key=lambda f: f.kw_only)
    return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

  def _check_fields(self) -> None:
    """Checks (and normalises) the fields that a subclass adds."""

  @abc.abstractmethod
  def validate(self, shape: tuple[int, ...]) -> None:
    """Raises ValueError, in words that follow "params[...] has shape ...; ", if a leaf of this shape cannot be viewed."""

  @abc.abstractmethod
  def to_units(self, scores: jax.Array) -> jax.Array:
    """Scores of entries, shape of the leaf -> scores of units, shape of the view (the sum over a unit's entries)."""

  @abc.abstractmethod
  def from_units(self, units: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Mask of units, shape of the view -> mask of entries, shape of the leaf."""

  @abc.abstractmethod
  def mask_to_units(self, mask: jax.Array) -> jax.Array:
    """Mask of entries -> mask of units. The inverse of `from_units`."""

  @abc.abstractmethod
  def view_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the view that `to_units` returns for a leaf of `shape`."""

  @abc.abstractmethod
  def unit_axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of the view along which units are ranked; every other axis of the view indexes groups."""

  def implied_keep(self, shape: tuple[int, ...]) -> int | None:
    """Units kept per group when the structure itself fixes it (N:M, a fixed fan-in), else None."""
    del shape
    return None

  @property
  def swaps_within_groups(self) -> bool:
    """Whether dynamic sparse training must keep the count of every group, and so swaps units inside groups."""
    return False

  def counts_around_swap(
    self, mask: jax.Array, drop: jax.Array, grow: jax.Array, keep: jax.Array, swaps: jax.Array, axes: tuple[int, ...]
  ) -> tuple[jax.Array, jax.Array]:
    """Units kept per group after dropping and after growing, where swaps stay inside groups.

    Args:
      mask, drop, grow: mask and scores of units, shape of the view.
      keep: shape=(), int32: units per group that the sparsity allows.
      swaps: shape=(), int32: units of the leaf to replace.
      axes: `unit_axes` of the leaf.
    """
    return swap_evenly(mask, drop, grow, keep, swaps, axes)

  def units_per_group(self, shape: tuple[int, ...]) -> int:
    """Units that are ranked against each other in a leaf of `shape`."""
    view = self.view_shape(shape)
    return math.prod(view[a] for a in self.unit_axes(shape))

  def group_count(self, shape: tuple[int, ...]) -> int:
    """Groups of such units in a leaf of `shape`."""
    return math.prod(self.view_shape(shape)) // max(self.units_per_group(shape), 1)

  def layer_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one layer of a stacked leaf."""
    return tuple(shape[len(self.stack_axes) :])


def swap_evenly(mask, drop, grow, keep, swaps, axes) -> tuple[jax.Array, jax.Array]:
  """Every group keeps its count; the swaps are shared out evenly, the rest to the groups that gain most."""
  return keep - selection.swap_counts(mask, drop, grow, swaps, axes), keep


def sum_scores(scores: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """The sum over a unit's entries; integer scores add up in float32, where a large unit does not overflow."""
  return scores.sum(axes, dtype=jnp.float32 if jnp.issubdtype(scores.dtype, jnp.integer) else None)


def normalize_axis(axis: int, ndim: int) -> int:
  """-ndim <= axis < ndim -> 0 <= axis < ndim; ValueError outside."""
  if not -ndim <= axis < ndim:
    raise ValueError(f"axis {axis} does not exist in {ndim} dimensions.")
  return axis % ndim
