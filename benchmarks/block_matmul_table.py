"""The tables, the plot and the break-even densities of what `block_matmul.py` measured.

  python benchmarks/block_matmul_table.py results/block_matmul.json [--transformer=results/block_sparse_transformer.json]
    [--docs=docs/block_matmul.md] [--measured=jaxsparse/ops/block_matmul/measured/nvidia_h100.json] [--plot=results/block_matmul.png]

Prints the Markdown of docs/block_matmul.md. `--docs` writes each table into a file between `<!-- table: NAME -->` and
`<!-- end -->`; text outside of these stays, so that no figure of a table is written by hand. `--measured` writes the densities above
which the dense dot won, by which `block_matmul` chooses.
"""

import collections
from collections.abc import Callable
import json
import math
import pathlib
import re

from absl import app
from absl import flags
import block_matmul_plot

_TRANSFORMER = flags.DEFINE_string("transformer", None, "What experiments/block_sparse_transformer.py wrote.")
_DOCS = flags.DEFINE_list("docs", None, "Markdown files that get their tables.")
_MEASURED = flags.DEFINE_string("measured", None, "Where the densities go at which dense wins, as JSON.")
_PLOT = flags.DEFINE_string("plot", None, "Where a plot goes; a second one goes beside it, with _rows in its name.")

BLOCKS = ("128x128", "64x64", "32x32")
PRODUCTS = ("fwd", "dx", "dw")
# Ratio to the dense dot by density, for each of BLOCKS.
GOALS = {1.0: (0.85, 0.85, 0.85), 0.5: (1.7, 1.5, 1.1), 0.25: (3.3, 2.9, 2.0), 0.1: (7, 6, 4), 0.05: (13, 10, 7)}
_DECODE_EFFICIENCY = 0.85
_DECODE_ROWS = 64
# The two shapes that goals are set for: (K, O, rows of x).
GOAL_SHAPES = {"8192 x 8192 x 8192": (8192, 8192, 8192), "4096 x 4096 x 14336 (B x K x O)": (4096, 14336, 4096)}


def by_case(rows) -> dict:
  """(K, O, B, block, density, pattern, product) -> row."""
  return {tuple(row[k] for k in ("K", "O", "B", "block", "density", "pattern", "product")): row for row in rows}


def break_even(rows) -> list[dict]:
  """For each (K, O, block, B, product) of random patterns the density above which the dense dot wins.

  Between two densities the ratio is taken to follow a power of the density; beyond the last, its inverse.
  """
  keys = ("shape", "K", "O", "block", "B", "product")
  groups = collections.defaultdict(dict)
  for row in rows:
    if row["pattern"] == "random":
      groups[tuple(row[key] for key in keys)][row["density"]] = row["ratio"]
  out = []
  for key, ratios in groups.items():
    points = sorted(ratios.items())
    at = min(1.0, points[-1][0] * points[-1][1]) if points[-1][1] >= 1 else 0.0
    for (low, fast), (high, slow) in zip(points, points[1:]):
      if fast >= 1 > slow:
        at = math.exp(math.log(low) + math.log(high / low) * math.log(fast) / math.log(fast / slow))
    if len(points) > 1:
      out.append(dict(zip(keys, key)) | {"dense wins above": round(at, 3)})
  return out


# -- Tables ------------------------------------------------------------------------------------------------------------


def table(head, lines) -> str:
  """Markdown; the first column is text, the others are numbers."""
  rows = ["| " + " | ".join(map(str, cells)) + " |" for cells in [head, *lines]]
  return "\n".join([rows[0], "| --- |" + " ---: |" * (len(head) - 1), *rows[1:]])


def number(value, goal=None, digits=3) -> str:
  """Three digits, bold where a goal is met; empty for None."""
  if value is None:
    return ""
  text = f"{value:.{digits}g}" if value < 100 else f"{value:.0f}"
  return f"**{text}**" if goal is not None and value >= goal else text


def ratio(found, *key):
  return found[key]["ratio"] if key in found else None


