"""What trains in a tree with sparse nodes, and what stays: floating-point leaves and the rest."""

from typing import Any

import jax
import jax.numpy as jnp


def partition(tree: Any) -> tuple[Any, Any]:
  """Takes a tree apart into what an optimizer can train and what is fixed.

  Kept values, scales and dense weights are floating point and train. Positions, packed metadata and quantised values
  are integers and do not: `jax.grad` refuses them, and an optimizer must not touch them. Of weights packed for the sparse
  tensor cores only 2:4 and 1:2 train; in the others free slots lie among the values, where an update could fill them:
  train the `NMArray`, and pack it then.

  Args:
    tree: parameters, with or without `NMArray` or packed nodes, such as `js.compress` returns.

  Returns:
    (trainable, fixed), two trees of the same containers, each with None where the leaf is in the other one. None is an
    empty tree for JAX and Optax, so `optimizer.init(trainable)` and `jax.grad` with respect to `trainable` work.

  >>> import jax.numpy as jnp
  >>> trainable, fixed = partition({"w": jnp.ones(2), "step": jnp.int32(3)})
  >>> trainable["step"] is None, fixed["w"] is None, combine(trainable, fixed)["w"].tolist()
  (True, True, [1.0, 1.0])
  """
  has_free_slots = lambda node: hasattr(node, "unpack") and node.pattern not in ("2:4", "1:2")
  trains = lambda leaf: not has_free_slots(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
  return (
    jax.tree.map(lambda leaf: leaf if trains(leaf) else None, tree, is_leaf=has_free_slots),
    jax.tree.map(lambda leaf: None if trains(leaf) else leaf, tree, is_leaf=has_free_slots),
  )


def combine(trainable: Any, fixed: Any) -> Any:
  """Joins what `partition` took apart; to be called inside the loss.

  Args:
    trainable: first result of `partition`, perhaps updated.
    fixed: second result of `partition`.

  Returns:
    A tree like the one that was taken apart.

  Raises:
    ValueError: the trees have different containers.
  """
  return jax.tree.map(lambda a, b: b if a is None else a, trainable, fixed, is_leaf=lambda x: x is None)
