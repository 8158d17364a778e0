"""`nm_matmul`, which implementation of it runs, and packing for the ones that read a layout of their own."""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.arrays import _nm_array
from jaxsparse.ops import _dispatch
from jaxsparse.ops import _shard_map
from jaxsparse.ops.nm_matmul import preference
from jaxsparse.ops.nm_matmul import reference
from jaxsparse.ops.nm_matmul import vjp

IMPLEMENTATIONS = ("reference", "xla", "hopper", "decode")
LAYOUTS = ("hopper", "decode")
_DTYPES = ("bfloat16", "float16", "float32")


def nm_matmul(
  x: Any,
  w: Any,
  *,
  bias: Any = None,
  activation: str | None = None,
  implementation: str | None = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """`act(x @ w + bias)` for an N:M sparse weight; products are summed in float32.

  Implementations (`which_nm_matmul` says which one a call takes, and why):

  - "reference": the specification, a gather and an einsum in float32; slow.
  - "xla": decompresses, then a dense dot. Runs everywhere; takes less memory than a dense weight, not less time.
  - "hopper": the sparse tensor cores of H100 and H200, for patterns that are valid 2:4.
  - "decode": reads only packed bytes; any N:M and quantised values, for few rows of x.

  Without a name the best one for device and shape is taken, also the dense path where that is expected to win. A weight
  in the canonical form is packed for a kernel in every call: `pack` it once where it is used more than once.

  Differentiable in reverse mode in x, bias, kept values and scales (`jaxsparse.ops.nm_matmul.vjp` states the cost), and
  works under `jit`, `vmap` and `scan`. Kernels are not partitioned by themselves: use `shard_map` across devices.

  Args:
    x: `[*B, K]`, bfloat16, float16 or float32.
    w: `NMArray` `[K, O]`, or what `pack` made of one. Values of x's dtype; quantised values go with any x.
    bias: None or `[O]`, floating point; added in float32.
    activation: None, "relu", "gelu" (tanh approximation) or "silu", in float32.
    implementation: one of the names above, or None.
    preferred_element_type: dtype of the result: bfloat16, float16 or float32; None takes that of x.

  Returns:
    `[*B, O]`.

  Raises:
    TypeError, ValueError: operands that do not fit each other.
    NotImplementedError: the named implementation cannot run; the message says why.

  >>> w = _nm_array.NMArray.from_dense(jnp.array([[0.0], [1.0], [2.0], [0.0]]), 2, 4)
  >>> nm_matmul(jnp.array([[5.0, 6.0, 7.0, 8.0]]), w).tolist()
  [[20.0]]
  """
  x = jnp.asarray(x)
  bias = None if bias is None else jnp.asarray(bias)
  choice = which_nm_matmul(
    x,
    w,
    bias=bias,
    activation=activation,
    implementation=implementation,
    preferred_element_type=preferred_element_type,
  )
  # A named kernel is lowered for any platform, so that what cannot run says so. An unnamed one gives way to XLA where a
  # computation ends up on another device than the one that was asked (a CPU beside the GPU).
  strict = implementation is not None
  dtype = jnp.dtype(x.dtype if preferred_element_type is None else preferred_element_type)
  return _run(x, w, bias, choice.implementation, strict, activation, dtype)


def which_nm_matmul(
  x: Any,
  w: Any,
  *,
  bias: Any = None,
  activation: str | None = None,
  implementation: str | None = None,
  preferred_element_type: Any = None,
) -> _dispatch.Choice:
  """Which implementation `nm_matmul` takes for these arguments here, and why not the others.

  Args:
    x, bias: as in `nm_matmul`; `jax.ShapeDtypeStruct` will do.
    w, activation, implementation, preferred_element_type: as in `nm_matmul`.

  Returns:
    A `Choice` with `implementation`, `reason`, `rejected` and `target`; prints as a list.

  Raises:
    As `nm_matmul`.

  >>> w = _nm_array.NMArray.from_dense(jnp.array([[0.0], [1.0], [2.0], [0.0]]), 2, 4)
  >>> which_nm_matmul(jax.ShapeDtypeStruct((1, 4), jnp.float32), w).implementation
  'xla'
  """
  dtype = jnp.dtype(x.dtype if preferred_element_type is None else preferred_element_type)
  _check(x, w, bias, activation, dtype)
  target = _dispatch.current_target()
  batch = math.prod(x.shape[:-1])
  flat = jax.ShapeDtypeStruct((batch, x.shape[-1]), x.dtype)
  bias = None if bias is None else jax.ShapeDtypeStruct(bias.shape, bias.dtype)
  kernel = functools.partial(_kernel_problem, x=flat, w=w, bias=bias, activation=activation, out=dtype, target=target)
  reasons: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "xla": lambda: None,
    "hopper": lambda: kernel("hopper"),
    "decode": lambda: kernel("decode"),
  }
  order = preference.order(batch, w, _packed_as(w), target)
  return _dispatch.choose("nm_matmul", implementation, reasons, order, target)


