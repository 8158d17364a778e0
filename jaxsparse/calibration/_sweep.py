"""One pass over the inputs of a weight in which later rows make up for what was done to earlier ones.

Optimal brain surgery and GPTQ share it. With the damped Gram matrix H = R R^T, R upper triangular, and U = R / diag(R):
if row i of the result is q_i and the deviations are e_j = w_j - q_j, the best value for row i given the rows before is
`a_i = w_i + sum_{j<i} U_ji e_j`, and what row i then adds to ||X (w - q)||^2 is `(a_i - q_i)^2 R_ii^2` (Chee et al., 2023,
https://arxiv.org/abs/2307.13304, Theorem 6: the same iteration as GPTQ's, which needs H^-1 and its factor).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.calibration import _gram

_BLOCK = 128


def block_rows(rows: int, multiple: int, wanted: int = _BLOCK) -> int:
  """Rows of a block: a divisor of `rows` and multiple of `multiple`, the largest up to `wanted`, unless that is tiny."""
  if rows <= wanted:
    return rows
  fitting = [b for b in range(multiple, rows + 1, multiple) if rows % b == 0]
  small = [b for b in fitting if wanted // 4 <= b <= wanted]
  return max(small) if small else min(b for b in fitting if b > wanted // 4)


def sweep(
  w: jax.Array,
  r: jax.Array,
  decide: Callable[[jax.Array, jax.Array, jax.Array], Any],
  apply: Callable[[jax.Array, Any, jax.Array], jax.Array],
  block: int,
  run: int,
) -> tuple[jax.Array, Any]:
  """Fixes the rows of w one after the other.

  Args:
    w: float32 `[K, O]`.
    r: `[K, K]`, upper triangular, R R^T = H.
    decide: `(index, adjusted, weight)` -> what is decided for a whole run of rows at its start (a mask, scales): index of
      the run, its rows `[run, O]` as adjusted so far, and `R_ii^2` `[run, 1]`.
    apply: `(row, decided, i)` -> the final row, `[O]`, from the adjusted one and its place in the run.
    block: rows whose effect on later blocks is one product; divides K.
    run: rows decided together; divides `block`.

  Returns:
    The new weight, and the decisions of all runs, stacked.
  """
  k, outputs = w.shape
  unit = r / jnp.diagonal(r)[None, :]
  weight = (jnp.diagonal(r) ** 2)[:, None]
  free = _inverses(unit, run)

  def one_block(b, state):
    pull, done, decisions = state
    start = b * block
    take = lambda a: jax.lax.dynamic_slice_in_dim(a, start, block)
    inner = jax.lax.dynamic_slice(unit, (start, start), (block, block))
    before, old, curve = take(pull), take(w), take(weight)

    def one_run(s, state):
      away, new, decisions = state
      rows = lambda a: jax.lax.dynamic_slice_in_dim(a, s * run, run)
      columns = jax.lax.dynamic_slice_in_dim(inner, s * run, run, axis=1)
      index = b * (block // run) + s
      # Each row of the run as it would be if the rows of the run before it followed freely.
      pulled = _gram.dot(free[index].T, rows(before) + _gram.dot(columns.T, away))
      decided = decide(index, rows(old) + pulled, rows(curve))
      decisions = jax.tree.map(lambda all, d: all.at[index].set(d), decisions, decided)

      def one_row(i, state):
        away, new = state
        at = s * run + i
        here = old[at] + before[at] + jnp.matmul(inner[:, at], away, precision=_gram.HIGHEST)
        row = apply(here, decided, i)
        return away.at[at].set(old[at] - row), new.at[at].set(row)

      return *jax.lax.fori_loop(0, run, one_row, (away, new)), decisions

    empty = jnp.zeros_like(old)
    away, new, decisions = jax.lax.fori_loop(0, block // run, one_run, (empty, empty, decisions))
    pull = pull + _gram.dot(take(unit).T, away)
    return pull, jax.lax.dynamic_update_slice_in_dim(done, new, start, 0), decisions

  spec = jax.eval_shape(
    decide,
    jax.ShapeDtypeStruct((), jnp.int32),
    jax.ShapeDtypeStruct((run, outputs), w.dtype),
    jax.ShapeDtypeStruct((run, 1), w.dtype),
  )
  decisions = jax.tree.map(lambda d: jnp.zeros((k // run, *d.shape), d.dtype), spec)
  empty = jnp.zeros_like(w)
  _, done, decisions = jax.lax.fori_loop(0, k // block, one_block, (empty, empty, decisions))
  return done, decisions


def _inverses(unit, run):
  """Inverses of the `run x run` blocks on the diagonal, `[K / run, run, run]`."""
  runs = unit.shape[0] // run
  blocks = jax.vmap(lambda i: jax.lax.dynamic_slice(unit, (i * run, i * run), (run, run)))(jnp.arange(runs))
  ones = jnp.broadcast_to(jnp.eye(run, dtype=unit.dtype), blocks.shape)
  return jax.lax.linalg.triangular_solve(blocks, ones, left_side=True, lower=False, unit_diagonal=True)
