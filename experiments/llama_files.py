"""Llama-family checkpoints, read into the parameters of `experiments.llama`: safetensors folders and GGUF files.

Both kinds of file hold matrices as `[out, in]` under names of their own; a table of names says what is expected, so that
a checkpoint of another architecture is an error that lists what does not fit, not a model that computes nonsense.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import functools
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import llama
from experiments import model_blocks

# Our name of a leaf in a block -> its name in the file, after the prefix of the block.
_SAFETENSORS_BLOCK = {
  "attention_norm": "input_layernorm",
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "out": "self_attn.o_proj",
  "mlp_norm": "post_attention_layernorm",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}
_SAFETENSORS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_GGUF_BLOCK = {
  "attention_norm": "attn_norm",
  "q": "attn_q",
  "k": "attn_k",
  "v": "attn_v",
  "out": "attn_output",
  "mlp_norm": "ffn_norm",
  "gate": "ffn_gate",
  "up": "ffn_up",
  "down": "ffn_down",
}
_GGUF = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}


_ROWS = 4096  # of a quantised matrix that are dequantised at a time, which takes several times their size


class Tensor(NamedTuple):
  """A tensor of a file.

  Attributes:
    shape: as the file has it.
    read: returns it.
  """

  shape: tuple[int, ...]
  read: Callable[[], Any]


def load_safetensors_folder(
  folder: str | pathlib.Path, dtype: Any = jnp.float32, *, streamed: bool = False
) -> tuple[llama.Config, Mapping[str, Any]]:
  """Reads `config.json` and every `*.safetensors` of a folder, in the layout of Hugging Face's `LlamaForCausalLM`.

  Args:
    folder: of the checkpoint, sharded or not.
    dtype: of the parameters.
    streamed: whether the parameters are `model_blocks.StreamedParams`.

  Returns:
    The configuration and the parameters.

  Raises:
    FileNotFoundError: a file is missing.
    ImportError: without the safetensors package.
    ValueError: the configuration asks for what `experiments.llama` does not compute, or the tensors are not those that
      the configuration calls for.
  """
  folder = pathlib.Path(folder).expanduser()
  if not (folder / "config.json").is_file():
    raise FileNotFoundError(
      f"{folder} has no config.json; a checkpoint is a folder with config.json and *.safetensors."
    )
  files = sorted(folder.glob("*.safetensors"))
  if not files:
    raise FileNotFoundError(f"{folder} has a config.json, but no *.safetensors.")
  config = _config_of_json(json.loads((folder / "config.json").read_text()), folder / "config.json")
  try:
    import safetensors
    import safetensors.flax  # noqa: F401  reads bfloat16
  except ImportError as error:
    raise ImportError("Reading a checkpoint needs safetensors: pip install 'jaxsparse[safetensors]'") from error
  tensors = {}
  for path in files:
    with safetensors.safe_open(path, framework="flax") as file:
      # Old checkpoints store the rotary frequencies, which follow from the configuration.
      names = [name for name in file.keys() if not name.endswith("rotary_emb.inv_freq")]
      shapes_of = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    tensors |= {name: Tensor(shape, functools.partial(_safetensor, path, name)) for name, shape in shapes_of.items()}
  # Some files of tied models hold the embedding a second time.
  if config.tied_embedding:
    tensors.pop("lm_head.weight", None)
  layout = _Layout(_SAFETENSORS, "model.layers.", _SAFETENSORS_BLOCK)
  return config, _assemble(tensors, config, layout, dtype, folder, streamed)


def _safetensor(path, name):
  import safetensors

  # Opened for each tensor: an open file is mapped, and what has been read of it counts as memory of this process.
  with safetensors.safe_open(path, framework="flax") as file:
    return file.get_tensor(name)


def load_gguf(
  path: str | pathlib.Path, dtype: Any = jnp.float32, *, streamed: bool = False
) -> tuple[llama.Config, Mapping[str, Any]]:
  """Reads a GGUF file of the llama architecture; quantised tensors are dequantised.

  Args:
    path: of the file.
    dtype: of the parameters.
    streamed: whether the parameters are `model_blocks.StreamedParams`.

  Returns:
    The configuration and the parameters.

  Raises:
    FileNotFoundError: there is no such file.
    ImportError: without the gguf package.
    ValueError: another architecture, or tensors that it does not have.
  """
  reader = open_gguf(path)
  config = _config_of_gguf(reader, path)
  path = pathlib.Path(path).expanduser()
  tensors = {t.name: Tensor(tuple(int(n) for n in t.shape[::-1]), _gguf_reader(path, t)) for t in reader.tensors}
  # Rows of a head come as pairs (0, 1), (2, 3), ... that are rotated together; `llama.rope` rotates halves.
  heads = {"q": config.heads, "k": config.kv_heads}

  def halves(name, value):
    if name not in heads:
      return value
    return value.reshape(heads[name], -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)

  return config, _assemble(tensors, config, _Layout(_GGUF, "blk.", _GGUF_BLOCK, halves), dtype, path, streamed)


def _gguf_reader(path, tensor):
  """A function that reads and dequantises a tensor; it holds no part of the mapped file."""
  from gguf import quants

  kind, stored, offset = tensor.tensor_type, (tensor.data.dtype, tensor.data.shape), int(tensor.data_offset)

  def read():
    dtype, shape = stored
    data = np.fromfile(path, dtype, count=math.prod(shape), offset=offset).reshape(shape)
    if data.shape[0] <= _ROWS:
      return quants.dequantize(data, kind)
    out = None
    for i in range(0, shape[0], _ROWS):
      part = quants.dequantize(data[i : i + _ROWS], kind)
      out = np.empty((shape[0], *part.shape[1:]), part.dtype) if out is None else out
      out[i : i + _ROWS] = part
    return out

  return read


def open_gguf(path: str | pathlib.Path) -> Any:
  """A `gguf.GGUFReader`.

  Raises:
    FileNotFoundError: there is no such file.
    ImportError: without the gguf package.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"There is no GGUF file {path}.")
  try:
    import gguf
  except ImportError as error:
    raise ImportError("Reading a GGUF file needs the gguf package: pip install 'jaxsparse[language]'") from error
  return gguf.GGUFReader(path)


