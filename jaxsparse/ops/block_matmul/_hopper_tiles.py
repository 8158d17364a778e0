"""Which tile of the block-sparse matmul a block of threads works on next, and where parts of a list leave their sums.

Blocks of threads persist and take their tiles from a counter, in the order of the plan: stripes along B, in each of which
all parts of lists come, longest first. What runs at a time then shares x in the L2 cache. The long tiles of the last stripes
come before the short ones of these, as many stripes as are done while one works on the longest tile: nobody begins it last.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.block_matmul import _tile_queue
from jaxsparse.ops.block_matmul import tuning as tunings
from jaxsparse.ops.block_matmul._hopper_device import ROWS
from jaxsparse.ops.block_matmul._tile_queue import div
from jaxsparse.ops.block_matmul._tile_queue import rem

WARPGROUPS = 2  # that multiply
WRITTEN = 3  # what is added to a flag until there are sums and somebody to add them
_AHEAD = 128  # of the sum are left to be loaded when the next tile is taken


class Tile(NamedTuple):
  """One tile, or the part of one.

  Attributes:
    which: list.
    sub: which 128 outputs of the list.
    b: first row of x.
    begin, end: its entries.
    index, parts: which part of its list this is, of how many.
    place: of the first of their sums.
  """

  which: Any
  sub: Any
  b: Any
  begin: Any
  end: Any
  index: Any
  parts: Any
  place: Any


@dataclasses.dataclass(frozen=True)
class Grid:
  """What is static of the tiles.

  Attributes:
    t: how the product is cut.
    batch: rows of x.
    lists: of blocks, in the plan.
    extra: how many parts of lists there may be beside them.
    size: of a block along the result.
    cluster: neighbours along B that form a cluster; what one loads of w all of them get.
    processors: blocks of threads that run at once.
  """

  t: tunings.Tuning
  batch: int
  lists: int
  extra: int
  size: int
  cluster: int
  processors: int

  @property
  def tiles_of_list(self) -> int:
    return max(1, self.size // tunings.TILE)

  @property
  def across(self) -> int:
    """Tiles along B, or clusters of them."""
    return -(-self.batch // (self.t.tile_b * self.cluster))

  @property
  def threads(self) -> int:
    """Blocks of threads, or clusters of them."""
    return min(self.lists * self.tiles_of_list * self.across, self.processors // self.cluster)

  @property
  def sums(self) -> tuple[int, int, int]:
    """Shape of what parts of lists leave behind, in float32."""
    places = self.extra * self.turns * self.tiles_of_list
    return places, WARPGROUPS, ROWS * self.t.tile_b

  @property
  def tail(self) -> int:
    """At most so many tiles along B, or clusters of them, are visited together at the end."""
    return min(self.across, max(1, self.t.tail // self.cluster))

  @property
  def turns(self) -> int:
    """After so many tiles along B, a place for sums is used again: those of the tail have places of their own."""
    return self.tail * self.cluster

  @property
  def counters(self) -> int:
    """One from which tiles are taken, and one for every sum that says whose turn it is."""
    return 1 + self.sums[0] * WARPGROUPS

  @property
  def ahead(self) -> int:
    """Entries of a list that are left to be loaded when the next tile is taken."""
    return max(1, _AHEAD // self.depth)


class Tiles(_tile_queue.Queue):
  """The tiles of a block of threads, while the kernel is traced; arguments as for `_hopper_body.Body`."""

  def __init__(self, launch: Grid, refs: dict[str, Any], smem: dict[str, Any]):
    self.t, self.live = launch.t, refs["parts"][0]
    super().__init__(launch, refs, smem, self.live * (launch.tiles_of_list * launch.across))
    self.heavy = refs["parts"][1] * launch.tiles_of_list
    at_once = launch.cluster * launch.tiles_of_list
    self.tail = jnp.clip(div(refs["parts"][2] + at_once - 1, at_once), 1, launch.tail)

  def tile_of(self, item) -> Tile:
    launch, across = self.launch, self.launch.across
    groups = self.live * launch.tiles_of_list
    # All tiles of the first stripes, then long ones of the last stripes, then all others of these.
    first, heavy = across - self.tail, self.heavy
    late, burst = item - first * groups, self.tail * heavy
    early, light = late < 0, late >= burst
    size = jnp.where(early, groups, jnp.where(light, groups - heavy, heavy))
    item = jnp.where(early, item, jnp.where(light, late - burst, late))
    b = div(item, size)  # the only division: it takes its time in every tile
    at = item - b * size + jnp.where(light, heavy, 0)
    b = b + jnp.where(early, 0, first)
    if launch.cluster > 1:
      b = b * launch.cluster + lax.axis_index("member")
    part = _plan.HEADER + div(at, launch.tiles_of_list) * _plan.PART
    which, begin, end, index, parts, place = (self.refs["parts"][part + j] for j in range(_plan.PART))
    return Tile(which, rem(at, launch.tiles_of_list), b * self.t.tile_b, begin, end, index, parts, place)

  def sums_of(self, at: Tile, place):
    """Where two parts meet: their sums, the flag, and what that is when the place is free.

    Both add 1 when they come, and 1 when they have written, or read. Whoever waits for it waits for parts that were
    handed out earlier, so that somebody always goes on.
    """
    launch, b = self.launch, div(at.b, self.t.tile_b)
    place = place * launch.turns + rem(b, launch.turns)
    index = place * launch.tiles_of_list + at.sub
    flag = self.refs["counter"].at[1 + index * WARPGROUPS + self.warpgroup]
    return self.refs["sums"].at[index, self.warpgroup], flag, 4 * div(b, launch.turns)
