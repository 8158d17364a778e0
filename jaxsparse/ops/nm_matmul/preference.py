"""Which implementation of `nm_matmul` is expected to be fastest: frozen data, and the order that follows from it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxsparse.ops import _dispatch

# Rows of x up to which reading fewer bytes decides, so that the layout with the fewest wins.
DECODE_BATCH = 16
# Products of K * O below which launch and ramp-up outweigh what sparsity saves: dense wins on the H100.
SMALL_WEIGHT = 1 << 21


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
  if w.shape[0] * w.shape[1] < SMALL_WEIGHT:
    return [
      ("xla", f"a dense dot is expected to win below {SMALL_WEIGHT} weights, this one has {w.shape[0]} x {w.shape[1]}.")
    ]
  hopper = ("hopper", f"the sparse tensor cores.{extra}")
  decode = ("decode", f"few rows of x: reads only packed bytes.{extra}")
  first = [decode, hopper] if batch <= DECODE_BATCH and not _prefers_tensor_cores(w) else [hopper, decode]
  return [*first, xla]


def layout(w: Any, batch: int | None) -> str:
  """The layout for a weight: "hopper" or "decode"."""
  if w.scales is not None or w.dtype.itemsize != 2 or not fits_tensor_cores(w.n, w.m):
    return "decode"
  if batch is None:
    return "hopper" if _prefers_tensor_cores(w) else "decode"
  return "decode" if batch <= DECODE_BATCH and not _prefers_tensor_cores(w) else "hopper"


def fits_tensor_cores(n: int, m: int) -> bool:
  """Whether every n:m weight is valid 2:4: no aligned group of four can hold more than two."""
  return (m % 4 == 0 and n <= 2) or (n, m) == (1, 2)


def _prefers_tensor_cores(w: Any) -> bool:
  """2:4 itself with 16-bit values: both layouts have the same bytes then."""
  return w.pattern == "2:4" and jnp.issubdtype(w.dtype, jnp.floating) and getattr(w, "scales", None) is None
