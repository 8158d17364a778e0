"""The Markdown table and the plot of what `nm_matmul.py` measured.

python benchmarks/nm_matmul_table.py results/nm_matmul.json [--columns=1,16,512] [--only=2:4] [--plot=results/nm_matmul.png]
"""

import json
import pathlib

from absl import app
from absl import flags

_COLUMNS = flags.DEFINE_list("columns", ["1", "16", "64", "512", "2048", "4096", "8192"], "Numbers of rows of x.")
_ONLY = flags.DEFINE_list("only", None, "Patterns in the table; default: all.")
_PLOT = flags.DEFINE_string("plot", None, "Where a plot goes.")


def by_case(rows):
  """(pattern, shape, B) -> the row of what `nm_matmul` takes by itself."""
  return {
    (row["pattern"], row["shape"], row["B"]): row for row in rows if row["implementation"].endswith("*") and "us" in row
  }


def markdown(rows, batches) -> str:
  """Cells: ratio to dense, then microseconds, "d" for the decode kernel, and cuSPARSELt's ratio to dense where timed."""
  taken = by_case(rows)
  cells = {}
  for (pattern, shape, batch), row in taken.items():
    mark = {"decode*": " d", "xla*": " x"}.get(row["implementation"], "")
    rival = f"; {row['dense us'] / row['cuSPARSELt us']:.2f}" if "cuSPARSELt us" in row else ""
    us = f"{row['us']:.0f}" if row["us"] >= 1000 else f"{row['us']:.3g}"
    cells.setdefault((pattern, shape, f"{row['K']} x {row['O']}"), {})[batch] = (
      f"{row['ratio']:.2f} ({us}{mark}{rival}){'†' * ('earlier' in row)}"
    )
  lines = ["| pattern | weight | K x O | " + " | ".join(f"{b} row{'s' * (b > 1)}" for b in batches) + " |"]
  lines.append("| --- | --- | --- |" + " ---: |" * len(batches))
  for key, row in cells.items():
    if any(b in row for b in batches):
      lines.append("| " + " | ".join([*key, *(row.get(b, "") for b in batches)]) + " |")
  return "\n".join(lines)


def plot(path, rows, title):
  """Ratio to dense over rows of x, one panel a pattern, one line a weight: what `nm_matmul` takes by itself."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  taken = by_case(rows)
  patterns, shapes = (list(dict.fromkeys(key[i] for key in taken)) for i in (0, 1))
  across = min(4, len(patterns))
  down = -(-len(patterns) // across)
  fig, axes = plt.subplots(
    down, across, figsize=(3.4 * across + 2.6, 3 * down + 0.6), squeeze=False, sharex=True, constrained_layout=True
  )
  for ax in axes.flat[len(patterns) :]:
    ax.set_visible(False)
  lines = {}
  for ax, pattern in zip(axes.flat, patterns):
    for i, shape in enumerate(shapes):
      points = sorted((batch, row["ratio"]) for (p, s, batch), row in taken.items() if (p, s) == (pattern, shape))
      if points:
        (lines[shape],) = ax.plot(*zip(*points), marker=".", linewidth=1.2, color=plt.cm.tab20(i % 20), label=shape)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_ylim(bottom=0)
    ax.set_title(pattern, fontsize=10)
    ax.grid(alpha=0.25)
  for ax in axes[-1]:
    ax.set_xlabel("rows of x")
  for ax in axes[:, 0]:
    ax.set_ylabel("dense time / time")
  fig.legend(lines.values(), lines.keys(), loc="outside right center", fontsize=7)
  fig.suptitle(title, fontsize=9, x=0.01, horizontalalignment="left")
  fig.savefig(path, dpi=120)
  plt.close(fig)


def title(environment) -> str:
  device = f"{environment['device']}, jax {environment['jax']}"
  return f"nm_matmul against XLA's dense bfloat16 dot ({device}); each line a weight"


def main(argv):
  found = json.loads(pathlib.Path(argv[1]).read_text())
  if _PLOT.value:
    plot(_PLOT.value, found["rows"], title(found["environment"]))
  rows = [row for row in found["rows"] if _ONLY.value is None or row["pattern"] in _ONLY.value]
  print(markdown(rows, [int(b) for b in _COLUMNS.value]))


if __name__ == "__main__":
  app.run(main)
