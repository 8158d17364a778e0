"""Two pictures of what `block_matmul.py` measured; `block_matmul_table.py --plot=` draws them.

The three products of the shapes that goals are set for, with goals and bounds, against density; and the forward product of
every weight with few rows of x, and against the number of rows.
"""

import math
import pathlib

# As in the tables: they are given, so that tables and pictures have one list of goals.
_PRODUCTS = {"fwd": ("x @ w", "tab:blue", "o"), "dx": ("dy @ w.T (dx)", "tab:orange", "s"), "dw": ("x.T @ dy (dw)", "tab:green", "^")}  # fmt: skip
_WEIGHTS = {
  "square/4096": ("tab:gray", "D"),
  "square/8192": ("black", "D"),
  "llama3-8b/up": ("tab:blue", "o"),
  "llama3-8b/down": ("tab:cyan", "v"),
  "llama3-70b/up": ("tab:red", "o"),
  "llama3-70b/down": ("tab:pink", "v"),
}
_FEW, _DENSITY = 16, 0.1
_RATIOS = (0.5, 1, 2, 5, 10, 20, 50)


def goals(path, found, blocks, shapes, wanted) -> None:
  """Ratio to the dense dot against density: a row of panels a shape, a column a block size, a colour a product.

  Args:
    path: of the PNG.
    found: what the benchmark wrote.
    blocks: block sizes.
    shapes: title -> (K, O, rows of x).
    wanted: density -> goal for each of the blocks.
  """
  fig, axes = _panels(shapes, blocks, found, "products")
  lines = {}
  for axis_row, (title, (k, o, batch)) in zip(axes, shapes.items()):
    for at, (ax, block) in enumerate(zip(axis_row, blocks)):
      rows = _random(found, K=k, O=o, B=batch, block=block)
      lines["1 / density"] = _frame(ax, [row["density"] for row in rows], 40)
      lines["goal of x @ w"] = _goals(ax, wanted, [goal[at] for goal in wanted.values()])
      for product, (label, color, marker) in _PRODUCTS.items():
        mine = [row for row in rows if row["product"] == product]
        x = [row["density"] for row in mine]
        hollow = dict(markerfacecolor="none", markersize=9) if product == "dx" else dict(markersize=5)  # often on x @ w
        (lines[label],) = ax.plot(x, [row["ratio"] for row in mine], color=color, marker=marker, **hollow)
        if product != "dx":  # its bound is nearly that of x @ w
          bound = [row.get("bound", math.nan) for row in mine]
          (lines[f"bound of {label}"],) = ax.plot(x, bound, color=color, linewidth=1.2, linestyle=":")
      ax.set_title(f"blocks of {block.split('x')[0]}, {title}", fontsize=10)
  _finish(fig, axes, path, lines)


def rows_of_x(path, found, blocks, efficiency) -> None:
  """The forward product of every weight: above 16 rows of x against density, below density 0.1 against the rows.

  Args:
    path, found, blocks: as in `goals`.
    efficiency: what the goal of few rows is, relative to 1 / density.
  """
  fig, axes = _panels(("density", "rows"), blocks, found, "x @ w")
  lines = {}
  for at, block in enumerate(blocks):
    few, many = axes[0][at], axes[1][at]
    rows = _random(found, B=_FEW, product="fwd", block=block)
    wanted = sorted({row["density"] for row in rows})
    lines["1 / density"] = _frame(few, wanted, 60)
    lines[f"goal, {efficiency:g} / density"] = _goals(few, wanted, [efficiency / d for d in wanted])
    lines |= _weights(few, rows, "density")
    few.set_title(f"blocks of {block.split('x')[0]}, {_FEW} rows of x", fontsize=10)
    rows = _random(found, density=_DENSITY, product="fwd", block=block)
    _frame(many, [], 12)
    lines |= _weights(many, rows, "B")
    ticks = sorted({row["B"] for row in rows})
    many.axhline(1 / _DENSITY, color="gray", linestyle="--", linewidth=1)
    many.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    many.set_xlabel("rows of x")
    many.set_title(f"blocks of {block.split('x')[0]}, density {_DENSITY:g}", fontsize=10)
  _finish(fig, axes, path, lines)


def beside(path) -> pathlib.Path:
  """Where the second picture goes, given the first.

  >>> beside("results/block_matmul.png").as_posix()
  'results/block_matmul_rows.png'
  """
  path = pathlib.Path(path)
  return path.with_stem(path.stem + "_rows")


def _random(found, **wanted):
  rows = [
    r for r in found["rows"] if r["pattern"] == "random" and all(r[key] == value for key, value in wanted.items())
  ]
  return sorted(rows, key=lambda row: (row["density"], row["B"]))


def _weights(ax, rows, along):
  """A line for every weight; label -> line."""
  lines = {}
  for shape, (color, marker) in _WEIGHTS.items():
    mine = [row for row in rows if row["shape"] == shape]
    if mine:
      label = f"{shape}, {mine[0]['K']} x {mine[0]['O']}"
      x, y = [row[along] for row in mine], [row["ratio"] for row in mine]
      (lines[label],) = ax.plot(x, y, color=color, marker=marker, markersize=5)
  return lines


def _goals(ax, densities, ratios):
  return ax.scatter(list(densities), ratios, s=220, linewidth=2, marker="_", color="red", zorder=4)


def _panels(rows, blocks, found, what):
  from matplotlib import figure

  fig = figure.Figure(figsize=(4.2 * len(blocks), 3.7 * len(rows) + 1), layout="constrained")
  where = f"{found['environment']['device']}, jax {found['environment']['jax']}"
  fig.suptitle(f"Block-sparse {what}: how many times as fast as XLA's dense bfloat16 dot ({where})", fontsize=12)
  return fig, fig.subplots(len(rows), len(blocks), squeeze=False, sharey="row")


def _frame(ax, densities, top):
  """Axes, what is slower than dense in grey, and the ideal; the line of that."""
  ax.set_xscale("log")
  ax.set_yscale("log")
  ax.set_ylim(0.6, top)
  ax.set_yticks([r for r in _RATIOS if 0.6 < r <= top], [f"{r:g}x" for r in _RATIOS if 0.6 < r <= top])
  ax.axhspan(0.6, 1, color="0.9", zorder=0)
  ax.grid(color="0.85", linewidth=0.6)
  ax.minorticks_off()
  ticks = sorted(set(densities))
  (line,) = ax.plot(ticks, [1 / d for d in ticks], color="gray", linestyle="--", linewidth=1)
  if ticks:
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlabel("density (blocks kept)")
  return line


def _finish(fig, axes, path, lines):
  for row in axes:
    row[0].set_ylabel("dense time / sparse time")
    row[0].text(0.02, 0.02, "slower than dense", transform=row[0].transAxes, ha="left", va="bottom", fontsize=9)
  fig.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize=10)
  fig.savefig(path, dpi=110)
