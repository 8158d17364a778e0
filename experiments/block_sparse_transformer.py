"""A character transformer whose MLPs are block-sparse from the first step on, beside the dense one: loss and time a step.

    python experiments/block_sparse_transformer.py [--densities=0.1,0.25] [--blocks=64,128] [--steps=500] [--out=results/x]

RigL on blocks: every 100 steps the blocks of the smallest sums of |weight| give their place to those with the largest sums of
|gradient|. Weights, gradients and moments of the MLPs hold the kept blocks only, and all products of a step but one in 100
are block-sparse. The step that changes the masks is a program, the 99 after it are another; each is compiled once. Data and the
dense rest of the model are those of char_transformer.py, except that layers are a list: in a loop, what the backward pass
needs of each would be copied to and from stacked arrays, which takes a third of a step.

A step's time is wall clock, refreshes included. The MLPs' share of it is timed apart: forward and backward pass of one
layer's, times the number of layers. `--out` (without suffix) gets JSON as it goes, where rows of other widths stay,
and a plot.
"""

from collections.abc import Callable, Iterator
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
from experiments import compilation
from experiments import corpus as corpus_lib
from experiments import llama
import jaxsparse as js

_DENSITIES = flags.DEFINE_list("densities", ["0.1", "0.25"], "Kept blocks of the MLPs; dense always runs too.")
_BLOCKS = flags.DEFINE_list("blocks", ["64", "128"], "Sides of blocks.")
_DIM = flags.DEFINE_integer("dim", 1024, "Width of the residual stream.")
_HIDDEN = flags.DEFINE_integer("hidden", 4096, "Width inside the MLPs.")
_LAYERS = flags.DEFINE_integer("layers", 4, "Layers.")
_BATCH = flags.DEFINE_integer("batch_size", 64, "Sequences to a step.")
_LENGTH = flags.DEFINE_integer("length", 256, "Characters in a sequence.")
_STEPS = flags.DEFINE_integer("steps", 500, "Steps, a multiple of --every.")
_EVERY = flags.DEFINE_integer("every", 100, "Steps from one change of the masks to the next.")
_RATE = flags.DEFINE_float("learning_rate", 1e-3, "Peak of the cosine schedule.")
_FOLDER = flags.DEFINE_string("folder", "", "Where the corpus is kept; default: data/ beside experiments/.")
_OUT = flags.DEFINE_string("out", None, "Where the figures and the plot go, without suffix.")

_WIDTHS = ("dim", "hidden", "layers", "batch_size", "length")
_MODEL = (*_WIDTHS, "block", "density")
_CALLS = 20  # passes of a layer's MLP in one program, to time it


def narrow(p: Any) -> Any:
  """A parameter, or a block-sparse weight, with bfloat16 values."""
  return p.astype(jnp.bfloat16)


def product(x: jax.Array, w: Any) -> jax.Array:
  return js.ops.block_matmul(x, w) if isinstance(w, js.BlockArray) else x @ w


def attend(q: jax.Array, k: jax.Array, v: jax.Array, is_causal: bool) -> jax.Array:
  # XLA's writes the 256 x 256 scores to memory: 3 of 29 ms.
  implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
  return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation=implementation)


# Traced and lowered once for all layers.
_layer = jax.jit(llama.block, static_argnames=("config", "product", "attend"))


def loss(params: Any, windows: jax.Array, config: llama.Config) -> jax.Array:
  """shape=(), float32: mean cross-entropy, in nats a character; weights are arrays or `BlockArray`s."""
  params = jax.tree.map(narrow, params, is_leaf=_is_block_array)
  # A product, not a lookup: the gradient of a lookup would be summed up in bfloat16.
  x = jax.nn.one_hot(windows[:, :-1], len(params["embedding"]), dtype=jnp.bfloat16) @ params["embedding"]
  for layer in params["layers"]:
    x = _layer(layer, x, config=config, product=product, attend=attend)
  logits = llama.rms_norm(x, params["norm"]) @ params["embedding"].T
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), windows[:, 1:]).mean()


def _is_block_array(node):
  return isinstance(node, js.BlockArray)