def goals(rows) -> str:
  """Ratio to the dense dot at the shapes and densities that goals are set for; bold: met."""
  found, parts = by_case(rows), []
  head = ["density"]
  for block in BLOCKS:
    head += [f"{block.split('x')[0]}: goal", *PRODUCTS]
  for name, (k, o, batch) in GOAL_SHAPES.items():
    lines = []
    for density, wanted in GOALS.items():
      cells = [f"{density:g}"]
      for block, goal in zip(BLOCKS, wanted):
        ratios = [ratio(found, k, o, batch, block, density, "random", product) for product in PRODUCTS]
        cells += [f"{goal:g}", number(ratios[0], goal), *map(number, ratios[1:])]
      lines.append(cells)
    parts.append(f"{name}:\n\n{table(head, lines)}")
  return "\n\n".join(parts)


def backward(rows) -> str:
  """The backward products beside the forward one, at the shapes that goals are set for.

  dx: its time over that of the forward product (goal 1.1); dw: its efficiency over the forward product's (goal 0.75).
  """
  found, lines = by_case(rows), []
  relative = {}
  for product in ("dx", "dw"):
    for name, (k, o, batch) in GOAL_SHAPES.items():
      for block in BLOCKS:
        cells = []
        for density in GOALS:
          mine, forward = (ratio(found, k, o, batch, block, density, "random", p) for p in (product, "fwd"))
          cells.append(None if None in (mine, forward) else mine / forward)
        relative[product, name, block] = cells
  for (product, name, block), cells in relative.items():
    if any(cell is not None for cell in cells):
      # dx: times, so smaller is better; dw: efficiency.
      show = (lambda c: number(1 / c, digits=3)) if product == "dx" else (lambda c: number(c, 0.75))
      texts = ["" if c is None else show(c) for c in cells]
      if product == "dx":
        texts = [f"**{t}**" if c is not None and 1 / c <= 1.1 else t for t, c in zip(texts, cells)]
      what = "time of dx / forward (goal 1.1)" if product == "dx" else "efficiency of dw / forward (goal 0.75)"
      lines.append([what, name.split(" (")[0], block, *texts])
  return table(["", "shape", "block", *(f"{d:g}" for d in GOALS)], lines)


def skewed(rows) -> str:
  """Time with a power law of blocks per column over that of a random pattern of the same density (goal 1.2)."""
  found, lines = by_case(rows), collections.defaultdict(dict)
  for (k, o, batch, block, density, pattern, product), row in found.items():
    random = found.get((k, o, batch, block, density, "random", product))
    if pattern == "skewed" and random:
      # Patterns differ in how many blocks they happen to keep.
      lines[k, o, batch][product, block] = row["us"] / row["kept"] / (random["us"] / random["kept"])
  show = lambda v: "" if v is None else f"**{v:.2f}**" if v <= 1.2 else f"{v:.2f}"
  columns = [(product, block) for product in PRODUCTS for block in BLOCKS]
  cells = [
    [f"{k} x {o}", batch, *(show(line.get(c)) for c in columns)] for (k, o, batch), line in sorted(lines.items())
  ]
  return table(["K x O", "rows", *(f"{p}, {b.split('x')[0]}" for p, b in columns)], cells)


def decode(rows) -> str:
  """Few rows of x and weights from memory: ratio to dense, and microseconds; the goal is 0.85 / density."""
  found = by_case(rows)
  batches = sorted({row["B"] for row in rows if row["B"] <= _DECODE_ROWS and row["product"] == "fwd"})
  shapes = list(dict.fromkeys((row["K"], row["O"]) for row in rows if row["B"] in batches))
  densities = [density for density in (*GOALS, 0.02) if density < 1]
  head = ["K x O, rows", "block", *(f"{d:g} (goal {_DECODE_EFFICIENCY / d:.3g})" for d in densities)]
  lines = []
  for k, o in shapes:
    for batch in batches:
      for block in BLOCKS:
        mine = [found.get((k, o, batch, block, d, "random", "fwd")) for d in densities]
        if any(mine):
          cell = lambda row, d: f"{number(row['ratio'], _DECODE_EFFICIENCY / d)} ({number(row['us'])})" if row else ""
          lines.append([f"{k} x {o}, {batch}", block, *(cell(row, d) for row, d in zip(mine, densities))])
  return table(head, lines)


