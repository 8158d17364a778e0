"""The report of pruning a language model: report.json, report.md, and a plot of every layer's error."""

from collections.abc import Sequence
import json
import pathlib
import resource
from typing import Any

import jax
from matplotlib import figure
import ml_collections

from experiments import llama
import jaxsparse as js

# One colour for each kind of layer, those that share an input alike in hue.
_COLOURS = dict(zip(llama.LINEARS, ("#2f6db3", "#6fa3d8", "#a9c8e8", "#4d4d4d", "#d9772b", "#eeb182", "#3a8f5c")))


class Report:
  """Collects what happens; `write` makes the files.

  Attributes:
    perplexities: {stage: {corpus: perplexity}}.
    seconds: {what: seconds}.
    losses: of repair.
    file_bytes: of the weights on disk.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    self._config = json.loads(config.to_json_best_effort())
    self.perplexities: dict[str, dict[str, float]] = {}
    self.seconds: dict[str, float] = {}
    self.losses: list[float] = []
    self.file_bytes = 0
    self._layers: list[dict[str, Any]] = []
    self._bytes: dict[str, int] = {}

  def layers(self, masks: Sequence[dict[str, jax.Array]], errors: Sequence[dict[str, float]]) -> None:
    """Masks and errors by name, for each block."""
    for i, block in enumerate(masks):
      for name in (name for name in llama.LINEARS if name in block):
        size, kept = block[name].size, int(block[name].sum())
        layer = {"name": f"blocks/{i}/{name}", "shape": list(block[name].shape), "size": size, "kept": kept}
        self._layers.append(layer | {"sparsity": 1 - kept / size, "error": errors[i][name]})

  def storage(self, dense: Any, compressed: Any) -> None:
    """Bytes of the dense parameters at two bytes each, and of what is stored."""
    is_node = lambda leaf: isinstance(leaf, js.NMArray)
    nbytes = lambda leaf: leaf.nbytes if is_node(leaf) else leaf.size * leaf.dtype.itemsize
    linears = lambda tree: [[block[name] for name in llama.LINEARS] for block in tree["blocks"]]
    self._bytes = {
      "linears, dense bfloat16": sum(2 * leaf.size for leaf in jax.tree.leaves(linears(dense))),
      "linears, stored": sum(nbytes(leaf) for leaf in jax.tree.leaves(linears(compressed), is_leaf=is_node)),
      "model, dense bfloat16": sum(2 * leaf.size for leaf in jax.tree.leaves(dense)),
      "model, stored": sum(nbytes(leaf) for leaf in jax.tree.leaves(compressed, is_leaf=is_node)),
    }

  def write(self, workdir: pathlib.Path) -> dict[str, Any]:
    """Writes the files; returns what report.json holds."""
    size, kept = (sum(layer[key] for layer in self._layers) for key in ("size", "kept"))
    out = {
      "perplexities": self.perplexities,
      "sparsity": 1 - kept / size,
      "seconds": {what: round(seconds, 2) for what, seconds in self.seconds.items()},
      "bytes": self._bytes | {"model.safetensors": self.file_bytes},
      "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
      "device": str(jax.devices()[0].device_kind),
      "repair_losses": self.losses,
      "layers": self._layers,
      "config": self._config,
    }
    (workdir / "report.json").write_text(json.dumps(out, indent=2) + "\n")
    (workdir / "report.md").write_text(_markdown(out))
    _plot(workdir / "errors.png", out)
    return out


def _markdown(out: dict[str, Any]) -> str:
  config = out["config"]
  corpora = list(next(iter(out["perplexities"].values())))
  stored, before = out["bytes"]["linears, stored"], out["bytes"]["linears, dense bfloat16"]
  model, whole = out["bytes"]["model.safetensors"], out["bytes"]["model, dense bfloat16"]
  lines = [
    f"# {config['model']}, {config['method']['name']} at {100 * out['sparsity']:.2f} %",
    "",
    "| perplexity | " + " | ".join(corpora) + " |",
    "|---|" + "---:|" * len(corpora),
    *(
      f"| {stage} | " + " | ".join(f"{of[corpus]:.2f}" for corpus in corpora) + " |"
      for stage, of in out["perplexities"].items()
    ),
    "",
    *(["The dense weights were dequantised from 4 bits.", ""] if _is_quantised(config["model"]) else []),
    "| | |",
    "|---|---:|",
    f"| sparsity of the linear layers | {100 * out['sparsity']:.2f} % |",
    f"| linear layers, stored | {stored:,} bytes, {stored / before:.3f} of bfloat16 |",
    f"| model.safetensors | {model:,} bytes, {model / whole:.3f} of the dense bfloat16 model |",
    f"| most memory at a time | {out['peak_resident_bytes'] / 2**20:,.0f} MiB |",
    *(f"| seconds: {what} | {seconds:.1f} |" for what, seconds in out["seconds"].items()),
    "",
    "![Error of each layer](errors.png)",
    "",
    "| layer | shape | sparsity | error |",
    "|---|---|---:|---:|",
    *(
      f"| {layer['name']} | {' x '.join(map(str, layer['shape']))} | {100 * layer['sparsity']:.2f} % "
      f"| {layer['error']:.4f} |"
      for layer in out["layers"]
    ),
  ]
  return "\n".join(lines) + "\n"


def _is_quantised(model: str) -> bool:
  return model == "smollm2" or model.endswith(".gguf")


def _plot(path: pathlib.Path, out: dict[str, Any]) -> None:
  """Relative error of the output of every layer, over the blocks; one line for each kind of layer."""
  fig = figure.Figure(figsize=(8, 4.5), layout="constrained", dpi=120)
  axes = fig.subplots()
  for kind, colour in _COLOURS.items():
    layers = [layer for layer in out["layers"] if layer["name"].rsplit("/", 1)[1] == kind]
    blocks = [int(layer["name"].split("/")[1]) for layer in layers]
    axes.plot(blocks, [layer["error"] for layer in layers], "o-", color=colour, markersize=3, linewidth=1.3, label=kind)
  axes.set_yscale("log")
  axes.set_xlabel("block")
  axes.set_ylabel("squared error of the output, relative")
  axes.set_title(f"{out['config']['method']['name']}, {100 * out['sparsity']:.1f} % removed", fontsize=10)
  fig.legend(frameon=False, fontsize=9, loc="outside right center")
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(alpha=0.25)
  fig.savefig(path)
