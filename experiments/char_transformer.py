"""A character-level transformer on the State of the Union addresses: the model, and training as one device program.

    python experiments/char_transformer.py --config=configs/char_transformer.py --config.updater.name=sr_ste

Parameters are float32, products and activations bfloat16. The corpus lies on the device and batches are drawn inside the
program, so that a chunk of hundreds of steps is one call. All seeds train side by side, as one vmapped program.
"""

from collections.abc import Callable
import functools
import math
import pathlib
import sys
import time
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from ml_collections import config_flags
import numpy as np
import optax

from experiments import corpus as corpus_lib
from experiments import llama
from experiments import optimizers
import jaxsparse as js


class Run(NamedTuple):
  """What trains: two functions of arrays, to be jitted.

  Attributes:
    init: seed (int32 scalar) -> carry.
    chunk: (carry, text) -> (carry, mean training loss of the chunk, parameters as they would be exported now).
    chunks: how many chunks make the whole run.
  """

  init: Callable
  chunk: Callable
  chunks: int


def shapes(config: ConfigDict) -> llama.Config:
  """Shapes of one layer."""
  model = config.model
  head_dim = model.dim // model.heads
  return llama.Config(
    dim=model.dim, heads=model.heads, kv_heads=model.heads, head_dim=head_dim, hidden=model.hidden, rope_theta=1e4
  )


def init_params(key: jax.Array, config: ConfigDict, vocabulary: int) -> dict[str, Any]:
  """Parameters, float32: the layers' leaves are stacked, `[layers, ...]`; the embedding is also the output layer."""
  embedding, layers = jax.random.split(key)
  make = functools.partial(llama.init_layer, config=shapes(config), dtype=jnp.float32)
  return {
    "embedding": jax.random.normal(embedding, (vocabulary, config.model.dim)) * 0.02,
    "layers": jax.vmap(make)(jax.random.split(layers, config.model.layers)),
    "norm": jnp.ones(config.model.dim),
  }


def loss(params: dict[str, Any], windows: jax.Array, config: ConfigDict) -> jax.Array:
  """shape=(), float32: mean cross-entropy, in nats a character, of windows `[B, T + 1]` of character numbers."""
  narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  # A product, not a lookup: the gradient of a lookup would be summed up in bfloat16.
  x = jax.nn.one_hot(windows[:, :-1], len(narrow["embedding"]), dtype=jnp.bfloat16) @ narrow["embedding"]
  attend = functools.partial(jax.nn.dot_product_attention, implementation=config.model.attention)
  body = lambda x, layer: (llama.block(layer, x, shapes(config), lambda x, w: x @ w, attend), None)
  x, _ = jax.lax.scan(body, x, narrow["layers"], unroll=config.model.unroll)
  logits = llama.rms_norm(x, narrow["norm"]) @ narrow["embedding"].T
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), windows[:, 1:]).mean()


