"""Masks of a `[K, O]` weight from scores, by the structures of the rest of the library."""

import jax
import jax.numpy as jnp

from jaxsparse import selection
from jaxsparse import structures


def keep_units(
  structure: structures.AbstractStructure, shape: tuple[int, int], sparsity: float | None = None, name: str = "weight"
) -> int:
  """Units that each group of a `[K, O]` weight keeps.

  `FixedFanIn()` ranks the weights of each output ("per row" in the papers), `Unstructured()` those of the layer.

  Args:
    structure: what is ranked together and removed together.
    shape: (K, O).
    sparsity: fraction to remove in [0, 1); None where the structure implies it (`NM`, a fixed fan-in).
    name: what errors call the weight.

  Raises:
    ValueError: the structure does not fit, the sparsity is missing or not what the structure implies, or nothing
      would be left.
  """
  _check_structure(structure)
  if len(shape) != 2:
    raise ValueError(f"{name} has shape {tuple(shape)}; post-training pruning takes [K, O] matrices.")
  try:
    structure.validate(tuple(shape))
  except ValueError as error:
    raise ValueError(f"{name} has shape {tuple(shape)}; {error}") from None
  units, implied = structure.units_per_group(shape), structure.implied_keep(shape)
  if implied is None and sparsity is None:
    raise ValueError(f"{name}: {structure!r} needs sparsity=, the fraction of weights to remove.")
  if implied is not None:
    if sparsity is not None and abs(1 - sparsity - implied / units) > 1e-6:
      raise ValueError(
        f"{name}: {structure!r} keeps {implied} of {units}, a sparsity of {1 - implied / units:g}, but {sparsity:g} was asked for."
      )
    return implied
  keep = selection.keep_count(units, sparsity)
  if keep == 0:
    raise ValueError(
      f"{name} with shape {tuple(shape)} cannot reach a sparsity of {sparsity:g}: none of the {units} units in a group of "
      f"{structure!r} would be left. Lower the sparsity, or use smaller units."
    )
  return keep


def select(scores: jax.Array, structure: structures.AbstractStructure, keep: int | jax.Array) -> jax.Array:
  """Mask of the `keep` best units of each group.

  Args:
    scores: `[K, O]`; a unit's are summed.
    structure: what is ranked together and removed together.
    keep: units kept per group; may be traced.

  Returns:
    bool `[K, O]`, True = kept.
  """
  _check_structure(structure)
  units, axes = structure.to_units(scores), structure.unit_axes(scores.shape)
  size = structure.units_per_group(scores.shape)
  if isinstance(keep, int) and not 0 <= keep <= size:
    raise ValueError(f"keep={keep}: a group of {structure!r} in scores of shape {scores.shape} has {size} units.")
  if units.ndim == 2 and axes == (0,):
    # Counts along rows: a CPU takes five times as long for counts along columns.
    mask = selection.topk_mask(units.T, keep, 1).T
  else:
    mask = selection.topk_mask(units, keep, axes)
  return structure.from_units(mask, scores.shape)


def _check_structure(structure) -> None:
  if not isinstance(structure, structures.AbstractStructure):
    raise TypeError(f"structure must be a structure such as NM(2, 4) or FixedFanIn(), got {structure!r}.")


def part_of(keep: int | jax.Array, part: jax.Array, parts: int) -> jax.Array:
  """Units kept in one of `parts` equal runs of a group, so that all of them add up to `keep`."""
  whole, rest = jnp.int32(keep) // parts, jnp.int32(keep) % parts
  return whole + rest * (part + 1) // parts - rest * part // parts
