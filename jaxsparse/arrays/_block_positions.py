"""Where the blocks of a `BlockArray` lie."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsparse.arrays import _nm_array


class StaticPositions:
  """Positions as part of a type: equal, and of one hash, where the values are."""

  def __init__(self, rows: np.ndarray, cols: np.ndarray):
    self.rows, self.cols = rows, cols
    self._hash = hash((rows.tobytes(), cols.tobytes()))

  def __hash__(self):
    return self._hash

  def __eq__(self, other):
    return (
      isinstance(other, StaticPositions)
      and self._hash == other._hash
      and np.array_equal(self.rows, other.rows)
      and np.array_equal(self.cols, other.cols)
    )

  def __repr__(self):
    return f"Positions of {self.rows.size} blocks"


def positions_of(keep: Any, capacity: int | None, name: str = "mask") -> tuple[Any, Any]:
  """(rows, cols) of the blocks that are kept, sorted by column, then row, padded to the capacity.

  Args:
    keep: bool `[K / bk, O / bo]`.
    capacity: see `BlockArray.from_dense`.
    name: what errors call the weight.

  Returns:
    int32 `[N]` each, NumPy's where `keep` has values; what does not fit is lost where it is traced.

  Raises:
    ValueError: no capacity, or one that the kept blocks do not fit into.
  """
  if capacity is not None:
    capacity = check_capacity(capacity, name)
  if _nm_array.is_concrete(keep):
    kept = np.asarray(keep)
    cols, rows = np.nonzero(kept.T)
    size = max(1, cols.size) if capacity is None else capacity
    if cols.size > size:
      raise ValueError(
        f"{name} keeps {cols.size} blocks, which do not fit into capacity={capacity}; at least {cols.size} is needed."
      )
    pad = (0, size - cols.size)
    return np.pad(rows, pad).astype(np.int32), np.pad(cols, pad, constant_values=kept.shape[1]).astype(np.int32)
  if capacity is None:
    raise ValueError(
      f"{name}: inside jit the number of kept blocks is not known; say capacity=, the most there can be, or give the mask "
      "as a NumPy array."
    )
  block_rows, block_cols = keep.shape
  flat = jnp.nonzero(keep.T.reshape(-1), size=capacity, fill_value=block_rows * block_cols)[0].astype(jnp.int32)
  cols = flat // block_rows
  return jnp.where(cols < block_cols, flat % block_rows, 0), cols


def check_capacity(capacity: Any, name: str) -> int:
  """The capacity as an int; ValueError if it is no positive integer."""
  if isinstance(capacity, bool) or not isinstance(capacity, (int, np.integer)) or capacity < 1:
    raise ValueError(f"{name}: capacity={capacity!r}; a positive integer is needed, also where nothing is kept.")
  return int(capacity)


def check(rows: np.ndarray, cols: np.ndarray, grid: tuple[int, int]) -> None:
  """ValueError for a block outside of the grid, two in one place, or an order that is not by column, then row."""
  live = cols != grid[1]
  outside = live & ((rows < 0) | (rows >= grid[0]) | (cols < 0) | (cols > grid[1]))
  if outside.any():
    i = int(outside.argmax())
    raise ValueError(
      f"BlockArray: block {i} lies at row {rows[i]}, column {cols[i]}; the grid has {grid[0]} rows and {grid[1]} columns."
    )
  key = np.where(live, cols.astype(np.int64) * grid[0] + rows, np.int64(grid[0]) * grid[1])
  step = np.diff(key)
  # Only slots without a block may share a position.
  same = (step == 0) & live[1:]
  if same.any():
    i = int(same.argmax())
    raise ValueError(f"BlockArray: blocks {i} and {i + 1} overlap, both lie at row {rows[i]}, column {cols[i]}.")
  if (step < 0).any():
    i = int((step < 0).argmax())
    raise ValueError(
      f"BlockArray: positions are not sorted by column, then row: block {i} at ({rows[i]}, {cols[i]}) comes before block "
      f"{i + 1} at ({rows[i + 1]}, {cols[i + 1]}). BlockArray.from_blocks sorts them."
    )