def _config_of_json(given: Mapping[str, Any], path: pathlib.Path) -> llama.Config:
  rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
  allowed = {
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
  }
  asked = {"hidden_act": "silu", **given}
  wrong = [f"{name} is {asked.get(name)!r}" for name, values in allowed.items() if asked.get(name) not in values]
  try:
    scaling = _rope_scaling(rope)
  except (ValueError, KeyError) as error:
    wrong.append(str(error) if isinstance(error, ValueError) else f"rope scaling has no {error}")
  needed = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "vocab_size")
  wrong += [f"{name} is missing" for name in needed if name not in given]
  if wrong:
    raise ValueError(
      f"{path} describes a model that is not computed here: {', '.join(wrong)}. Read are Llama and Mistral models without "
      "biases and sliding windows, with rope scaling 'linear' or 'llama3' or none."
    )
  heads = given["num_attention_heads"]
  return llama.Config(
    dim=given["hidden_size"],
    heads=heads,
    kv_heads=given.get("num_key_value_heads") or heads,
    head_dim=given.get("head_dim") or given["hidden_size"] // heads,
    hidden=given["intermediate_size"],
    rope_theta=float(given.get("rope_theta", rope.get("rope_theta", 10_000.0))),
    layers=given["num_hidden_layers"],
    vocabulary=given["vocab_size"],
    norm_epsilon=given.get("rms_norm_eps", 1e-6),
    tied_embedding=bool(given.get("tie_word_embeddings", False)),
    rope_scaling=scaling,
  )


def _rope_scaling(given: Mapping[str, Any]) -> llama.RopeScaling | None:
  """Of config.json's `rope_scaling` or `rope_parameters`; KeyError or ValueError where it cannot be computed."""
  kind = given.get("rope_type", given.get("type", "default"))
  if kind == "default":
    return None
  if kind != "llama3":
    return llama.RopeScaling(kind, float(given["factor"]) if kind == "linear" else 1.0)
  names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
  return llama.RopeScaling(kind, *(given[name] for name in names))


