"""Soft-threshold reparametrisation: a method outside the axes of `Updater`, as an object of its own beside the engine."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _engine
from jaxsparse import _state
from jaxsparse import _tree
from jaxsparse import rules as rules_lib


@dataclasses.dataclass(frozen=True)
class SoftThreshold:
  """STR: every leaf learns its own threshold, so the sparsity of each follows from training.

      w' = sign(w) relu(|w| - sigmoid(s)),   s one number a leaf, trained with the weights

  The parameters become `{"weights": tree, "thresholds": tree}`; both go to the optimizer, whose weight decay on s (towards
  sigmoid(0) = 1/2) sets the final sparsity. It offers what an updater does: `wrap_optax`, `forward_params`, `sparse_params`,
  `export`, `instant_sparsify`; `get_masks` finds the masks, which are of the weights' tree.

  Args:
    start: s before training. The authors' ImageNet runs start far below zero (some thousands) and let weight decay raise
      it over the epochs; -5 (a threshold of 0.0067) suits short runs and is our choice.
    rules: which leaves, as in `Updater`; a rule may only say None (dense) here.

  >>> method = SoftThreshold(start=0.0)
  >>> params = method.init({"w": jnp.array([[0.7, -0.2], [-1.0, 0.5]])})
  >>> method.instant_sparsify(params)[1]["w"].tolist()
  [[True, False], [True, False]]

  References:
    Kusupati et al., Soft Threshold Weight Reparameterization for Learnable Sparsity, 2020,
    https://arxiv.org/abs/2002.03231. No known differences; its initial values were not checked.
  """

  start: float = -5.0
  rules: rules_lib.Rules = rules_lib.Rules()

  def __post_init__(self):
    if any(said is not None for _, said in self.rules.entries):
      raise ValueError("SoftThreshold learns every sparsity: its rules may only say None, for leaves that stay dense.")

  def init(self, weights: Any) -> dict[str, Any]:
    """`{"weights", "thresholds"}` from a tree of weights; dense leaves have None for a threshold."""
    leaves = _tree.flatten(weights)
    self.rules.check_used(leaves.names)
    dense = lambda name, value: self.rules.find(name) is not None or jnp.ndim(value) < 2
    thresholds = [
      None if dense(name, value) else jnp.asarray(self.start, value.dtype)
      for name, value in zip(leaves.names, leaves.values)
    ]
    if all(t is None for t in thresholds):
      raise ValueError(f"{self!r} finds no leaf with two dimensions or more that its rules leave to it.")
    return {"weights": weights, "thresholds": leaves.treedef.unflatten(thresholds)}

  def wrap_optax(
    self, inner: optax.GradientTransformation, key: jax.Array | int = 0, tag: str | None = None
  ) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with masks of the weights above their thresholds kept in a `SparsityState`; updates are `inner`'s."""
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
      return _state.SparsityState(
        count=jnp.zeros((), jnp.int32),
        key=_engine.key_data(key),
        masks=_masks(params),
        drop_state=(),
        grow_state=(),
        forward_state=(),
        inner_state=inner.init(params),
        tag={} if tag is None else {tag: ()},
      )

    def update_fn(updates, state, params=None, **extra):
      if params is None:
        raise ValueError("tx.update(grads, opt_state, params) needs the parameters: masks follow from them.")
      updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
      masks = _masks(optax.apply_updates(params, updates))
      return updates, state._replace(count=optax.safe_increment(state.count), masks=masks, inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  def forward_params(self, params: Any, opt_state: Any = None, tag: str | None = None) -> Any:
    """The weights that the loss sees, differentiable in weights and thresholds; a tree like the weights."""
    del opt_state, tag
    return _map(params, soft_threshold)

  def sparse_params(self, params: Any, opt_state: Any = None, tag: str | None = None) -> Any:
    """The same weights, for evaluation."""
    return self.forward_params(params, opt_state, tag)

  def export(self, params: Any, opt_state: Any = None, tag: str | None = None) -> tuple[Any, Any]:
    """The final weights and their masks; thresholds are folded in."""
    del opt_state, tag
    return self.instant_sparsify(params)

  def instant_sparsify(self, params: Any) -> tuple[Any, Any]:
    """`(weights, masks)` at the present thresholds."""
    return self.forward_params(params), _masks(params)


def soft_threshold(weight: jax.Array, threshold: jax.Array) -> jax.Array:
  """sign(w) relu(|w| - sigmoid(s)) in w's dtype."""
  return jnp.sign(weight) * jax.nn.relu(jnp.abs(weight) - jax.nn.sigmoid(threshold).astype(weight.dtype))


def _map(params, fn):
  """fn(weight, threshold) where there is one; other weights pass."""
  if not isinstance(params, dict) or set(params) != {"weights", "thresholds"}:
    raise ValueError('SoftThreshold trains {"weights", "thresholds"}: make them with its init(weights).')
  return jax.tree.map(
    lambda s, w: w if s is None else fn(w, s), params["thresholds"], params["weights"], is_leaf=lambda s: s is None
  )


def _masks(params):
  masks = _map(params, lambda w, s: jnp.abs(w) > jax.nn.sigmoid(s).astype(w.dtype))
  dense = lambda s, mask: optax.MaskedNode() if s is None else mask
  return jax.tree.map(dense, params["thresholds"], masks, is_leaf=lambda s: s is None)
