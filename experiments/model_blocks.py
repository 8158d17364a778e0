"""A model that need not be in memory: blocks are read when they are asked for, and without their zeros once pruned."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import calibration

Block = dict[str, jax.Array]


class StreamedBlocks(Sequence):
  """Blocks that are read from a file whenever they are asked for, and not kept.

  Args:
    read: reads the block of an index.
    number: of blocks.
  """

  def __init__(self, read: Callable[[int], Block], number: int):
    self._read, self._number = read, number

  def __len__(self):
    return self._number

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self._read(i) for i in range(self._number)[index]]
    return self._read(range(self._number)[index])  # an IndexError past the end, by which iteration stops


class StreamedParams(Mapping):
  """Parameters of a model that are read from a file whenever they are asked for, and not kept.

  Args:
    read: reads a leaf outside of the blocks by its name.
    names: of those leaves.
    blocks: what "blocks" holds.
  """

  def __init__(self, read: Callable[[str], jax.Array], names: Sequence[str], blocks: Sequence[Block]):
    self._read, self._names, self._blocks = read, tuple(names), blocks

  def __len__(self):
    return len(self._names) + 1

  def __iter__(self):
    return iter((*self._names, "blocks"))

  def __getitem__(self, name):
    if name == "blocks":
      return self._blocks
    if name not in self._names:
      raise KeyError(name)
    return self._read(name)

  def with_blocks(self, blocks: Sequence[Block]) -> "StreamedParams":
    return StreamedParams(self._read, self._names, blocks)


class PrunedBlocks(Sequence):
  """The blocks of a model of which some are pruned, dense ones to whom asks for them.

  Where the dense blocks are streamed, pruned ones are held as their kept values and a bit for each place: at half of the
  weights, 0.53 of the dense block, with its masks. Otherwise both are held as they come.

  Args:
    dense: the blocks before pruning; this sequence holds those that are not pruned yet, and the caller should not.
  """

  def __init__(self, dense: Sequence[Block]):
    self._packs = isinstance(dense, StreamedBlocks)
    self._blocks = [None] * len(dense) if self._packs else list(dense)
    self._stream = dense if self._packs else None
    self._masks = [None] * len(dense)

  def __len__(self):
    return len(self._blocks)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(len(self))[index]]
    block = self._blocks[index]
    if block is None:
      return self._stream[index]
    return _unpacked(block) if self._packs else block

  @property
  def nbytes(self) -> int:
    """Bytes of what is held."""
    blocks = [leaf for block in self._blocks if block is not None for leaf in block.values()]
    return sum(leaf.nbytes for leaf in blocks) + sum(m.nbytes for masks in self._masks if masks for m in masks.values())

  def put(self, block: calibration.PrunedBlock) -> None:
    """Takes a pruned block in place of the dense one."""
    self._blocks[block.index] = _packed(block) if self._packs else block.params
    self._masks[block.index] = None if self._packs else block.masks

  def masks(self) -> Iterator[Block]:
    """The masks of each block by name, bool `[K, O]`, one block at a time.

    Raises:
      ValueError: a block has not been pruned.
    """
    for index, block in enumerate(self._blocks):
      if self._packs and block is not None:
        yield {name: jnp.asarray(leaf.mask()) for name, leaf in block.items() if isinstance(leaf, _Packed)}
      elif self._masks[index] is not None:
        yield self._masks[index]
      else:
        raise ValueError(f"Block {index} has not been pruned: it has no masks.")


def prunable(params: Mapping[str, Any]) -> Mapping[str, Any]:
  """The parameters with `PrunedBlocks`, which leave the given ones as they are."""
  blocks = PrunedBlocks(params["blocks"])
  return params.with_blocks(blocks) if isinstance(params, StreamedParams) else {**params, "blocks": blocks}


class _Packed:
  """A pruned matrix on the host: the values that are kept, and a bit for each place."""

  def __init__(self, weight: np.ndarray, mask: np.ndarray):
    self._shape, self._values, self._bits = weight.shape, weight[mask], np.packbits(mask)

  @property
  def nbytes(self) -> int:
    return self._values.nbytes + self._bits.nbytes

  def mask(self) -> np.ndarray:
    return np.unpackbits(self._bits, count=self._shape[0] * self._shape[1]).view(bool).reshape(self._shape)

  def dense(self) -> np.ndarray:
    out = np.zeros(self._shape, self._values.dtype)
    out[self.mask()] = self._values
    return out


def _packed(block: calibration.PrunedBlock) -> dict[str, Any]:
  masks = block.masks
  return {n: _Packed(np.asarray(w), np.asarray(masks[n])) if n in masks else w for n, w in block.params.items()}


def _unpacked(block: dict[str, Any]) -> Block:
  return {name: jnp.asarray(w.dense()) if isinstance(w, _Packed) else w for name, w in block.items()}
