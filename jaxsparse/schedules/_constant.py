"""Schedules at a constant sparsity: periodic, alternating, static."""

import dataclasses

import jax.numpy as jnp

from jaxsparse.schedules import _base


@dataclasses.dataclass(frozen=True)
class Periodic(_base.AbstractMaskSchedule):
  """Refreshes every `every` updates in [start, stop), at the final sparsity throughout.

  Args:
    every: updates between refreshes.
    stop: refreshes end before this count; None refreshes for ever.
    start: count of the first refresh.
    event: counts start at this event of the inner optimizer, see `AbstractMaskSchedule`.

  Raises:
    ValueError: stop <= start, every < 1 or start < 0.
  """

  every: int = 1
  stop: int | None = None
  start: int = 0
  event: str | None = None

  def __post_init__(self):
    _base.check_window("Periodic", self.every, self.start, self.stop)

  def due(self, count):
    return _base.in_window(count, self.every, self.start, self.stop)

  def progress(self, count):
    return (jnp.asarray(count) >= self.start).astype(jnp.float32)

  def elapsed(self, count):
    if self.stop is None:
      return jnp.zeros((), jnp.float32)
    return _base.time_share(count, self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class Alternating(_base.AbstractMaskSchedule):
  """Turns of sparse and dense training; the last turn, from the last switch on, is sparse.

  The masks close at `start`, open `sparse_steps` later, close again `dense_steps` after that, and so on; whole turns
  only fit before `stop`, and the switch that follows the last of them closes the masks for good.

  Args:
    sparse_steps: updates in a sparse turn.
    dense_steps: updates in a dense turn.
    stop: no dense turn ends after this count.
    start: count of the first switch to sparse.

  Raises:
    ValueError: stop <= start, or a turn shorter than one update.

  References:
    Peste et al., AC/DC, 2021, https://arxiv.org/abs/2106.12379.
  """

  sparse_steps: int
  dense_steps: int
  stop: int
  start: int = 0

  def __post_init__(self):
    _base.check_window("Alternating (sparse_steps)", self.sparse_steps, self.start, self.stop)
    _base.check_window("Alternating (dense_steps)", self.dense_steps, self.start, self.stop)

  @property
  def _last(self) -> int:
    turn = self.sparse_steps + self.dense_steps
    return self.start + (self.stop - self.start) // turn * turn

  def due(self, count):
    count = jnp.asarray(count)
    within = (count - self.start) % (self.sparse_steps + self.dense_steps)
    switches = (within == 0) | (within == self.sparse_steps)
    return (count >= self.start) & (count <= self._last) & switches

  def progress(self, count):
    count = jnp.asarray(count)
    within = (count - self.start) % (self.sparse_steps + self.dense_steps)
    sparse = (count >= self._last) | ((count >= self.start) & (within < self.sparse_steps))
    return sparse.astype(jnp.float32)

  def elapsed(self, count):
    return _base.time_share(count, self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class Static(_base.AbstractMaskSchedule):
  """No refresh: the masks are those of the start."""

  def due(self, count):
    return jnp.zeros((), bool)

  def progress(self, count):
    return jnp.ones((), jnp.float32)

  def elapsed(self, count):
    return jnp.zeros((), jnp.float32)

  @property
  def refreshes(self):
    return False
