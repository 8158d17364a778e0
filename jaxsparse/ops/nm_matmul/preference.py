"""Which implementation of `nm_matmul` is expected to be fastest: frozen data, and the order that follows from it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxsparse.ops import _dispatch
from jaxsparse.ops.nm_matmul import _hopper_layout
from jaxsparse.ops.nm_matmul import tuning

# Rows of x up to which reading fewer bytes decides, where a pattern is sparser than 2:4. (At 2:4 both kernels read the
# same and were within 5 % of each other on an H100, from 1 row to 16.) The decode kernel reads the weight once for 32 rows.
DECODE_BATCH = 32


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
  if dense_wins(batch, *w.shape):
    return [
      ("xla", f"a dense dot is expected to win for {batch} rows and a small weight, {w.shape[0]} x {w.shape[1]}.")
    ]
  hopper = ("hopper", f"the sparse tensor cores.{extra}")
  decode = ("decode", f"few rows of x: reads only packed bytes.{extra}")
  first = [decode, hopper] if batch <= DECODE_BATCH and not _prefers_tensor_cores(w) else [hopper, decode]
  return [*first, xla]


def layout(w: Any, batch: int | None) -> str:
  """The layout for a weight: "hopper" or "decode"."""
  if w.scales is not None or w.dtype.itemsize != 2 or not _hopper_layout.fits_two_in_four(w.n, w.m):
    return "decode"
  if batch is None:
    return "hopper" if _prefers_tensor_cores(w) else "decode"
  return "decode" if batch <= DECODE_BATCH and not _prefers_tensor_cores(w) else "hopper"


def dense_wins(batch: int, k: int, o: int) -> bool:
  """Whether a dense dot of `[batch, k] @ [k, o]` is expected to be faster than any kernel, on an H100."""
  return tuning.choose_tuning(batch, k, o) is None


def _prefers_tensor_cores(w: Any) -> bool:
  """2:4 itself with 16-bit values: both layouts have the same bytes then."""
  pattern = getattr(w, "pattern", None) or f"{w.n}:{w.m}"
  quantised = getattr(w, "scales", None) is not None or not jnp.issubdtype(jnp.dtype(w.dtype), jnp.floating)
  return pattern == "2:4" and not quantised