def bounds(rows) -> str:
  """Ratio / its bound, and what the bound is: of blocks that are narrower than a tile."""
  found, lines = by_case(rows), []
  mark = {"L2": "", "memory": " m", "tensor cores": " t"}
  for name, (k, o, batch) in GOAL_SHAPES.items():
    for block in BLOCKS:
      for product in PRODUCTS:
        mine = [found.get((k, o, batch, block, d, "random", product)) for d in (*GOALS, 0.02)]
        if any(row and "bound" in row for row in mine):
          cell = lambda row: f"{row['ratio']:.3g} / {row['bound']:.3g}{mark[row['bound by']]}" if row else ""
          lines.append([name.split(" (")[0], block, product, *map(cell, mine)])
  return table(["shape", "block", "product", *(f"{d:g}" for d in (*GOALS, 0.02))], lines)


def crossings(rows) -> str:
  """The density above which the dense dot wins."""
  cells = {(c["K"], c["O"], c["B"], c["product"], c["block"]): c["dense wins above"] for c in break_even(rows)}
  lines = []
  for k, o, batch in sorted({key[:3] for key in cells}):
    line = [cells.get((k, o, batch, product, block)) for product in PRODUCTS for block in BLOCKS]
    lines.append([f"{k} x {o}", batch, *("" if c is None else f"{c:.2f}" for c in line)])
  return table(["K x O", "rows", *(f"{p}, {b.split('x')[0]}" for p in PRODUCTS for b in BLOCKS)], lines)


def grid(rows) -> str:
  """All products of random patterns, "forward" or "forward, dx, dw": ratio to the dense dot."""
  found = by_case(rows)
  densities = sorted({row["density"] for row in rows if row["density"] < 1}, reverse=True)
  lines = []
  for k, o, batch in sorted({(row["K"], row["O"], row["B"]) for row in rows}):
    for block in BLOCKS:
      parts = []
      for density in densities:
        texts = [number(ratio(found, k, o, batch, block, density, "random", product)) or "-" for product in PRODUCTS]
        parts.append(texts[0] if texts[1:] == ["-", "-"] else ", ".join(texts))
      if any(part != "-" for part in parts):
        lines.append([f"{k} x {o}", batch, block, *parts])
  return table(["K x O", "rows", "block", *(f"{d:g}" for d in densities)], lines)


def transformer(found) -> str:
  """What experiments/block_sparse_transformer.py wrote."""
  lines, timed = [], all("ms of the MLPs" in row for row in found["rows"])
  for row in found["rows"]:
    dense = next(
      r for r in found["rows"]
      if r["block"] is None and all(r[k] == row[k] for k in ("dim", "hidden", "layers", "batch_size", "length"))
    )  # fmt: skip
    lines.append([
      f"{row['dim']}, {row['hidden']}, {row['layers']}",
      "dense" if row["block"] is None else f"{row['density']:g}, {row['block']}",
      f"{row['parameters'] / 1e6:.1f}",
      f"{row['ms a step']:.2f}",
      f"{dense['ms a step'] / row['ms a step']:.2f}",
      *([f"{row['ms of the MLPs']:.2f}"] if timed else []),
      f"{row['train loss']:.4f}",
      f"{row['held-out loss']:.4f}",
    ])  # fmt: skip
  head = ["dim, hidden, layers", "density, block", "million parameters", "ms a step", "x faster",
          *(["ms of MLPs"] if timed else []), "loss", "held out"]  # fmt: skip
  return table(head, lines)


