"""A character transformer whose MLPs are block-sparse from the first step on, beside the dense one: loss and time a step.

    python experiments/block_sparse_transformer.py [--densities=0.125,0.25] [--block=64] [--steps=1000]

RigL on blocks: every 100 steps the blocks of the smallest sums of |weight| give their place to those with the largest sums of
|gradient|. Weights, gradients and moments of the MLPs hold the kept blocks only, and all products of a step but one in 100
are block-sparse. The step that changes the masks is a program, the 99 after it are another; each is compiled once. Data and the
dense rest of the model are those of char_transformer.py. There, layers are stacked; here they are a list, since stacked layers
are not stored compactly, and are stacked in every step, so that kernels are compiled for one layer.
"""

from collections.abc import Callable
import concurrent.futures
import contextlib
import functools
import json
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import char_transformer
from experiments import corpus as corpus_lib
from experiments import llama
import jaxsparse as js

_DENSITIES = flags.DEFINE_list("densities", ["0.125", "0.25"], "Kept blocks of the MLPs; dense always runs too.")
_BLOCK = flags.DEFINE_integer("block", 64, "Side of a block.")
_DIM = flags.DEFINE_integer("dim", 1024, "Width of the residual stream.")
_HIDDEN = flags.DEFINE_integer("hidden", 4096, "Width inside the MLPs.")
_LAYERS = flags.DEFINE_integer("layers", 4, "Layers.")
_BATCH = flags.DEFINE_integer("batch_size", 64, "Sequences to a step.")
_LENGTH = flags.DEFINE_integer("length", 256, "Characters in a sequence.")
_STEPS = flags.DEFINE_integer("steps", 1000, "Steps, a multiple of --every.")
_EVERY = flags.DEFINE_integer("every", 100, "Steps from one change of the masks to the next.")
_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Peak of the cosine schedule.")
_FOLDER = flags.DEFINE_string("folder", "", "Where the corpus is kept; default: data/ beside experiments/.")
_OUT = flags.DEFINE_string("out", None, "Where the figures go, as JSON.")


def narrow(p: Any) -> Any:
  """A parameter, or a block-sparse weight, with bfloat16 values."""
  return p.astype(jnp.bfloat16)


def product(x: jax.Array, w: Any) -> jax.Array:
  return js.ops.block_matmul(x, w) if isinstance(w, js.BlockArray) else x @ w


def loss(params: Any, windows: jax.Array, config: llama.Config) -> jax.Array:
  """shape=(), float32: mean cross-entropy, in nats a character; weights are arrays or `BlockArray`s."""
  params = jax.tree.map(narrow, params, is_leaf=lambda p: isinstance(p, js.BlockArray))
  # A product, not a lookup: the gradient of a lookup would be summed up in bfloat16.
  x = jax.nn.one_hot(windows[:, :-1], len(params["embedding"]), dtype=jnp.bfloat16) @ params["embedding"]
  layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])
  x, _ = jax.lax.scan(lambda x, layer: (llama.block(layer, x, config, product), None), x, layers)
  logits = llama.rms_norm(x, params["norm"]) @ params["embedding"].T
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), windows[:, 1:]).mean()


def make_updater(config: llama.Config, density: float) -> js.Updater:
  """Dense at density 1, else RigL on blocks of the MLPs, stored compactly."""
  if density == 1:
    return js.no_prune()
  block = js.Block((_BLOCK.value, _BLOCK.value))
  rules = js.Rules(
    ("/gate_up$", js.Compact(block, (config.dim, 2 * config.hidden))),
    ("/down$", js.Compact(block, (config.hidden, config.dim))),
    (".*", None),
  )
  stop = _STEPS.value * 3 // 4
  return js.rigl(sparsity=1 - density, every=_EVERY.value, stop=stop, rules=rules, distribution=js.Uniform())


