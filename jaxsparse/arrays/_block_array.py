"""Block-sparse weights as they are stored: the kept blocks and where they lie."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.arrays import _block_positions
from jaxsparse.arrays import _nm_array

_FLOATS = ("bfloat16", "float16", "float32")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockArray:
  """A weight `[K, O]` of which whole blocks `bk x bo` are kept.

  Invariants, with N blocks of capacity on a grid of `K / bk` by `O / bo`:

  - `blocks[i]` is the dense tile at block row `rows[i]` and block column `cols[i]`; all other entries are 0.
  - Positions are sorted by column, then row (CSC), and no two are equal: a weight has one representation.
  - Slots that hold no block come last: their column is `O / bo`, one past the grid, and nothing reads their values.
    N is at least 1.

  Weights that `Updater.forward_params` hands out inside `jit` are the exception to the order: their blocks lie in the slots in
  which they are trained, and they carry a plan, so that products need no other order. One that a jitted function
  returns works in products, `to_dense` and `astype`; `from_blocks(w.blocks, w.rows, w.cols, w.shape)` gives the weight in
  the order above.

  Two forms. *Dynamic*: positions are arrays like any other, so that a mask may change, inside `jit` too, without
  compiling anew; N is the capacity. *Static*: positions are NumPy arrays that belong to the type; every function is
  compiled for one mask, what kernels derive from positions is computed while tracing, and `jax.grad` sees only the blocks.
  `freeze` and `thaw` turn one into the other.

  Layers may be stacked on leading axes of all arrays, with room for the same number of blocks in each (`js.compress` does it,
  or `jax.tree.map(jnp.stack, ...)`): to be run over with `jax.lax.scan` or `jax.vmap`, which hand out one layer at a time.

  The constructor checks the invariants and copies nothing; it looks at values only outside of tracing. Unflattening, as
  every JAX transformation does it, checks nothing. `blocks` can be trained; positions cannot
  (`jaxsparse.arrays.partition` takes them apart).

  Attributes:
    blocks: `[N, bk, bo]`, bfloat16, float16 or float32.
    rows: `[N]`, int32, block row of each block.
    cols: `[N]`, int32, block column of each block.
    plan: None, or what kernels derive from these positions (`js.ops.plan_blocks` adds it); of the dynamic form only. It goes
      with them: of an array with a plan replace the blocks alone, and make one with other positions anew.
    shape: (K, O), static.
    static: which form this is, static.
    positions: of the static form, as one hashable value; else None.

  Raises:
    ValueError, TypeError: for blocks or positions that break an invariant; the message names the first place.

  >>> w = BlockArray.from_dense(jnp.diag(jnp.arange(1.0, 5.0)), (2, 2))
  >>> w
  BlockArray(2 blocks of 2x2, shape=(4, 4), dtype=float32)
  >>> w.rows.tolist(), w.cols.tolist()
  ([0, 1], [0, 1])
  """

  blocks: jax.Array
  rows: Any
  cols: Any
  plan: Any = None
  shape: tuple[int, int] = dataclasses.field(kw_only=True)
  static: bool = dataclasses.field(default=False, kw_only=True)

  def __post_init__(self):
    object.__setattr__(self, "shape", _checked_shape(self.shape))
    if self.static:
      for name in ("rows", "cols"):
        object.__setattr__(self, name, _static_positions(getattr(self, name), name))
      object.__setattr__(self, "plan", None)
    object.__setattr__(
      self, "positions", _block_positions.StaticPositions(self.rows, self.cols) if self.static else None
    )
    check(self)

  def tree_flatten_with_keys(self):
    children, static = self.tree_flatten()
    return [
      (jax.tree_util.GetAttrKey(name), c) for name, c in zip(("blocks", "rows", "cols", "plan"), children)
    ], static

  def tree_flatten(self):
    if self.static:
      return (self.blocks,), (self.shape, self.positions)
    return (self.blocks, self.rows, self.cols, self.plan), (self.shape, None)

  @classmethod
  def tree_unflatten(cls, static, leaves) -> Self:
    # Leaves may be anything here (tracers, None, specs, object()): the constructor's checks would be in the way.
    self = object.__new__(cls)
    shape, positions = static
    if positions is not None:
      leaves = (*leaves, positions.rows, positions.cols, None)
    for name, leaf in zip(("blocks", "rows", "cols", "plan"), leaves, strict=True):
      object.__setattr__(self, name, leaf)
    object.__setattr__(self, "shape", shape)
    object.__setattr__(self, "static", positions is not None)
    object.__setattr__(self, "positions", positions)
    return self

  @property
  def ndim(self) -> int:
    """2, and the axes on which layers are stacked."""
    return len(self.blocks.shape) - 1

  @property
  def dtype(self) -> Any:
    return jnp.dtype(self.blocks.dtype)

  @property
  def block_shape(self) -> tuple[int, int]:
    """(bk, bo)."""
    return tuple(self.blocks.shape[-2:])

  @property
  def grid(self) -> tuple[int, int]:
    """Block rows and block columns of the dense weight."""
    (k, o), (bk, bo) = self.shape, self.block_shape
    return k // bk, o // bo

  @property
  def capacity(self) -> int:
    """Blocks that there is room for, N (in each layer)."""
    return self.blocks.shape[-3]

  @property
  def count(self) -> Any:
    """Blocks that are kept, at most the capacity: int32, one for each layer; an int in the static form."""
    if self.static:
      return int((self.cols < self.grid[1]).sum())
    return (self.cols < self.grid[1]).sum(-1, dtype=jnp.int32)

  @property
  def density(self) -> float:
    """Capacity relative to all blocks of the dense weight: what a product costs at most."""
    return self.capacity / max(1, self.grid[0] * self.grid[1])

  @property
  def pattern(self) -> str:
    """ "64x64 blocks"."""
    return "{}x{} blocks".format(*self.block_shape)

  @property
  def nbytes(self) -> int:
    """Bytes of the blocks and their positions, without a plan."""
    return int(np.prod(self.blocks.shape)) * self.dtype.itemsize + 8 * int(np.prod(self.blocks.shape[:-2]))

  def __repr__(self):
    try:
      form = ", static" if self.static else ""
      sizes = "{}x{}".format(*self.block_shape)
      stack = "".join(f"{n} x " for n in self.blocks.shape[:-3])
      return f"BlockArray({stack}{self.capacity} blocks of {sizes}, shape={self.shape}, dtype={self.dtype}{form})"
    except (AttributeError, TypeError, ValueError):  # Leaves that are no arrays, between flattening and unflattening.
      return f"BlockArray({self.blocks!r}, {self.rows!r}, {self.cols!r}, shape={self.shape})"

  @classmethod
  def from_dense(
    cls,
    w: Any,
    block_shape: tuple[int, int],
    mask: Any = None,
    *,
    capacity: int | None = None,
    static: bool = False,
    name: str = "w",
  ) -> Self:
    """Keeps the blocks of a dense weight that hold anything, or that a mask names.

    Args:
      w: `[K, O]`, floating point.
      block_shape: (bk, bo); they divide K and O.
      mask: bool (or 0/1), True = kept, for every entry `[K, O]` or for every block `[K / bk, O / bo]`. A block is kept
        where any of its entries is; entries outside the mask are taken as 0 whatever they are. None: what is not 0.
      capacity: room for this many blocks; needed inside `jit` unless the mask is a NumPy array. None: as many as are kept.
      static: the form, see `BlockArray`; inside `jit` it needs such a mask.
      name: what errors call the weight.

    Returns:
      A BlockArray of w's dtype; `to_dense` gives back `where(mask, w, 0)`, bit for bit.

    Raises:
      ValueError: blocks do not tile w, shapes differ, or more blocks are kept than there is room for. Inside `jit` that
        cannot be seen: the last blocks are lost (`js.ops.masked_block_matmul` computes the dense product then).
      TypeError: w is not bfloat16, float16 or float32.
    """
    w = jnp.asarray(w)
    (bk, bo), grid = check_tiling(w.shape, block_shape, name)
    _check_float(w.dtype, name)
    tiles = w.reshape(grid[0], bk, grid[1], bo).transpose(0, 2, 1, 3)
    if mask is None:
      keep = (tiles != 0).any((2, 3))
    else:
      # NumPy's stays NumPy's, and so is known while tracing.
      mask = (mask if isinstance(mask, jax.Array) else np.asarray(mask)).astype(bool)
      if mask.shape == w.shape and (bk, bo) != (1, 1):
        mask = mask.reshape(grid[0], bk, grid[1], bo).transpose(0, 2, 1, 3)
        tiles, keep = jnp.where(mask, tiles, 0), mask.any((2, 3))
      elif mask.shape == grid:
        keep = mask
      else:
        raise ValueError(
          f"{name} has shape {w.shape}, its mask {mask.shape}; allowed are {w.shape}, one for each entry, and {grid}, one "
          f"for each block of {bk}x{bo}."
        )
    rows, cols = _block_positions.positions_of(keep, capacity, name)
    picked = tiles[jnp.asarray(rows), jnp.minimum(jnp.asarray(cols), grid[1] - 1)]
    blocks = jnp.where(jnp.asarray(cols < grid[1])[:, None, None], picked, 0)
    return cls(blocks, *((rows, cols) if static else map(jnp.asarray, (rows, cols))), shape=w.shape, static=static)

  @classmethod
  def from_blocks(
    cls, blocks: Any, rows: Any, cols: Any, shape: tuple[int, int], *, capacity: int | None = None, static: bool = False
  ) -> Self:
    """Blocks at given positions, in any order.

    Args:
      blocks: `[N, bk, bo]`, floating point.
      rows: `[N]`, block rows.
      cols: `[N]`, block columns; `O / bo` for slots that hold nothing.
      shape: (K, O).
      capacity: room for this many blocks, at least N; None: N.
      static: the form, see `BlockArray`.

    Raises:
      ValueError: as the constructor; also if there is room for fewer than N blocks.
    """
    blocks, shape = jnp.asarray(blocks), _checked_shape(shape)
    # NumPy's stay NumPy's, and so are known while tracing.
    rows, cols = (a if isinstance(a, jax.Array) else np.asarray(a) for a in (rows, cols))
    xp = np if all(isinstance(a, np.ndarray) for a in (rows, cols)) else jnp
    for name, a in (("rows", rows), ("cols", cols)):
      if a.ndim != 1 or blocks.ndim != 3 or a.shape != blocks.shape[:1] or not jnp.issubdtype(a.dtype, jnp.integer):
        raise ValueError(
          f"BlockArray: {name} is {a.dtype}{list(a.shape)} for blocks of shape {blocks.shape}; allowed are integers [N] "
          "for blocks [N, bk, bo]."
        )
    order = xp.lexsort((rows, cols))
    extra = 0 if capacity is None else _block_positions.check_capacity(capacity, "BlockArray") - blocks.shape[0]
    if extra < 0:
      raise ValueError(f"BlockArray: {blocks.shape[0]} blocks do not fit into capacity={capacity}.")
    outside = shape[1] // blocks.shape[2] if blocks.shape[2] else 0
    rows = xp.pad(rows[order].astype(np.int32), (0, extra))
    cols = xp.pad(cols[order].astype(np.int32), (0, extra), constant_values=outside)
    blocks = jnp.pad(blocks[order], ((0, extra), (0, 0), (0, 0)))
    return cls(blocks, *((rows, cols) if static else map(jnp.asarray, (rows, cols))), shape=shape, static=static)

  def to_dense(self, dtype: Any = None) -> jax.Array:
    """The dense weight, `[K, O]` (`[*S, K, O]` of stacked layers), of `dtype`, or of the blocks' dtype."""
    if self.ndim > 2:
      return jax.vmap(lambda w: w.to_dense(dtype))(self)
    (bk, bo), grid = self.block_shape, self.grid
    dense = jnp.zeros((*grid, bk, bo), self.dtype)
    # Slots without a block lie outside of the grid and are dropped.
    dense = dense.at[self.rows, self.cols].set(self.blocks, mode="drop")
    return dense.transpose(0, 2, 1, 3).reshape(self.shape).astype(self.dtype if dtype is None else dtype)

  def astype(self, dtype: Any) -> Self:
    """The same weight with blocks of another floating-point dtype."""
    _check_float(jnp.dtype(dtype), "BlockArray.astype")
    (blocks, *rest), static = self.tree_flatten()
    # Past the constructor: positions are those there were, in the order of slots where a jitted function returned them.
    return self.tree_unflatten(static, (blocks.astype(dtype), *rest))

  def freeze(self) -> Self:
    """The static form: positions become part of the type. They must have values, so not inside `jit`."""
    return dataclasses.replace(self, static=True)

  def thaw(self) -> Self:
    """The dynamic form: positions become arrays."""
    if not self.static:
      return self
    return dataclasses.replace(self, rows=jnp.asarray(self.rows), cols=jnp.asarray(self.cols), static=False)


