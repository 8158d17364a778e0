"""Schedules that raise the sparsity step by step, and the one that does it at once."""

import abc
import dataclasses

import jax
import jax.numpy as jnp

from jaxsparse.schedules import _base


@dataclasses.dataclass(frozen=True)
class OneShot(_base.AbstractMaskSchedule):
  """One refresh, in the update with count `at`, straight to the final sparsity."""

  at: int = 0

  def __post_init__(self):
    _base.check_window("OneShot", 1, self.at, None)

  def due(self, count):
    return jnp.asarray(count) == self.at

  def progress(self, count):
    return (jnp.asarray(count) >= self.at).astype(jnp.float32)

  def elapsed(self, count):
    return self.progress(count)


@dataclasses.dataclass(frozen=True)
class AbstractRamp(_base.AbstractMaskSchedule):
  """Refreshes every `every` updates in [start, stop); the sparsity grows along a curve and stays at its end.

  tau runs from 0 at the first refresh to exactly 1 at the last one of the ramp.

  Args:
    every: updates between refreshes.
    stop: refreshes end before this count.
    start: count of the first refresh.
    ramp_stop: the ramp ends before this count, refreshes go on at the final sparsity (GraNet's regrowth); None takes
      `stop`.

  Raises:
    ValueError: unless start < ramp_stop <= stop and every >= 1.
  """

  every: int
  stop: int
  start: int = 0
  ramp_stop: int | None = dataclasses.field(default=None, kw_only=True)

  def __post_init__(self):
    name = type(self).__name__
    _base.check_window(name, self.every, self.start, self.stop)
    if self.ramp_stop is not None:
      _base.check_window(f"{name} (ramp_stop)", self.every, self.start, self.ramp_stop)
      if self.ramp_stop > self.stop:
        raise ValueError(f"{name}: ramp_stop={self.ramp_stop} must not exceed stop={self.stop}.")
    self._check()

  def _check(self) -> None:
    """Errors for what a curve adds."""

  @abc.abstractmethod
  def curve(self, tau: jax.Array) -> jax.Array:
    """Progress at tau in [0, 1]; shape=(), float32, exactly 1 at 1."""

  @property
  def ramps(self):
    return True

  def due(self, count):
    return _base.in_window(count, self.every, self.start, self.stop)

  def progress(self, count):
    stop = self.stop if self.ramp_stop is None else self.ramp_stop
    return self.curve(_base.window_fraction(count, self.every, self.start, stop))

  def elapsed(self, count):
    return _base.time_share(count, self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class Polynomial(AbstractRamp):
  """Progress 1 - (1 - tau) ** power: with power 3, the cubic ramp of gradual magnitude pruning.

  Args:
    every, stop, start, ramp_stop: of `AbstractRamp`.
    power: positive; 1 is linear, 3 cubic.

  Raises:
    ValueError: as `AbstractRamp`, and for power <= 0.

  >>> [round(float(Polynomial(every=10, stop=31).progress(t)), 3) for t in (0, 10, 20, 30)]
  [0.0, 0.704, 0.963, 1.0]
  >>> [round(float(Polynomial(every=10, ramp_stop=21, stop=50).progress(t)), 3) for t in (0, 10, 20, 30)]
  [0.0, 0.875, 1.0, 1.0]

  References:
    Zhu and Gupta, To prune, or not to prune, 2017, https://arxiv.org/abs/1710.01878.
  """

  power: float = 3.0

  def _check(self):
    if not self.power > 0:
      raise ValueError(f"Polynomial: power={self.power!r} must be positive.")

  def curve(self, tau):
    return 1 - (1 - tau) ** self.power


@dataclasses.dataclass(frozen=True)
class Linear(AbstractRamp):
  """Progress tau. Arguments and errors of `AbstractRamp`."""

  def curve(self, tau):
    return tau


@dataclasses.dataclass(frozen=True)
class Cosine(AbstractRamp):
  """Progress (1 - cos(pi tau)) / 2, slow at both ends. Arguments and errors of `AbstractRamp`."""

  def curve(self, tau):
    return jnp.where(tau >= 1, jnp.float32(1), (1 - jnp.cos(jnp.pi * tau)) / 2)
