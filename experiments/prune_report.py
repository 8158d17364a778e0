"""The report of pruning a language model: report.json, report.md, and a plot of every layer's error."""

from collections.abc import Callable
from collections.abc import Iterable
import functools
import json
import math
import os
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
  """Collects what happens; `write` makes the files of what is known so far, each in one piece.

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

  def layers(self, masks: Iterable[dict[str, jax.Array]], errors: Iterable[dict[str, float]]) -> None:
    """Masks and errors by name, for each block."""
    for i, (block, errors_of) in enumerate(zip(masks, errors)):
      for name in (name for name in llama.LINEARS if name in block):
        size, kept = block[name].size, int(block[name].sum())
        layer = {"name": f"blocks/{i}/{name}", "shape": list(block[name].shape), "size": size, "kept": kept}
        self._layers.append(layer | {"sparsity": 1 - kept / size, "error": errors_of[name]})

  def storage(self, compressed: Any) -> None:
    """Bytes of what is stored, and of dense parameters at two bytes each."""
    is_node = lambda leaf: isinstance(leaf, js.NMArray)
    nbytes = lambda leaf: leaf.nbytes if is_node(leaf) else leaf.size * leaf.dtype.itemsize
    size = lambda leaf: math.prod(leaf.shape)
    leaves = functools.partial(jax.tree.leaves, is_leaf=is_node)
    linears = leaves([[block[name] for name in llama.LINEARS] for block in compressed["blocks"]])
    self._bytes = {
      "linears, dense bfloat16": 2 * sum(map(size, linears)),
      "linears, stored": sum(map(nbytes, linears)),
      "model, dense bfloat16": 2 * sum(map(size, leaves(compressed))),
      "model, stored": sum(map(nbytes, leaves(compressed))),
    }

  def write(self, workdir: pathlib.Path) -> dict[str, Any]:
    """Writes report.json, report.md and, once layers are pruned, errors.png; returns what report.json holds."""
    size, kept = (sum(layer[key] for layer in self._layers) for key in ("size", "kept"))
    out = {
      "perplexities": self.perplexities,
      "sparsity": 1 - kept / size if size else 0.0,
      "seconds": {what: round(seconds, 2) for what, seconds in self.seconds.items()},
      "bytes": self._bytes | ({"model.safetensors": self.file_bytes} if self.file_bytes else {}),
      "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
      "device": str(jax.devices()[0].device_kind),
      "repair_losses": self.losses,
      "layers": self._layers,
      "config": self._config,
    }
    if self._layers:
      _replace(workdir / "errors.png", lambda path: _plot(path, out))
    _replace(workdir / "report.md", lambda path: path.write_text(_markdown(out)))
    _replace(workdir / "report.json", lambda path: path.write_text(json.dumps(out, indent=2) + "\n"))
    return out


def _replace(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
  """The file as it was, or as it is meant to be: a crash leaves nothing between."""
  partial = path.with_name(f".{os.getpid()}.{path.name}")
  write(partial)
  partial.replace(path)


def _markdown(out: dict[str, Any]) -> str:
  config, nbytes = out["config"], out["bytes"]
  corpora = list(next(iter(out["perplexities"].values())))
  share = lambda label, name, of: (
    [f"| {label} | {nbytes[name]:,} bytes, {nbytes[name] / nbytes[of]:.3f} of bfloat16 |"] if name in nbytes else []
  )
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
    *share("linear layers, stored", "linears, stored", "linears, dense bfloat16"),
    *share("model.safetensors", "model.safetensors", "model, dense bfloat16"),
    f"| most memory at a time | {out['peak_resident_bytes'] / 2**20:,.0f} MiB |",
    *(f"| seconds: {what} | {seconds:.1f} |" for what, seconds in out["seconds"].items()),
    "",
    *(["![Error of each layer](errors.png)", ""] if out["layers"] else []),
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