def make_updater(config: llama.Config, block: int | None, density: float) -> js.Updater:
  """Dense without a block, else RigL on blocks of the MLPs, stored compactly."""
  if block is None:
    return js.no_prune()
  structure = js.Block((block, block))
  rules = js.Rules(
    ("/gate_up$", js.Compact(structure, (config.dim, 2 * config.hidden))),
    ("/down$", js.Compact(structure, (config.hidden, config.dim))),
    (".*", None),
  )
  stop = _STEPS.value * 3 // 4
  return js.rigl(sparsity=1 - density, every=_EVERY.value, stop=stop, rules=rules, distribution=js.Uniform())


def init_params(updater: js.Updater, config: llama.Config, vocabulary: int) -> tuple[Any, Any]:
  """(parameters, masks for `js.set_masks`); float32. The dense weights of sparse layers never exist."""
  sparse = updater.storage == "compact"

  @jax.jit
  def dense():
    embedding, layers = jax.random.split(jax.random.key(0))
    tree = {
      "embedding": jax.random.normal(embedding, (vocabulary, config.dim)) * 0.02,
      "layers": [llama.init_layer(key, config, jnp.float32) for key in jax.random.split(layers, _LAYERS.value)],
      "norm": jnp.ones(config.dim),
    }
    unused = dict(gate_up=None, down=None) if sparse else {}
    return tree | {"layers": [layer._replace(**unused) for layer in tree["layers"]]}

  tree = dense()
  if not sparse:
    return tree, None
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  mlp = dict(gate_up=shape(config.dim, 2 * config.hidden), down=shape(config.hidden, config.dim))
  return updater.compact_init(tree | {"layers": [layer._replace(**mlp) for layer in tree["layers"]]}, key=1)


