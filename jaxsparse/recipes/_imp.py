"""Iterative pruning: train, prune some more, rewind, and again."""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _plan
from jaxsparse import _tree
from jaxsparse import _updater


class Round(NamedTuple):
  """The end of a round: trained parameters, their masks, and the sparsity that was asked for."""

  params: Any
  masks: Any
  sparsity: float


def round_sparsity(sparsity: float, done: int, rounds: int) -> float:
  """1 - (1 - sparsity)^(done / rounds): every round removes the same share of what is left.

  >>> round_sparsity(0.75, 1, 2)
  0.5
  """
  return sparsity if done == rounds else 1 - (1 - sparsity) ** (done / rounds)


def iterative_pruning(
  params: Any,
  train_fn: Callable[[Any, Any, int], Any],
  updater: _updater.Updater,
  rounds: int,
  *,
  rewind_to: Any = None,
  rewind: bool = True,
) -> Iterator[Round]:
  """Iterative magnitude pruning with rewinding (the lottery ticket procedure): train, then prune and train again, `rounds` times.

      def train_fn(params, masks, r):
        opt_state = js.set_masks(tx.init(params), masks)       # tx = js.static_sparse(...).wrap_optax(...)
        ...
        return params

      *_, last = iterative_pruning(params, train_fn, js.global_magnitude(sparsity=0.9, stop=1), rounds=5)

  Args:
    params: where training starts.
    train_fn: `(params, masks, round) -> trained params`; must keep to the masks, which are all ones in round 0.
    updater: says what is pruned and by what (an algorithm without gradients in its score, such as `magnitude` or
      `global_magnitude`), and its `sparsity` the end. Its schedule is not used.
    rounds: times that something is removed; there is one training more.
    rewind_to: what kept weights go back to: None for `params` (Frankle and Carbin), or the parameters of an early step of the
      first round (late rewinding).
    rewind: False trains on from the trained weights, with a learning rate schedule that starts anew (learning rate rewinding).

  Yields:
    A `Round` after each training; sparsities follow `round_sparsity`, the last is the updater's own.

  References:
    Frankle and Carbin, The Lottery Ticket Hypothesis, 2019, https://arxiv.org/abs/1803.03635; late rewinding: Frankle et al.,
    2020, https://arxiv.org/abs/1912.05671; learning rate rewinding: Renda et al., 2020, https://arxiv.org/abs/2003.02389.
    No known differences.
  """
  _check(updater, "iterative_pruning")
  masks, start = all_kept(updater, params), params if rewind_to is None else rewind_to
  for r in range(rounds + 1):
    sparsity = round_sparsity(updater.sparsity, r, rounds)
    if r:
      trained, masks = prune_to(updater, params, masks, sparsity)
      params = _keep(start, masks) if rewind else trained
    params = train_fn(params, masks, r)
    yield Round(params, masks, sparsity)


def all_kept(updater: _updater.Updater, params: Any) -> Any:
  """All-ones masks of the leaves that the updater sparsifies, `optax.MaskedNode()` for the others."""
  leaves = _tree.flatten(params)
  plans = _plan.make_plan(updater, leaves)
  return leaves.treedef.unflatten(
    [optax.MaskedNode() if plan.structure is None else jnp.ones(plan.shape, bool) for plan in plans]
  )


def prune_to(updater: _updater.Updater, params: Any, masks: Any, sparsity: float) -> tuple[Any, Any]:
  """`(params, masks)` at another sparsity than the updater's, out of what `masks` keep."""
  stage = dataclasses.replace(updater, sparsity=sparsity, initial_sparsity=0.0)
  return stage.instant_sparsify(params, masks=masks)


def _check(updater, name: str) -> None:
  if updater.sparsity is None or updater.prunes_at_init or updater.drop.uses_gradient:
    raise ValueError(f"{name} needs an updater with a sparsity and a score of the weights alone, not {updater!r}.")


def _keep(params, masks):
  keep = lambda m, p: p if _tree.is_masked_node(m) else jnp.where(m, p, jnp.zeros((), p.dtype))
  return jax.tree.map(keep, masks, params, is_leaf=_tree.is_masked_node)
