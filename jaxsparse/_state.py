"""The state that an updater keeps in the optimizer state, and how to find and replace it there."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import _tree
from jaxsparse import masks as masks_lib


class SparsityState(NamedTuple):
  """What an updater remembers.

  Attributes:
    count: shape=(), int32: updates seen.
    key: shape=(2,), uint32: `jax.random.key_data` of a threefry key; folded with `count`, never changed.
    masks: tree like the parameters: bool (True = kept), `PackedMask`, `Positions` where only what is kept is stored, or
      `optax.MaskedNode()` where dense.
    drop_state, grow_state: tree like the parameters with the scorers' buffers, () when stateless.
    forward_state: () for every forward so far.
    inner_state: state of the wrapped optimizer.
    tag: {} or {name: ()}; a key is part of the tree, so it is static and every serialiser keeps it.
  """

  count: jax.Array
  key: jax.Array
  masks: Any
  drop_state: Any
  grow_state: Any
  forward_state: Any
  inner_state: optax.OptState
  tag: dict[str, tuple[()]]


def first(key: jax.Array, masks: Any, inner_state: optax.OptState, tag: str | None) -> SparsityState:
  """The state before the first update, with stateless scorers."""
  tags = {} if tag is None else {tag: ()}
  return SparsityState(jnp.zeros((), jnp.int32), key, masks, (), (), (), inner_state, tags)


def tag_name(state: SparsityState) -> str | None:
  """The `tag=` that was given to `wrap_optax`."""
  return next(iter(state.tag), None)


def get_sparsity_state(opt_state: Any, tag: str | None = None) -> SparsityState:
  """Finds the SparsityState inside any optimizer state.

  Args:
    opt_state: the state of `wrap_optax(...)`, also inside `optax.chain`, `MultiSteps`, `masked`, `partition`,
      `inject_hyperparams`, `apply_if_finite`, or the `opt_state` of an `nnx.Optimizer`.
    tag: the `tag=` that was given to `wrap_optax`, needed only where several updaters are in one optimizer.

  Returns:
    The state, with plain arrays as leaves.

  Raises:
    ValueError: if there is none, or several and `tag` does not single one out.
  """
  states = _find(opt_state, tag)
  if len(states) > 1:
    tags = [tag_name(s) for s in states]
    raise ValueError(
      f"The optimizer state holds {len(states)} sparsity states with tags {tags}: name one with tag=. "
      "(get_masks merges them where they cover different leaves.)"
    )
  return states[0]


def get_masks(opt_state: Any, tag: str | None = None) -> Any:
  """The masks inside any optimizer state: a tree like the parameters.

  Args:
    opt_state: as in `get_sparsity_state`.
    tag: only the masks of the updater with this tag.

  Returns:
    A tree with bool arrays (True = kept; packed masks are unpacked) and `optax.MaskedNode()` where a leaf is dense.
    Compact leaves have their `Positions`: a mask would be as large as the dense weight (`Positions.to_mask` makes one).
    Updaters over different leaves (`optax.partition`) are merged.

  Raises:
    ValueError: if there is no updater, two of them mask the same leaf, or masks have not been set yet.
  """
  states = _find(opt_state, tag)
  merged = functools.reduce(_merge, [s.masks for s in states])
  unpack = lambda node: node if _tree.is_masked_node(node) else masks_lib.unpack(require_set(node))
  return jax.tree.map(unpack, merged, is_leaf=_tree.is_mask_leaf)


def set_masks(opt_state: Any, masks: Any, tag: str | None = None) -> Any:
  """An optimizer state whose masks are the given ones.

  For training from masks found elsewhere: pruning at initialisation, iterative pruning with rewinding, a pruned
  checkpoint (`masks_from_zeros`). Apply them to the parameters with `Updater.sparse_params` before the first step.

  Args:
    opt_state: as in `get_sparsity_state`, before or during training.
    masks: tree like the parameters; bool, 0/1 integers or floats, as JAX, NumPy or CPU torch arrays. `None` or
      `optax.MaskedNode()` for dense leaves.
    tag: which updater, where there are several.

  Returns:
    `opt_state` with new masks, stored packed where they were packed.

  Raises:
    ValueError: for another tree, another shape, values other than 0 and 1, or a mask with zeros for a leaf that the
      updater leaves dense.
  """
  old = get_sparsity_state(opt_state, tag)
  paths, structure = jax.tree_util.tree_flatten_with_path(old.masks, is_leaf=_tree.is_mask_leaf)
  is_leaf = lambda m: m is None or _tree.is_mask_leaf(m) or hasattr(m, "detach")
  given = jax.tree_util.tree_flatten_with_path(masks, is_leaf=is_leaf)[0]
  if len(given) != len(paths):
    raise ValueError(
      f"masks has {len(given)} leaves, the optimizer state {len(paths)}: they belong to different models, or leaves are "
      f"missing (None stands for a dense one). {_tree.difference(given, paths, 'masks', 'the optimizer state')}"
    )
  new = [_replace("masks" + jax.tree_util.keystr(path), node, mask) for (path, node), (_, mask) in zip(paths, given)]
  state = old._replace(masks=structure.unflatten(new))

  def swap(node):
    if not isinstance(node, SparsityState) or not (tag is None or tag_name(node) == tag):
      return node
    # Put values back leaf by leaf: nnx keeps every array inside a variable of its own.
    nodes, treedef = jax.tree.flatten(node.masks, is_leaf=_tree.is_mask_leaf)
    del nodes
    return node._replace(masks=treedef.unflatten(_tree.mask_leaves(state.masks)))

  return jax.tree.map(swap, opt_state, is_leaf=lambda x: isinstance(x, SparsityState))


def require_state(state: Any) -> None:
  """ValueError for what is not the state of an updater, where `tx.update` needs it."""
  if not isinstance(state, SparsityState):
    raise ValueError(
      f"tx.update(grads, opt_state, params): opt_state must be what this optimizer's tx.init(params), or its last update, "
      f"returned, got {type(state).__name__}."
    )


def require_set(node: Any) -> Any:
  """The node, or an error where masks have to be given first."""
  if isinstance(node, masks_lib.UnsetMask):
    if node.structure is not None:
      raise ValueError(
        f"{node.owner} stores {node.structure!r}, and the optimizer state does not say where the values lie. Run "
        "`params, masks = updater.compact_init(...)`, then `opt_state = jaxsparse.set_masks(tx.init(params), masks)`."
      )
    raise ValueError(
      f"{node.owner} finds its masks before training. Run `pruned, masks = updater.instant_sparsify(params, "
      "loss_fn=..., batches=...)`, then `opt_state = jaxsparse.set_masks(tx.init(pruned), masks)`."
    )
  return node


def _merge(a: Any, b: Any, label: str = "params") -> Any:
  """One mask tree from two over different leaves; a MaskedNode may stand for a whole branch (`optax.partition`)."""
  if _tree.is_masked_node(a) or _tree.is_masked_node(b):
    return b if _tree.is_masked_node(a) else a
  if _tree.is_mask_leaf(a) and _tree.is_mask_leaf(b):
    raise ValueError(f"Two updaters mask {label} (shape {tuple(a.shape)}): name one of them with tag=.")
  (branches, structure), (others, other) = (
    jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y, x=x: y is not x) for x in (a, b)
  )
  if structure != other:
    raise ValueError("The optimizer state holds updaters over different models: name one with tag=.")
  return structure.unflatten(
    [_merge(x, y, label + jax.tree_util.keystr(path)) for (path, x), (_, y) in zip(branches, others, strict=True)]
  )


def _find(opt_state: Any, tag: str | None) -> list[SparsityState]:
  leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SparsityState))
  states = [_plain(x) for x in leaves if isinstance(x, SparsityState)]
  if not states:
    raise ValueError(
      "There is no SparsityState here. Pass the optimizer state of `updater.wrap_optax(...)` (for nnx: "
      "`optimizer.opt_state`), also inside chain, MultiSteps, masked, partition or inject_hyperparams."
    )
  if tag is not None:
    tags = [tag_name(s) for s in states]
    states = [s for s in states if tag_name(s) == tag]
    if not states:
      raise ValueError(f"No updater has the tag {tag!r}; there are {tags}.")
  return states


def _plain(state: SparsityState) -> SparsityState:
  """flax.nnx variables around arrays -> the arrays."""
  is_variable = lambda x: hasattr(x, "get_value") and hasattr(x, "set_value")
  return jax.tree.map(lambda x: x.get_value() if is_variable(x) else x, state, is_leaf=is_variable)


def _replace(label: str, node: Any, mask: Any) -> Any:
  """A given mask in the storage of the one it replaces."""
  if isinstance(mask, masks_lib.Positions) or getattr(node, "structure", None) is not None:
    return _replace_positions(label, node, mask)
  if _tree.is_masked_node(node):
    if mask is None or _tree.is_masked_node(mask) or bool(np.all(np.asarray(_tree.to_array(mask)) != 0)):
      return node
    raise ValueError(
      f"{label} removes weights of a leaf that the updater leaves dense: by a rule, or because "
      "its distribution gives the leaf no share of the sparsity (Uniform() gives every leaf the same)."
    )
  if mask is None or _tree.is_masked_node(mask):
    raise ValueError(f"{label} is missing: the updater sparsifies this leaf (shape {tuple(node.shape)}).")
  mask = masks_lib.unpack(mask) if isinstance(mask, masks_lib.PackedMask) else _tree.to_array(mask)
  if tuple(mask.shape) != tuple(node.shape):
    raise ValueError(f"{label} has shape {tuple(mask.shape)}, the leaf {tuple(node.shape)}.")
  if mask.dtype != bool:
    if not isinstance(mask, jax.core.Tracer) and not bool(np.all((np.asarray(mask) == 0) | (np.asarray(mask) == 1))):
      raise ValueError(f"{label} holds values other than 0 and 1; a mask is True (or 1) where a weight is kept.")
    mask = mask != 0
  mask = jnp.asarray(mask)
  packed = isinstance(node, masks_lib.PackedMask) or (isinstance(node, masks_lib.UnsetMask) and node.packed)
  return masks_lib.pack(mask) if packed else mask


def _replace_positions(label: str, node: Any, given: Any) -> Any:
  """Given Positions, where the leaf is stored compactly; values outside of tracing are looked at."""
  want = getattr(node, "structure", None)
  if want is None:
    raise ValueError(
      f"{label} is Positions, but the leaf is not stored compactly: a mask of shape {tuple(node.shape)} is needed."
    )
  if not isinstance(given, masks_lib.Positions):
    raise ValueError(f"{label} must be Positions of {want!r}, as compact_init gives them, got {type(given).__name__}.")
  if given.structure != want or tuple(given.shape) != tuple(node.shape):
    raise ValueError(
      f"{label} has Positions of {given.structure!r} for values of shape {tuple(given.shape)}, the leaf stores {want!r} in "
      f"shape {tuple(node.shape)}."
    )
  problem = "" if isinstance(given.indices, jax.core.Tracer) else given.problem()
  if problem:
    raise ValueError(f"{label}: {problem}")
  return given
