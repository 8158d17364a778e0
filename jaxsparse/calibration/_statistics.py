"""What one linear layer is fed with, summed up while it streams by: mergeable, and `psum`-able across devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse.calibration import _sketch


class Statistics(NamedTuple):
  """Sums over the inputs x `[..., K]` of a linear layer; float32 unless stated.

  Attributes:
    count: shape=(), int32: input rows (tokens) seen, fewer than 2**31.
    sum: `[K]`, sum of x.
    sum_squares: `[K]`, sum of x**2.
    centred: `[K]`, sum of (x - mean)**2, kept apart because it is lost in the difference of the other two when the mean
      is large.
    gram: `[K, K]`, X^T X, or None.
    cross: `[K, M]`, X^T Y with a second stream Y `[..., M]`, or None.
    sketch: quantiles of |x| over all features, or None.
  """

  count: jax.Array
  sum: jax.Array
  sum_squares: jax.Array
  centred: jax.Array
  gram: jax.Array | None = None
  cross: jax.Array | None = None
  sketch: _sketch.QuantileSketch | None = None

  @property
  def mean(self) -> jax.Array:
    """`[K]`."""
    return self.sum / self._rows

  @property
  def variance(self) -> jax.Array:
    """`[K]`, of the population (divided by count)."""
    return self.centred / self._rows

  @property
  def norm(self) -> jax.Array:
    """`[K]`, Euclidean norm of a feature over all rows, divided by sqrt(count), as Wanda takes it."""
    return jnp.sqrt(self.sum_squares / self._rows)

  @property
  def _rows(self):
    return jnp.maximum(self.count, 1).astype(jnp.float32)


def init_statistics(features: int, *, gram: bool = False, cross: int | None = None, sketch: bool = False) -> Statistics:
  """Statistics of nothing.

  Args:
    features: K.
    gram: whether to sum X^T X, `4 K**2` bytes.
    cross: M, to sum X^T Y with a second stream of M features.
    sketch: whether to keep quantiles of |x|.
  """
  zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
  return Statistics(
    count=jnp.int32(0),
    sum=zeros(features),
    sum_squares=zeros(features),
    centred=zeros(features),
    gram=zeros(features, features) if gram else None,
    cross=None if cross is None else zeros(features, cross),
    sketch=_sketch.init_sketch() if sketch else None,
  )


def update(
  statistics: Statistics, x: jax.Array, *, second: jax.Array | None = None, where: jax.Array | None = None
) -> Statistics:
  """Adds a batch of inputs.

  Args:
    statistics: so far.
    x: `[..., K]`, any floating dtype; summed in float32.
    second: `[..., M]`, the second stream, needed where `statistics.cross` is kept: inputs (or outputs) of the dense
      layer on the same tokens.
    where: bool `[...]`, False for padding, which counts for nothing.

  Raises:
    ValueError: shapes do not fit, or `second` is missing or not expected.
  """
  features = statistics.sum.shape[0]
  if not x.ndim or x.shape[-1] != features:
    raise ValueError(f"x has shape {x.shape}; these statistics are of {features} features on the last axis.")
  if (second is None) != (statistics.cross is None):
    raise ValueError("second= goes with init_statistics(cross=...): give both or neither.")
  rows = _rows(x, where)
  count = rows.shape[0] if where is None else where.sum(dtype=jnp.int32)
  total = rows.sum(0)
  mean = total / jnp.maximum(jnp.float32(count), 1)
  away = rows - mean if where is None else jnp.where(where.reshape(-1, 1), rows - mean, 0)
  batch = Statistics(
    count=jnp.int32(count),
    sum=total,
    sum_squares=(rows * rows).sum(0),
    centred=(away * away).sum(0),
    gram=None if statistics.gram is None else _product(rows, rows),
    cross=None if second is None else _cross(statistics, rows, _rows(second, where)),
    sketch=None if statistics.sketch is None else _sketch.update_sketch(_sketch.init_sketch(), x, where),
  )
  return merge(statistics, batch)


def merge(a: Statistics, b: Statistics) -> Statistics:
  """Statistics of what either has seen."""
  if [leaf is None for leaf in a] != [leaf is None for leaf in b] or a.sum.shape != b.sum.shape:
    raise ValueError("statistics of different layers, or with different parts, cannot be merged.")
  added = jax.tree.map(jnp.add, a._replace(centred=None), b._replace(centred=None))
  # Chan, Golub, LeVeque: the sums of squares around either mean, and what the two means are apart.
  weight = a._rows * b.count.astype(jnp.float32) / added._rows
  apart = jnp.where(jnp.minimum(a.count, b.count) > 0, weight * (a.mean - b.mean) ** 2, 0)
  return added._replace(centred=a.centred + b.centred + apart)


def psum(statistics: Statistics, axis_name: str | tuple[str, ...]) -> Statistics:
  """The statistics of all devices on a mapped axis, on each of them."""
  total = jax.lax.psum(statistics._replace(centred=None), axis_name)
  away = statistics.centred + statistics.count.astype(jnp.float32) * (statistics.mean - total.mean) ** 2
  return total._replace(centred=jax.lax.psum(away, axis_name))


def check_statistics(statistics: Statistics, name: str = "layer", *, full_rank: bool = False) -> None:
  """Refuses statistics that no method can use; looks at values, so call it outside of `jit`.

  Args:
    statistics: of one layer.
    name: of the layer, for the error.
    full_rank: whether the method inverts the Gram matrix, and so needs at least K rows.

  Raises:
    ValueError: nothing was seen, an input was NaN or infinite (the first feature is named), or there are fewer rows
      than a Gram matrix of full rank needs.
  """
  count, features = int(statistics.count), statistics.sum.shape[0]
  if count == 0:
    raise ValueError(f"{name}: no calibration data was seen; run at least one batch through it.")
  bad = ~jnp.isfinite(statistics.sum_squares)
  if bool(bad.any()):
    raise ValueError(
      f"{name}: inputs of feature {int(jnp.argmax(bad))} are NaN or infinite ({int(bad.sum())} of {features} features). "
      "Look for the layer before it that overflows, or calibrate in a wider dtype."
    )
  if full_rank and statistics.gram is None:
    raise ValueError(f"{name}: this method needs a Gram matrix; collect with init_statistics(..., gram=True).")
  if full_rank and count < features:
    raise ValueError(
      f"{name}: {count} calibration rows cannot give a Gram matrix of full rank for {features} inputs; use at least "
      f"{features} tokens (better ten times as many), or a method without a Gram matrix, such as wanda."
    )


def _rows(x, where):
  rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  return rows if where is None else jnp.where(where.reshape(-1, 1), rows, 0)


def _cross(statistics, rows, second):
  if second.shape != (rows.shape[0], statistics.cross.shape[1]):
    raise ValueError(
      f"second has {second.shape} rows and features; ({rows.shape[0]}, {statistics.cross.shape[1]}) fit."
    )
  return _product(rows, second)


def _product(a, b):
  return jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)
