"""What there is to report about masks: sparsity, overlap, churn, parameters, FLOPs and bytes."""

from collections.abc import Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import _state
from jaxsparse import _tree
from jaxsparse import masks as masks_lib


def summarize_sparsity(tree: Any, only_total: bool = False, params: Any = None) -> dict[str, jax.Array]:
  """Sparsity of every leaf and of the whole.

  Three totals are in use, and they differ. Of masks alone, the total is over the leaves that have one: leaves that a rule
  or the distribution keeps dense are left out, so where ERK makes a layer dense it lies above the `sparsity=` asked for.
  With `params=` it is over all parameters, biases too: what the model has lost. Of parameters alone, zeros are counted
  (JaxPruner's habit): initial zeros of biases count as removed, and so do freshly grown weights, which are kept.

  Args:
    tree: masks (from `get_masks`), or parameters. In masks, False counts; in parameters, zeros do.
    only_total: leave out the leaves.
    params: beside masks, the parameters: a leaf without a mask then counts as kept. A part of both trees will do, such
      as the kernels alone.

  Returns:
    "path/of/leaf" -> sparsity, and "_total_sparsity". Works under jit.

  >>> import jax.numpy as jnp
  >>> import optax
  >>> {k: float(v) for k, v in summarize_sparsity({"w": jnp.array([1., 0., 0., 0.])}).items()}
  {'w': 0.75, '_total_sparsity': 0.75}
  >>> masks = {"w": jnp.array([True, False, False, False]), "b": optax.MaskedNode()}
  >>> {k: float(v) for k, v in summarize_sparsity(masks, params={"w": jnp.ones(4), "b": jnp.zeros(2)}).items()}
  {'b': 0.0, 'w': 0.75, '_total_sparsity': 0.5}
  >>> float(summarize_sparsity({})["_total_sparsity"])
  0.0
  """
  leaves = _mask_leaves(tree)
  kept = {name: _count(leaf) for name, leaf in leaves.items()}
  sizes = {name: leaf.size for name, leaf in leaves.items()}
  if params is not None:
    every = _tree.flatten(params)
    _tree.match(every, tree, "masks")
    # Of a compact leaf the positions know how large the dense weight is.
    sizes = {n: leaf.size for n, leaf in zip(every.names, every.values) if not _tree.is_masked_node(leaf)} | sizes
    kept = {name: kept.get(name, jnp.float32(size)) for name, size in sizes.items()}
  size = sum(sizes.values())
  total = 1 - sum(kept.values(), jnp.float32(0)) / size if size else jnp.float32(0)  # No masks: nothing is removed.
  out = {} if only_total else {name: 1 - kept[name] / max(sizes[name], 1) for name in sizes}
  return out | {"_total_sparsity": total}


def summarize_intersection(masks_a: Any, masks_b: Any, only_total: bool = False) -> dict[str, jax.Array]:
  """Share of the entries kept in `masks_a` that are kept in `masks_b` too, for every leaf and in total.

  Args:
    masks_a, masks_b: masks or parameters of one model.
    only_total: leave out the leaves.

  Returns:
    "path/of/leaf" -> share in [0, 1], and "_total_intersection".
  """
  a, b = _pair(masks_a, masks_b, "summarize_intersection")
  both = {n: jnp.sum((a[n] != 0) & (b[n] != 0), dtype=jnp.float32) for n in a}
  kept = {n: jnp.sum(a[n] != 0, dtype=jnp.float32) for n in a}
  total = sum(both.values(), jnp.float32(0)) / jnp.maximum(sum(kept.values(), jnp.float32(0)), 1)
  out = {} if only_total else {n: both[n] / jnp.maximum(kept[n], 1) for n in a}
  return out | {"_total_intersection": total}


def mask_churn(old: Any, new: Any) -> jax.Array:
  """Sparse architecture divergence (SAD): how many mask bits differ between two mask trees; shape=(), float32."""
  a, b = _pair(old, new, "mask_churn")
  return sum((jnp.sum((a[n] != 0) != (b[n] != 0), dtype=jnp.float32) for n in a), jnp.float32(0))


