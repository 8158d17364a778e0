"""Which absent weights a layer would gain most from: scores by the gradient of the dense weight, which is never stored.

The gradient of a layer's weight is `x.T @ dy`. Growth by gradients (RigL) needs only the largest of it, so it is computed
for some outputs at a time, and forgotten.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _block_array
from jaxsparse.arrays import _fixed_fan_in_array
from jaxsparse.ops import _float32_sums

# Entries of the dense gradient that exist at a time.
_CHUNK = 1 << 24


class Candidates(NamedTuple):
  """Absent inputs of every output, and their scores.

  Attributes:
    indices: int32 `[C, O]`.
    scores: float32 `[C, O]`, -inf where an output has no more candidates.
  """

  indices: jax.Array
  scores: jax.Array


def fan_in_candidates(
  x: Any, dy: Any, w: _fixed_fan_in_array.FixedFanInArray, count: int, *, sample: int | None = None, key: Any = None
) -> Candidates:
  """The `count` absent inputs of every output whose weights have the largest |gradient|.

  Of a refresh that replaces n inputs of an output it takes `count >= n` to be RigL's; with fewer, some of what is dropped
  stays. A sample of the inputs, drawn anew for every chunk of outputs, makes it cheaper by K / sample.

  Args:
    x: `[*B, K]`, input of the layer.
    dy: `[*B, O]`, derivative of the loss by its output.
    w: where inputs are kept; its values are not read.
    count: C.
    sample: how many inputs of each output are looked at; None for all.
    key: PRNG key, with `sample`.

  Returns:
    Candidates `[C, O]`, to be passed as `candidate_scores` to `tx.update`.

  Raises:
    ValueError: shapes do not fit, count or sample are out of range, or a sample has no key.
  """
  x, dy = jnp.asarray(x), jnp.asarray(dy)
  inputs, outputs = w.shape
  _check_operands("fan_in_candidates", x, dy, (inputs, outputs))
  seen = inputs if sample is None else sample
  if not 1 <= seen <= inputs or not 1 <= count <= seen:
    raise ValueError(f"fan_in_candidates: count={count}, sample={sample}; 1 <= count <= sample <= {inputs} is needed.")
  if sample is not None and key is None:
    raise ValueError("fan_in_candidates: a sample= needs a key=.")
  return Candidates(*_fan_in(count, None if sample == inputs else sample, x, dy, w, key))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fan_in(count, sample, x, dy, w, key):
  inputs, outputs = w.shape
  x, dy = x.reshape(-1, inputs), dy.reshape(-1, outputs)
  width = min(outputs, max(1, _CHUNK // (sample or inputs)))

  def body(i, found):
    start = jnp.minimum(i * width, outputs - width)
    cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, width, axis=1)
    rows, at, columns = jnp.arange(inputs, dtype=jnp.int32), cut(w.indices).astype(jnp.int32), x
    if sample is not None:
      rows = jax.random.permutation(jax.random.fold_in(key, i), rows)[:sample]
      # Kept inputs that are not in the sample lie past its end, where nothing is written.
      at = jnp.full(inputs, sample, jnp.int32).at[rows].set(jnp.arange(sample, dtype=jnp.int32))[at]
      columns = x[:, rows]
    gradient = jnp.abs(_float32_sums.einsum("bk,bo->ko", columns, cut(dy)))
    gradient = gradient.at[at, jnp.arange(width)].set(-jnp.inf, mode="drop")
    scores, place = jax.lax.top_k(gradient.T, count)
    put = lambda a, part: jax.lax.dynamic_update_slice_in_dim(a, part.T, start, axis=1)
    return put(found[0], rows[place]), put(found[1], scores)

  empty = jnp.zeros((count, outputs), jnp.int32), jnp.zeros((count, outputs), jnp.float32)
  return jax.lax.fori_loop(0, -(-outputs // width), body, empty)


def block_gradient_scores(x: Any, dy: Any, block_shape: tuple[int, int]) -> jax.Array:
  """The sum of |gradient| over every block of a layer's dense weight, kept or not.

  Args:
    x: `[*B, K]`, input of the layer.
    dy: `[*B, O]`, derivative of the loss by its output.
    block_shape: (bk, bo); they divide K and O.

  Returns:
    float32 `[K / bk, O / bo]`, to be passed as `candidate_scores` to `tx.update`.

  Raises:
    ValueError: shapes do not fit, or blocks do not tile the weight.

  >>> block_gradient_scores(jnp.array([[1.0, -2.0]]), jnp.array([[3.0, 0.0]]), (2, 1)).tolist()
  [[9.0, 0.0]]
  """
  x, dy = jnp.asarray(x), jnp.asarray(dy)
  shape = (*x.shape[-1:], *dy.shape[-1:])
  _check_operands("block_gradient_scores", x, dy, shape)
  block_shape, _ = _block_array.check_tiling(shape, block_shape, "block_gradient_scores: the weight")
  return _blocks(block_shape, x, dy)


@functools.partial(jax.jit, static_argnums=0)
def _blocks(block_shape, x, dy):
  (bk, bo), inputs = block_shape, x.shape[-1]
  x = x.reshape(-1, inputs)
  columns = dy.reshape(x.shape[0], -1, bo).transpose(1, 0, 2)

  def score(column):
    return jnp.abs(_float32_sums.einsum("bk,bo->ko", x, column)).reshape(-1, bk * bo).sum(1)

  return jax.lax.map(score, columns, batch_size=max(1, _CHUNK // (inputs * bo))).T


def _check_operands(op, x, dy, shape) -> None:
  if x.ndim < 1 or dy.ndim < 1:
    raise ValueError(f"{op}: x has shape {x.shape} and dy {dy.shape}; [*B, K] and [*B, O] are needed.")
  if x.shape[:-1] != dy.shape[:-1] or (x.shape[-1], dy.shape[-1]) != shape:
    raise ValueError(
      f"{op}: x has shape {x.shape} and dy {dy.shape}; a weight {shape} needs [*B, {shape[0]}] and [*B, {shape[1]}]."
    )
