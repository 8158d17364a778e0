"""Parameters and masks side by side: flattening, and names of leaves."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Leaves(NamedTuple):
  """A flattened tree of parameters.

  Attributes:
    names: "mlp/kernel", what rules are matched against.
    labels: "params['mlp']['kernel']", what errors say.
    values: the leaves; `optax.MaskedNode()` where an outer `optax.masked` took one away.
    treedef: structure, to put as many values back with `treedef.unflatten`.
  """

  names: list[str]
  labels: list[str]
  values: list[Any]
  treedef: Any


# Not "anything with a dtype": flax.nnx variables have one, and are containers here.
_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def is_masked_node(x: Any) -> bool:
  """Whether this is where `optax.masked`, or an updater, leaves a leaf out."""
  return isinstance(x, optax.MaskedNode)


def is_mask_leaf(x: Any) -> bool:
  """Whether a node of a mask tree stands for one leaf of the parameters."""
  # masks.py imports this module; its node types are told by name to keep the imports one-way.
  return is_masked_node(x) or type(x).__name__ in ("PackedMask", "Positions", "UnsetMask") or isinstance(x, _ARRAYS)


def flatten(params: Any) -> Leaves:
  """Flattens parameters; leaves taken away by `optax.masked` or `optax.partition` stay in place as MaskedNode."""
  paths, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_masked_node)
  names = [leaf_name(path) for path, _ in paths]
  labels = ["params" + jax.tree_util.keystr(path) for path, _ in paths]
  return Leaves(names, labels, [value for _, value in paths], treedef)


def leaf_name(path: tuple[Any, ...]) -> str:
  """ "mlp/kernel"; the box that flax puts around an array (nnx variables, linen metadata) is not part of the name."""
  boxed = len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name in ("value", "raw_value")
  return jax.tree_util.keystr(path[:-1] if boxed else path, simple=True, separator="/")


def mask_leaves(masks: Any) -> list[Any]:
  """The nodes of a mask tree, one for each leaf of the parameters, in the same order."""
  return jax.tree.leaves(masks, is_leaf=is_mask_leaf)


def wider(a: Any, b: Any) -> Any:
  """The dtype that holds both, also where the user forbids implicit promotion: here it is explicit."""
  with jax.numpy_dtype_promotion("standard"):
    return jnp.promote_types(a, b)


def to_array(leaf: Any) -> Any:
  """Arrays pass; anything else that NumPy can read (lists, torch tensors on the CPU) becomes a NumPy array."""
  if isinstance(leaf, (jax.Array, np.ndarray)):
    return leaf
  if hasattr(leaf, "detach"):
    leaf = leaf.detach().cpu()
  return np.asarray(leaf)


def match(leaves: Leaves, other: Any, what: str) -> list[Any]:
  """The nodes of a mask tree beside the leaves of the parameters; ValueError where the trees differ.

  A MaskedNode may stand for a whole branch, as `optax.masked` and `optax.partition` make it from prefix trees.
  """
  paths = jax.tree_util.tree_flatten_with_path(other, is_leaf=is_mask_leaf)[0]
  if len(paths) != len(leaves.values):
    paths = _spread(leaves.names, paths)
  if len(paths) != len(leaves.values):
    parameters = jax.tree_util.tree_flatten_with_path(leaves.treedef.unflatten(leaves.values), is_leaf=is_masked_node)[
      0
    ]
    raise ValueError(
      f"The parameters have {len(leaves.values)} leaves, {what} {len(paths)}: they are different trees. "
      + difference(parameters, paths, "the parameters", what)
    )
  nodes = [node for _, node in paths]
  check_shapes(leaves, nodes, what)
  return nodes


def _spread(names: list[str], paths: list[Any]) -> list[Any]:
  """Repeats every MaskedNode for all leaves of the branch that it stands for."""
  out = []
  for path, node in paths:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    branch = [n for n in names if n.startswith(name + "/")] if is_masked_node(node) else []
    out += [(path, node)] * max(len(branch), 1)
  return out


def check_shapes(leaves: Leaves, nodes: Sequence[Any], what: str) -> None:
  """ValueError where a node's shape is not that of its leaf."""
  for label, value, node in zip(leaves.labels, leaves.values, nodes, strict=True):
    shape = getattr(node, "shape", None)
    if shape is not None and not is_masked_node(value) and tuple(shape) != tuple(value.shape):
      raise ValueError(
        f"{label} has shape {tuple(value.shape)}, but {what} {tuple(shape)}; both must come from the same model."
      )


def difference(paths: Sequence[Any], others: Sequence[Any], what: str, other: str) -> str:
  """What only one of two flattened trees has, for an error; `(path, leaf)` pairs and names of the trees."""
  a, b = ({leaf_name(path) for path, _ in side} for side in (paths, others))
  return f"Only in {what}: {_few(a - b)}; only in {other}: {_few(b - a)}."


def _few(names) -> str:
  names = sorted(names)
  return "nothing" if not names else ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
