"""Sparsity and quantisation together: the order of the two, and what their errors do to each other."""

from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp

from jaxsparse import structures
from jaxsparse.calibration import _gptq
from jaxsparse.calibration import _gram
from jaxsparse.calibration import _scores
from jaxsparse.calibration import _selection
from jaxsparse.quant import _dense


def sparsify_and_quantize(
  w: jax.Array,
  structure: structures.AbstractStructure,
  keep: int | jax.Array,
  *,
  bits: int = 8,
  group: int = 128,
  order: str = "sparsify, quantize",
  norm: jax.Array | None = None,
  gram: jax.Array | None = None,
) -> _gptq.Quantized:
  """Prunes by score and rounds what is left.

  Args:
    w: `[K, O]`.
    structure, keep: the pattern, and the units kept per group.
    bits, group: as `quantize`.
    order: "sparsify, quantize", or "quantize, sparsify", which ranks weights that rounding has made equal and lets
      removed weights widen scales; it logs a warning.
    norm: `[K]`, for Wanda's scores; None ranks by magnitude.
    gram: `[K, K]`, for rounding by `gptq` instead of to the nearest; for the first order only.

  Raises:
    ValueError: another order, or a Gram matrix with the second one.

  References:
    Harma et al., Effective Interplay between Sparsity and Quantization, 2024 (https://arxiv.org/abs/2405.20935): the
    first order never has the larger error for magnitude masks and max-scaled groups. For whole models, and methods that
    compensate errors, that is a default and not a law.
  """
  rank = _scores.magnitude_scores if norm is None else lambda v: _scores.wanda_scores(v, norm)
  if order == "sparsify, quantize":
    pruned, mask = _scores.prune(w, rank(w), structure, keep)
    if gram is not None:
      return _gptq.gptq(pruned, gram, mask, bits=bits, group=group)
    return _gptq.Quantized(*_dense.quantize_dense(pruned, bits, group), mask)
  if order != "quantize, sparsify":
    raise ValueError(f"order={order!r}: 'sparsify, quantize' and 'quantize, sparsify' are allowed.")
  if gram is not None:
    raise ValueError("gptq makes up for errors on a fixed mask: it needs order='sparsify, quantize'.")
  logging.warning(
    "jaxsparse: quantising before pruning has the larger error; order='sparsify, quantize' is the default."
  )
  values, scales = _dense.quantize_dense(w, bits, group)
  mask = _selection.select(rank(_dense.dequantize_dense(values, scales)), structure, keep)
  return _gptq.Quantized(jnp.where(mask, values, 0), scales, mask)


class Orthogonality(NamedTuple):
  """Errors of a weight, or of the outputs it makes: L2 norms of the difference from the dense ones.

  Attributes:
    sparsify: of pruning alone.
    quantize: of rounding alone.
    sparsify_quantize: of pruning, then rounding.
    quantize_sparsify: of rounding, then pruning.
    excess: `sparsify_quantize - (sparsify + quantize)`: above 0 the two do more harm together than the sum of their own.
  """

  sparsify: jax.Array
  quantize: jax.Array
  sparsify_quantize: jax.Array
  quantize_sparsify: jax.Array
  excess: jax.Array


def orthogonality_report(
  w: jax.Array,
  structure: structures.AbstractStructure,
  keep: int | jax.Array,
  *,
  bits: int = 8,
  group: int = 128,
  gram: jax.Array | None = None,
) -> Orthogonality:
  """What magnitude pruning and rounding to the nearest cost alone and together.

  Args:
    w: `[K, O]`.
    structure, keep, bits, group: as `sparsify_and_quantize`.
    gram: `[K, K]`, X^T X, to measure the outputs X w; None measures the weight.

  References:
    Harma et al., 2024 (https://arxiv.org/abs/2405.20935).
  """
  w = w.astype(jnp.float32)
  round_off = lambda v: _dense.dequantize_dense(*_dense.quantize_dense(v, bits, group))
  prune = lambda v: _scores.prune(v, _scores.magnitude_scores(v), structure, keep)[0]

  def error(v):
    return jnp.sqrt(jnp.sum((v - w) ** 2 if gram is None else _gram.reconstruction_error(v, w, gram)))

  pruned, rounded = prune(w), round_off(w)
  alone = error(pruned), error(rounded)
  together = error(round_off(pruned))
  return Orthogonality(*alone, together, error(prune(rounded)), together - sum(alone))
