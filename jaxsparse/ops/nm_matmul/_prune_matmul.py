"""A 2:4 product for training: the forward product and dx on the sparse tensor cores, the mask taken anew in every call."""

from collections.abc import Mapping
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxsparse.ops import _dispatch
from jaxsparse.ops.nm_matmul import _hopper_layout
from jaxsparse.ops.nm_matmul import _prune_pack

GRADIENTS = ("dense", "masked")


def prune_matmul(
  x: jax.Array,
  w: jax.Array,
  packed: _prune_pack.PrunedWeight | None = None,
  *,
  mask: _prune_pack.Mask = "transposable",
  gradient: Literal["dense", "masked"] = "dense",
  implementation: str | None = None,
) -> jax.Array:
  """`x @ prune(w)`, w pruned to 2:4 in this call: a linear layer that trains faster than a dense one.

  With m the forward mask, m' the backward one (m' = m unless the mask is "bdwp") and dy the gradient of the result:

      y = x @ (m * w)        sparse
      dx = dy @ (m' * w).T   sparse; dense for a columnwise mask, whose transpose is not 2:4
      dw = x.T @ dy          dense; with gradient="masked", m * (x.T @ dy)

  Two of three products run at the sparse rate and dw at the dense one: where a sparse product is r times as fast as a
  dense one, a step is 3 / (1 + 2 / r) times as fast: 1.33 at the 1.6 that an H100 can reach, less what pruning and
  packing cost (some 3 % at 8192 tokens). Few tokens do not pay for it. `which_prune_matmul` says what runs where.

  Args:
    x: `[*B, K]` bf16, f16 or f32; its dtype is that of both products.
    w: `[K, O]` of x's dtype, or f32 (a master copy: pruned by its own magnitudes, multiplied in x's dtype).
    packed: `prune_and_pack(w, dtype=x.dtype)`, where a caller shares it between calls with the same w (microbatches);
      None packs here. Gradients go to w.
    mask: as in `prune_and_pack`; ignored where packed is given, which has its own.
    gradient: of w. "dense" is straight-through: pruned weights get the gradient of a weight that were there, and can
      come back (STE, SR-STE and decaying masks need this). "masked" is the exact gradient of the formula, with the mask
      held fixed.
    implementation: "hopper" (sparse tensor cores), "xla" (dense products of the pruned weight, which run everywhere and
      save no time), or None for the best that can run here.

  Returns:
    `[*B, O]` of x's dtype; accumulation is in float32. dw has w's dtype.

  Raises:
    TypeError: dtypes that do not fit.
    ValueError: shapes that do not fit, unknown mask, gradient or implementation.
    NotImplementedError: the named implementation cannot run here; the message says why.

  >>> x, w = jnp.ones((2, 4)), jnp.array([[1.0, 4, 2, 3], [2.0, 3, 1, 4], [3.0, 2, 4, 1], [4.0, 1, 3, 2]])
  >>> prune_matmul(x, w).tolist()
  [[7.0, 7.0, 7.0, 7.0], [7.0, 7.0, 7.0, 7.0]]

  References:
    Hubara et al., "Accelerated sparse neural training" (https://arxiv.org/abs/2102.08124): transposable masks let
    both products be sparse.
  """
  x, w = jnp.asarray(x), jnp.asarray(w)
  _check(x, w, packed, gradient)
  plan = which_prune_matmul(x, w, packed, mask=mask, implementation=implementation)
  if packed is None:
    # The mask is no function to differentiate: gradients reach w through dw alone.
    packed = _prune_pack.prune_and_pack(
      jax.lax.stop_gradient(w), mask=mask, dtype=x.dtype, implementation=plan["pack"].implementation
    )
  products = tuple((name, plan[name].implementation) for name in ("forward", "dx"))
  return _matmul(products, gradient, x.reshape(-1, x.shape[-1]), w, packed).reshape(*x.shape[:-1], w.shape[1])


