"""Which implementation of the block-sparse products is expected to be fastest: measurements, and the order that follows."""

from collections.abc import Sequence
import functools
import importlib.resources
import json
import math
from typing import Any

from jaxsparse.ops import _dispatch

# Where the gathered path gives way to the dense dot on a device without a kernel.
PORTABLE_BREAK_EVEN = 0.4
_BLOCKS = (32, 64, 128)


def order(w: Any, target: _dispatch.Target, batch: int, product: str) -> Sequence[tuple[str, str]]:
  """(implementation, why), best first; the last one runs everywhere.

  Args:
    w: `BlockArray` `[K, O]`.
    target: the device.
    batch: rows of x.
    product: "fwd", "dx" or "dw".
  """
  dense = f"a dense dot is expected to win at density {w.density:.2f}"
  kernel = []
  if target.platform == "gpu":
    limit, where = break_even(w, batch, product)
    if w.density > limit:
      return [("dense", f"{dense}, above {limit:g}: {where}.")]
    kernel = [("hopper", f"multiplies only kept blocks; wins up to density {limit:g}: {where}.")]
  if w.density > PORTABLE_BREAK_EVEN:
    return [*kernel, ("dense", f"{dense}, above {PORTABLE_BREAK_EVEN:g}.")]
  return [*kernel, ("xla", "gathers, multiplies and adds up kept blocks.")]


def break_even(w: Any, batch: int, product: str) -> tuple[float, str]:
  """The density above which the dense dot was faster than the kernel, at the shape measured that is nearest, and which.

  Args:
    w: `BlockArray` `[K, O]`.
    batch: rows of x.
    product: "fwd", "dx" or "dw".
  """
  side = max(side for side in _BLOCKS if side <= max(_BLOCKS[0], min(w.block_shape)))
  data = measured()
  rows = [row for row in data["rows"] if row[2] == f"{side}x{side}" and row[4] == product]
  away = lambda n, m: abs(math.log2(max(1, n) / m))
  distance = lambda row: away(w.shape[0], row[0]) + away(w.shape[1], row[1]) + away(batch, row[3])
  k, o, _, rows_of_x, _, limit = min(rows, key=distance)
  return limit, f"measured with {k} x {o}, blocks of {side} and {rows_of_x} rows on {data['device']}"


@functools.cache
def measured() -> dict[str, Any]:
  """What `benchmarks/block_matmul_table.py --measured=` wrote, of the nearest device there is."""
  path = importlib.resources.files("jaxsparse.ops.block_matmul") / "measured" / "nvidia_h100.json"
  return json.loads(path.read_text())
