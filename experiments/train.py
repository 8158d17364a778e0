"""Trains a classifier with any sparsity algorithm: the loop to read, run and fork.

    python experiments/train.py --config=configs/digits.py:rigl --config.updater.sparsity=0.95 --workdir=runs/rigl95

The working directory gets metrics.csv, metrics.jsonl, tensorboard/, checkpoints/ and the report (report.md,
report.json and two plots). Started again with the same arguments, a run goes on from its last checkpoint and ends in
the same bits as if it had never stopped; a finished one only writes its report again.
"""

import difflib
import pathlib
import sys
from typing import Any

# `python experiments/train.py` puts experiments/ on the path; the packages beside it are found from the root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import ConfigDict
from ml_collections import config_flags
import numpy as np
import optax
import tqdm

from experiments import checkpoints
from experiments import datasets
from experiments import metrics
from experiments import models
from experiments import optimizers
from experiments import report
import jaxsparse as js

FIELDS = "seed dataset data_dir model optimizer batch_size steps updater log_every eval_every checkpoint_every".split()


def train(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Trains, evaluates, writes checkpoints and metrics, and reports.

  Args:
    config: see configs/digits.py, which describes every field.
    workdir: directory of this run; an interrupted run goes on from its last checkpoint.

  Returns:
    The contents of report.json.

  Raises:
    ValueError, TypeError: for a configuration that cannot work, before the first step.
    FileNotFoundError: if the data are missing; the message says how to get them.
  """
  # Everything that can be wrong is made first, so that it fails before the first step.
  check_fields(config)
  updater = js.create_updater(config.updater)
  data = datasets.load(config.dataset, config.data_dir)
  model = models.create(config.model, data.classes)
  optimizer, learning_rate = optimizers.create(config.optimizer, config.steps)
  tx = updater.wrap_optax(optimizer, key=config.seed)

  loss_fn, train_step, eval_step = make_steps(updater, model, tx)

  def evaluate(params, opt_state):
    sums = [eval_step(params, opt_state, batch) for batch in data.test_batches()]
    loss, correct = np.sum(jax.device_get(sums), axis=0, dtype=np.float64) / len(data.test_labels)
    return {"test_loss": loss, "test_accuracy": correct}

  # Under jit: run operation by operation, initialisation compiles a hundred small programs.
  params = jax.jit(model.init)(jax.random.key(config.seed), data.train_images[:1])["params"]
  opt_state = jax.jit(tx.init)(params)
  if updater.prunes_at_init:
    # What pruning before training may differentiate, and on what: ten batches, or (without data) one input of ones.
    batches = [data.train_batch(config.seed, step, config.batch_size) for step in range(10)]
    at_init = {
      "loss": (lambda params, batch: loss_fn(params, batch)[0], batches),
      "tempered loss": (lambda params, batch: loss_fn(params, batch, temperature=200.0)[0], batches),
      "sum of outputs": (
        lambda params, image: model.apply({"params": params}, image).sum(),
        [np.ones_like(data.train_images[:1])],
      ),
    }
    objective, batches = at_init[updater.drop.objective]
    params, masks = updater.instant_sparsify(params, config.seed, loss_fn=objective, batches=batches)
    opt_state = js.set_masks(opt_state, masks)
  if updater.forward.storage == "hard":  # Dense storage keeps the weights behind the mask: they may come back.
    params = jax.jit(updater.sparse_params)(params, opt_state)

  sparsity = jax.jit(lambda params, opt_state: metrics.weight_sparsity(params, js.get_masks(opt_state)))
  layers = {f"sparsity/{name}": name for name in sparsity(params, opt_state)}
  columns = ["train_loss", "train_accuracy", "learning_rate", "test_loss", "test_accuracy", *layers]

  workdir = pathlib.Path(workdir).expanduser().resolve()
  workdir.mkdir(parents=True, exist_ok=True)
  with checkpoints.Checkpoints(workdir, config) as saved:
    first, (params, opt_state) = saved.restore_or(0, (params, opt_state))
    with (
      metrics.MetricsWriter(workdir, columns, first) as writer,
      tqdm.tqdm(total=config.steps, initial=first, unit="step", desc=workdir.name, mininterval=0.5) as bar,
    ):
      for step in range(first + 1, config.steps + 1):  # `step` counts finished updates, this one included.
        batch = data.train_batch(config.seed, step - 1, config.batch_size)
        params, opt_state, row = train_step(params, opt_state, batch)
        bar.update()

        last = step == config.steps
        evaluates = last or step % config.eval_every == 0
        if evaluates or step % config.log_every == 0:
          row |= {"learning_rate": learning_rate(step - 1)}
          row |= evaluate(params, opt_state) if evaluates else {}
          values = sparsity(params, opt_state)
          row |= {column: values[name] for column, name in layers.items()}
          writer.write(step, **jax.device_get(row))
          bar.set_postfix(loss=f"{row['train_loss']:.3f}", sparsity=f"{values['_total_sparsity']:.3f}")
        # After the row, so that no checkpoint is ahead of the metrics.
        if last or step % config.checkpoint_every == 0:
          saved.save(step, (params, opt_state))

    final, masks = updater.export(params, opt_state)
    return report.write(workdir, config, updater, final, masks, evaluate(params, opt_state), writer.rows)


def make_steps(updater: js.Updater, model: Any, tx: optax.GradientTransformationExtraArgs) -> tuple[Any, Any, Any]:
  """The functions that train and evaluate a classifier.

  Returns:
    `loss_fn(params, batch, temperature=1.0)` -> (mean loss, which predictions are right);
    `train_step(params, opt_state, batch)` -> (params, opt_state, metrics), jitted;
    `eval_step(params, opt_state, batch)` -> (sum of losses, number of right predictions), jitted.
  """
  needs = updater.grow.needs if updater.grow else ()

  def loss_fn(params, batch, temperature=1.0):
    logits = model.apply({"params": params}, batch["image"]) / temperature
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return loss.mean(), logits.argmax(-1) == batch["label"]

  @jax.jit
  def train_step(params, opt_state, batch):
    grad_fn = jax.value_and_grad(lambda p: loss_fn(updater.forward_params(p, opt_state), batch), has_aux=True)
    (loss, correct), grads = grad_fn(params)
    extra = {"corr": models.correlations(model, params, batch["image"])} if "corr" in needs else {}
    updates, opt_state = tx.update(grads, opt_state, params, **extra)
    return optax.apply_updates(params, updates), opt_state, {"train_loss": loss, "train_accuracy": correct.mean()}

  @jax.jit
  def eval_step(params, opt_state, batch):
    loss, correct = loss_fn(updater.sparse_params(params, opt_state), batch)
    return loss * len(batch["label"]), correct.sum()

  return loss_fn, train_step, eval_step


def check_fields(config: ConfigDict) -> None:
  """ValueError for a misspelt field (it would be ignored) or a missing one."""
  for field in sorted(set(config.keys()) - set(FIELDS)):
    near = difflib.get_close_matches(field, FIELDS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"The configuration has an unknown field {field!r}.{hint} The fields are: {', '.join(FIELDS)}.")
  if missing := sorted(set(FIELDS) - set(config.keys())):
    raise ValueError(f"The configuration lacks {', '.join(missing)}.")
  for field in ("batch_size", "steps", "log_every", "eval_every", "checkpoint_every"):
    if config[field] < 1:
      raise ValueError(f"config.{field} must be at least 1, got {config[field]}.")


if __name__ == "__main__":
  config_flag = config_flags.DEFINE_config_file("config", None, "The configuration, such as configs/digits.py:rigl.")
  workdir_flag = flags.DEFINE_string("workdir", None, "Directory of this run; an interrupted run is resumed.")
  flags.mark_flags_as_required(["config", "workdir"])

  def main(argv):
    # Orbax tells of every save at level INFO, which app.run turns on.
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
      raise app.UsageError(f"Unknown arguments: {argv[1:]}. Options look like --config.updater.sparsity=0.95.")
    done = train(config_flag.value, workdir_flag.value)
    print(f"test accuracy {done['test_accuracy']:.4f} at sparsity {done['sparsity']:.4f}")
    print(f"report: {pathlib.Path(workdir_flag.value) / 'report.md'}")

  app.run(main)
