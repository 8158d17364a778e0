"""Averages of models that share one mask."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse import _updater
from jaxsparse.recipes import _imp


def soup(members: Sequence[Any], masks: Any = None, weights: Sequence[float] | None = None) -> Any:
  """The average of several models' parameters, as sparse as they are.

  Args:
    members: parameters of models that were trained apart from one starting point.
    masks: their common masks; a member with a weight outside them is an error.
    weights: one number a member; None for equal ones. They are normalised.

  Returns:
    Parameters, averaged in float32 and cast back. Statistics of batch norms must be computed again.

  >>> soup([{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([3.0, 0.0])}])["w"].tolist()
  [2.0, 0.0]
  """
  if not members:
    raise ValueError("soup needs at least one member.")
  weights = [1.0] * len(members) if weights is None else list(weights)
  if len(weights) != len(members) or not sum(weights) > 0:
    raise ValueError(f"soup needs one weight for each of {len(members)} members and a positive sum, got {weights}.")
  if masks is not None:
    for i, member in enumerate(members):
      _check_within(i, member, masks)
  shares = [w / sum(weights) for w in weights]

  def mean(*leaves):
    wide = _tree.wider(leaves[0].dtype, jnp.float32)
    # Around the first member, so that equal members give that member exactly.
    first = leaves[0].astype(wide)
    return (first + sum(s * (x.astype(wide) - first) for s, x in zip(shares, leaves))).astype(leaves[0].dtype)

  return jax.tree.map(mean, *members)


def greedy_soup(members: Sequence[Any], score_fn: Callable[[Any], float], masks: Any = None) -> Any:
  """Takes members in, best first, while the soup's score does not fall (Wortsman et al., https://arxiv.org/abs/2203.05482).

  Args:
    members, masks: as in `soup`.
    score_fn: parameters -> number, higher is better, on held-out data.
  """
  order = sorted(members, key=score_fn, reverse=True)
  inside = order[:1]
  best = score_fn(soup(inside, masks))
  for member in order[1:]:
    score = score_fn(soup([*inside, member], masks))
    if score >= best:
      inside, best = [*inside, member], score
  return soup(inside, masks)


def sparse_model_soups(
  params: Any,
  train_fn: Callable[[Any, Any, int, int], Any],
  updater: _updater.Updater,
  cycles: int,
  members: int,
  *,
  combine: Callable[[Sequence[Any], Any], Any] = soup,
) -> Iterator[_imp.Round]:
  """Sparse Model Soups: prune, retrain several copies under one mask, average, and again.

  In every cycle the share 1 - (1 - s)^(1/cycles) of what is left is removed, so the sparsity is exactly s after the last.

  Args:
    params: a trained dense model.
    train_fn: `(params, masks, cycle, member) -> params`: a retraining that differs from member to member by its seed, weight
      decay, length or schedule (the paper restarts the learning rate linearly), and keeps to the masks.
    updater: what is pruned and by what, and the final sparsity, as in `iterative_pruning`; the paper ranks |w| globally.
    cycles: times that something is removed.
    members: retrainings in each cycle; they are independent, so `train_fn` may run them at once on several devices.
    combine: `(members, masks) -> params`, such as `soup` (uniform) or a `greedy_soup` with its `score_fn` filled in.

  Yields:
    The `Round` of every cycle.

  References:
    Zimmer et al., Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging, 2023,
    https://arxiv.org/abs/2306.16788. Differs from the paper: statistics of batch norms are left to `combine`.
  """
  _imp._check(updater, "sparse_model_soups")
  masks = _imp.all_kept(updater, params)
  for cycle in range(1, cycles + 1):
    sparsity = _imp.round_sparsity(updater.sparsity, cycle, cycles)
    params, masks = _imp.prune_to(updater, params, masks, sparsity)
    trained = [train_fn(params, masks, cycle, member) for member in range(members)]
    params = combine(trained, masks)
    yield _imp.Round(params, masks, sparsity)


def _check_within(i: int, member, masks) -> None:
  leaves = _tree.flatten(member)
  for label, value, mask in zip(leaves.labels, leaves.values, _tree.match(leaves, masks, "masks")):
    if not _tree.is_masked_node(mask) and bool(jnp.any(jnp.where(mask, 0, value) != 0)):
      raise ValueError(
        f"Member {i} of the soup has weights outside the common mask at {label}; its training left the mask."
      )
