"""Scorers that look at a whole model once, before training: SNIP, GraSP, SynFlow."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

LossFn = Callable[[Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class AbstractModelScorer(abc.ABC):
  """Scores all leaves together from a loss function and batches; runs in `Updater.instant_sparsify` only."""

  objective: ClassVar[Literal["loss", "tempered loss", "sum of outputs"]] = "loss"
  """What `loss_fn` returns: the training loss on batches of data, the same with logits divided by 200, or the sum of the
  model's outputs on an input of ones. A training loop can choose by it what to pass, without knowing the method."""

  @property
  def rounds(self) -> int:
    """How often scores are computed, on the model pruned so far; the density falls geometrically over the rounds."""
    return 1

  @abc.abstractmethod
  def scores(self, params, loss_fn: LossFn, batches: Iterable[Any], key: jax.Array):
    """Tree like `params`, float32: the score of every entry; `key` is a typed PRNG key."""


@dataclasses.dataclass(frozen=True)
class Snip(AbstractModelScorer):
  """|w dL/dw| with the gradient averaged over the batches.

  References:
    Lee et al., SNIP, 2019, https://arxiv.org/abs/1810.02340. No known differences.
  """

  def scores(self, params, loss_fn, batches, key):
    grads = mean_gradient(loss_fn, params, batches)
    return jax.tree.map(lambda p, g: jnp.abs(p * g).astype(jnp.float32), params, grads)


@dataclasses.dataclass(frozen=True)
class Shuffled(AbstractModelScorer):
  """Another scorer's scores in random order inside each leaf: its layer densities, random positions.

  Only single weights keep their densities: the sum over a unit of several would mix what belongs to different units.

  References:
    Liu et al., The Unreasonable Effectiveness of Random Pruning, 2022, https://arxiv.org/abs/2202.02643 ("SNIP ratio",
    "GraSP ratio"). No known differences.
  """

  scorer: AbstractModelScorer

  @property
  def objective(self):
    return self.scorer.objective

  def __post_init__(self):
    if not isinstance(self.scorer, AbstractModelScorer) or self.scorer.rounds != 1:
      raise ValueError(f"Shuffled: {self.scorer!r} must score a model in one round, such as Snip() or Grasp().")

  def scores(self, params, loss_fn, batches, key):
    leaves, treedef = jax.tree.flatten(self.scorer.scores(params, loss_fn, batches, key))
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([jax.random.permutation(k, s.ravel()).reshape(s.shape) for k, s in zip(keys, leaves)])


@dataclasses.dataclass(frozen=True)
class Grasp(AbstractModelScorer):
  """w (H g): weights whose removal would lower the gradient flow score highest.

  H g is the Hessian-vector product of the loss over the batches with its own gradient g; to first order, |g|^2 changes by
  -2 w (H g) when w is removed. (The paper's S is the negative of this, and its highest are removed.)

  References:
    Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, 2020,
    https://arxiv.org/abs/2002.07376.
    Differs from the paper: the temperature of 200 on the logits is for `loss_fn` to apply (without it, what is kept is much
    worse: 81 instead of 97 % on digits at 90 %), and one pass over the batches.
  """

  objective: ClassVar[str] = "tempered loss"

  def scores(self, params, loss_fn, batches, key):
    batches = list(batches)
    grads = mean_gradient(loss_fn, params, batches)

    @jax.jit
    def product(batch):
      return jax.jvp(lambda p: jax.grad(loss_fn)(p, batch), (params,), (grads,))[1]

    return jax.tree.map(lambda p, h: (p * h).astype(jnp.float32), params, mean_tree(product, batches))


@dataclasses.dataclass(frozen=True)
class SynFlow(AbstractModelScorer):
  """|w dR/dw| with R the sum of the outputs of the network of absolute weights: needs no data.

  `loss_fn(params, batch)` must return the *sum of the outputs* for the batch, and the batch is an input of ones.

  References:
    Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, 2020,
    https://arxiv.org/abs/2006.05467. No known differences.
  """

  objective: ClassVar[str] = "sum of outputs"
  iterations: int = 100

  def __post_init__(self):
    if not self.iterations >= 1:
      raise ValueError(f"SynFlow: iterations={self.iterations!r} must be at least 1.")

  @property
  def rounds(self):
    return self.iterations

  def scores(self, params, loss_fn, batches, key):
    positive = jax.tree.map(jnp.abs, params)
    grads = mean_gradient(loss_fn, positive, batches)
    return jax.tree.map(lambda p, g: jnp.abs(p * g).astype(jnp.float32), positive, grads)


def mean_tree(fn, batches: Iterable[Any]):
  """Mean over batches of a tree-valued function; ValueError when there are none."""
  total, count = None, 0
  for batch in batches:
    value = fn(batch)
    total = value if total is None else jax.tree.map(jnp.add, total, value)
    count += 1
  if total is None:
    raise ValueError("batches= is empty: at least one batch is needed to score a model.")
  return jax.tree.map(lambda v: v / count, total)


def mean_gradient(loss_fn: LossFn, params, batches: Iterable[Any]):
  """Gradient of the mean loss over the batches."""
  grad = _compiled_gradient(loss_fn)
  return mean_tree(lambda batch: grad(params, batch), batches)


@functools.lru_cache(maxsize=4)
def _compiled_gradient(loss_fn: LossFn):
  # SynFlow asks for it a hundred times: compile once.
  return jax.jit(jax.grad(loss_fn))
