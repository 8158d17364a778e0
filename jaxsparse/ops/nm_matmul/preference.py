"""Which implementation of `nm_matmul` is expected to be fastest: frozen data, and the order that follows from it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxsparse.ops import _dispatch
from jaxsparse.ops.nm_matmul import _hopper_layout

# What follows was measured on an H100 (`measured/few_rows_nvidia_h100.json`; a test holds these rules against it).
# Rows of x up to which reading fewer bytes decides, so that the decode kernel wins for patterns sparser than 2:4: with
# one entry to a group, and with more, which take more work to unpack.
SINGLE_DECODE_BATCH, DECODE_BATCH = 32, 16
# From this many outputs on, 1:8 and sparser win up to 64 rows: x is read by more outputs at a time.
_MANY_OUTPUTS, _MANY_OUTPUTS_BATCH = 28672, 64
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
  if not packed and dense_wins(*w.shape):  # the dense path would unpack a packed weight in every call
    return [("xla", f"a weight of {w.shape[0]} x {w.shape[1]} is small: kernels win from {SMALL_WEIGHT} entries on.")]
  hopper = ("hopper", f"the sparse tensor cores.{extra}")
  decode = ("decode", f"few rows of x: reads only packed bytes.{extra}")
  first = [decode, hopper] if batch <= _decode_rows(w) else [hopper, decode]
  return [*first, xla]


def layout(w: Any, batch: int | None) -> str:
  """The layout for a weight: "hopper" or "decode"."""
  if w.scales is not None or w.dtype.itemsize != 2 or not _hopper_layout.fits_two_in_four(w.n, w.m):
    return "decode"
  if batch is None:
    return "hopper" if w.pattern == "2:4" else "decode"
  return "decode" if batch <= _decode_rows(w) else "hopper"


def dense_wins(k: int, o: int) -> bool:
  """Whether a dense dot by a weight `[k, o]` is expected to be faster than any kernel, on an H100."""
  return k * o < SMALL_WEIGHT or min(k, o) < 256


def _decode_rows(w: Any) -> int:
  """Rows of x up to which the decode kernel is expected to be faster than the tensor cores' own layout."""
  pattern = getattr(w, "pattern", None) or f"{w.n}:{w.m}"
  quantised = getattr(w, "scales", None) is not None or not jnp.issubdtype(jnp.dtype(w.dtype), jnp.floating)
  if pattern == "2:4" and not quantised:
    return DECODE_BATCH if _idle_tensor_cores(*w.shape) else 0
  n, m = map(int, pattern.split(":"))
  if n > 1:
    return DECODE_BATCH
  return _MANY_OUTPUTS_BATCH if m >= 8 and w.shape[1] >= _MANY_OUTPUTS else SINGLE_DECODE_BATCH


def _idle_tensor_cores(k: int, o: int) -> bool:
  """Whether at 2:4, where both kernels read the same, the one of the tensor cores has too few blocks at work.

  With few rows of x: too few tiles of 64 outputs for 132 processors, a second wave of them that is nearly empty, or one
  wave of long tiles, whose blocks have less under way. There it was measured 2 to 59 % slower, elsewhere up to 4 % faster.
  """
  return o < 2048 or 132 * 64 < o < 200 * 64 or (o <= 132 * 64 and k >= 8192)
