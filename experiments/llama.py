"""A Llama-style decoder as pure functions of arrays, whose products can be sparse.

Weights are `[in, out]`. Each is a dense array, or anything `jaxsparse.ops.nm_matmul` takes; the queries, keys and values
are one product, and so are the gate and the up projection. `product` says how a weight is multiplied with: `matmul` for
finished weights, `prune_matmul` for dense weights that train as 2:4 ones.

A whole language model is a dictionary, as `experiments.llama_files` reads it: `embedding` `[V, D]`, `blocks`, a list of
dictionaries `attention_norm q k v out mlp_norm gate up down`, `norm` `[D]`, and `head` `[D, V]` where it is not the
embedding. There, weights that share an input are arrays of their own, and `product` receives them as a tuple.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import causal_attention
from experiments import decode_attention
from jaxsparse import ops


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How the rotary frequencies of a model were lowered to reach further.

  Attributes:
    kind: "linear" divides all of them by `factor`; "llama3" only those whose wave is longer than
      `original_positions / low_frequency_factor`, and leaves those alone whose wave is shorter than
      `original_positions / high_frequency_factor`, with a smooth passage between the two.
    factor: at least 1.
    low_frequency_factor, high_frequency_factor, original_positions: of "llama3".

  Raises:
    ValueError: another kind, or numbers that make no sense.
  """

  kind: str
  factor: float
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_positions: int = 8192

  def __post_init__(self):
    if self.kind not in ("linear", "llama3"):
      raise ValueError(f"rope scaling is {self.kind!r}; computed are 'linear' and 'llama3'.")
    if self.factor < 1 or not 0 < self.low_frequency_factor < self.high_frequency_factor:
      raise ValueError(f"{self}: factor must be at least 1, and 0 < low_frequency_factor < high_frequency_factor.")

  def scale(self, frequencies: jax.Array) -> jax.Array:
    if self.kind == "linear":
      return frequencies / self.factor
    waves = self.original_positions * frequencies / (2 * jnp.pi)  # that fit in the original length
    kept = (waves - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
    kept = jnp.clip(kept, 0, 1)
    return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class Config:
  """Shapes of a decoder; the defaults are those of an 8B model.

  Attributes:
    dim: width of the residual stream, D.
    heads: query heads, H.
    kv_heads: key and value heads, each shared by H / kv_heads query heads.
    head_dim: width of a head.
    hidden: width inside the MLP, F.
    rope_theta: base of the rotary frequencies.
    rope_scaling: of these, or None; a mapping, as JSON has it, becomes one.
    layers: number of blocks.
    vocabulary: number of tokens, V.
    norm_epsilon: added to the mean square in RMSNorm.
    tied_embedding: whether the head is the transpose of the embedding.
  """

  dim: int = 4096
  heads: int = 32
  kv_heads: int = 8
  head_dim: int = 128
  hidden: int = 14336
  rope_theta: float = 500_000.0
  layers: int = 32
  vocabulary: int = 128_256
  norm_epsilon: float = 1e-5
  tied_embedding: bool = False
  rope_scaling: RopeScaling | None = None

  def __post_init__(self):
    if isinstance(self.rope_scaling, Mapping):
      object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))

  @property
  def qkv_dims(self) -> tuple[int, int, int]:
    return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim


class Layer(NamedTuple):
  """One block. `qkv` and `gate_up` may be tuples of weights, side by side."""

  attention_norm: jax.Array  # [D]
  qkv: Any  # [D, (H + 2 kv_heads) head_dim]
  out: Any  # [H head_dim, D]
  mlp_norm: jax.Array  # [D]
  gate_up: Any  # [D, 2 F]
  down: Any  # [F, D]


# The weights of a block of a language model that are matrices, in the order in which they are multiplied with.
LINEARS = ("q", "k", "v", "out", "gate", "up", "down")


def layer_of(block: Mapping[str, Any]) -> Layer:
  """The `Layer` of one of a language model's blocks."""
  return Layer(
    attention_norm=block["attention_norm"],
    qkv=(block["q"], block["k"], block["v"]),
    out=block["out"],
    mlp_norm=block["mlp_norm"],
    gate_up=(block["gate"], block["up"]),
    down=block["down"],
  )


def init_layer(key: jax.Array, config: Config, dtype: Any = jnp.bfloat16) -> Layer:
  """Random weights of variance 1 / fan-in."""
  shapes = {
    "qkv": (config.dim, sum(config.qkv_dims)),
    "out": (config.heads * config.head_dim, config.dim),
    "gate_up": (config.dim, 2 * config.hidden),
    "down": (config.hidden, config.dim),
  }
  keys = dict(zip(shapes, jax.random.split(key, len(shapes))))
  weights = {name: jax.random.normal(keys[name], s, dtype) * s[0] ** -0.5 for name, s in shapes.items()}
  return Layer(attention_norm=jnp.ones(config.dim, dtype), mlp_norm=jnp.ones(config.dim, dtype), **weights)


