"""DSnoT: a mask improved by swaps, without changing a weight."""

import functools

import jax
import jax.numpy as jnp

from jaxsparse import structures
from jaxsparse.calibration import _scores
from jaxsparse.calibration import _shapes
from jaxsparse.calibration import _statistics


@functools.partial(jax.jit, static_argnames=("structure", "cycles", "stop_on_sign_flip"))
def dsnot(
  w: jax.Array,
  mask: jax.Array,
  statistics: _statistics.Statistics,
  structure: structures.AbstractStructure | None = None,
  *,
  cycles: int = 50,
  threshold: float | jax.Array = 0.1 / 2048,
  variance_power: float = 1.0,
  stop_on_sign_flip: bool = True,
) -> jax.Array:
  """Swaps kept and pruned weights of each output so that its expected error goes to 0.

  The error of an output is `E = sum of w_k mean_k over pruned k`. A cycle regrows the pruned weight with the largest
  `w_k mean_k / var_k` of E's sign, and prunes, of the kept weights whose `w mean` has the other sign, the one with the
  least Wanda score (under n:m, the least of the regrown weight's group). An output stops when `|E| <= threshold`, when
  nothing fits, or when a swap would flip E's sign.

  Args:
    w: `[K, O]`.
    mask: bool `[K, O]`, any initial mask.
    statistics: of the layer's inputs.
    structure: `NM` keeps every group's count; None, `FixedFanIn` and `Unstructured` keep every output's.
    cycles: at most.
    threshold: in units of the mean output. The authors' 0.1 counts sums over a sequence (of 2048 there).
    variance_power: exponent of the variance in the regrowing criterion.
    stop_on_sign_flip: whether a swap that flips E's sign is refused, and so |E| never rises. The authors' code never
      stops at it, whatever is asked for (the flag's type is wrong), and may end with a larger error than it started from.

  Returns:
    bool `[K, O]`, with the counts of `mask`.

  Raises:
    ValueError: a structure whose units are more than a weight: a swap of single weights would break it.

  References:
    Zhang et al., Dynamic Sparse No Training, 2023 (https://arxiv.org/abs/2310.08915). Differs from the paper: of the
    two candidates to prune, the sign rule is applied to n:m groups too, and a weight pruned or regrown once is not
    barred from moving back.
  """
  if not isinstance(structure, (structures.NM, structures.FixedFanIn, structures.Unstructured, type(None))):
    raise ValueError(
      f"DSnoT swaps single weights, which {structure!r} does not allow; NM, FixedFanIn and Unstructured do."
    )
  _shapes.check_shapes("dsnot", w, mask=mask, norm=statistics.norm)
  effect = w.astype(jnp.float32) * statistics.mean[:, None]
  # A feature that never varies says nothing about which weight to prefer: it would divide by 0.
  variance = jnp.maximum(statistics.variance, jnp.finfo(jnp.float32).tiny)[:, None]
  growth = effect / variance**variance_power
  wanda = _scores.wanda_scores(w, statistics.norm)
  group = structure.m if isinstance(structure, structures.NM) else w.shape[0]
  row = jax.lax.broadcasted_iota(jnp.int32, w.shape, 0)
  at = lambda a, index: jnp.take_along_axis(a, index[None], 0)[0]

  def cycle(state):
    step, mask, error, active = state
    sign = jnp.sign(error)
    grow_score = jnp.where(~mask & (sign * effect > 0), sign * growth, -jnp.inf)
    grow = jnp.argmax(grow_score, 0)
    near = row // group == grow // group
    drop_score = jnp.where(mask & near & (sign * effect < 0), wanda, jnp.inf)
    drop = jnp.argmin(drop_score, 0)
    after = error - at(effect, grow) + at(effect, drop)
    active &= (jnp.abs(error) > threshold) & (at(grow_score, grow) > -jnp.inf) & (at(drop_score, drop) < jnp.inf)
    if stop_on_sign_flip:
      active &= sign * after >= 0
    mask = (mask | (active & (row == grow))) & ~(active & (row == drop))
    return step + 1, mask, jnp.where(active, after, error), active

  unfinished = lambda state: (state[0] < cycles) & state[3].any()
  error = jnp.sum(jnp.where(mask, 0, effect), 0)
  return jax.lax.while_loop(unfinished, cycle, (0, mask, error, jnp.ones(error.shape, bool)))[1]
