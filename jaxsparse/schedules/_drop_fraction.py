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


@dataclasses.dataclass(frozen=True)
class PiecewiseFraction(AbstractDropFraction):
  """One fraction after the other: `fractions[i]` once `boundaries[i - 1]` of the time has passed.

  Args:
    fractions: numbers, or other drop fractions, which still see the whole of the time.
    boundaries: shares of the time in (0, 1), increasing, one fewer than fractions.

  Raises:
    ValueError: for boundaries that do not increase or do not fit.

  >>> [float(PiecewiseFraction((0.5, 0.25, 0.0), (0.5, 0.75)).value(jnp.float32(t))) for t in (0.0, 0.5, 0.9)]
  [0.5, 0.25, 0.0]
  """

  fractions: tuple[float | AbstractDropFraction, ...]
  boundaries: tuple[float, ...]

  def __post_init__(self):
    object.__setattr__(self, "fractions", tuple(self.fractions))
    object.__setattr__(self, "boundaries", tuple(self.boundaries))
    edges = (0.0, *self.boundaries, 1.0)
    if len(self.fractions) != len(self.boundaries) + 1 or any(a >= b for a, b in zip(edges, edges[1:])):
      raise ValueError(
        f"PiecewiseFraction: {len(self.fractions)} fractions need {len(self.fractions) - 1} increasing boundaries in "
        f"(0, 1), got {self.boundaries!r}."
      )
    for fraction in self.fractions:
      if not isinstance(fraction, AbstractDropFraction):
        _check("PiecewiseFraction", fraction)

  def value(self, elapsed):
    pieces = [f if isinstance(f, AbstractDropFraction) else ConstantFraction(f) for f in self.fractions]
    now = pieces[0].value(elapsed)
    for piece, boundary in zip(pieces[1:], self.boundaries):
      now = jnp.where(elapsed >= boundary, piece.value(elapsed), now)
    return now


def _check(name: str, fraction: float) -> None:
  if not 0.0 <= fraction <= 1.0:
    raise ValueError(f"{name}: fraction={fraction!r} must be in [0, 1].")
