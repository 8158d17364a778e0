"""Block after block through a model: sum up what its linear layers are fed with, prune them, go on to the next block.

The model is a list of parameter trees and a function that applies one of them:

    apply_block(params, hidden, product) -> hidden

with `product(x, w)` for every linear layer: `x @ w` for a dense weight, or for a tuple of weights that share the input x,
whose results come side by side. While statistics are collected, the weights in `params` are stand-ins that carry their
name; the function only has to pass them on. Nothing is patched, and nothing else of a model needs to be known here.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse.calibration import _statistics

ApplyBlock = Callable[[Any, jax.Array, Callable[[jax.Array, Any], jax.Array]], jax.Array]
# Weights that share an input, by name, and what that input was -> their pruned weights and masks.
Prune = Callable[[dict[str, jax.Array], _statistics.Statistics], dict[str, tuple[jax.Array, jax.Array]]]

_PROBES = 512  # input rows, of all batches together, that are kept to measure a layer's error on


class PrunedBlock(NamedTuple):
  """What `prune_blocks` did with one block.

  Attributes:
    index: of the block.
    params: the tree, pruned.
    masks: bool `[K, O]` by name, for the layers that were pruned.
    errors: by name, |x w_pruned - x w|**2 / |x w|**2 over a sample of the inputs x that the layer was calibrated on.
  """

  index: int
  params: Any
  masks: dict[str, jax.Array]
  errors: dict[str, float]


class Inputs(NamedTuple):
  """What one input, shared by one or more linear layers, was.

  Attributes:
    statistics: of all of it.
    probes: `[rows, K]`, a sample of it.
  """

  statistics: _statistics.Statistics
  probes: jax.Array


def matmul(x: jax.Array, w: Any) -> jax.Array:
  """`x @ w`, for a tuple of weights side by side: the `product` of a dense model."""
  return jnp.concatenate([x @ part for part in w], -1) if isinstance(w, tuple) else x @ w


def collect(
  apply_block: ApplyBlock,
  params: Any,
  hidden: jax.Array,
  linears: Sequence[str],
  *,
  gram: bool = False,
  sketch: bool = False,
  dense: tuple[Any, jax.Array] | None = None,
) -> tuple[jax.Array, dict[tuple[str, ...], Inputs]]:
  """Applies a block to a batch and sums up the inputs of its linear layers. Pure: for `jit`, and for `shard_map`.

  Across devices, each with its part of the batch, `psum` of the statistics gives those of the whole batch.

  Args:
    apply_block: of the model.
    params: of the block.
    hidden: `[B, T, D]`.
    linears: names of the leaves of `params` that are linear weights `[K, O]`.
    gram, sketch: parts of `Statistics`.
    dense: (params, hidden) of the unpruned model on the same tokens, for `Statistics.cross` between the inputs here and
      there.

  Returns:
    The block's output, and what each input was, keyed by the names of the weights that share it, in the order in which
    they are used.

  Raises:
    ValueError: a name is no leaf, or a weight was not passed to `product`, or in two calls.
  """
  output, _, inputs = _collect(apply_block, params, hidden, linears, gram=gram, sketch=sketch, dense=dense)
  return output, inputs


def _collect(apply_block, params, hidden, linears, *, gram, sketch, dense, probes=_PROBES):
  """`collect`, with the output of the dense block as well."""
  output, seen = _observe(apply_block, params, hidden, linears)
  dense_output, other = (None, {}) if dense is None else _observe(apply_block, *dense, linears)

  def summed(names, x):
    second = other.get(names)
    cross = None if second is None else second.shape[-1]
    empty = _statistics.init_statistics(x.shape[-1], gram=gram, cross=cross, sketch=sketch)
    rows = x.reshape(-1, x.shape[-1])
    sample = rows[:: max(1, rows.shape[0] // probes)][:probes].astype(jnp.float32)
    return Inputs(_statistics.update(empty, x, second=second), sample)

  return output, dense_output, {names: summed(names, x) for names, x in seen.items()}


def stream_statistics(
  apply_block: ApplyBlock,
  blocks: Sequence[Any],
  hidden: Sequence[jax.Array],
  linears: Sequence[str],
  *,
  gram: bool = False,
  sketch: bool = False,
  compiler_options: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, _statistics.Statistics]]:
  """Statistics of the unpruned model, one block at a time: for what must be known before pruning starts.

  Args:
    apply_block, linears, gram, sketch: as in `collect`.
    blocks: parameters of each.
    hidden: batches of the input of the first block.
    compiler_options: of `jax.jit`, for passes through a block.

  Yields:
    For each block, `Statistics` by name. Weights that share an input share them.
  """
  stream = _Stream(apply_block, linears, gram, sketch, compiler_options)
  hidden = list(hidden)
  for block in blocks:
    yield {name: inputs.statistics for names, inputs in stream.collect(block, hidden, advance=True) for name in names}


def prune_blocks(
  apply_block: ApplyBlock,
  blocks: Sequence[Any],
  hidden: Sequence[jax.Array],
  prune: Prune,
  linears: Sequence[str],
  *,
  sequential: bool = True,
  layer_by_layer: bool = False,
  gram: bool = False,
  sketch: bool = False,
  cross: bool = False,
  compiler_options: Mapping[str, Any] | None = None,
) -> Iterator[PrunedBlock]:
  """Prunes a model block by block. One block's statistics and the hidden states are all that is held.

  Args:
    apply_block: of the model.
    blocks: parameters of each.
    hidden: batches of the input of the first block, of equal shape.
    prune: called for each input with the weights that share it, by name (`blocks/3/q`), and its statistics.
    linears: names of the leaves of a block that are linear weights `[K, O]` and are to be pruned.
    sequential: whether a block is calibrated on the outputs of the pruned blocks before it, or of the dense ones.
    layer_by_layer: whether, inside a block too, a layer is calibrated on the outputs of pruned ones. Takes a pass through
      the block for each of its inputs.
    gram, sketch: parts of `Statistics`.
    cross: whether to sum `Statistics.cross`, between the inputs of the pruned model and those of the dense one, which is
      then run beside it. For `sequential`.
    compiler_options: of `jax.jit`, for passes through a block.

  Yields:
    A `PrunedBlock` for each block.

  Raises:
    ValueError: as in `collect`; inputs are not finite, or are too few for a Gram matrix of full rank; the arguments
      contradict each other.
  """
  if (cross or layer_by_layer) and not sequential:
    raise ValueError("cross and layer_by_layer compare with pruned layers: they need sequential=True.")
  stream = _Stream(apply_block, linears, gram, sketch, compiler_options)
  hidden = list(hidden)
  beside = list(hidden) if cross else None  # the dense model's stream
  for index, block in enumerate(blocks):
    params, masks, errors = block, {}, {}
    rounds = stream.order(block, hidden) if layer_by_layer else [None]
    for only in rounds:
      # The last round reaches far enough to move the stream on whose block it does not change.
      advance = only == rounds[-1] and (cross or not sequential)
      for names, inputs in stream.collect(params, hidden, block, beside, only=only, advance=advance):
        label = {short: f"blocks/{index}/{short}" for short in names}
        _statistics.check_statistics(inputs.statistics, ", ".join(label.values()), full_rank=gram)
        before = {label[short]: w for short, w in _weights(block, names).items()}
        after = prune(before, inputs.statistics)
        missing = [name for name in before if name not in after]
        if missing:
          raise ValueError(f"prune returned nothing for {', '.join(missing)}; (weight, mask) of each is needed.")
        for short in names:
          pruned, masks[short] = after[label[short]]
          errors[short] = float(_relative_error(inputs.probes, before[label[short]], pruned))
          params = _exchange(params, {short: pruned})
    if sequential and index + 1 < len(blocks):
      stream.advance(params, hidden)
    yield PrunedBlock(index, params, masks, errors)


class _Named:
  """Stands in a block's parameters for the weight that it holds, so that a product knows which layer it is of."""

  def __init__(self, name: str, weight: jax.Array):
    self.name, self.weight = name, weight

  def __getattr__(self, attribute):
    raise AttributeError(f"apply_block used .{attribute} of {self.name!r} itself; pass the weight on: product(x, w).")

  def __rmatmul__(self, x):
    raise TypeError(f"apply_block multiplied with {self.name!r} itself; call its `product` argument: product(x, w).")