def check(w: BlockArray) -> None:
  """The invariants of `BlockArray`: ValueError or TypeError that names the field and the first place."""
  for name in ("blocks", "rows", "cols"):
    if not hasattr(getattr(w, name), "shape"):
      raise TypeError(f"BlockArray: {name} must be an array, got {type(getattr(w, name)).__name__}.")
  if len(w.blocks.shape) != 3:
    hint = " Take stacked layers one at a time, with jax.lax.scan or jax.vmap." if len(w.blocks.shape) > 3 else ""
    raise ValueError(f"BlockArray: blocks has shape {tuple(w.blocks.shape)}; allowed is [N, bk, bo].{hint}")
  _check_float(w.blocks.dtype, "BlockArray: blocks")
  if w.blocks.shape[0] < 1:
    raise ValueError(
      "BlockArray: capacity 0; a weight without blocks keeps one empty slot, whose column is O / bo "
      "(from_blocks(..., capacity=1) makes it)."
    )
  _, grid = check_tiling(w.shape, w.block_shape, "BlockArray")
  for name in ("rows", "cols"):
    value = getattr(w, name)
    if tuple(value.shape) != (w.capacity,) or jnp.dtype(value.dtype) != jnp.int32:
      raise ValueError(
        f"BlockArray: {name} is {value.dtype}{list(value.shape)}; int32 [{w.capacity}] is needed, one for each block."
      )
  if _nm_array.is_concrete(w.rows) and _nm_array.is_concrete(w.cols):
    _block_positions.check(np.asarray(w.rows), np.asarray(w.cols), grid)


