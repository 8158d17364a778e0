"""Blocks of threads that persist and take their tiles from a counter in device memory.

Whoever is done takes the next tile, as late as hides the time that this takes. The loading warpgroup takes it for all
warpgroups of its block of threads, or cluster of them, through a short queue in shared memory.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _hopper_device as device

_QUEUE = 4  # tiles that the loading warpgroup may be ahead of the others


def div(a, b):
  """a // b of an int32 that is not negative; `//` would add instructions for those that are."""
  return lax.div(a, jnp.int32(b))


def rem(a, b):
  """a % b, likewise."""
  return lax.rem(a, jnp.int32(b))


def scratch(barrier, multiplying: int) -> dict[str, Any]:
  """Shared memory and barriers of the queue, for so many warpgroups that multiply."""
  return dict(
    queue=mg.plgpu.SMEM((_QUEUE,), jnp.int32),
    fetched=barrier(num_arrivals=1, num_barriers=_QUEUE),
    taken=barrier(num_arrivals=multiplying + 1, num_barriers=_QUEUE),
  )


class Queue:
  """The tiles of a block of threads, while the kernel is traced; subclasses say what a tile is (`tile_of`).

  Args:
    launch: what is static: `threads` (blocks of threads, or clusters of them), `cluster` and `interpret`.
    refs: counter in device memory, and what `tile_of` needs.
    smem: what `scratch` asked for.
    work: how many tiles there are.
  """

  def __init__(self, launch: Any, refs: dict[str, Any], smem: dict[str, Any], work: Any):
    self.launch, self.refs, self.smem, self.work = launch, refs, smem, work
    self.warpgroup = lax.axis_index("warpgroup")
    # The first tiles are handed out by index, but not all clusters may run at once.
    self.base = 0 if launch.cluster > 1 else launch.threads

  def tile_of(self, item) -> Any:
    """The tile of this number."""
    raise NotImplementedError

  def arrive(self, barrier):
    if self.launch.cluster > 1:  # there, one thread signals for its warpgroup
      device.synchronize()()
    mg.plgpu.barrier_arrive(barrier)

  def walk(self, body, loads: bool, state: Any = None):
    """Runs `body(i, tile, state, publish) -> state` for all tiles; returns the last state.

    The state, such as a place in a ring of steps, is 0 at first unless it is given. Who loads calls `publish` in between: it takes the next tile for all warpgroups.
    """

    def one(carry):
      i, item, state = carry
      state = body(i, self.tile_of(item), state, lambda: self._publish(i, item))
      return i + 1, self._read(i), state

    start, item = jnp.int32(0), lax.axis_index("block")
    if self.launch.cluster > 1:
      if loads:
        self._publish(start, item)
      start, item = start + 1, self._read(start)
    state = jnp.int32(0) if state is None else state
    return lax.while_loop(lambda carry: carry[1] < self.work, one, (start, item, state))[2]

  def free_queue(self):
    for slot in range(_QUEUE):
      self.arrive(self.smem["taken"].at[slot])

  def drain_queue(self):
    for slot in range(_QUEUE):
      mg.plgpu.barrier_wait(self.smem["taken"].at[slot])

  def _publish(self, i, item):
    slot = rem(i, _QUEUE)
    place = self.smem["queue"].at[slot]
    mg.plgpu.barrier_wait(self.smem["taken"].at[slot])
    if self.launch.interpret is None:
      device.fetch(self.launch.cluster)(self.refs["counter"], place)
    else:
      self.smem["queue"][slot] = item + self.launch.threads - self.base
    self.arrive(self.smem["fetched"].at[slot])

  def _read(self, i):
    slot = rem(i, _QUEUE)
    mg.plgpu.barrier_wait(self.smem["fetched"].at[slot])
    item = self.smem["queue"][slot] + self.base
    self.arrive(self.smem["taken"].at[slot])
    return item
