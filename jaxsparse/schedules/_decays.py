"""How fast a share falls from 1 to 0: what removed weights still count for while a mask is closing."""

import abc
import dataclasses

import jax
import jax.numpy as jnp

from jaxsparse.schedules import _base


@dataclasses.dataclass(frozen=True)
class AbstractDecay(abc.ABC):
  """A share in [0, 1] as a function of the count of updates: 1 up to `start`, exactly 0 from `stop` on.

  Args:
    stop: the share is 0 from this count on.
    rate: how much an update takes, see the subclasses.
    start: it falls from this count on.
  """

  stop: int
  rate: float | None = None
  start: int = dataclasses.field(default=0, kw_only=True)

  def __post_init__(self):
    name = type(self).__name__
    _base.check_window(name, 1, self.start, self.stop)
    if self.rate is not None and not self.rate > 0:
      raise ValueError(f"{name}: rate={self.rate!r} must be positive.")

  def value(self, count: _base.Count) -> jax.Array:
    """shape=(), float32 in [0, 1]."""
    count = jnp.asarray(count)
    since = jnp.maximum(count - self.start, 0).astype(jnp.float32)
    return jnp.where(count >= self.stop, jnp.float32(0), self.share(since))

  @abc.abstractmethod
  def share(self, since: jax.Array) -> jax.Array:
    """The share `since` updates after `start`; shape=(), float32."""


@dataclasses.dataclass(frozen=True)
class LinearDecay(AbstractDecay):
  """max(0, 1 - rate (t - start)), and 0 from `stop` on.

  Args:
    stop: count from which the share is 0.
    rate: lost per update; None loses 1 / (stop - start), which ends at `stop`.
    start: count up to which the share is 1.

  >>> [float(LinearDecay(8, start=4).value(t)) for t in (0, 4, 5, 7, 8)]
  [1.0, 1.0, 0.75, 0.25, 0.0]
  """

  def share(self, since):
    rate = 1 / (self.stop - self.start) if self.rate is None else self.rate
    return jnp.maximum(1 - rate * since, 0)


@dataclasses.dataclass(frozen=True)
class ExponentialDecay(AbstractDecay):
  """exp(-rate (t - start)), and 0 from `stop` on.

  Args:
    stop: count from which the share is 0.
    rate: per update.
    start: count up to which the share is 1.

  >>> [round(float(ExponentialDecay(9, rate=0.5).value(t)), 3) for t in (0, 2, 8, 9)]
  [1.0, 0.368, 0.018, 0.0]
  """

  rate: float = 1e-4

  def share(self, since):
    return jnp.exp(-self.rate * since)
