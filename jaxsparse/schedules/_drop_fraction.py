"""The share of kept units that dynamic sparse training replaces at a refresh."""

import abc
import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AbstractDropFraction(abc.ABC):
  """A share in [0, 1] of the kept units, as a function of the elapsed share of the schedule."""

  @abc.abstractmethod
  def value(self, elapsed: jax.Array) -> jax.Array:
    """shape=(), float32 in [0, 1] -> shape=(), float32 in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class ConstantFraction(AbstractDropFraction):
  """The same share at every refresh."""

  fraction: float = 0.3

  def __post_init__(self):
    _check("ConstantFraction", self.fraction)

  def value(self, elapsed):
    return jnp.full_like(elapsed, self.fraction)


@dataclasses.dataclass(frozen=True)
class CosineFraction(AbstractDropFraction):
  """end + (fraction - end) (1 + cos(pi elapsed)) / 2: the cosine decay of RigL."""

  fraction: float = 0.3
  end: float = 0.0

  def __post_init__(self):
    _check("CosineFraction", self.fraction)
    _check("CosineFraction (end)", self.end)

  def value(self, elapsed):
    return self.end + (self.fraction - self.end) * (1 + jnp.cos(jnp.pi * elapsed)) / 2


def _check(name: str, fraction: float) -> None:
  if not 0.0 <= fraction <= 1.0:
    raise ValueError(f"{name}: fraction={fraction!r} must be in [0, 1].")