def _checked_shape(shape: Any) -> tuple[int, int]:
  if not (
    isinstance(shape, (tuple, list)) and len(shape) == 2 and all(isinstance(s, (int, np.integer)) for s in shape)
  ):
    raise ValueError(f"BlockArray: shape={shape!r}; two integers (K, O), of the dense weight, are needed.")
  return tuple(map(int, shape))


def _static_positions(value: Any, name: str) -> np.ndarray:
  if not _nm_array.is_concrete(value):
    raise TypeError(
      f"BlockArray: static=True needs {name} as an array with values that are known while tracing, got {value}. Inside jit "
      "give NumPy arrays."
    )
  value = np.asarray(value)
  # Another width is no error here; other numbers, and what would wrap around, are left for `check` to name.
  if value.dtype.kind in "iu" and (value.astype(np.int32) == value).all():
    return value.astype(np.int32)
  return value


def check_tiling(shape: tuple[int, ...], block_shape: Any, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
  """((bk, bo), grid); ValueError if blocks do not tile the shape."""
  block = tuple(block_shape) if isinstance(block_shape, (tuple, list)) else block_shape
  if not (
    isinstance(block, tuple) and len(block) == 2 and all(isinstance(b, (int, np.integer)) and b > 0 for b in block)
  ):
    raise ValueError(f"{name}: block_shape={block_shape!r}; two positive integers (bk, bo) are needed.")
  if len(shape) != 2 or shape[0] % block[0] or shape[1] % block[1] or min(shape) < 1:
    raise ValueError(
      f"{name} has shape {tuple(shape)}; blocks of {block[0]}x{block[1]} need two axes [K, O] divisible by them. "
      "Pad the weight, or leave it dense."
    )
  return block, (shape[0] // block[0], shape[1] // block[1])


def _check_float(dtype: Any, name: str) -> None:
  if jnp.dtype(dtype).name not in _FLOATS:
    raise TypeError(f"{name} is {jnp.dtype(dtype).name}; allowed are {', '.join(_FLOATS)}.")
