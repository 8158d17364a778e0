"""The first look: dense and sparse networks on the digits of scikit-learn, in a table, a plot and a JSON file.

    make quickstart

Every method trains the same multilayer perceptron with the same optimizer, data order and seeds; one line of the table
is one call of a factory. Step times are measured in turns, so that a busy machine slows all methods alike.
"""

import argparse
from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import time
from typing import Any

import jax
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
import numpy as np
import optax
from sklearn import datasets
from sklearn import model_selection
import tqdm

import jaxsparse as js

WIDTHS = (64, 256, 128, 10)
BATCH = 64
LEARNING_RATE = 2e-3


@dataclasses.dataclass(frozen=True)
class Method:
  """One line of the table: `make(stop)` gives the updater for masks that are final from update `stop` on."""

  label: str
  target: float
  make: Callable[[int], js.Updater] | None


def methods() -> list[Method]:
  """The dense baseline is plain Optax, without jaxsparse."""
  hidden_blocks = js.Rules(("dense_2", None))  # ten outputs are not divisible into blocks of 8
  return [
    Method("dense", 0.0, None),
    Method("magnitude", 0.9, lambda stop: js.magnitude(sparsity=0.9, every=20, stop=stop)),
    Method("sr_ste 2:4", 0.5, lambda stop: js.sr_ste(structure=js.NM(2, 4))),
    Method(
      "rigl 8x8 blocks",
      0.8,
      lambda stop: js.rigl(sparsity=0.8, every=20, stop=stop, structure=js.Block((8, 8)), rules=hidden_blocks),
    ),
    Method("static_sparse ERK", 0.95, lambda stop: js.static_sparse(sparsity=0.95)),
    Method("rigl ERK", 0.95, lambda stop: js.rigl(sparsity=0.95, every=20, stop=stop)),
    Method("global_magnitude", 0.98, lambda stop: js.global_magnitude(sparsity=0.98, every=20, stop=stop)),
  ]


def load_digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
  """1,437 training and 360 test images of 8 x 8 pixels in [0, 1], with their labels."""
  x, y = datasets.load_digits(return_X_y=True)
  x_train, x_test, y_train, y_test = model_selection.train_test_split(
    (x / 16).astype(np.float32), y.astype(np.int32), test_size=360, stratify=y, random_state=0
  )
  return (x_train, y_train), (x_test, y_test)


def init_params(seed: int) -> dict[str, dict[str, np.ndarray]]:
  rng = np.random.default_rng(seed)
  return {
    f"dense_{i}": {
      "kernel": rng.normal(0, np.sqrt(2 / fan_in), (fan_in, fan_out)).astype(np.float32),
      "bias": np.zeros(fan_out, np.float32),
    }
    for i, (fan_in, fan_out) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:]))
  }


def apply(params, x):
  for i in range(len(WIDTHS) - 1):
    x = x @ params[f"dense_{i}"]["kernel"] + params[f"dense_{i}"]["bias"]
    x = jax.nn.relu(x) if i < len(WIDTHS) - 2 else x
  return x


def loss_fn(params, batch):
  x, y = batch
  return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


