"""Which implementation of `nm_matmul` is expected to be fastest: frozen data, and the order that follows from it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxsparse.ops import _dispatch
from jaxsparse.ops.nm_matmul import _hopper_layout

# What follows was measured on an H100 (benchmarks/results/nm_matmul_h100.json).
# Rows of x up to which reading fewer bytes decides, so that the decode kernel wins for patterns sparser than 2:4. At 2:4
# both kernels read the same, and were within 12 % of each other, but where `_idle_tensor_cores`.
DECODE_BATCH = 16
# The smallest weight for which a kernel was measured; it beat the dense dot for all numbers of rows.
SMALL_WEIGHT = 1 << 20


def order(batch: int, w: Any, packed: str | None, target: _dispatch.Target) -> Sequence[tuple[str, str]]:
  """(implementation, why), best first; the last one runs everywhere.

  Args:
    batch: rows of x.
    w: `NMArray` or packed weight `[K, O]`.
    packed: "hopper", "decode", or None for an `NMArray`.
    target: the device.
  """
  if target.platform != "gpu":
    return [("xla", f"no kernel is written for {target}; decompresses, then a dense dot.")]
  xla = ("xla", "decompresses, then a dense dot: no kernel runs this.")
  extra = "" if packed else " The weight is packed in every call: pack it once."
  if dense_wins(*w.shape):
    return [("xla", f"a weight of {w.shape[0]} x {w.shape[1]} is small: kernels win from {SMALL_WEIGHT} entries on.")]
  hopper = ("hopper", f"the sparse tensor cores.{extra}")
  decode = ("decode", f"few rows of x: reads only packed bytes.{extra}")
  first = [decode, hopper] if batch <= DECODE_BATCH and not _prefers_tensor_cores(w) else [hopper, decode]
  return [*first, xla]


def layout(w: Any, batch: int | None) -> str:
  """The layout for a weight: "hopper" or "decode"."""
  if w.scales is not None or w.dtype.itemsize != 2 or not _hopper_layout.fits_two_in_four(w.n, w.m):
    return "decode"
  if batch is None:
    return "hopper" if w.pattern == "2:4" else "decode"
  return "decode" if batch <= DECODE_BATCH and not _prefers_tensor_cores(w) else "hopper"


def dense_wins(k: int, o: int) -> bool:
  """Whether a dense dot by a weight `[k, o]` is expected to be faster than any kernel, on an H100."""
  return k * o < SMALL_WEIGHT or min(k, o) < 256


def _prefers_tensor_cores(w: Any) -> bool:
  """2:4 itself with 16-bit values, where enough blocks are at work."""
  pattern = getattr(w, "pattern", None) or f"{w.n}:{w.m}"
  quantised = getattr(w, "scales", None) is not None or not jnp.issubdtype(jnp.dtype(w.dtype), jnp.floating)
  return pattern == "2:4" and not quantised and not _idle_tensor_cores(w.shape[1])


def _idle_tensor_cores(o: int) -> bool:
  """With few rows of x: too few tiles of 64 outputs for 132 processors, or a second wave of them that is nearly empty.

  Measured 23 % slower than the decode kernel at o = 10240, and 59 % at o = 1024 with k = 4096.
  """
  return o < 2048 or 132 * 64 < o < 200 * 64