def init_params(updater: js.Updater, config: llama.Config, vocabulary: int) -> tuple[Any, Any]:
  """(parameters, masks for `js.set_masks`); float32. The dense weights of sparse layers never exist."""
  embedding, layers = jax.random.split(jax.random.key(0))
  tree = {
    "embedding": jax.random.normal(embedding, (vocabulary, config.dim)) * 0.02,
    "layers": [llama.init_layer(key, config, jnp.float32) for key in jax.random.split(layers, _LAYERS.value)],
    "norm": jnp.ones(config.dim),
  }
  if updater.storage != "compact":
    return tree, None
  like = lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype)
  tree["layers"] = [layer._replace(gate_up=like(layer.gate_up), down=like(layer.down)) for layer in tree["layers"]]
  return updater.compact_init(tree, key=1)


def make_programs(updater: js.Updater, config: llama.Config):
  """(initial carry of parameters and masks, a step after which masks may differ, and the steps up to the next of them).

  The last two are functions `(carry, text) -> (carry, mean loss)`; the first of them ignores that there is nothing to change
  when masks have found their place.
  """
  rate = optax.warmup_cosine_decay_schedule(0, _RATE.value, _STEPS.value // 10, _STEPS.value, _RATE.value / 10)
  tx = optax.chain(optax.clip_by_global_norm(1.0), updater.wrap_optax(optax.adamw(rate, b2=0.99, weight_decay=0.1)))
  sparse = updater.storage == "compact"

  def start(params, masks):
    state = tx.init(params)
    return params, state if masks is None else js.set_masks(state, masks), jax.random.key_data(jax.random.key(2))

  def batch(key, text):
    key, now = jax.random.split(jax.random.wrap_key_data(key))
    starts = jax.random.randint(now, (_BATCH.value, 1), 0, text.size - _LENGTH.value)
    return jax.random.key_data(key), text[starts + jnp.arange(_LENGTH.value + 1)].astype(jnp.int32)

  def step(carry, _=None, *, text):
    params, state, key = carry
    key, windows = batch(key, text)
    value, grads = jax.value_and_grad(lambda p: loss(updater.forward_params(p, state), windows, config))(params)
    extra = dict(candidate_scores=None) if sparse else {}
    updates, state = tx.update(grads, state, params, **extra)
    return (optax.apply_updates(params, updates), state, key), value

  def refresh(carry, text):
    """A step with the gradient of the dense weights, which blocks compete by."""
    params, state, key = carry
    key, windows = batch(key, text)
    dense = updater.dense_params(params, state)
    value, grads = jax.value_and_grad(lambda p: loss(p, windows, config))(dense)
    grads, scores = updater.split_gradients(grads, state)
    updates, state = tx.update(grads, state, params, candidate_scores=scores)
    return (optax.apply_updates(params, updates), state, key), value

  def steps(carry, text):
    carry, values = jax.lax.scan(functools.partial(step, text=text), carry, length=_EVERY.value - 1)
    return carry, values.mean()

  return start, refresh if sparse else step, steps


def _compiler_options() -> dict[str, bool]:
  """On a GPU, without XLA's search for the better of two ways to emit each fusion, which is most of what compiling takes."""
  return {"xla_gpu_experimental_enable_fusion_autotuner": False} if jax.default_backend() == "gpu" else {}


def prepare(density: float, config: llama.Config, text: jax.Array, windows: jax.Array, vocabulary: int) -> dict:
  """What is run, compiled, and the seconds that took."""
  updater = make_updater(config, density)
  start, refresh, steps = make_programs(updater, config)
  began = time.perf_counter()
  carry = jax.block_until_ready(start(*init_params(updater, config, vocabulary)))
  seconds = {"start": time.perf_counter() - began}

  def evaluate(params, state):
    found = jax.lax.map(lambda w: loss(updater.forward_params(params, state), w.astype(jnp.int32), config), windows)
    return found.mean()

  def compile(name, program, *args, **kwargs):
    began = time.perf_counter()
    compiled = program.lower(*args, **kwargs).compile(_compiler_options())
    seconds[name] = time.perf_counter() - began
    return name, compiled

  programs = (
    functools.partial(compile, "refresh", jax.jit(refresh, donate_argnums=0), carry, text=text),
    functools.partial(compile, "steps", jax.jit(steps, donate_argnums=0), carry, text=text),
    functools.partial(compile, "evaluate", jax.jit(evaluate), *carry[:2]),
  )
  with concurrent.futures.ThreadPoolExecutor(len(programs)) as pool:
    compiled = dict(pool.map(lambda program: program(), programs))
  stored = sum(p.size for p in jax.tree.leaves(carry[0]))
  return dict(density=density, carry=carry, seconds=seconds, stored=stored, **compiled)


def train(run: dict, text: jax.Array, report: Callable[[dict], None] = lambda row: None) -> dict:
  """Trains to the end, masks changing on the way: losses, the time of a step, and how often blocks moved.

  Args:
    run: of `prepare`; its carry is used up.
    text: the corpus.
    report: receives what is known after each change of the masks.
  """
  carry, losses, seconds, moved = run["carry"], [], [], 0
  sparse = run["density"] < 1
  row = {"density": run["density"], "parameters": run["stored"], "compile seconds": run["seconds"], "losses": losses}
  with _count_compilations() as compilations:
    for _ in range(_STEPS.value // _EVERY.value):
      places = _places(carry) if sparse else []
      began = time.perf_counter()
      carry, first = run["refresh"](carry, text=text)
      carry, rest = run["steps"](carry, text=text)
      losses.append((float(first) + float(rest) * (_EVERY.value - 1)) / _EVERY.value)  # waits
      seconds.append(time.perf_counter() - began)
      moved += any(not np.array_equal(a, b) for a, b in zip(places, _places(carry) if sparse else []))
      row |= {
        "train loss": losses[-1],
        "ms a step": 1e3 * float(np.median(seconds[1:] or seconds)) / _EVERY.value,
        "seconds of each chunk": seconds,
        "refreshes that moved blocks": moved,
        "compilations while training": len(compilations),
      }
      report(row)
    row["held-out loss"] = float(run["evaluate"](*carry[:2]))
  report(row)
  return row


def _places(carry) -> list[np.ndarray]:
  """Where the blocks of every sparse leaf lie."""
  masks = jax.tree.leaves(js.get_masks(carry[1]), is_leaf=lambda node: isinstance(node, js.Positions))
  return [np.asarray(node.indices) for node in masks if isinstance(node, js.Positions)]


@contextlib.contextmanager
def _count_compilations():
  """A list that gets an item for each program that XLA compiles meanwhile."""
  found = []

  def listen(event, duration, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
      found.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def main(argv):
  del argv
  if _STEPS.value % _EVERY.value:
    raise app.UsageError(f"--steps={_STEPS.value} must be a multiple of --every={_EVERY.value}.")
  corpus = corpus_lib.load(_FOLDER.value or None)
  text = jnp.asarray(corpus.train)
  windows = char_transformer.validation_windows(corpus.validation, _LENGTH.value, 4 * _BATCH.value)
  config = llama.Config(
    _DIM.value, _DIM.value // 128 or 1, _DIM.value // 128 or 1, min(128, _DIM.value), _HIDDEN.value, 1e4
  )
  make = functools.partial(
    prepare, config=config, text=text, windows=jnp.asarray(windows), vocabulary=len(corpus.alphabet)
  )
  densities = [1.0, *map(float, _DENSITIES.value)]
  found = []

  def report(row):
    """All rows as they are now: what ends early has left its figures."""
    if _OUT.value:
      rows = [*found, row] if row not in found else found
      partial = pathlib.Path(f"{_OUT.value}.partial")
      partial.write_text(json.dumps({"block": _BLOCK.value, "steps": _STEPS.value, "rows": rows}, indent=1))
      partial.replace(_OUT.value)

  began = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(len(densities)) as pool:
    runs = list(pool.map(make, densities))
  print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
  for run in runs:
    found.append(row := train(run, text, report))
    faster = found[0]["ms a step"] / row["ms a step"]
    print(
      f"density {row['density']:g}: {row['parameters'] / 1e6:.1f} million parameters, {row['ms a step']:.2f} ms a step "
      f"({faster:.2f}x), loss {row['train loss']:.4f} in training, {row['held-out loss']:.4f} held out, "
      f"{row['refreshes that moved blocks']} refreshes, {row['compilations while training']} compilations on the way",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main)
