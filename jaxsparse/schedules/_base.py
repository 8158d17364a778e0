"""When masks are chosen anew, and how far towards the final sparsity."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

Count = jax.Array | int


@dataclasses.dataclass(frozen=True)
class AbstractMaskSchedule(abc.ABC):
  """Says at which counts of updates the masks are refreshed, and the progress towards the final sparsity there.

  `count` is the number of updates seen before the current one: 0 in the first call of `tx.update`. Progress is 0 at
  the initial sparsity and exactly 1 at the last refresh, so the final sparsity is reached whatever `every` is.

  Masks interpolate the number of removed units of a leaf between its first and last count, rounded down: exact at both
  ends, and in between within one unit (and float32's rounding of the progress) of `floor(units * sparsity_t)`.

  `event` names an entry of the inner optimizer's state that holds the count of an update in which something happened,
  -1 before that (STEP's `frozen_at`). The schedule then counts from there: 0 in that very update, -1 before it.
  """

  event: ClassVar[str | None] = None

  @abc.abstractmethod
  def due(self, count: Count) -> jax.Array:
    """shape=(), bool: whether the masks are refreshed in the update with this count."""

  @abc.abstractmethod
  def progress(self, count: Count) -> jax.Array:
    """shape=(), float32 in [0, 1]: how far the sparsity has come by this count."""

  @abc.abstractmethod
  def elapsed(self, count: Count) -> jax.Array:
    """shape=(), float32 in [0, 1]: the share of the schedule's time that has passed (for decaying drop fractions)."""

  @property
  def ramps(self) -> bool:
    """Whether the sparsity grows over the schedule; otherwise sparse-from-the-start methods begin at the final one."""
    return False

  @property
  def refreshes(self) -> bool:
    """Whether there is any refresh at all."""
    return True


def check_window(name: str, every: int, start: int, stop: int | None) -> None:
  """Errors for a refresh window [start, stop) that can never work."""
  for label, value in (("every", every), ("start", start), ("stop", stop)):
    if value is not None and (isinstance(value, bool) or int(value) != value):
      raise ValueError(f"{name}: {label}={value!r} must be an integer number of updates.")
  if every < 1:
    raise ValueError(f"{name}: every={every} must be at least 1.")
  if start < 0:
    raise ValueError(f"{name}: start={start} must be at least 0.")
  if stop is not None and stop <= start:
    raise ValueError(f"{name}: stop={stop} must be greater than start={start}; masks are refreshed in [start, stop).")


def in_window(count: Count, every: int, start: int, stop: int | None) -> jax.Array:
  """Whether a refresh falls on this count: start, start + every, ... below stop."""
  count = jnp.asarray(count)
  due = (count >= start) & ((count - start) % every == 0)
  return due if stop is None else due & (count < stop)


def time_share(count: Count, start: int, stop: int) -> jax.Array:
  """The share of [start, stop) that has passed; shape=(), float32 in [0, 1]."""
  return jnp.clip(jnp.asarray(count) - start, 0, stop - start).astype(jnp.float32) / (stop - start)


def window_fraction(count: Count, every: int, start: int, stop: int) -> jax.Array:
  """Position of a count between the first refresh (0) and the last one below stop (exactly 1)."""
  last = start + (stop - 1 - start) // every * every
  count = jnp.asarray(count)
  if last == start:
    return (count >= start).astype(jnp.float32)
  done = jnp.clip(count - start, 0, last - start).astype(jnp.float32)
  return jnp.where(count >= last, jnp.float32(1), done / (last - start))