class _Stream:
  """Passes of batches through a block, compiled once for all blocks of equal shapes."""

  def __init__(self, apply_block: ApplyBlock, linears: Sequence[str], gram: bool, sketch: bool, compiler_options: Any):
    self._apply_block, self._linears = apply_block, tuple(linears)
    self._parts = {"gram": gram, "sketch": sketch}
    self._order, self._shapes = {}, {}  # blocks of equal shapes are traced once
    jit = functools.partial(jax.jit, compiler_options=compiler_options)
    self._apply = jit(lambda params, x: apply_block(params, x, matmul))
    self._step = jit(self._one_batch, static_argnames=("only", "advance", "probes"), donate_argnames="so_far")

  def order(self, params: Any, hidden: Sequence[jax.Array]) -> list[tuple[str, ...]]:
    """Names of the weights that share an input, for each input, as the block uses them."""
    if not hidden:
      raise ValueError("There is no calibration data; give at least one batch of hidden states.")
    key = _signature((params, hidden[0]))
    if key not in self._order:
      names = self._order[key] = []
      jax.eval_shape(lambda p, x: names.extend(_observe(self._apply_block, p, x, self._linears)[1]), params, hidden[0])
    return self._order[key]

  def collect(self, params, hidden, dense_params=None, beside=None, *, only=None, advance=False):
    """(names, Inputs) of each input, over all batches.

    With `advance` the batches `beside`, where there are any, or else `hidden` become the outputs of their block.
    """
    names = [only] if only else self.order(params, hidden)
    one_batch = {"only": only, "probes": -(-_PROBES // len(hidden))}
    total, probes = None, []
    for i, x in enumerate(hidden):
      dense = None if beside is None else (dense_params, beside[i])
      if total is None:
        key = _signature((params, x, dense)), only
        if key not in self._shapes:
          self._shapes[key] = jax.eval_shape(
            lambda: self._one_batch(params, x, dense, None, advance=False, **one_batch)[1]
          )
        total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._shapes[key])
      output, total, some = self._step(params, x, dense, total, advance=advance, **one_batch)
      probes.append(some)
      if advance:
        (hidden if beside is None else beside)[i] = output
    probes = [jnp.concatenate(parts) for parts in zip(*probes)]
    return [(n, Inputs(statistics, probe)) for n, statistics, probe in zip(names, total, probes)]

  def advance(self, params, hidden) -> None:
    """The batches become the block's outputs."""
    for i, x in enumerate(hidden):
      hidden[i] = self._apply(params, x)

  def _one_batch(self, params, x, dense, so_far, *, only, advance, probes):
    observe = functools.partial(_collect, self._apply_block, params, x, self._linears, dense=dense, **self._parts)
    own, other, inputs = observe(probes=probes)
    output = own if dense is None else other
    chosen = [inputs[only]] if only else list(inputs.values())
    statistics = [one.statistics for one in chosen]
    if so_far is not None:
      statistics = [_statistics.merge(a, b) for a, b in zip(so_far, statistics)]
    # What is not returned is not computed: the last product of the block, or all after the one input that is wanted.
    return output if advance else None, statistics, [one.probes for one in chosen]


def _observe(apply_block, params, hidden, linears) -> tuple[jax.Array, dict[tuple[str, ...], jax.Array]]:
  """The block's output, and the input of each product, by the names of its weights."""
  seen = {}

  def product(x, w):
    named = [part for part in (w if isinstance(w, tuple) else (w,)) if isinstance(part, _Named)]
    names = tuple(part.name for part in named)
    for name in names:
      if any(name in others for others in seen):
        raise ValueError(f"{name!r} is multiplied with twice in one block; its inputs would be two.")
    if names:
      seen[names] = x
    plain = lambda part: part.weight if isinstance(part, _Named) else part
    return matmul(x, tuple(map(plain, w)) if isinstance(w, tuple) else plain(w))

  weights = _weights(params, linears)
  output = apply_block(_exchange(params, {name: _Named(name, w) for name, w in weights.items()}), hidden, product)
  missing = set(weights) - {name for names in seen for name in names}
  if missing:
    raise ValueError(
      f"{', '.join(sorted(missing))}: apply_block did not multiply with these through its `product` argument, so nothing is "
      "known of their inputs."
    )
  return output, seen


def _weights(params: Any, names: Sequence[str]) -> dict[str, jax.Array]:
  """Leaves by name.

  Raises:
    ValueError: there is no such leaf.
  """
  leaves = {_tree.leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
  unknown = [name for name in names if name not in leaves]
  if unknown:
    raise ValueError(f"linears: the block has no {', '.join(map(repr, unknown))}; its leaves are {', '.join(leaves)}.")
  return {name: leaves[name] for name in names}


def _exchange(params: Any, new: Mapping[str, Any]) -> Any:
  """The tree with other leaves in the places of those names."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: new.get(_tree.leaf_name(path), leaf), params)


def _signature(tree: Any) -> tuple[Any, ...]:
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, *((leaf.shape, leaf.dtype) for leaf in leaves)


@jax.jit
def _relative_error(x, before, after):
  wanted = x @ before.astype(jnp.float32)
  return jnp.sum((x @ after.astype(jnp.float32) - wanted) ** 2) / jnp.maximum(jnp.sum(wanted**2), 1e-30)
