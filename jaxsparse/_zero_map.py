"""Whether an optimizer keeps zeros at zero."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _tree


class ZeroMap:
  """Remembers whether an optimizer maps zero gradients, parameters and state to zero state.

  Nearly all do, and cleaning their state before the step is then enough to keep it zero off-mask. The others (Adafactor
  adds its epsilon to the second moment) are cleaned after the step too, at the price that XLA on a CPU can no longer
  update the moments in place. Tried out once per tree of parameters, on two entries along each dimension.
  """

  def __init__(self):
    self._known: dict[Any, bool] = {}

  def keeps_zeros(self, inner, leaves: _tree.Leaves) -> bool:
    if leaves.treedef not in self._known:
      self._known[leaves.treedef] = _try_zeros(inner, leaves)
    return self._known[leaves.treedef]


def _try_zeros(inner, leaves) -> bool:
  # Concrete arrays only: this runs while tracing. One entry is zero among ones, for optimizers that mix entries.
  with jax.ensure_compile_time_eval():
    holed = [
      v if _tree.is_masked_node(v) else jnp.ones((2,) * v.ndim, v.dtype).at[(0,) * v.ndim].set(0) for v in leaves.values
    ]
    params = leaves.treedef.unflatten(holed)
    found: list[bool] = []

    def note(leaf, param):
      if not _tree.is_masked_node(leaf) and not _tree.is_masked_node(param) and jnp.shape(leaf) == param.shape:
        found.append(bool(leaf[(0,) * leaf.ndim] == 0))
      return leaf

    try:
      state = inner.init(params)
      for _ in range(2):
        state = inner.update(params, state, params)[1]
      optax.tree.map_params(inner, note, state, params, is_leaf=_tree.is_masked_node)
    except (TypeError, ValueError, jax.errors.JAXTypeError):
      # The optimizer wants keyword arguments, or its hyperparameters are traced: nothing is known, so clean twice.
      return False
  return all(found)