def make_run(config: ConfigDict, vocabulary: int) -> Run:
  """The training of one configuration.

  Args:
    config: see configs/char_transformer.py.
    vocabulary: number of characters.

  Raises:
    ValueError, TypeError: for an updater or optimizer that cannot be made, or steps that the chunks do not divide.
  """
  if config.steps % config.chunks:
    raise ValueError(f"config.steps={config.steps} must be a multiple of config.chunks={config.chunks}.")
  updater = js.create_updater(config.updater)
  optimizer, _ = optimizers.create(config.optimizer, config.steps)
  tx = optax.chain(optax.clip_by_global_norm(config.clip), updater.wrap_optax(optimizer))

  def init(seed):
    key, data = jax.random.split(jax.random.key(seed))
    params = init_params(key, config, vocabulary)
    state = tx.init(params)
    if updater.forward.storage == "hard":
      params = updater.sparse_params(params, state)
    return params, state, data

  def step(carry, _, text):
    params, state, key = carry
    key, now = jax.random.split(key)
    starts = jax.random.randint(now, (config.batch_size, 1), 0, text.size - config.length)
    windows = text[starts + jnp.arange(config.length + 1)].astype(jnp.int32)
    value, grads = jax.value_and_grad(lambda p: loss(updater.forward_params(p, state), windows, config))(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state, key), value

  def chunk(carry, text):
    carry, losses = jax.lax.scan(functools.partial(step, text=text), carry, length=config.steps // config.chunks)
    return carry, losses.mean(), updater.sparse_params(carry[0], carry[1])

  return Run(init, chunk, config.chunks)


def validation_windows(tokens: np.ndarray, length: int, count: int) -> np.ndarray:
  """`[4, count / 4, length + 1]`, uint8: windows that follow one another, each predicting `length` characters."""
  count = min(count, (tokens.size - 1) // length) // 4 * 4
  if not count:
    raise ValueError(f"The held-out text of {tokens.size} characters has fewer than 4 windows of {length}.")
  starts = np.arange(count)[:, None] * length
  return tokens[starts + np.arange(length + 1)].reshape(4, count // 4, length + 1)


def make_evaluate(config: ConfigDict) -> Callable:
  """(parameters, windows `[n, length + 1]`) -> the mean loss, a batch at a time."""

  def evaluate(params, windows):
    batches = windows.reshape(-1, math.gcd(len(windows), config.batch_size), config.length + 1)
    return jax.lax.map(lambda batch: loss(params, batch.astype(jnp.int32), config), batches).mean()

  return evaluate


def compile_evaluate(config: ConfigDict, vocabulary: int, windows: jax.Array) -> Any:
  """`make_evaluate` for all seeds at once, compiled for one quarter of the windows."""
  shape = jax.eval_shape(
    jax.vmap(lambda key: init_params(key, config, vocabulary)), jax.random.split(jax.random.key(0), config.seeds)
  )
  return jax.jit(jax.vmap(make_evaluate(config), in_axes=(0, None))).lower(shape, windows[0]).compile()


def compile_run(config: ConfigDict, vocabulary: int, text: jax.Array) -> tuple[Any, Any, int]:
  """`Run` of all seeds side by side, compiled: (carry of the first step, chunk, chunks)."""
  run = make_run(config, vocabulary)
  seeds = jnp.arange(config.seeds)
  carry = jax.jit(jax.vmap(run.init)).lower(seeds).compile()(seeds)
  chunk = jax.jit(jax.vmap(run.chunk, in_axes=(0, None)), donate_argnums=0)
  return carry, chunk.lower(carry, text).compile(), run.chunks


def train(carry: Any, chunk: Callable, chunks: int, text: jax.Array, evaluate: Callable, windows: jax.Array) -> dict:
  """Trains a compiled run to the end.

  Args:
    carry, chunk, chunks: from `compile_run`.
    text: the training characters.
    evaluate: from `compile_evaluate`.
    windows: from `validation_windows`.

  Returns:
    `train` and `validation`: the curves `[chunks, seeds]` (validation on the first quarter of the windows);
    `final`: validation loss of every seed on all windows; `kept`: share of the layers' weights that are not zero;
    `seconds`: wall-clock time of training.
  """
  start = time.perf_counter()
  losses, curve = [], []
  params = None
  for _ in range(chunks):
    carry, value, params = chunk(carry, text)
    losses.append(value)
    curve.append(evaluate(params, windows[0]))
  curve = np.asarray(jax.device_get(curve), np.float64)
  seconds = time.perf_counter() - start
  rest = jax.device_get([evaluate(params, part) for part in windows[1:]])
  layers = params["layers"]
  weights = [layers.qkv, layers.out, layers.gate_up, layers.down]
  return {
    "train": np.asarray(jax.device_get(losses), np.float64).tolist(),
    "validation": curve.tolist(),
    "final": np.mean([curve[-1], *rest], 0, np.float64).tolist(),
    "kept": float(sum(jnp.count_nonzero(w) for w in weights) / sum(w.size for w in weights)),
    "seconds": seconds,
  }


if __name__ == "__main__":
  config_flag = config_flags.DEFINE_config_file("config", None, "Such as configs/char_transformer.py.")
  flags.mark_flag_as_required("config")

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f"Unknown arguments: {argv[1:]}. Options look like --config.updater.name=sr_ste.")
    config = config_flag.value
    corpus = corpus_lib.load(config.folder)
    text = jnp.asarray(corpus.train)
    windows = jnp.asarray(validation_windows(corpus.validation, config.length, config.windows))
    carry, chunk, chunks = compile_run(config, len(corpus.alphabet), text)
    evaluate = compile_evaluate(config, len(corpus.alphabet), windows)
    found = train(carry, chunk, chunks, text, evaluate, windows)
    for i, values in enumerate(found["validation"]):
      print(f"after {(i + 1) * config.steps // chunks} steps: {np.mean(values):.4f} nats a character, held out")
    print(f"in the end, by seed: {', '.join(f'{v:.4f}' for v in found['final'])}; {found['seconds']:.0f} s")

  app.run(main)
