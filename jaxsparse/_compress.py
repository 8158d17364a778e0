"""The bridge from training to inference: parameters and masks in, sparse storage nodes out."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse import masks as masks_lib
from jaxsparse.arrays import BlockArray
from jaxsparse.arrays import NMArray
from jaxsparse.arrays import _nm_array
from jaxsparse.structures import Block
from jaxsparse.structures import NM
from jaxsparse.structures import Frames

# What masks are tried for when no structure is named: the one with the fewest bytes that holds the mask.
_PATTERNS = ((1, 16), (1, 8), (1, 4), (2, 8), (2, 4), (4, 8))


@dataclasses.dataclass(frozen=True)
class LeafReport:
  """What `compress` did with one leaf.

  Attributes:
    name: "mlp/kernel".
    shape: of the dense leaf.
    pattern: "2:4" or "64x64 blocks", or None where the leaf stays dense.
    reason: why it stays dense, "" where it does not.
    bytes_before, bytes_after: of the dense leaf, and of what took its place (its `nbytes`).
  """

  name: str
  shape: tuple[int, ...]
  pattern: str | None
  reason: str
  bytes_before: int
  bytes_after: int


@dataclasses.dataclass(frozen=True)
class CompressionReport:
  """What `compress` did, leaf by leaf; prints as a table.

  Attributes:
    leaves: one `LeafReport` for each leaf, in the order of the tree.
  """

  leaves: tuple[LeafReport, ...]

  @property
  def bytes_before(self) -> int:
    return sum(leaf.bytes_before for leaf in self.leaves)

  @property
  def bytes_after(self) -> int:
    return sum(leaf.bytes_after for leaf in self.leaves)

  def __str__(self):
    rows = [("leaf", "shape", "stored as", "bytes before", "after")]
    for leaf in self.leaves:
      stored = leaf.pattern or f"dense: {leaf.reason}"
      rows.append((leaf.name, str(leaf.shape), stored, str(leaf.bytes_before), str(leaf.bytes_after)))
    rows.append(("total", "", "", str(self.bytes_before), str(self.bytes_after)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def compress(
  params: Any,
  masks: Any,
  *,
  structure: NM | Frames | Block | None = None,
  dtype: Any = None,
  on_mismatch: str = "report",
  return_report: bool = False,
) -> Any:
  """Turns pruned weights into `NMArray` nodes where their masks are N:M, or `BlockArray` nodes where blocks are removed.

  N:M is along the reduction axis; that of a matmul kernel `[K, O]` is -2. Leaves without a mask (biases, embeddings that a rule left
  dense), convolution kernels and other ranks stay dense arrays; the report says why.

  Args:
    params: parameters: a tree of arrays, `nnx.State`, linen's parameter dictionary.
    masks: masks as `js.get_masks`, `updater.export` or `updater.instant_sparsify` give them: bool arrays, `PackedMask`,
      `optax.MaskedNode()` for dense leaves. Weights outside a mask are dropped, whatever they are.
    structure: the pattern to store. `js.NM(n, m)` (of `js.Frames`, the last one): its `stack_axes` say that leaves stack layers `[*S, K, O]`; it may not
      name another reduction axis. `js.Block((bk, bo))`: the blocks in which a mask keeps anything, of stacked
      layers (`stack_axes`) with room for as many as the fullest of them keeps. None: for each leaf, the smallest of 1:16, 1:8, 1:4, 2:8, 2:4, 4:8 that fits.
    dtype: of the stored values; None keeps that of the weight. Leaves that stay dense are not changed.
    on_mismatch: "report" leaves a masked leaf that does not fit dense; "error" raises.
    return_report: also return a `CompressionReport`.

  Returns:
    A tree with the containers of `params` and `NMArray` or `BlockArray` leaves; with `return_report=True`, (tree, report).

  Raises:
    ValueError: the trees differ, not a single leaf can be stored compressed (the message holds the report), or, with
      `on_mismatch="error"`, a masked leaf does not fit.
    TypeError: inside `jit` (masks must be looked at), or the structure is neither N:M nor blocks.

  >>> import jaxsparse as js
  >>> params = {"kernel": jnp.array([[1.0], [0.0], [0.0], [2.0]]), "bias": jnp.zeros(1)}
  >>> compress(params, js.masks_from_zeros(params), structure=js.NM(2, 4))["kernel"]
  NMArray(2:4, shape=(4, 1), dtype=float32)
  """
  structure = structure.last if isinstance(structure, Frames) else structure
  if structure is not None and not isinstance(structure, (NM, Block)):
    raise TypeError(
      f"compress stores N:M patterns and blocks; structure={structure!r} is neither. Use js.NM(n, m), js.Block((bk, bo)), "
      "or None."
    )
  if on_mismatch not in ("report", "error"):
    raise ValueError(f"on_mismatch={on_mismatch!r}; allowed are 'report' and 'error'.")
  leaves = _tree.flatten(params)
  nodes = _tree.match(leaves, masks, "masks")
  out, report = [], []
  for name, label, value, node in zip(leaves.names, leaves.labels, leaves.values, nodes):
    if _tree.is_masked_node(value):
      out.append(value)
      continue
    if isinstance(value, jax.core.Tracer) or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(node)):
      raise TypeError(f"{label}: compress looks at masks and so cannot run inside jit; call it once, outside.")
    stored, reason = _compress_leaf(label, value, node, structure, dtype)
    if reason and on_mismatch == "error" and not _tree.is_masked_node(node):
      raise ValueError(f"{label}: {reason} on_mismatch='report' leaves such a leaf dense.")
    out.append(stored)
    size = int(value.size * jnp.dtype(value.dtype).itemsize)
    pattern = None if reason else stored.pattern
    report.append(LeafReport(name, tuple(value.shape), pattern, reason, size, size if reason else stored.nbytes))
  report = CompressionReport(tuple(report))
  if not any(leaf.pattern for leaf in report.leaves):
    kind = "a block-sparse array" if isinstance(structure, Block) else "an N:M array"
    raise ValueError(f"compress: no leaf can be stored as {kind}.\n{report}")
  tree = leaves.treedef.unflatten(out)
  return (tree, report) if return_report else tree


def _compress_leaf(label, value, node, structure, dtype) -> tuple[Any, str]:
  """(NMArray or BlockArray, ""), or the leaf as it is and why."""
  if _tree.is_masked_node(node):
    return value, "it has no mask."
  stack = 0 if structure is None else len(structure.stack_axes)
  reason = _wrong_shape(value, structure, stack)
  if reason:
    return value, reason
  mask = jnp.asarray(masks_lib.unpack(node)).astype(bool)
  if isinstance(structure, Block):
    return _compress_blocks(label, value, mask, structure, dtype)
  candidates = [(structure.n, structure.m)] if structure is not None else _PATTERNS
  reason = ""
  for n, m in candidates:
    if value.shape[-2] % m:
      reason = f"axis -2 of shape {tuple(value.shape)} is not divisible by {m}."
      continue
    reason = _nm_array.group_problem(mask, n, m) or ""
    if not reason:
      weight = value if dtype is None else jnp.asarray(value).astype(dtype)
      return NMArray.from_dense(weight, n, m, mask, name=label), ""
  if structure is None:
    reason = "the mask is none of " + ", ".join(f"{n}:{m}" for n, m in _PATTERNS) + " along axis -2."
  return value, reason


def _compress_blocks(label, value, mask, structure, dtype) -> tuple[Any, str]:
  """A BlockArray, unless blocks do not tile the leaf or every block is kept; stacked layers have room for the fullest."""
  (bk, bo), (k, o) = structure.shape, value.shape[-2:]
  if k % bk or o % bo:
    return value, f"blocks of {bk}x{bo} do not tile shape {tuple(value.shape)}."
  weight = value if dtype is None else jnp.asarray(value).astype(dtype)
  stack, grid = value.shape[:-2], (k // bk, o // bo)
  kept = mask.reshape(-1, grid[0], bk, grid[1], bo).any((2, 4))
  count = int(kept.sum((1, 2)).max())
  if count == grid[0] * grid[1]:
    return value, f"its mask keeps something in every block of {bk}x{bo}."
  make = functools.partial(BlockArray.from_dense, block_shape=structure.shape, capacity=max(1, count), name=label)
  layers = [make(w, mask=m) for w, m in zip(jnp.reshape(weight, (-1, k, o)), jnp.reshape(mask, (-1, k, o)))]
  if not stack:
    return layers[0], ""
  return jax.tree.map(lambda *a: jnp.stack(a).reshape(*stack, *a[0].shape), *layers), ""


def _wrong_shape(value, structure, stack) -> str:
  """Why a leaf is no matmul kernel, or ""."""
  ndim = value.ndim
  if not jnp.issubdtype(value.dtype, jnp.floating):
    return f"its dtype is {value.dtype}."
  if ndim != 2 + stack:
    if ndim == 4 and not stack:
      return "it is a convolution kernel (HWIO); only matmul kernels [K, O] are stored compressed."
    named = f"{structure!r}" if stack else "a kernel [K, O]"
    hint = "" if stack or ndim < 3 else f" Layers stacked on leading axes: stack_axes={tuple(range(ndim - 2))}."
    return f"it has {ndim} dimensions, {named} {2 + stack}.{hint}"
  if isinstance(structure, NM) and structure.axis is not None:
    axes = structure.axis if isinstance(structure.axis, tuple) else (structure.axis,)
    if [a % 2 for a in axes] != [0] or not all(-2 <= a < 2 for a in axes):
      return f"{structure!r} prunes along another axis than the reduction axis of a kernel [K, O], -2."
  return ""