def pack(w: _nm_array.NMArray, layout: str = "auto", *, batch: int | None = None) -> Any:
  """Packs a weight once for a kernel; the values stay bit for bit.

  Args:
    w: `NMArray` `[K, O]`.
    layout: "hopper" for the sparse tensor cores (patterns that are valid 2:4, 16-bit values), "decode" for few rows of x
      (every pattern, quantised values), or "auto", which takes "hopper" for 2:4 and "decode" for what that cannot
      hold and for patterns that are sparser than 2:4, where decoding reads fewer bytes.
    batch: rows of x that the weight is meant for, where known: "auto" then takes the layout for that many.

  Returns:
    A node that `nm_matmul` takes and `unpack` turns back. It is a pytree, made for one kind of device: save the `NMArray`.

  Raises:
    TypeError: w is no NMArray.
    ValueError: unknown layout, a stacked weight, or a pattern or dtype that the layout cannot hold.
  """
  if not isinstance(w, _nm_array.NMArray):
    raise TypeError(f"pack takes an NMArray, got {type(w).__name__}.")
  if w.ndim != 2:
    raise ValueError(f"pack takes one layer [K, O], got {w!r}; pack the layers one by one, or under jax.vmap.")
  if layout == "auto":
    layout = preference.layout(w, batch)
  if layout not in LAYOUTS:
    raise ValueError(f"layout={layout!r} is unknown; allowed are 'auto', {', '.join(map(repr, LAYOUTS))}.")
  return _packed(layout, w)


def unpack(w: Any) -> _nm_array.NMArray:
  """The `NMArray` of a packed weight, bit for bit; an `NMArray` passes."""
  if isinstance(w, _nm_array.NMArray):
    return w
  packed = _packed_as(w)
  if packed is None:
    raise TypeError(f"unpack takes what pack made, got {type(w).__name__}.")
  if packed == "hopper":
    return w.unpack()
  from jaxsparse.ops.nm_matmul import _decode_pack

  return _nm_array.NMArray.tree_unflatten((w.n, w.m), _decode_pack.unpack_decode(w))


def _is_float(dtype: Any) -> bool:
  return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)


def _packed_as(w: Any) -> str | None:
  """Name of the layout of a packed weight, None for an NMArray and anything else."""
  return {"SparseTensorCoreLayout": "hopper", "DecodeLayout": "decode"}.get(type(w).__name__)


def _pack_as(layout: str, w: _nm_array.NMArray) -> Any:
  if layout == "hopper":
    from jaxsparse.ops.nm_matmul import _hopper_layout

    return _hopper_layout.pack(w)
  from jaxsparse.ops.nm_matmul import _decode_pack

  return _decode_pack.pack_decode(w.values, w.indices, w.n, w.m, w.scales, shape=w.shape)


_packed = jax.jit(_pack_as, static_argnums=0)


def _kernel(name: str) -> tuple[Any, Any]:
  """(supports, run) of a kernel; imports Pallas."""
  if name == "hopper":
    from jaxsparse.ops.nm_matmul import _hopper

    return _hopper.supports, _hopper.nm_matmul_sparse_core
  from jaxsparse.ops.nm_matmul import _decode

  return _decode.supports, _decode.nm_matmul_decode


def _kernel_problem(name, *, x, w, bias, activation, out, target) -> str | None:
  """Why a kernel cannot run, as a sentence, or None."""
  if target.platform != "gpu":
    return f"it needs an NVIDIA GPU; this is {target}."
  if target.capability != (9, 0):
    return f"it is written for Hopper (compute capability 9.0); this is {target}."
  packed = _packed_as(w)
  if packed not in (None, name):
    return f"w is packed for {packed!r}; pack the NMArray with layout={name!r}."
  if x.shape[0] == 0 or 0 in w.shape:
    return "the product is empty."
  try:
    spec = w if packed else jax.eval_shape(functools.partial(_pack_as, name), w)
  except (ValueError, TypeError) as error:
    return f"it cannot hold this weight: {error}"
  from jaxsparse.ops import _mosaic_gpu

  supports, _ = _kernel(name)
  return _mosaic_gpu.unavailable() or supports(x, spec, bias=bias, activation=activation, out_dtype=out)


