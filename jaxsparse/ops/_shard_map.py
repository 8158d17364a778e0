"""What ops with derivatives of their own, and kernels, must say to `jax.shard_map`: over which mesh axes values vary."""

from typing import Any

import jax


def varying(tree: Any) -> frozenset:
  """Mesh axes over which any leaf varies; none outside of `jax.shard_map`, and within it where `check_vma=False`."""
  of = lambda a: getattr(getattr(jax.typeof(a), "manual_axis_type", None), "varying", frozenset())
  return frozenset().union(*map(of, jax.tree.leaves(tree)))


def vary_together(*operands: Any) -> Any:
  """Operands that, inside `jax.shard_map`, all vary over the same mesh axes; elsewhere they pass.

  A custom derivative must give a cotangent of the operand's own type: where x is replicated and w is split along O, `dx` is a
  sum over the devices. After this, JAX knows of the sum and takes it.
  """
  axes = varying(operands)
  missing = lambda leaf: tuple(sorted(axes - varying(leaf)))
  cast = lambda leaf: jax.lax.pcast(leaf, missing(leaf), to="varying") if missing(leaf) else leaf
  return jax.tree.map(cast, operands)


def like_operands(y: Any, *operands: Any) -> Any:
  """A result of a kernel (Pallas does not know), or the start of a loop, that varies over the mesh axes of operands."""
  return vary_together(y, *operands)[0]
