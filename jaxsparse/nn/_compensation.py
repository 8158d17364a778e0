"""Learned parameters that make up for what N:M removes: AST's SLoRB and CAST's scales of groups.

Both are ordinary parameters beside the kernel. Keep them dense by a rule, such as `("slorb", None)`.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxsparse import structures


def init_slorb(
  kernel: jax.Array, mask: jax.Array, block: int = 64, init: Literal["mean", "sum"] = "mean"
) -> dict[str, jax.Array]:
  """Sparse low-rank boosting: {"down": P, "up": B} for y = x (mask w) + (x P) B.

  P sums blocks of `block` consecutive inputs; B holds what each block of removed weights adds up to, divided by `block`
  ("mean") or not ("sum"). With "mean", an input that is constant in every block gives exactly the dense layer's output.

  Args:
    kernel: shape=(in, out).
    mask: bool, like the kernel; True = kept.
    block: inputs in a block (the paper's default; its scripts take 16).
    init: "mean" or "sum".

  Returns:
    "down" of shape (in, in / block) and "up" of shape (in / block, out), in the kernel's dtype, both to be trained.

  Raises:
    ValueError: if the kernel has other than two dimensions, or inputs not divisible by `block`.

  >>> import jax.numpy as jnp
  >>> kernel, mask = jnp.array([[1.0], [3.0]]), jnp.array([[False], [True]])
  >>> {name: p.tolist() for name, p in init_slorb(kernel, mask, block=2).items()}
  {'down': [[1.0], [1.0]], 'up': [[0.5]]}

  References:
    Huang et al., Pruning Large Language Models with Semi-Structural Adaptive Sparse Training, 2024,
    https://arxiv.org/abs/2407.20584. No known differences.
  """
  if kernel.ndim != 2 or kernel.shape[0] % block:
    raise ValueError(f"init_slorb needs a kernel (in, out) with in divisible by block={block}, got {kernel.shape}.")
  if init not in ("mean", "sum"):
    raise ValueError(f"init_slorb: init must be 'mean' or 'sum', got {init!r}.")
  inputs, outputs = kernel.shape
  removed = jnp.where(mask, 0, kernel.astype(jnp.float32)).reshape(inputs // block, block, outputs).sum(1)
  up = removed / block if init == "mean" else removed
  down = jnp.repeat(jnp.eye(inputs // block, dtype=kernel.dtype), block, axis=0)
  return {"down": down, "up": up.astype(kernel.dtype)}


def slorb(x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
  """What SLoRB adds to the sparse layer's output: (x P) B; `[..., in] -> [..., out]`."""
  return (x @ params["down"]) @ params["up"]


def init_group_scale(kernel: jax.Array, structure: structures.NM) -> jax.Array:
  """A scale of one for every group of a kernel: the shape of the structure's view, with one entry a group.

  >>> import jax.numpy as jnp
  >>> init_group_scale(jnp.ones((8, 3)), structures.NM(2, 4)).shape
  (2, 1, 3)
  """
  axes = structure.unit_axes(kernel.shape)
  view = structure.view_shape(kernel.shape)
  return jnp.ones([1 if a in axes else n for a, n in enumerate(view)], kernel.dtype)


def scale_groups(kernel: jax.Array, scale: jax.Array, structure: structures.NM) -> jax.Array:
  """The kernel with every group times its scale. Scales keep the pattern, and merge into the weights after training.

  Experimental: that CAST scales groups is known, where and from what start is not.
  """
  return structure.from_units(structure.to_units(kernel) * scale, kernel.shape)
