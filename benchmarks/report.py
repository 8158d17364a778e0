"""What every benchmark ends with: a table on the terminal, a JSON file and a plot."""

from collections.abc import Sequence
import json
import pathlib
import platform
import textwrap
from typing import Any

import jax
import jaxlib
import numpy as np


def environment() -> dict[str, Any]:
  """Device and library versions, to be quoted with every figure."""
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "numpy": np.__version__,
    "python": platform.python_version(),
  }


def print_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
  """Rows as aligned text; floats with four significant digits."""
  cells = [[_text(row.get(c, "")) for c in columns] for row in rows]
  widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
  print("  ".join(c.ljust(w) for c, w in zip(columns, widths)))
  for line in cells:
    print("  ".join(cell.ljust(w) for cell, w in zip(line, widths)))


def write_json(path: str | pathlib.Path, rows: Sequence[dict[str, Any]], **extra: Any) -> None:
  """Writes {"environment": ..., "rows": ...}, a row to a line, in one piece: a broken run leaves no half file."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  head = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {"environment": environment(), **extra}.items()]
  lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
  partial.write_text("{\n " + ",\n ".join([*head, f'"rows": [\n{lines}\n ]']) + "\n}\n")
  partial.replace(path)


def bar_plot(
  path: str | pathlib.Path,
  labels: Sequence[str],
  values: Sequence[float],
  title: str,
  xlabel: str,
  target: float | None = None,
  errors: Sequence[float] | None = None,
) -> None:
  """Horizontal bars with their values, standard errors where there are any, and a line at the target."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  fig, ax = plt.subplots(figsize=(7, 0.4 * len(labels) + 1.3), constrained_layout=True)
  reverse = lambda numbers: None if numbers is None else list(numbers)[::-1]
  bars = ax.barh(reverse(labels), reverse(values), xerr=reverse(errors), color="#0072B2", ecolor="#222222")
  if target is not None:
    ax.axvline(target, color="#D55E00", linestyle="--", label=f"target {target:g}")
    fig.legend(loc="outside lower right", fontsize=9)
  if errors is None:
    texts = [f"{value:#.3g}".rstrip(".") for value in values]
  else:
    texts = [f"{value:.1f} ± {error:.1f}" for value, error in zip(values, errors, strict=True)]
  # On white, since the line at the target may run through them.
  for text in ax.bar_label(bars, reverse(texts), padding=3):
    text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
  ax.margins(x=0.12 if errors is None else 0.22)
  fig.suptitle(textwrap.fill(title, 90), fontsize=10)
  ax.set_xlabel(xlabel)
  fig.savefig(path, dpi=130)
  plt.close(fig)


def _text(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)