def make_programs(updater: js.Updater, config: llama.Config) -> tuple[Callable, Callable | None, Callable]:
  """(initial carry of parameters and masks, a step after which masks may differ, and the steps up to the next of them).

  The last two are functions `(carry, text) -> (carry, mean loss)`. The first of them ignores that there is nothing to change
  when masks have found their place; a dense model has none.
  """
  rate = optax.warmup_cosine_decay_schedule(0, _RATE.value, _STEPS.value // 10, _STEPS.value, _RATE.value / 10)
  tx = optax.chain(optax.clip_by_global_norm(1.0), updater.wrap_optax(optax.adamw(rate, b2=0.99, weight_decay=0.1)))
  sparse = updater.storage == "compact"

  @jax.jit
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
    carry, values = jax.lax.scan(functools.partial(step, text=text), carry, length=_EVERY.value - sparse)
    return carry, values.mean()

  return start, refresh if sparse else None, steps


def _mlp_passes(weights, x, dy):
  """`_CALLS` forward and backward passes of the MLP of one layer, each of which takes results of the last one as x."""
  trainable, fixed = js.arrays.partition(weights)

  def one(_, carry):
    y, pull = jax.vjp(lambda w, x: llama.mlp(*js.arrays.combine(w, fixed), x, product), trainable, carry[1])
    dw, dx = pull(dy)
    return dw, y + dx  # both, or what gives y would not be computed

  return jax.lax.fori_loop(0, _CALLS, one, (jax.tree.map(jnp.zeros_like, trainable), x))


def prepare(
  block: int | None, density: float, config: llama.Config, text: jax.Array, vocabulary: int
) -> dict[str, Any]:
  """What is run, compiled, and the seconds that took."""
  updater = make_updater(config, block, density)
  start, refresh, steps = make_programs(updater, config)
  began = time.perf_counter()
  carry = jax.block_until_ready(start(*init_params(updater, config, vocabulary)))
  seconds = {"start": time.perf_counter() - began}
  run = dict(block=block, density=density, carry=carry, seconds=seconds)
  run["dense params"] = (lambda params, state: params) if refresh is None else updater.dense_params
  run["stored"] = sum(p.size for p in jax.tree.leaves(carry[0]))

  def compile(name, program, *args, **kwargs):
    began = time.perf_counter()
    run[name] = jax.jit(program, **kwargs).lower(*args).compile(compilation.untuned())
    seconds[name] = time.perf_counter() - began

  # As training sees it: inside jit weights carry their plan, which would else be derived in each pass.
  params = jax.tree.map(narrow, jax.jit(updater.forward_params)(*carry[:2])["layers"][0], is_leaf=_is_block_array)
  x = jax.random.normal(jax.random.key(3), (_BATCH.value * _LENGTH.value, config.dim), jnp.bfloat16)
  run["mlp inputs"] = (params.gate_up, params.down), x, x[::-1]
  jobs = [("steps", steps, carry, text), ("mlp", _mlp_passes, *run["mlp inputs"])]
  if refresh is not None:
    jobs.append(("refresh", refresh, carry, text))
  with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
    list(pool.map(lambda job: compile(*job, **dict(donate_argnums=0) if job[0] != "mlp" else {}), jobs))
  return run


def train(run: dict, text: jax.Array, report: Callable[[dict], None] = lambda row: None) -> dict:
  """Trains to the end, masks changing on the way: losses, the time of a step, and how often blocks moved.

  Args:
    run: of `prepare`; its carry is replaced by the last one.
    text: the corpus.
    report: receives what is known after each change of the masks.
  """
  losses, seconds, moved = [], [], 0
  sparse = "refresh" in run
  widths = dict(zip(_WIDTHS, (_DIM.value, _HIDDEN.value, _LAYERS.value, _BATCH.value, _LENGTH.value)))
  row = widths | {"block": run["block"], "density": run["density"], "parameters": run["stored"],
                  "compile seconds": run["seconds"], "losses": losses}  # fmt: skip
  with _count_compilations() as compilations:
    for _ in range(_STEPS.value // _EVERY.value):
      places = _places(run["carry"]) if sparse else []
      began = time.perf_counter()
      first = 0.0
      if sparse:
        run["carry"], first = run["refresh"](run["carry"], text)
      run["carry"], rest = run["steps"](run["carry"], text)
      losses.append((float(first) + float(rest) * (_EVERY.value - sparse)) / _EVERY.value)  # waits
      seconds.append(time.perf_counter() - began)
      moved += any(not np.array_equal(a, b) for a, b in zip(places, _places(run["carry"]) if sparse else []))
      row |= {
        "train loss": losses[-1],
        "ms a step": 1e3 * float(np.median(seconds[1:] or seconds)) / _EVERY.value,
        "seconds of each chunk": seconds,
        "refreshes that moved blocks": moved,
        "compilations while training": len(compilations),
      }
      report(row)
  row["ms of the MLPs"] = 1e3 * _LAYERS.value / _CALLS * _seconds(lambda: run["mlp"](*run["mlp inputs"]))
  return row


def _seconds(f) -> float:
  """Median of three calls."""
  jax.block_until_ready(f())
  rounds = []
  for _ in range(3):
    began = time.perf_counter()
    jax.block_until_ready(f())
    rounds.append(time.perf_counter() - began)
  return float(np.median(rounds))


def _places(carry) -> list[np.ndarray]:
  """Where the blocks of every sparse leaf lie."""
  masks = jax.tree.leaves(js.get_masks(carry[1]), is_leaf=lambda node: isinstance(node, js.Positions))
  return [np.asarray(node.indices) for node in masks if isinstance(node, js.Positions)]


@contextlib.contextmanager
def _count_compilations() -> Iterator[list[float]]:
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


def make_evaluate(config: llama.Config) -> Callable:
  """(parameters with dense weights, windows `[n, B, T + 1]`) -> the mean loss, one program for all models."""

  def evaluate(params, windows):
    return jax.lax.map(lambda w: loss(params, w.astype(jnp.int32), config), windows).mean()

  return evaluate


def speed_up(row: dict, rows: list[dict]) -> float:
  """How many times as long a step of the dense model of the same widths takes."""
  same = lambda other: other["block"] is None and all(other[key] == row[key] for key in _WIDTHS)
  return next(other for other in rows if same(other))["ms a step"] / row["ms a step"]


def plot(path: pathlib.Path, rows: list[dict]) -> None:
  """Training loss over seconds of training, one panel a width."""
  from matplotlib import figure

  groups = list(dict.fromkeys(tuple(row[key] for key in _WIDTHS) for row in rows))
  fig = figure.Figure(figsize=(5 * len(groups), 3.6), layout="constrained", dpi=130)
  for ax, group in zip(fig.subplots(1, len(groups), squeeze=False)[0], groups):
    for row in rows:
      if tuple(row[key] for key in _WIDTHS) == group:
        name = "dense" if row["block"] is None else f"{row['density']:g}, blocks of {row['block']}"
        ax.plot(
          np.cumsum(row["seconds of each chunk"]),
          row["losses"],
          marker=".",
          label=f"{name}: {speed_up(row, rows):.2f}x",
        )
    ax.set_title("dim {}, hidden {}, {} layers, {} x {} characters".format(*group), fontsize=8)
    ax.set_xlabel("seconds")
    ax.set_ylabel("training loss")
    ax.legend(fontsize=7)
  fig.savefig(path)


def write(path: str, rows: list[dict]) -> None:
  """All rows as they are now, and those that a file has of other models, in one piece."""
  target = pathlib.Path(f"{path}.json")
  name = lambda row: tuple(row[key] for key in _MODEL)
  known = {name(row) for row in rows}
  old = json.loads(target.read_text())["rows"] if target.exists() else []
  rows = [row for row in old if name(row) not in known] + rows
  device = jax.devices()[0].device_kind
  partial = pathlib.Path(f"{path}.partial")
  lines = ",\n".join(json.dumps(row) for row in rows)
  partial.write_text(f'{{"device": {json.dumps(device)}, "jax": "{jax.__version__}", "rows": [\n{lines}\n]}}\n')
  partial.replace(target)


def main(argv):
  del argv
  if _STEPS.value % _EVERY.value:
    raise app.UsageError(f"--steps={_STEPS.value} must be a multiple of --every={_EVERY.value}.")
  corpus = corpus_lib.load(_FOLDER.value or None)
  text, vocabulary = jnp.asarray(corpus.train), len(corpus.alphabet)
  windows = jnp.asarray(char_transformer.validation_windows(corpus.validation, _LENGTH.value, 4 * _BATCH.value))
  heads = _DIM.value // 128 or 1
  config = llama.Config(_DIM.value, heads, heads, min(128, _DIM.value), _HIDDEN.value, 1e4)
  models = [(None, 1.0), *((int(b), float(d)) for b in _BLOCKS.value for d in _DENSITIES.value)]
  found = []

  def report(row):
    """What ends early has left its figures."""
    if _OUT.value:
      write(_OUT.value, [*found, row])

  began = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(len(models) + 1) as pool:
    shapes = jax.eval_shape(lambda: init_params(js.no_prune(), config, vocabulary)[0])
    evaluate = pool.submit(lambda: jax.jit(make_evaluate(config)).lower(shapes, windows).compile(compilation.untuned()))
    runs = list(pool.map(lambda model: prepare(*model, config, text, vocabulary), models))
  print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
  for i, run in enumerate(runs):
    row = train(run, text, report)
    row["held-out loss"] = float(evaluate.result()(run["dense params"](*run["carry"][:2]), windows))
    report(row)
    found.append(row)
    runs[i] = run = None  # frees its arrays
    print(
      f"block {row['block']}, density {row['density']:g}: {row['parameters'] / 1e6:.1f} million parameters, "
      f"{row['ms a step']:.2f} ms a step ({speed_up(row, found):.2f}x), {row['ms of the MLPs']:.2f} ms of it MLPs, "
      f"loss {row['train loss']:.4f} in training, {row['held-out loss']:.4f} held out, "
      f"{row['refreshes that moved blocks']} refreshes, {row['compilations while training']} compilations on the way",
      flush=True,
    )
  if _OUT.value:
    plot(pathlib.Path(f"{_OUT.value}.png"), json.loads(pathlib.Path(f"{_OUT.value}.json").read_text())["rows"])


if __name__ == "__main__":
  app.run(main)