def matmul(x: jax.Array, w: Any) -> jax.Array:
  """`x @ w` for a dense array, an NMArray, a packed weight, or a tuple of them, whose products come side by side."""
  if isinstance(w, tuple):
    return jnp.concatenate([matmul(x, part) for part in w], -1)
  return x @ w if isinstance(w, jax.Array) else ops.nm_matmul(x, w)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float = 1e-5) -> jax.Array:
  wide = x.astype(jnp.float32)
  return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon)).astype(x.dtype) * scale


def rope(x: jax.Array, positions: jax.Array, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
  """Rotates `[B, T, heads, head_dim]` by positions `[T]`, the halves of a head being the two coordinates."""
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half) / half)
  angles = positions[:, None] * (frequencies if scaling is None else scaling.scale(frequencies))
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def mlp(gate_up: Any, down: Any, x: jax.Array, product: Callable = matmul) -> jax.Array:
  """`(silu(x @ gate) * (x @ up)) @ down`."""
  gate, up = jnp.split(product(x, gate_up), 2, -1)
  return product(jax.nn.silu(gate) * up, down)


def _heads(layer, x, positions, config, product):
  """Queries `[B, T, H, head_dim]`, keys and values `[B, T, kv_heads, head_dim]`."""
  qkv = product(rms_norm(x, layer.attention_norm, config.norm_epsilon), layer.qkv)
  q, k, v = jnp.split(qkv, [config.qkv_dims[0], sum(config.qkv_dims[:2])], -1)
  q, k, v = (a.reshape(*x.shape[:2], -1, config.head_dim) for a in (q, k, v))
  turn = lambda x: rope(x, positions, config.rope_theta, config.rope_scaling)
  return turn(q), turn(k), v


def block(
  layer: Layer,
  x: jax.Array,
  config: Config,
  product: Callable = matmul,
  attend: Callable = jax.nn.dot_product_attention,
) -> jax.Array:
  """One layer over whole sequences, causal: `[B, T, D]` -> `[B, T, D]`."""
  q, k, v = _heads(layer, x, jnp.arange(x.shape[1]), config, product)
  attended = attend(q, k, v, is_causal=True)
  x = x + product(attended.reshape(*x.shape[:2], -1), layer.out)
  return x + mlp(layer.gate_up, layer.down, rms_norm(x, layer.mlp_norm, config.norm_epsilon), product)


def decode_block(
  layer: Layer,
  cache: jax.Array,
  x: jax.Array,
  position: jax.Array,
  config: Config,
  product: Callable = matmul,
  attend: Callable = decode_attention.reference,
) -> tuple[jax.Array, jax.Array]:
  """One layer of one decoding step.

  Args:
    layer: the weights.
    cache: `[B, 2, kv_heads, T, head_dim]`, keys and values of the positions before.
    x: `[B, D]`, the residual stream at `position`.
    position: int32 scalar, the same for the whole batch.
    config: shapes.
    product: how weights are multiplied with.
    attend: `decode_attention.reference`, or on an H100 `decode_attention.attention`.

  Returns:
    The cache with this position written, and `[B, D]`.
  """
  q, k, v = _heads(layer, x[:, None], position[None], config, product)
  written = jnp.stack([k, v], 1).swapaxes(2, 3)  # one write for both
  cache = jax.lax.dynamic_update_slice(cache, written, (0, 0, 0, position, 0))
  q = q.reshape(x.shape[0], config.kv_heads, -1, config.head_dim)  # query heads that share a key head
  x = x + product(attend(q, cache, position).reshape(x.shape[0], -1), layer.out)
  return cache, x + mlp(layer.gate_up, layer.down, rms_norm(x, layer.mlp_norm, config.norm_epsilon), product)


def apply_block(
  params: Mapping[str, Any],
  x: jax.Array,
  config: Config,
  product: Callable = matmul,
  attend: Callable = causal_attention.causal_attention,
) -> jax.Array:
  """`block` for one of a language model's blocks."""
  return block(layer_of(params), x, config, product, attend)


def embed(params: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
  """Tokens `[...]` -> the residual stream before the first block, `[..., D]`."""
  return params["embedding"][tokens]


def embed_rows(params: Mapping[str, Any], rows: np.ndarray, batch: int) -> list[jax.Array]:
  """`embed` of rows `[R, T]`, `batch` rows at a time; the embedding is asked for once."""
  table = {"embedding": params["embedding"]}
  return [embed(table, jnp.asarray(rows[i : i + batch])) for i in range(0, len(rows), batch)]


def logits(params: Mapping[str, Any], x: jax.Array, config: Config) -> jax.Array:
  """The residual stream after the last block `[..., D]` -> float32 logits of the next token, `[..., V]`."""
  x = rms_norm(x, params["norm"], config.norm_epsilon)
  axis = 1 if config.tied_embedding else 0
  weight = params["embedding"] if config.tied_embedding else params["head"]
  contract = ((x.ndim - 1,), (axis,)), ((), ())
  return jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)