def _config_of_gguf(reader: Any, path: Any) -> llama.Config:
  fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
  architecture = fields.get("general.architecture")
  if architecture != "llama":
    raise ValueError(f"{path} holds a model of architecture {architecture!r}; only 'llama' is computed here.")
  field = lambda name, default=None: fields.get(f"llama.{name}", default)
  dim, heads = field("embedding_length"), field("attention.head_count")
  scaling, factor = field("rope.scaling.type", "none"), field("rope.scaling.factor", 1.0)
  if scaling not in ("none", "linear"):
    raise ValueError(f"{path}: rope scaling is {scaling!r}; of GGUF files, 'linear' and 'none' are read.")
  embedding = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
  return llama.Config(
    dim=dim,
    heads=heads,
    kv_heads=field("attention.head_count_kv", heads),
    head_dim=field("attention.key_length", dim // heads),
    hidden=field("feed_forward_length"),
    rope_theta=float(field("rope.freq_base", 10_000.0)),
    layers=field("block_count"),
    vocabulary=field("vocab_size", 0 if embedding is None else int(embedding.shape[1])),
    norm_epsilon=float(field("attention.layer_norm_rms_epsilon")),
    tied_embedding=not any(t.name == "output.weight" for t in reader.tensors),
    rope_scaling=llama.RopeScaling("linear", float(factor)) if scaling == "linear" else None,
  )


def shapes(config: llama.Config) -> dict[str, tuple[int, ...]]:
  """Our shapes, `[in, out]`, by our names."""
  dim, (q, k, v) = config.dim, config.qkv_dims
  return {
    "embedding": (config.vocabulary, dim),
    "norm": (dim,),
    "head": (dim, config.vocabulary),
    "attention_norm": (dim,),
    "q": (dim, q),
    "k": (dim, k),
    "v": (dim, v),
    "out": (q, dim),
    "mlp_norm": (dim,),
    "gate": (dim, config.hidden),
    "up": (dim, config.hidden),
    "down": (config.hidden, dim),
  }


class _Layout(NamedTuple):
  """What a kind of file calls its tensors, and how its matrices differ from the transposes of ours."""

  top: Mapping[str, str]
  prefix: str
  block: Mapping[str, str]
  change: Callable[[str, Any], Any] = lambda name, value: value


def _assemble(
  tensors: Mapping[str, Tensor], config: llama.Config, layout: _Layout, dtype: Any, where: Any, streamed: bool
) -> Mapping[str, Any]:
  """The tree of parameters, once names and shapes in the file are exactly the ones that are expected."""
  top = {ours: f"{theirs}.weight" for ours, theirs in layout.top.items() if ours != "head" or not config.tied_embedding}
  blocks = [
    {ours: f"{layout.prefix}{i}.{name}.weight" for ours, name in layout.block.items()} for i in range(config.layers)
  ]
  named = [item for part in (top, *blocks) for item in part.items()]
  _check_names(tensors, [theirs for _, theirs in named], where)
  wanted = shapes(config)
  for ours, theirs in named:
    shape = wanted[ours] if ours == "embedding" else wanted[ours][::-1]
    if tensors[theirs].shape != shape:
      raise ValueError(f"{where}: {theirs} has shape {tensors[theirs].shape}; the configuration calls for {shape}.")

  def read(part):
    values = {ours: layout.change(ours, np.asarray(tensors[theirs].read())) for ours, theirs in part.items()}
    return {ours: jnp.asarray(v if ours == "embedding" else v.T, dtype) for ours, v in values.items()}

  stream = model_blocks.StreamedBlocks(lambda i: read(blocks[i]), config.layers)
  if streamed:
    return model_blocks.StreamedParams(lambda name: read({name: top[name]})[name], tuple(top), stream)
  return read(top) | {"blocks": list(stream)}


def _check_names(found: Iterable[str], expected: Iterable[str], where: Any) -> None:
  missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
  if missing or unexpected:
    some = lambda names: ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    parts = [f"lacks {some(missing)}"] if missing else []
    parts += [f"has {some(unexpected)}, which a Llama model does not"] if unexpected else []
    raise ValueError(f"{where} {' and '.join(parts)}. Its tensors must be those of a Llama model without biases.")