def readme(rows) -> str:
  """The largest shape with a goal, in short."""
  found, (k, o, batch) = by_case(rows), next(iter(GOAL_SHAPES.values()))
  densities = (*GOALS, 0.02)
  lines = []
  for block in BLOCKS:
    for product in PRODUCTS:
      mine = [ratio(found, k, o, batch, block, d, "random", product) for d in densities]
      lines.append([f"{product}, blocks of {block.split('x')[0]}", *map(number, mine)])
  return table([f"x faster than XLA's dense dot, {k}^3, bfloat16, H100", *(f"{d:g}" for d in densities)], lines)


def readme_transformer(found) -> str:
  """Steps and losses of the first widths."""
  rows = [row for row in found["rows"] if row["dim"] == found["rows"][0]["dim"]]
  dense = next(row for row in rows if row["block"] is None)
  name = lambda row: "dense" if row["block"] is None else f"density {row['density']:g}, blocks of {row['block']}"
  lines = [
    [name(row), f"{row['parameters'] / 1e6:.1f} M", f"{row['ms a step']:.1f}",
     f"{dense['ms a step'] / row['ms a step']:.2f}", f"{row['train loss']:.3f}", f"{row['held-out loss']:.3f}"]
    for row in rows
  ]  # fmt: skip
  head = [f"MLPs {rows[0]['hidden']} wide, H100", "parameters", "ms a step", "x faster", "loss", "held out"]
  return table(head, lines)


TABLES: dict[str, Callable] = {
  "goals": goals,
  "backward": backward,
  "skewed": skewed,
  "decode": decode,
  "bounds": bounds,
  "break-even": crossings,
  "grid": grid,
  "readme": readme,
}


TRAINED: dict[str, Callable] = {"transformer": transformer, "readme-transformer": readme_transformer}


def tables(found, trained=None) -> dict[str, str]:
  """Name -> Markdown; `trained` is what the transformer wrote."""
  made = {name: make(found["rows"]) for name, make in TABLES.items()}
  return made | ({name: make(trained) for name, make in TRAINED.items()} if trained else {})


def fill(text: str, made: dict[str, str]) -> str:
  """A document with its tables replaced; those that are not given stay.

  >>> fill("a <!-- table: x -->old<!-- end --> b", {"x": "new"})
  'a <!-- table: x -->\\nnew\\n<!-- end --> b'
  """

  def replace(match):
    name = match[1]
    return f"<!-- table: {name} -->\n{made[name]}\n<!-- end -->" if name in made else match[0]

  return re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


# -- Files -------------------------------------------------------------------------------------------------------------


def measured(found) -> str:
  """What `jaxsparse.ops.block_matmul.preference` reads: one line a shape."""
  columns = ("K", "O", "block", "B", "product", "dense wins above")
  lines = [json.dumps([row[c] for c in columns]) for row in break_even(found["rows"])]
  head = {key: found["environment"][key] for key in ("device", "jax")} | {"dtype": "bfloat16", "columns": columns}
  return json.dumps(head)[:-1] + ', "rows": [\n ' + ",\n ".join(lines) + "\n]}\n"


def plot(path, found) -> None:
  """Two pictures: at `path`, and beside it."""
  block_matmul_plot.goals(path, found, BLOCKS, GOAL_SHAPES, GOALS)
  block_matmul_plot.rows_of_x(block_matmul_plot.beside(path), found, BLOCKS, _DECODE_EFFICIENCY)


def main(argv):
  found = json.loads(pathlib.Path(argv[1]).read_text())
  trained = json.loads(pathlib.Path(_TRANSFORMER.value).read_text()) if _TRANSFORMER.value else None
  made = tables(found, trained)
  for name, text in made.items():
    print(f"{name}:\n\n{text}\n")
  for path in map(pathlib.Path, _DOCS.value or ()):
    path.write_text(fill(path.read_text(), made))
  if _MEASURED.value:
    pathlib.Path(_MEASURED.value).write_text(measured(found))
  if _PLOT.value:
    plot(_PLOT.value, found)


if __name__ == "__main__":
  app.run(main)