def _check(x, w, bias, activation, out) -> None:
  if not isinstance(w, _nm_array.NMArray) and _packed_as(w) is None:
    raise TypeError(
      f"nm_matmul: w is a {type(w).__name__}; an NMArray (js.compress, NMArray.from_dense) or what pack made of one is "
      "needed. For a dense weight use x @ w."
    )
  if len(w.shape) != 2:
    raise ValueError(
      f"nm_matmul: w is {w!r}; one layer [K, O] is needed. Run over stacked layers with jax.lax.scan or jax.vmap."
    )
  if len(x.shape) < 1 or x.shape[-1] != w.shape[0]:
    raise ValueError(f"nm_matmul: x has shape {tuple(x.shape)}, w {w.shape}; the last axis of x must be {w.shape[0]}.")
  if jnp.dtype(x.dtype).name not in _DTYPES:
    raise TypeError(f"nm_matmul: x is {x.dtype}; allowed are {', '.join(_DTYPES)}.")
  # Quantised: integers with scales, as leaves of their own or inside the packed data.
  quantised = getattr(w, "scales", None) is not None or not _is_float(w.dtype)
  if not quantised and jnp.dtype(w.dtype) != jnp.dtype(x.dtype):
    raise TypeError(
      f"nm_matmul: x is {x.dtype}, w {w.dtype}; make them equal: x.astype(w.dtype), or cast the weight before packing."
    )
  if out.name not in _DTYPES:
    raise TypeError(f"nm_matmul: preferred_element_type={out.name}; allowed are {', '.join(_DTYPES)}.")
  if bias is not None and tuple(bias.shape) != (w.shape[1],):
    raise ValueError(f"nm_matmul: bias has shape {tuple(bias.shape)}; it must be ({w.shape[1]},), one for each output.")
  if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
    raise TypeError(f"nm_matmul: bias is {bias.dtype}; it must be floating point.")
  if activation not in reference.ACTIVATIONS:
    raise ValueError(f"nm_matmul: activation={activation!r}; allowed are {list(reference.ACTIVATIONS)}.")


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _run(x, w, bias, implementation, strict, activation, dtype):
  if implementation in ("hopper", "decode"):
    forward = _run_kernel(implementation, strict)
  else:
    forward = _run_plain(implementation)
  call = vjp.Call(forward, _dense, _spread, activation, dtype)
  y = vjp.matmul(call, *_shard_map.vary_together(x.reshape(-1, x.shape[-1]), w, bias))
  return y.reshape(*x.shape[:-1], w.shape[1])


def _dense(w, dtype):
  if _packed_as(w) != "hopper":
    return unpack(w).to_dense(dtype)
  from jaxsparse.ops.nm_matmul import _hopper_layout

  # Not by way of the NMArray, which takes a sort where slots are free.
  return _hopper_layout.to_dense(w).astype(dtype)


def _spread(w, dtype):
  return unpack(w).to_dense(dtype)


def _xla(x, w, bias, activation, dtype):
  return reference.xla(x, _dense(w, x.dtype), bias, activation, dtype)


@functools.cache
def _run_plain(name: str):
  """ "reference" or "xla", from any form of the weight."""
  if name == "xla":
    return _xla
  return lambda x, w, bias, activation, dtype: reference.reference(x, unpack(w), bias, activation, dtype)


@functools.cache
def _run_kernel(name: str, strict: bool):
  """A kernel, with the weight packed if it is not, and vmap over x folded into its rows."""

  def run(x, w, bias, activation, dtype):
    def on_gpu(x, w, bias):
      w = w if _packed_as(w) else _pack_as(name, w)
      y = _kernel(name)[1](x, w, bias=bias, activation=activation, out_dtype=dtype)
      return _shard_map.like_operands(y, x)

    def elsewhere(x, w, bias):
      return _xla(x, w, bias, activation, dtype)

    @jax.custom_batching.custom_vmap
    def call(x, w, bias):
      if strict:
        return on_gpu(x, w, bias)
      return jax.lax.platform_dependent(x, w, bias, cuda=on_gpu, default=elsewhere)

    @call.def_vmap
    def batched(size, in_batched, x, w, bias):
      if not any(jax.tree.leaves(in_batched[1:])) and in_batched[0]:
        y = call(x.reshape(size * x.shape[1], x.shape[2]), w, bias)
        return y.reshape(size, x.shape[1], -1), True
      spread = lambda a, b: a if b else jnp.broadcast_to(a, (size, *a.shape))
      args = jax.tree.map(spread, (x, w, bias), tuple(in_batched))
      return jax.lax.map(lambda a: call(*a), args), True

    return call(x, w, bias)

  return run
