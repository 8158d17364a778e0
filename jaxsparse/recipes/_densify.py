"""From sparse pre-training to dense fine-tuning."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _state


def densify(
  opt_state: Any, params: Any = None, inner: optax.GradientTransformation | None = None, tag: str | None = None
) -> Any:
  """An optimizer state that keeps every weight: those that were removed go on from zero.

  The function of the model does not change in that moment; from the next update on every weight gets gradients. Use it with
  an updater that does not refresh masks any more (`static_sparse`, or others past their `stop`).

      opt_state = densify(opt_state)                           # keep the optimizer's moments
      opt_state = densify(opt_state, params, optax.adam(1e-5))  # start them anew, with the inner optimizer of a new `tx`

  Args:
    opt_state: as in `get_sparsity_state`.
    params, inner: the parameters and the inner optimizer, to initialise its state anew; both or none.
    tag: which updater, where there are several.

  Returns:
    `opt_state` with all-ones masks, and a new inner state where `inner` is given.

  >>> from jaxsparse import algorithms
  >>> params = {"w": jnp.ones((4, 4))}
  >>> state = algorithms.static_sparse(sparsity=0.75).wrap_optax(optax.sgd(0.1)).init(params)
  >>> int(_state.get_masks(densify(state))["w"].sum())
  16

  References:
    Thangarasa et al., SPDF: Sparse Pre-training and Dense Fine-tuning for Large Language Models, 2023,
    https://arxiv.org/abs/2303.10464. No code is public; the paper's abstract was read.
  """
  if (params is None) != (inner is None):
    raise ValueError("densify: params and inner belong together; give both to start the optimizer's state anew.")
  ones = lambda m: m if isinstance(m, optax.MaskedNode) else jnp.ones(m.shape, bool)
  masks = jax.tree.map(ones, _state.get_masks(opt_state, tag), is_leaf=lambda m: isinstance(m, optax.MaskedNode))
  opt_state = _state.set_masks(opt_state, masks, tag)
  if inner is None:
    return opt_state

  def swap(node):
    ours = isinstance(node, _state.SparsityState) and (tag is None or _state.tag_name(node) == tag)
    return node._replace(inner_state=inner.init(params)) if ours else node

  return jax.tree.map(swap, opt_state, is_leaf=lambda x: isinstance(x, _state.SparsityState))
