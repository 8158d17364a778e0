"""`_hopper` for a few hundred rows of x: every tile at once, and clusters of blocks of threads that share its list.

So few rows make few tiles, which leave multiprocessors idle and end when the longest list does. Here the list of a tile is
cut in equal shares, one for each block of threads of a cluster. In the end they meet in distributed shared memory: each
sends its sums of every slice of the rows to the member that adds that slice up, in an order that is always the same. A
block of threads works on one tile: no counter says which comes next, and so none must be cleared by another kernel first.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxsparse.ops.block_matmul import _hopper_body as body
from jaxsparse.ops.block_matmul import _hopper_device as device
from jaxsparse.ops.block_matmul._hopper_tiles import div
from jaxsparse.ops.block_matmul._hopper_tiles import rem
from jaxsparse.ops.block_matmul._hopper_tiles import Tile


@dataclasses.dataclass(frozen=True)
class Launch(body.Launch):
  """As `_hopper_body.Launch`; `cluster` is 1, members of a cluster are `t.split_k`."""

  @property
  def threads(self) -> int:
    """Clusters."""
    tiles = self.lists * self.tiles_of_list * self.across
    return tiles if self.interpret is None else tiles * self.t.split_k

  @property
  def chunks(self) -> list[tuple[int, int]]:
    rows = self.t.tile_b // self.t.split_k if self.interpret is None else self.t.tile_b
    size = self.t.epilogue_n
    return [(start, min(size, rows - start)) for start in range(0, rows, size)]

  def scratch(self) -> dict[str, Any]:
    found = super().scratch()
    return {name: found[name] for name in found if name not in ("queue", "fetched", "taken")}


class Body(body.Body):
  """As `_hopper_body.Body`; refs have the plan's `whole` lists, and neither sums nor a counter."""

  def __init__(self, launch: Launch, refs: dict[str, Any], smem: dict[str, Any]):
    super().__init__(launch, refs, smem)
    self.index, self.member, split_k = lax.axis_index("block"), 0, launch.t.split_k
    if split_k > 1 and launch.interpret is None:
      self.member = lax.axis_index("member")
    elif split_k > 1:
      self.index, self.member = div(self.index, split_k), rem(self.index, split_k)
      self.refs = refs | dict(out=refs["out"].at[self.member])

  def walk(self, body, loads):
    """The tile of this block of threads."""
    del loads
    launch = self.launch
    at, b = div(self.index, launch.across), rem(self.index, launch.across)
    line = div(at, launch.tiles_of_list) * 3
    which, begin, end = (self.refs["whole"][line + i] for i in range(3))
    begin, end = (begin + div((end - begin) * (self.member + i), self.t.split_k) for i in range(2))
    body(
      0, Tile(which, rem(at, launch.tiles_of_list), b * self.t.tile_b, begin, end, 0, 0, 0), jnp.int32(0), lambda: None
    )

  def free_queue(self):
    """There is none."""

  drain_queue = free_queue

  def _finish(self, i, accumulator, at):
    if self.t.split_k > 1 and self.launch.interpret is None:
      exchange = device.exchange(self.t.tile_b, self.t.split_k, self.launch.row_transforms)
      accumulator = exchange(accumulator, self.smem["x_smem"])
      at = at._replace(b=at.b + self.member * (self.t.tile_b // self.t.split_k))
    self._store(i, accumulator, at)
