"""Task masks: several tasks in one set of weights, each with connections of its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _state
from jaxsparse import _tree
from jaxsparse import _updater
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.recipes import _imp


@dataclasses.dataclass(frozen=True)
class Tasks:
  """What has been learned so far, as a value; every method that changes it returns a new one.

      updater = Tasks.updater(js.get_algorithm("set")(sparsity=0.8, every=400))      # grows into weights that no task uses
      tx = updater.wrap_optax(optax.adam(1e-3))
      tasks = Tasks.start(updater, params)
      for data in tasks_data:
        params, opt_state = tasks.begin(updater, tx, params, key)
        ...                                                        # tx.update(grads, opt_state, params, used=tasks.used)
        tasks = tasks.finish(params, opt_state)
      logits = apply(tasks.params(0), images)                      # the first task, bit for bit as it was

  Attributes:
    weights: tree like the parameters: the weights of all finished tasks. Leaves without masks hold those of the start.
    used: masks of the weights that some finished task uses.
    masks: masks of every finished task.
    dense: for every finished task its leaves without masks (biases, norms), which are its own.

  References:
    Yildirim et al., Continual Learning with Dynamic Sparse Training: Exploring Algorithms for Effective Model Updates, 2023,
    https://arxiv.org/abs/2308.14831.
    Differs from the paper: a task's forward pass sees its own weights only, and leaves without masks are kept per task.
  """

  weights: Any
  used: Any
  masks: tuple[Any, ...] = ()
  dense: tuple[Any, ...] = ()

  @staticmethod
  def updater(updater: _updater.Updater) -> _updater.Updater:
    """The updater with growth kept out of used weights; it needs `tx.update(..., used=tasks.used)`."""
    if updater.grow is None:
      return updater
    return dataclasses.replace(updater, grow=scorers.Unused(updater.grow), call=None)

  @classmethod
  def start(cls, updater: _updater.Updater, params: Any) -> "Tasks":
    """No task yet."""
    none = lambda m: m if _tree.is_masked_node(m) else jnp.zeros_like(m)
    masks = _imp.all_kept(updater, params)
    weights = _tree_map(lambda m, p: p if _tree.is_masked_node(m) else jnp.zeros_like(p), masks, params)
    return cls(weights, jax.tree.map(none, masks, is_leaf=_tree.is_masked_node))

  def begin(
    self,
    updater: _updater.Updater,
    tx: optax.GradientTransformationExtraArgs,
    params: Any,
    key: jax.Array | int = 0,
    tag: str | None = None,
  ) -> tuple[Any, Any]:
    """Fresh random masks over unused weights, for a new task.

    Args:
      updater: gives sparsity, structure and distribution.
      tx: `updater.wrap_optax(...)`.
      params: values that the new weights start from.
      key: seed, or PRNG key, of the masks.
      tag: which updater, where `tx` holds several.

    Returns:
      `(params, opt_state)`; the parameters are zero outside the new masks.

    Raises:
      ValueError: if too few weights are left.
    """
    draw = dataclasses.replace(
      updater,
      schedule=schedules.Static(),
      drop=scorers.Random(),
      init=scorers.Random(),
      grow=None,
      drop_fraction=None,
      surplus=None,
      init_distribution=None,
      skip_step_when_due=False,
      call=None,
    )
    free = jax.tree.map(lambda m: m if _tree.is_masked_node(m) else ~m, self.used, is_leaf=_tree.is_masked_node)
    params, masks = draw.instant_sparsify(params, key, masks=free)
    return params, _state.set_masks(tx.init(params), masks, tag)

  def finish(self, params: Any, opt_state: Any, tag: str | None = None) -> "Tasks":
    """Freezes what the task has learned.

    Raises:
      ValueError: if it uses a weight of an earlier task (training without `used=`).
    """
    masks = _state.get_masks(opt_state, tag)
    overlap = _tree_map(lambda u, m: False if _tree.is_masked_node(m) else jnp.any(u & m), self.used, masks)
    if any(bool(x) for x in jax.tree.leaves(overlap)):
      raise ValueError(
        "The task grew into weights of an earlier one: train with Tasks.updater(updater) and tx.update(..., used=tasks.used)."
      )
    take = lambda m, new, old: old if _tree.is_masked_node(m) else jnp.where(m, new, old)
    own = lambda m, new: new if _tree.is_masked_node(m) else optax.MaskedNode()
    return Tasks(
      _tree_map(take, masks, params, self.weights),
      _tree_map(lambda m, u: u if _tree.is_masked_node(m) else u | m, masks, self.used),
      (*self.masks, masks),
      (*self.dense, _tree_map(own, masks, params)),
    )

  def params(self, task: int) -> Any:
    """The parameters of a finished task."""
    keep = lambda m, w, d: d if _tree.is_masked_node(m) else jnp.where(m, w, jnp.zeros((), w.dtype))
    return _tree_map(keep, self.masks[task], self.weights, self.dense[task])


def _tree_map(fn, *trees):
  return jax.tree.map(fn, *trees, is_leaf=_tree.is_masked_node)
