"""SparseGPT: optimal brain surgery in blocks."""

import functools
from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp

from jaxsparse import structures
from jaxsparse.calibration import _gram
from jaxsparse.calibration import _selection
from jaxsparse.calibration import _shapes
from jaxsparse.calibration import _sweep


class Pruned(NamedTuple):
  """A pruned weight.

  Attributes:
    weight: float32 `[K, O]`, exactly 0 off the mask.
    mask: bool `[K, O]`, True = kept.
    damping: shape=(), what SparseGPT's factorisation needed; `check_pruned` says so when it is more than was asked for.
  """

  weight: jax.Array
  mask: jax.Array
  damping: jax.Array


@functools.partial(jax.jit, static_argnames=("structure", "block"))
def sparsegpt(
  w: jax.Array,
  gram: jax.Array,
  structure: structures.AbstractStructure,
  keep: int | jax.Array,
  *,
  damping: float | jax.Array = 0.01,
  block: int = 128,
) -> Pruned:
  """Prunes row after row and lets the rows after it make up for what is lost.

  A weight is judged by the increase of ||X (w - w')||^2 that its removal costs once later rows have been readjusted,
  `a^2 R_kk^2`. Masks are chosen for `block` rows at a time, n:m patterns for every m rows.

  Args:
    w: `[K, O]`, any floating dtype; or the target of `corrected_target`.
    gram: float32 `[K, K]`, X^T X of the layer's inputs. Any common factor is irrelevant.
    structure: `FixedFanIn()` for each output by itself, `Unstructured()` for the layer, `NM(n, m)`, `Block(shape)`.
    keep: units kept per group, from `keep_units`; may be traced. Each block of rows keeps its share.
    damping: added to the diagonal, relative to its mean. Inputs that were always 0 lose their weights' claim to
      anything: their diagonal is 1.
    block: rows per block, about: a divisor of K near it is taken.

  Returns:
    A `Pruned`.

  References:
    Frantar and Alistarh, SparseGPT, 2023 (https://arxiv.org/abs/2301.00774). Differs from the paper: one triangular
    factor of H replaces the inverse and its factor (`_sweep`); counts are exact in every block and in total; weights
    of dead inputs are ranked with score 0 and not set to 0 beforehand, which comes to the same unless a structure
    keeps them.
  """
  _shapes.check_shapes("sparsegpt", w, gram=gram)
  k = w.shape[0]
  r, used = _gram.upper_factor(gram, damping)
  w = jnp.where((jnp.diagonal(gram) > 0)[:, None], w.astype(jnp.float32), 0)
  tile = _rows_together(structure)
  block = _sweep.block_rows(k, tile, block)
  local = isinstance(structure, structures.NM)  # groups lie inside a run of m rows: decided late, all alike
  run = tile if local else block

  def decide(index, adjusted, weight):
    count = keep if local else _selection.part_of(keep, index, k // run)
    return _selection.select(adjusted * adjusted * weight, structure, count)

  row = lambda adjusted, mask, i: jnp.where(mask[i], adjusted, 0)
  weight, masks = _sweep.sweep(w, r, decide, row, block, run)
  return Pruned(weight, masks.reshape(w.shape), used)


def check_pruned(pruned: Pruned, name: str = "layer", damping: float = 0.01) -> None:
  """Refuses a weight that is not finite, and warns of one that needed more damping; outside of `jit`.

  Args:
    pruned: what `sparsegpt` or `alps` returned.
    name: of the layer, for the message.
    damping: what was asked for.

  Raises:
    ValueError: the Gram matrix could not be factored with any damping that was tried.
  """
  if not bool(jnp.isfinite(pruned.weight).all()):
    raise ValueError(
      f"{name}: its Gram matrix could not be factored, with {float(pruned.damping):g} of its mean diagonal added at last. "
      "Its inputs (or the weight) are not finite or far too large; look at them with check_statistics."
    )
  if float(pruned.damping) > damping * 1.001:
    logging.warning(
      "jaxsparse: the Gram matrix of %s is not positive definite in float32; it took a damping of %g instead of %g. More "
      "calibration data would help.",
      name,
      float(pruned.damping),
      damping,
    )


def _rows_together(structure: structures.AbstractStructure) -> int:
  """Rows of a weight that a unit or a group of this structure spans."""
  if isinstance(structure, structures.NM):
    return structure.m
  if isinstance(structure, structures.Block):
    return structure.shape[0]
  if isinstance(structure, (structures.FixedFanIn, structures.Unstructured)):
    return 1
  raise ValueError(
    f"{structure!r} is not pruned in blocks of rows; allowed are FixedFanIn, Unstructured, NM and Block. "
    "Prune by wanda_scores and refit instead."
  )
