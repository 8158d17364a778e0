"""Which implementation of the block-sparse products is expected to be fastest: frozen data, and the order that follows."""

from collections.abc import Sequence
from typing import Any

from jaxsparse.ops import _dispatch

# Density above which XLA's dense dot is expected to win on the H100, by the shorter side of a block. Blocks below 128 are
# bound by loads of x through the L2 cache, blocks of 32 also by instructions of which they fill a half.
BREAK_EVEN = {32: 0.45, 64: 0.65, 128: 0.8}
# Where the gathered path gives way to the dense dot on a device without a kernel.
PORTABLE_BREAK_EVEN = 0.4


def order(w: Any, target: _dispatch.Target) -> Sequence[tuple[str, str]]:
  """(implementation, why), best first; the last one runs everywhere.

  Args:
    w: `BlockArray` `[K, O]`.
    target: the device.
  """
  dense = f"a dense dot is expected to win at density {w.density:.2f}"
  kernel = []
  if target.platform == "gpu":
    limit = BREAK_EVEN[max(side for side in BREAK_EVEN if side <= max(32, min(w.block_shape)))]
    if w.density > limit:
      return [("dense", f"{dense}, above {limit:g}.")]
    kernel = [("hopper", "multiplies only kept blocks.")]
  if w.density > PORTABLE_BREAK_EVEN:
    return [*kernel, ("dense", f"{dense}, above {PORTABLE_BREAK_EVEN:g}.")]
  return [*kernel, ("xla", "gathers, multiplies and adds up kept blocks.")]
