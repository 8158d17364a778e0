"""CoSpaDi (experimental): a weight as a dictionary times sparse columns, fitted to a layer's outputs."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse.calibration import _gram
from jaxsparse.calibration import _shapes


class Dictionary(NamedTuple):
  """`w = atoms @ coefficients`, where each column of the coefficients has `nnz` entries.

  Attributes:
    atoms: `[K, A]`.
    values: `[nnz, O]`.
    indices: `[nnz, O]`, int32 in [0, A).
  """

  atoms: jax.Array
  values: jax.Array
  indices: jax.Array

  def coefficients(self) -> jax.Array:
    """`[A, O]`."""
    return _scatter(self.values, self.indices, self.atoms.shape[1])

  def to_dense(self) -> jax.Array:
    """`[K, O]`."""
    return _gram.dot(self.atoms, self.coefficients())

  def nbytes(self, itemsize: int = 2) -> int:
    """Bytes of values of `itemsize` and of indices of ceil(log2 A) bits."""
    bits = max(1, (self.atoms.shape[1] - 1).bit_length())
    return itemsize * (self.atoms.size + self.values.size) + -(-self.indices.size * bits // 8)


@functools.partial(jax.jit, static_argnames=("atoms", "nnz", "iterations"))
def cospadi(
  w: jax.Array, gram: jax.Array, atoms: int, nnz: int, *, iterations: int = 10, damping: float | jax.Array = 0.01
) -> tuple[Dictionary, jax.Array]:
  """Minimises ||X (w - D S)||_F over dictionaries D and columns of S with `nnz` entries.

  With H = R R^T it is plain dictionary learning of R^T w: sparse codes by orthogonal matching pursuit (a column keeps its
  old support where that is better), atoms by least squares (the method of optimal directions). The error never rises.

  Args:
    w: `[K, O]`.
    gram: `[K, K]`, X^T X.
    atoms: columns of D, at most O.
    nnz: entries of a column of S, at most `atoms`.
    iterations: of both steps.
    damping: relative to the mean of the diagonal of H.

  Returns:
    The factors, and ||R^T (w - D S)||_F^2 after each iteration, `[iterations]`.

  Raises:
    ValueError: `atoms` or `nnz` out of range.

  References:
    Shopkhoev et al., CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning, 2025
    (https://arxiv.org/abs/2509.22075). Differs from the paper: optimal directions in place of K-SVD; the first atoms are
    the leading left singular vectors and then columns of the weight.
  """
  _shapes.check_shapes("cospadi", w, gram=gram)
  if not 0 < nnz <= atoms <= w.shape[1]:
    raise ValueError(f"cospadi(atoms={atoms!r}, nnz={nnz!r}) of a weight {w.shape}: 0 < nnz <= atoms <= {w.shape[1]}.")
  r, _ = _gram.upper_factor(gram, damping)
  y = _gram.dot(r.T, w.astype(jnp.float32))
  u, s, _ = jnp.linalg.svd(y, full_matrices=False)
  rank = min(atoms, u.shape[1])
  largest = jnp.argsort(-jnp.sum(y * y, 0))[: atoms - rank]
  d = _unit(jnp.concatenate([u[:, :rank], y[:, largest]], 1))
  first = jnp.broadcast_to(jnp.arange(nnz)[:, None], (nnz, y.shape[1]))

  def step(indices, d):
    values, residual = _fit(d, y, indices)
    new = _pursue(d, y, nnz)
    new_values, new_residual = _fit(d, y, new)
    better = jnp.sum(new_residual**2, 0) < jnp.sum(residual**2, 0)
    indices, values = jnp.where(better, new, indices), jnp.where(better, new_values, values)
    code = _scatter(values, indices, atoms)
    d, error = _directions(d, y, code)
    return indices, d, values, error

  def iterate(state, _):
    indices, d, values, error = step(*state[:2])
    return (indices, d, values), error

  start = first, d, jnp.zeros(first.shape, jnp.float32)
  (indices, d, values), errors = jax.lax.scan(iterate, start, length=iterations)
  whole = jax.scipy.linalg.solve_triangular(r, d, lower=False, trans="T")
  return Dictionary(whole, values, indices), errors


def _unit(d):
  norm = jnp.linalg.norm(d, axis=0)
  return d / jnp.where(norm > 0, norm, 1)


def _scatter(values, indices, atoms):
  column = jnp.broadcast_to(jnp.arange(values.shape[1]), indices.shape)
  return jnp.zeros((atoms, values.shape[1]), values.dtype).at[indices, column].add(values)


def _fit(d, y, indices):
  """Least squares of every column of y on its own atoms: (values `[nnz, O]`, residual)."""
  between, against = _gram.dot(d.T, d), _gram.dot(d.T, y)

  def one(index, right):
    small = between[index][:, index]
    # Atoms may be parallel: a little of the identity keeps the solve finite.
    return jnp.linalg.solve(small + 1e-6 * jnp.trace(small) / len(index) * jnp.eye(len(index)), right[index])

  values = jax.vmap(one, in_axes=1, out_axes=1)(indices, against)
  return values, y - _gram.dot(d, _scatter(values, indices, d.shape[1]))


def _pursue(d, y, nnz):
  """Orthogonal matching pursuit: indices `[nnz, O]`."""
  indices = jnp.zeros((nnz, y.shape[1]), jnp.int32)
  residual, used = y, jnp.zeros((d.shape[1], y.shape[1]), bool)
  length = jnp.linalg.norm(d, axis=0)[:, None]
  for i in range(nnz):
    score = jnp.abs(_gram.dot(d.T, residual)) / jnp.where(length > 0, length, 1)
    index = jnp.argmax(jnp.where(used, -1.0, score), 0)
    used = used.at[index, jnp.arange(y.shape[1])].set(True)
    indices = indices.at[i].set(index)
    residual = _fit(d, y, indices[: i + 1])[1]
  return indices


def _directions(d, y, code):
  """The best atoms for given codes, where they are better than the old ones, and the squared error."""
  square = _gram.dot(code, code.T)
  damped = square + 1e-6 * jnp.trace(square) / len(square) * jnp.eye(len(square))
  # Solved for the change, so that an atom that no column uses stays.
  new = d + jnp.linalg.solve(damped, _gram.dot(code, (y - _gram.dot(d, code)).T)).T
  errors = [jnp.sum((y - _gram.dot(a, code)) ** 2) for a in (d, new)]
  return jnp.where(errors[1] < errors[0], new, d), jnp.minimum(*errors)