class Trainer:
  """A method ready to run: all its randomness comes in through `init`, so one compilation serves all seeds."""

  def __init__(self, method: Method, steps: int, data):
    self.method = method
    self.updater = method.make(max(1, 3 * steps // 4)) if method.make else None
    self.optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    self.data = data
    tx = self.updater.wrap_optax(self.optimizer) if self.updater else self.optimizer

    def step(carry, batch):
      params, opt_state = carry
      forward = self.updater.forward_params if self.updater else lambda p, _: p
      loss, grads = jax.value_and_grad(lambda p: loss_fn(forward(p, opt_state), batch))(params)
      updates, opt_state = tx.update(grads, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def init(params, key):
      if self.updater is None:
        return params, self.optimizer.init(params)
      opt_state = self.updater.wrap_optax(self.optimizer, key=key).init(params)
      if self.updater.forward.storage == "hard":
        params = self.updater.sparse_params(params, opt_state)
      return params, opt_state

    @jax.jit
    def run(carry, images, labels, order):
      return jax.lax.scan(lambda c, i: step(c, (images[i], labels[i])), carry, order)

    @jax.jit
    def evaluate(carry, images, labels):
      params = self.export(carry)[0]
      return (apply(params, images).argmax(-1) == labels).mean()

    self._init, self._run, self._evaluate = init, run, evaluate

  def init(self, seed: int):
    return self._init(init_params(seed), jax.random.key(seed))

  def run(self, carry, order):
    """As many updates as `order` has rows; returns the new carry and the losses."""
    return jax.block_until_ready(self._run(carry, *self.data[0], order))

  def accuracy(self, carry) -> float:
    return float(self._evaluate(carry, *self.data[1]))

  def export(self, carry) -> tuple[Any, Any]:
    params, opt_state = carry
    return self.updater.export(params, opt_state) if self.updater else (params, None)

  def sparsity(self, carry) -> float:
    """Of the leaves that are pruned."""
    if self.updater is None:
      return 0.0
    return float(js.summarize_sparsity(js.get_masks(carry[1]), only_total=True)["_total_sparsity"])


def batches(seed: int, count: int, examples: int) -> np.ndarray:
  """[count, BATCH] indices: a new shuffle for every epoch."""
  rng = np.random.default_rng(seed)
  per_epoch = examples // BATCH
  epochs = -(-count // per_epoch)
  return np.concatenate([rng.permutation(examples)[: per_epoch * BATCH].reshape(-1, BATCH) for _ in range(epochs)])[
    :count
  ]


def train_all(trainers, steps: int, seeds: int, chunk: int, bar):
  """Trains every method with every seed; returns one record a method and the carries in the middle of training."""
  records, middles = [], []
  chunks = steps // chunk
  for trainer in trainers:
    bar.set_description(f"train {trainer.method.label}")
    curves, sparsities, final = [], [], None
    for seed in range(seeds):
      carry = trainer.init(seed)
      order = batches(seed, steps, len(trainer.data[0][0]))
      curve, sparsity = [trainer.accuracy(carry)], [trainer.sparsity(carry)]
      for c in range(chunks):
        if seed == 0 and c == chunks // 2:
          middles.append(carry)
        carry, _ = trainer.run(carry, order[c * chunk : (c + 1) * chunk])
        curve.append(trainer.accuracy(carry))
        sparsity.append(trainer.sparsity(carry))
        bar.update()
      curves.append(curve)
      sparsities.append(sparsity)
      final = trainer.export(carry)
    params, masks = final
    records.append(
      {
        "method": trainer.method.label,
        "call": repr(trainer.updater) if trainer.updater else "optax.adam, without jaxsparse",
        "target_sparsity": trainer.method.target,
        "sparsity": sparsities[-1][-1],
        "accuracy_mean": statistics.mean(curve[-1] for curve in curves),
        "accuracy_std": statistics.stdev(curve[-1] for curve in curves) if seeds > 1 else 0.0,
        "parameters_kept": js.count_parameters(params, masks) / js.count_parameters(params),
        "flops_kept": js.count_flops(params, masks) / js.count_flops(params),
        "accuracy_curves": curves,
        "sparsity_curve": sparsities[0],
      }
    )
  return records, middles


def time_all(trainers, middles, records, chunk: int, rounds: int, bar) -> None:
  """Adds step times: all methods in turn, `rounds` times; medians of the times and of the ratios to dense."""
  order = batches(0, chunk, len(trainers[0].data[0][0]))
  times = []
  for _ in range(rounds):
    bar.set_description("time steps")
    row = []
    for trainer, carry in zip(trainers, middles):
      start = time.perf_counter()
      trainer.run(carry, order)
      row.append((time.perf_counter() - start) / chunk)
    times.append(row)
    bar.update()
  for i, record in enumerate(records):
    record["step_ms"] = 1e3 * statistics.median(row[i] for row in times)
    record["step_time_to_dense"] = statistics.median(row[i] / row[0] for row in times)


def table(records, seeds: int) -> str:
  header = ("method", "target", "reached", "accuracy %", "step / dense", "params kept", "FLOPs kept")
  rows = [
    (
      r["method"],
      f"{r['target_sparsity']:.2f}",
      f"{r['sparsity']:.4f}",
      f"{100 * r['accuracy_mean']:.1f}" + (f" ± {100 * r['accuracy_std']:.1f}" if seeds > 1 else ""),
      f"{r['step_time_to_dense']:.2f}x",
      f"{100 * r['parameters_kept']:.1f} %",
      f"{100 * r['flops_kept']:.1f} %",
    )
    for r in records
  ]
  widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

  def line(cells):
    return "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths)))

  return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


# Okabe and Ito's palette, told apart by colour-blind readers; markers differ as well.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot(records, chunk: int, path: pathlib.Path) -> None:
  figure, (curves, masks, final) = plt.subplots(1, 3, figsize=(15, 4.8), constrained_layout=True)
  for i, (record, colour, marker) in enumerate(zip(records, _COLOURS, _MARKERS)):
    updates = chunk * np.arange(len(record["sparsity_curve"]))
    style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.5}
    every = max(1, len(updates) // 8)
    marks = (i % every, every)  # not all in one place, so that lines on top of each other show
    accuracy = 100 * np.mean(record["accuracy_curves"], axis=0)
    curves.plot(updates[1:], accuracy[1:], markevery=marks, label=record["method"], **style)
    masks.plot(updates, 100 * np.asarray(record["sparsity_curve"]), markevery=marks, **style)
    kept = 100 * record["parameters_kept"]
    final.errorbar(
      kept,
      100 * record["accuracy_mean"],
      100 * record["accuracy_std"],
      fmt=marker,
      color=colour,
      markersize=9,
      capsize=4,
    )
  lowest = min(100 * r["accuracy_mean"] for r in records)
  curves.set(
    xlabel="updates", ylabel="test accuracy (%)", title="Accuracy during training", ylim=(min(80, lowest - 5), 100)
  )
  masks.set(
    xlabel="updates", ylabel="sparsity of the pruned layers (%)", title="Sparsity during training", ylim=(-3, 103)
  )
  final.set(
    xlabel="parameters kept (%, logarithmic)",
    ylabel="test accuracy (%)",
    title="At the end (mean and deviation of the seeds)",
  )
  final.set_xscale("log")
  final.set_xlim(1.5, 140)
  ticks = (2, 5, 10, 20, 50, 100)
  final.set_xticks(ticks, [str(t) for t in ticks])
  final.minorticks_off()
  figure.get_layout_engine().set(wspace=0.06)
  for axes in (curves, masks, final):
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
  handles, labels = curves.get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Trains, prints the table, writes `quickstart.json` and `quickstart.png`; returns what the JSON file holds."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--steps", type=int, default=800, help="updates of each training run")
  parser.add_argument("--seeds", type=int, default=3, help="training runs of each method")
  parser.add_argument("--rounds", type=int, default=25, help="repetitions of the timing")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/quickstart"), help="where files go")
  args = parser.parse_args(argv)
  chunk = max(1, args.steps // 20)
  started = time.perf_counter()
  data = load_digits()
  trainers = [Trainer(method, args.steps, data) for method in methods()]
  total = len(trainers) * args.seeds * (args.steps // chunk) + args.rounds
  with tqdm.tqdm(
    total=total, unit="chunk", bar_format="{desc:<26}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
  ) as bar:
    records, middles = train_all(trainers, args.steps, args.seeds, chunk, bar)
    time_all(trainers, middles, records, chunk, args.rounds, bar)
  result = {
    "data": "scikit-learn digits, 1437 training and 360 test images",
    "network": f"multilayer perceptron {WIDTHS}, float32",
    "optimizer": f"Adam, cosine from {LEARNING_RATE}, batch {BATCH}",
    "steps": args.steps,
    "seeds": args.seeds,
    "seconds": time.perf_counter() - started,
    "jax": jax.__version__,
    "jaxsparse": js.__version__,
    "python": platform.python_version(),
    "device": jax.devices()[0].device_kind,
    "cpus": os.cpu_count(),
    "methods": records,
  }
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "quickstart.json").write_text(json.dumps(result, indent=1) + "\n")
  plot(records, chunk, args.out / "quickstart.png")
  print(f"\nDigits, multilayer perceptron {WIDTHS}, {args.steps} updates, {args.seeds} seeds, JAX {jax.__version__}:\n")
  print(table(records, args.seeds))
  print(
    "\n'step / dense' is the measured time of one training update, mask refreshes included, over plain Optax. Masks alone"
    "\nsave no time: a masked matmul multiplies the zeros too. FLOPs count what a machine that skips zeros would do."
    f"\n\nPlot and numbers: {args.out}/quickstart.png, {args.out}/quickstart.json ({result['seconds']:.0f} s)"
  )
  return result


if __name__ == "__main__":
  main()
