"""flax.nnx models whose Linear layers multiply by sparse kernels."""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import optax

from jaxsparse import _compress
from jaxsparse import _tree
from jaxsparse import masks as masks_lib
from jaxsparse import ops
from jaxsparse.nn import _dot_general
from jaxsparse.structures import NM


class SparseParam(nnx.Param):
  """A parameter whose value is a sparse node; `[...]`, as `nnx.Linear` reads its kernel, gives it whole."""

  def get_value(self, *, index: Any = ..., **kwargs) -> Any:
    if index is not ...:
      raise TypeError("A sparse kernel cannot be indexed; take to_dense() of its value first.")
    return super().get_value(**kwargs)


def compress_linears(
  model: nnx.Module,
  masks: Any = None,
  *,
  structure: NM | None = None,
  layout: str | None = None,
  dtype: Any = None,
  implementation: str | None = None,
  on_mismatch: str = "report",
) -> _compress.CompressionReport:
  """Stores the kernels of a pruned model's `nnx.Linear` layers compressed, in place.

  The layers stay: each compressed one gets a `SparseParam` for its kernel, and `nm_dot_general` and `promote_dtype` injected
  where `nnx.Linear` takes them. Other layers, and Linear layers whose mask does not fit, are not touched.

  To fine-tune the kept values, take the parameters apart with `jaxsparse.arrays.partition` (positions do not train).

  Args:
    model: any `nnx.Module`, whose weights have been pruned.
    masks: masks like `nnx.state(model, nnx.Param)`, as `js.get_masks` gives them; None takes what is not 0.
    structure: `js.NM(n, m)` for all layers; None finds the smallest pattern for each, as in `js.compress`.
    layout: None stores `NMArray`s; "auto", "hopper" or "decode" packs them for the device, as `jaxsparse.ops.pack`.
    dtype: of the stored values; None keeps that of the kernel.
    implementation: of `jaxsparse.ops.nm_matmul`, for all layers; None takes the best for every call.
    on_mismatch: "report", or "error" for a masked Linear kernel that does not fit.

  Returns:
    A `CompressionReport` over all parameters.

  Raises:
    ValueError: the model has no `nnx.Linear`, none of them can be compressed, or masks are those of another model.
  """
  layers = {"/".join(map(str, path)): node for path, node in nnx.iter_modules(model) if type(node) is nnx.Linear}
  if not layers:
    raise ValueError("compress_linears: the model has no nnx.Linear layer.")
  state = nnx.state(model, nnx.Param)
  leaves = _tree.flatten(state)
  if masks is None:
    masks = masks_lib.masks_from_zeros(state)
  nodes = _tree.match(leaves, masks, "masks")
  kernels = {f"{name}/kernel" if name else "kernel": layer for name, layer in layers.items()}
  for layer in kernels.values():
    if layer.dot_general is not jax.lax.dot_general:
      raise ValueError(
        f"compress_linears: a Linear layer has a dot_general of its own, {layer.dot_general}; remove it."
      )
  ours = [node if name in kernels else optax.MaskedNode() for name, node in zip(leaves.names, nodes)]
  tree, report = _compress.compress(
    state, leaves.treedef.unflatten(ours), structure=structure, dtype=dtype, on_mismatch=on_mismatch, return_report=True
  )
  stored = dict(zip(leaves.names, jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, _compress.NMArray))))
  dot = _dot_general.nm_dot_general
  if implementation is not None:
    dot = functools.partial(dot, implementation=implementation)
  for leaf in report.leaves:
    if leaf.pattern is None:
      continue
    layer, node = kernels[leaf.name], stored[leaf.name]
    layer.kernel = SparseParam(node if layout is None else ops.pack(node, layout), **layer.kernel.get_metadata())
    layer.dot_general, layer.promote_dtype = dot, _dot_general.promote_dtype
  masked = {name for name, node in zip(leaves.names, nodes) if not _tree.is_masked_node(node)}
  explain = lambda leaf: leaf.name in masked and leaf.name not in kernels
  reason = "it is no kernel of an nnx.Linear."
  return _compress.CompressionReport(
    tuple(dataclasses.replace(leaf, reason=reason) if explain(leaf) else leaf for leaf in report.leaves)
  )
