"""How important an entry is."""

import abc
import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax


class LeafInputs(NamedTuple):
  """What a scorer may look at, for one leaf.

  Attributes:
    param: the stored parameter.
    grad: its gradient, dense and before any mask; None where there is none (`instant_sparsify` without a loss).
    key: a typed PRNG key of this leaf and this refresh.
    extra: arrays of the leaf's shape, by the names in the scorer's `needs`.
  """

  param: jax.Array
  grad: jax.Array | None
  key: jax.Array
  extra: Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class AbstractScorer(abc.ABC):
  """Scores the entries of a leaf: higher is kept (or grown) first. Criterion and growth are the same type.

  `accumulate` runs in every update and must be cheap; `score` runs only when a refresh is due. Stateless scorers keep
  the defaults of `init` and `accumulate`.
  """

  uses_gradient: ClassVar[bool] = False
  """Whether `score` or `accumulate` reads `inputs.grad`."""

  needs: ClassVar[tuple[str, ...]] = ()
  """Extra inputs by name: keyword arguments of `tx.update` (trees like the parameters), or parts of the inner
  optimizer's state that are, such as Adam's "nu"."""

  def init(self, param: jax.Array) -> jax.Array | tuple[()]:
    """State of one leaf; () when stateless."""
    del param
    return ()

  def accumulate(self, state, inputs: LeafInputs):
    """State of one leaf after one more update."""
    del inputs
    return state

  @abc.abstractmethod
  def score(self, state, inputs: LeafInputs) -> jax.Array:
    """Scores of the leaf's entries: its shape, any real dtype; NaN ranks lowest."""


@dataclasses.dataclass(frozen=True)
class AbstractElementwiseScorer(AbstractScorer):
  """A score that is computed entry by entry, and so need not be stored to be ranked: most are.

  A search for a threshold reads the leaf a few times; evaluating the score in each of these passes costs nothing
  beside the read, and saves a float32 copy of the leaf.
  """

  @abc.abstractmethod
  def terms(self, state, inputs: LeafInputs) -> tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]:
    """(fn, arrays): `fn(*arrays)` are the scores, computed entry by entry from arrays of the leaf's shape."""

  def score(self, state, inputs):
    fn, arrays = self.terms(state, inputs)
    return fn(*arrays)
