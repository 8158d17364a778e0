"""Schedules that raise the sparsity step by step, and the one that does it at once."""

import dataclasses

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
class Polynomial(_base.AbstractMaskSchedule):
  """Progress 1 - (1 - tau) ** power, refreshed every `every` updates in [start, stop).

  tau runs from 0 at the first refresh to 1 at the last one before `stop`; power 3 is the cubic ramp of gradual
  magnitude pruning (Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878).

  Args:
    every: updates between refreshes.
    stop: refreshes end before this count.
    start: count of the first refresh.
    power: positive; 1 is linear, 3 cubic.

  Raises:
    ValueError: stop <= start, every < 1, start < 0 or power <= 0.

  >>> [round(float(Polynomial(every=10, stop=31).progress(t)), 3) for t in (0, 10, 20, 30)]
  [0.0, 0.704, 0.963, 1.0]
  """

  every: int
  stop: int
  start: int = 0
  power: float = 3.0

  def __post_init__(self):
    _base.check_window("Polynomial", self.every, self.start, self.stop)
    if not self.power > 0:
      raise ValueError(f"Polynomial: power={self.power!r} must be positive.")

  @property
  def ramps(self):
    return True

  def due(self, count):
    return _base.in_window(count, self.every, self.start, self.stop)

  def progress(self, count):
    return 1 - (1 - self.elapsed(count)) ** self.power

  def elapsed(self, count):
    return _base.window_fraction(count, self.every, self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class RampThenHold(_base.AbstractMaskSchedule):
  """`Polynomial` over [start, ramp_stop), then refreshes at the final sparsity until `stop` (GraNet).

  Drop fractions decay over the whole of [start, stop).

  Args:
    every: updates between refreshes.
    ramp_stop: the final sparsity is reached at the last refresh before this count.
    stop: refreshes end before this count.
    start: count of the first refresh.
    power: positive; 1 is linear, 3 cubic.

  Raises:
    ValueError: unless start < ramp_stop <= stop, every >= 1 and power > 0.

  >>> [round(float(RampThenHold(every=10, ramp_stop=21, stop=50).progress(t)), 3) for t in (0, 10, 20, 30)]
  [0.0, 0.875, 1.0, 1.0]
  """

  every: int
  ramp_stop: int
  stop: int
  start: int = 0
  power: float = 3.0

  def __post_init__(self):
    _base.check_window("RampThenHold (ramp_stop)", self.every, self.start, self.ramp_stop)
    _base.check_window("RampThenHold", self.every, self.start, self.stop)
    if self.ramp_stop > self.stop:
      raise ValueError(f"RampThenHold: ramp_stop={self.ramp_stop} must not exceed stop={self.stop}.")
    if not self.power > 0:
      raise ValueError(f"RampThenHold: power={self.power!r} must be positive.")

  @property
  def ramps(self):
    return True

  def due(self, count):
    return _base.in_window(count, self.every, self.start, self.stop)

  def progress(self, count):
    return 1 - (1 - _base.window_fraction(count, self.every, self.start, self.ramp_stop)) ** self.power

  def elapsed(self, count):
    done = jnp.clip(jnp.asarray(count) - self.start, 0, self.stop - self.start)
    return done.astype(jnp.float32) / (self.stop - self.start)


@dataclasses.dataclass(frozen=True)
class Linear(_base.AbstractMaskSchedule):
  """Progress grows linearly from the first refresh to the last one in [start, stop)."""

  every: int
  stop: int
  start: int = 0

  def __post_init__(self):
    _base.check_window("Linear", self.every, self.start, self.stop)

  @property
  def ramps(self):
    return True

  def due(self, count):
    return _base.in_window(count, self.every, self.start, self.stop)

  def progress(self, count):
    return self.elapsed(count)

  def elapsed(self, count):
    return _base.window_fraction(count, self.every, self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class Cosine(_base.AbstractMaskSchedule):
  """Progress (1 - cos(pi tau)) / 2, slow at both ends, refreshed every `every` updates in [start, stop)."""

  every: int
  stop: int
  start: int = 0

  def __post_init__(self):
    _base.check_window("Cosine", self.every, self.start, self.stop)

  @property
  def ramps(self):
    return True

  def due(self, count):
    return _base.in_window(count, self.every, self.start, self.stop)

  def progress(self, count):
    tau = self.elapsed(count)
    return jnp.where(tau >= 1, jnp.float32(1), (1 - jnp.cos(jnp.pi * tau)) / 2)

  def elapsed(self, count):
    return _base.window_fraction(count, self.every, self.start, self.stop)