def count_parameters(params: Any, masks: Any = None) -> int:
  """Parameters that are kept: the size of every leaf, or of its mask where there is one."""
  return int(sum(_kept(params, masks).values()))


def count_flops(params: Any, masks: Any = None, positions: Mapping[str, int] | None = None) -> int:
  """Floating-point operations of the matmuls and convolutions for one example: 2 x kept weights x positions.

  Args:
    params: parameters; leaves with fewer than two dimensions (biases, scales) are not counted.
    masks: masks, or None for the dense model.
    positions: regular expression -> how often the weights it matches are applied to one example (output height x width
      of a convolution, tokens of a sequence; 0 for embedding tables); 1 where nothing matches.

  Returns:
    An integer. It counts what a machine that skips every zero would do; wall-clock time is another matter.
  """
  shapes = {name: leaf.shape for name, leaf in zip(_tree.flatten(params).names, _tree.flatten(params).values)}

  def times(name):
    return next((n for pattern, n in (positions or {}).items() if re.search(pattern, name)), 1)

  return int(sum(2 * kept * times(name) for name, kept in _kept(params, masks).items() if len(shapes[name]) >= 2))


def mask_nbytes(masks: Any) -> int:
  """Bytes that a mask tree occupies as stored (pass `get_sparsity_state(opt_state).masks`)."""
  return int(sum(leaf.nbytes for leaf in jax.tree.leaves(masks)))


def _kept(params, masks) -> dict[str, int]:
  leaves = _tree.flatten(params)
  nodes = [None] * len(leaves.values) if masks is None else _tree.match(leaves, masks, "masks")
  return {
    name: int(value.size) if node is None or _tree.is_masked_node(node) else _exact_count(masks_lib.unpack(node))
    for name, value, node in zip(leaves.names, leaves.values, nodes)
  }


def _mask_leaves(tree: Any) -> dict[str, Any]:
  is_state = lambda node: isinstance(node, _state.SparsityState)
  if any(map(is_state, jax.tree.leaves(tree, is_leaf=is_state))):
    raise TypeError("This is an optimizer state, whose moments and counts are no masks: pass js.get_masks(opt_state).")
  paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_tree.is_mask_leaf)[0]
  return {
    _tree.leaf_name(path): node if isinstance(node, masks_lib.Positions) else _tree.to_array(masks_lib.unpack(node))
    for path, node in paths
    if not _tree.is_masked_node(node)
  }


def _pair(first: Any, second: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """Leaves of two mask trees of one model."""
  a, b = _mask_leaves(first), _mask_leaves(second)
  if a.keys() != b.keys():
    raise ValueError(f"{name}: the trees differ, only one of them has {sorted(a.keys() ^ b.keys())[:5]}.")
  _refuse_positions({**a, **b}, name)
  for leaf in a:
    if a[leaf].shape != b[leaf].shape:
      raise ValueError(f"{name}: {leaf} has shape {a[leaf].shape} in the one tree and {b[leaf].shape} in the other.")
  return a, b


def _count(leaf) -> jax.Array:
  if isinstance(leaf, masks_lib.Positions):
    return leaf.kept_units.astype(jnp.float32) * leaf.unit_size
  return jnp.sum(leaf != 0, dtype=jnp.float32)


def _exact_count(leaf) -> int:
  if isinstance(leaf, masks_lib.Positions):
    return int(leaf.kept_units) * leaf.unit_size
  return int(jnp.sum(leaf))


def _refuse_positions(leaves: dict[str, Any], name: str) -> None:
  for leaf, node in leaves.items():
    if isinstance(node, masks_lib.Positions):
      raise TypeError(
        f"{name}: {leaf} has Positions, whose mask would be as large as the dense weight; where that is small, pass "
        "Positions.to_mask()."
      )