def which_prune_matmul(
  x: Any,
  w: Any,
  packed: _prune_pack.PrunedWeight | None = None,
  *,
  mask: _prune_pack.Mask = "transposable",
  implementation: str | None = None,
) -> Mapping[str, _dispatch.Choice]:
  """What each part of `prune_matmul` runs on for these arguments here, and why.

  Args:
    x, w, packed, mask, implementation: as in `prune_matmul`; `jax.ShapeDtypeStruct` will do for arrays.

  Returns:
    A `Choice` for each of "pack" (absent if packed is given), "forward", "dx" and "dw".

  Raises:
    As `prune_matmul`.
  """
  target = _dispatch.current_target()
  plan = {}
  if packed is None:
    # Pruning is the same on any product: only a product can be named.
    plan["pack"] = _prune_pack.which_prune_and_pack(w, mask=mask, dtype=x.dtype)
    spec = jax.ShapeDtypeStruct(w.shape, w.dtype)
    pack = functools.partial(_prune_pack.prune_and_pack, mask=mask, dtype=x.dtype, implementation="xla")
    packed = jax.eval_shape(pack, spec)
  rows = math.prod(x.shape[:-1])
  for name, layout in (("forward", packed.forward), ("dx", packed.backward)):
    if layout is None:
      why = "a columnwise mask is not 2:4 in the transposed weight, so this product is dense."
      plan[name] = _dispatch.Choice("xla", why, {"hopper": why}, target)
      continue
    operand = jax.ShapeDtypeStruct((rows, layout.shape[0]), x.dtype)
    reasons = {"xla": lambda: None, "hopper": functools.partial(_hopper_problem, operand, layout, target)}
    preference = [("hopper", "the sparse tensor cores can run it."), ("xla", "it runs everywhere.")]
    plan[name] = _dispatch.choose("prune_matmul", implementation, reasons, preference, target)
  why = "the gradient of the weight is a dense product."
  plan["dw"] = _dispatch.Choice("xla", why, {"hopper": why}, target)
  return plan


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(products, gradient, x, w, packed):
  return _product(dict(products)["forward"], x, packed.forward)


def _matmul_fwd(products, gradient, x, w, packed):
  # w itself is not kept: its shape and dtype are all that the backward pass wants.
  return _matmul(products, gradient, x, w, packed), (x, jnp.zeros((0,), w.dtype), packed)


def _matmul_bwd(products, gradient, residuals, dy):
  x, like, packed = residuals
  # The sparse kernel wants dy in memory. Then dw should read it there too, not have XLA compute it once more inside a dot.
  dy = jax.lax.optimization_barrier(dy)
  if packed.backward is None:
    dx = _dot(dy, packed.dense(), (1, 1))
  else:
    dx = _product(dict(products)["dx"], dy, packed.backward)
  dw = _dot(x, dy, (0, 0), like.dtype)
  if gradient == "masked":
    dw = jnp.where(_kept(packed.forward), dw, 0)
  return dx, dw, None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _product(implementation, x, layout):
  if implementation == "xla":
    return _dot(x, _hopper_layout.to_dense(layout), (1, 0))
  from jaxsparse.ops.nm_matmul import _hopper

  return _hopper.nm_matmul_sparse_core(x, layout, out_dtype=x.dtype)


def _dot(a, b, axes, dtype=None):
  dims = (((axes[0],), (axes[1],)), ((), ()))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype or a.dtype)


def _kept(layout):
  """The mask `[K, O]` of a layout."""
  _, positions = _hopper_layout.unpack_quads(layout)
  at = jnp.arange(4, dtype=positions.dtype)[:, None]
  return ((positions[:, :1] == at) | (positions[:, 1:] == at)).reshape(layout.shape)


def _hopper_problem(x, layout, target) -> str | None:
  if target.platform != "gpu":
    return f"it needs an NVIDIA GPU; this is {target}."
  from jaxsparse.ops.nm_matmul import _hopper

  return _hopper.supports(x, layout, out_dtype=x.dtype)


def _check(x, w, packed, gradient):
  if gradient not in GRADIENTS:
    raise ValueError(f"gradient must be one of {GRADIENTS}, got {gradient!r}.")
  if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
    raise ValueError(f"prune_matmul: x has shape {x.shape} and w {w.shape}; [*B, K] and [K, O] are needed.")
  if w.dtype not in (x.dtype, jnp.float32):
    raise TypeError(f"prune_matmul: x is {x.dtype} and w {w.dtype}; w must have x's dtype or be float32.")
  if packed is None:
    return
  if packed.shape != w.shape:
    raise ValueError(f"prune_matmul: packed has shape {packed.shape} and w {w.shape}; it must be w, packed.")
  if packed.forward.values.dtype != x.dtype:
    raise TypeError(
      f"prune_matmul: packed holds {packed.forward.values.dtype} and x is {x.dtype}; use prune_and_pack(w, dtype=x.dtype)."
    )
