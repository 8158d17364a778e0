"""What the forward pass sees, and what the optimizer stores."""

import abc
import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AbstractForward(abc.ABC):
  """How stored parameters and masks make the effective weights, and how gradients come back.

  `storage` is the promise to the user: "hard" keeps the stored parameters exactly zero off-mask after every update;
  "dense" keeps dense parameters, and only `Updater.forward_params` shows them masked.
  """

  storage: ClassVar[Literal["hard", "dense"]]

  @abc.abstractmethod
  def forward(self, param: jax.Array, mask: jax.Array, count: jax.Array) -> jax.Array:
    """Effective weights of one leaf, differentiable; same shape and dtype as `param`."""

  @abc.abstractmethod
  def gradient(self, grad: jax.Array, param: jax.Array, mask: jax.Array, count: jax.Array) -> jax.Array:
    """The gradient handed to the inner optimizer."""

  def project(self, param: jax.Array, mask: jax.Array, count: jax.Array) -> jax.Array:
    """The weights to use or export outside training; masked, unless a forward says otherwise."""
    del count
    return jnp.where(mask, param, jnp.zeros((), param.dtype))
