"""The report of a run: report.json, report.md, and two plots."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

import jax
from matplotlib import figure
from matplotlib import ticker
import ml_collections

from experiments import metrics
import jaxsparse as js

_BLUE, _ORANGE, _GREY = "#2f6db3", "#d9772b", "#b8bec6"


def write(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  updater: js.Updater,
  params: Any,
  masks: Any,
  test: dict[str, float],
  rows: Sequence[dict[str, float]],
) -> dict[str, Any]:
  """Writes report.md, report.json, sparsity_per_layer.png and curves.png.

  Args:
    workdir: where they go.
    config: of the run.
    updater: of the run.
    params: exported parameters.
    masks: exported masks; layers without one are dense.
    test: test metrics of these parameters (of the last step, not of the best).
    rows: the metrics over training, as `MetricsWriter` keeps them.

  Returns:
    What report.json holds.
  """
  sparsity = {k: float(v) for k, v in jax.device_get(metrics.weight_sparsity(params, masks)).items()}
  masked_names = js.summarize_sparsity(masks)
  layers = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    masked = name in masked_names
    kept = leaf.size - round(sparsity.get(name, 0.0) * leaf.size)
    layers.append(
      {
        "name": name,
        "shape": list(leaf.shape),
        "masked": masked,
        "size": leaf.size,
        "kept": kept,
        "sparsity": sparsity.get(name, 0.0),
      }
    )
  total = sum(layer["size"] for layer in layers)
  out = {
    "updater": repr(updater),
    "steps": config.steps,
    **{name: float(value) for name, value in test.items()},
    "sparsity": sparsity["_total_sparsity"],
    "parameters": total,
    "parameters_kept": js.count_parameters(params, masks),
    "layers": layers,
    "config": json.loads(config.to_json_best_effort()),
  }
  (workdir / "report.json").write_text(json.dumps(out, indent=2) + "\n")
  (workdir / "report.md").write_text(_markdown(out))
  _plot_layers(workdir / "sparsity_per_layer.png", out)
  _plot_curves(workdir / "curves.png", out, rows)
  return out


def _markdown(out: dict[str, Any]) -> str:
  kept, total = out["parameters_kept"], out["parameters"]
  lines = [
    f"# `{out['updater']}` on {out['config']['dataset']}",
    "",
    "| after the last step | |",
    "|---|---:|",
    f"| steps | {out['steps']:,} |",
    f"| test accuracy | {100 * out['test_accuracy']:.2f} % |",
    f"| test loss | {out['test_loss']:.4f} |",
    f"| sparsity, over all weights of two dimensions or more | {100 * out['sparsity']:.2f} % |",
    f"| parameters kept, dense ones included | {kept:,} of {total:,} ({100 * kept / total:.2f} %) |",
    "",
    "| layer | shape | sparsity | kept |",
    "|---|---|---:|---:|",
  ]
  for layer in out["layers"]:
    sparsity = f"{100 * layer['sparsity']:.2f} %" if layer["masked"] else "dense"
    shape = " x ".join(map(str, layer["shape"]))
    lines.append(f"| {layer['name']} | {shape} | {sparsity} | {layer['kept']:,} |")
  plots = ["", "![Sparsity of each layer](sparsity_per_layer.png)", "", "![Curves](curves.png)", ""]
  return "\n".join(lines + plots)


def _plot_layers(path: pathlib.Path, out: dict[str, Any]) -> None:
  """Horizontal bars, one a weight layer, in the order of the parameters; dense ones are marked as such."""
  # Biases and scales stay dense under the default rules; a bar for each would hide the layers that matter.
  layers = [layer for layer in out["layers"] if layer["masked"] or len(layer["shape"]) >= 2]
  fig = figure.Figure(figsize=(8, 1.6 + 0.45 * len(layers)), layout="constrained", dpi=120)
  axes = fig.subplots()
  for i, layer in enumerate(layers):
    percent = 100 * layer["sparsity"]
    axes.barh(i, percent, color=_BLUE, height=0.65)
    said = f"{percent:.2f} %" if layer["masked"] else "dense"
    axes.text(103, i, f"{said}  ({layer['kept']:,} of {layer['size']:,} kept)", va="center", fontsize=9)
  if out["sparsity"] > 0:
    axes.axvline(
      100 * out["sparsity"], color=_ORANGE, linestyle="--", label=f"all weights: {100 * out['sparsity']:.2f} %"
    )
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
  names = [f"{layer['name']}\n{' x '.join(map(str, layer['shape']))}" for layer in layers]
  axes.set_yticks(range(len(layers)), names, fontsize=9)
  axes.invert_yaxis()
  # Room right of 100 % for the labels.
  axes.set_xlim(0, 160)
  axes.set_xticks(range(0, 101, 20))
  axes.set_xlabel("weights removed (%)", loc="left")
  axes.spines[["top", "right"]].set_visible(False)
  fig.suptitle(f"Sparsity of each layer: {out['updater']}", fontsize=10, wrap=True)
  fig.savefig(path)


def _plot_curves(path: pathlib.Path, out: dict[str, Any], rows: Sequence[dict[str, float]]) -> None:
  """Loss, accuracy and sparsity over the steps, under one another."""
  fig = figure.Figure(figsize=(8, 8), layout="constrained", dpi=120)
  loss, accuracy, sparsity = fig.subplots(3, 1, sharex=True)
  for axes, kind, label, factor in ((loss, "loss", "cross-entropy", 1), (accuracy, "accuracy", "accuracy (%)", 100)):
    _line(axes, rows, f"train_{kind}", factor, color=_GREY, linewidth=1, label="training, one batch")
    _line(axes, rows, f"test_{kind}", factor, color=_BLUE, marker="o", markersize=3, label="test set")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=9)
  # A diverged start must not flatten the rest.
  loss.set_yscale("log")
  loss.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  loss.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  loss.yaxis.set_minor_formatter(ticker.NullFormatter())
  names = [name for name in rows[-1] if name.startswith("sparsity/") and not name.endswith("/_total_sparsity")]
  for name in names[:8]:
    _line(sparsity, rows, name, 100, linewidth=1.2, drawstyle="steps-post", label=name.removeprefix("sparsity/"))
  _line(
    sparsity,
    rows,
    "sparsity/_total_sparsity",
    100,
    color="black",
    linewidth=1.8,
    drawstyle="steps-post",
    label="all weights",
  )
  if len(names) > 8:
    sparsity.set_title(f"the first 8 of {len(names)} layers", fontsize=9)
  sparsity.set_ylim(-2, 102)
  sparsity.set_ylabel("weights removed (%)")
  sparsity.set_xlabel("step")
  sparsity.legend(frameon=False, fontsize=9, ncols=2)
  fig.suptitle(f"{out['updater']} on {out['config']['dataset']}", fontsize=10, wrap=True)
  for axes in (loss, accuracy, sparsity):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
  fig.savefig(path)


def _line(axes, rows, name, factor, **style) -> None:
  points = [(row["step"], factor * row[name]) for row in rows if name in row]
  axes.plot([x for x, _ in points], [y for _, y in points], **style)
