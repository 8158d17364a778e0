"""The experiments: what the command line does, what a kill leaves, what a mistake says."""

import gzip
import importlib
import json
import os
import pathlib
import random
import re
import signal
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from experiments import checkpoints
from experiments import datasets
from experiments import fashion_mnist_table
from experiments import metrics
from experiments import models
from experiments import optimizers
from experiments import train
import jaxsparse as js

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = [f"digits:{name}" for name in js.all_algorithm_names()]
CONFIGS += sorted(path.stem for path in (ROOT / "configs").glob("fashion_mnist_*.py"))


def get_config(name):
  """The configuration that `--config=configs/name.py`, or `configs/file.py:algorithm`, gives."""
  file, *algorithm = name.split(":")
  return importlib.import_module(f"configs.{file}").get_config(*algorithm)


def toy(name, steps=24, **fields):
  """A configuration of configs/, small and short."""
  config = get_config(name)
  config.model.features = (32, 32)  # frames of SdGF need inputs in 32s
  with config.unlocked():
    config.update({"steps": steps, "batch_size": 32, "log_every": 4, "eval_every": 8, "checkpoint_every": 8} | fields)
  return config


def write_idx(path, array):
  path.write_bytes(b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def write_fashion_mnist(folder):
  """64 training and 32 test images of noise, in Fashion-MNIST's files, one of them compressed."""
  rng = np.random.default_rng(0)
  for part, size in (("train", 64), ("t10k", 32)):
    write_idx(folder / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (size, 28, 28), np.uint8))
    write_idx(folder / f"{part}-labels-idx1-ubyte", (np.arange(size) % 10).astype(np.uint8))
  plain = folder / "train-images-idx3-ubyte"
  plain.with_name(plain.name + ".gz").write_bytes(gzip.compress(plain.read_bytes()))
  plain.unlink()


def read_events(folder):
  """{(tag, step): value} from TensorBoard's files: records of length, checksum, event, checksum."""
  from tensorboardX.proto import event_pb2

  found = {}
  for path in sorted(folder.glob("events.out.tfevents.*")):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
  return found


# -- configurations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_trains(name):
  """As far as shapes go: a whole step is traced, nothing is compiled."""
  config = toy(name, steps=400)
  train.check_fields(config)
  updater = js.create_updater(config.updater)
  optimizer, _ = optimizers.create(config.optimizer, config.steps)
  tx, model = updater.wrap_optax(optimizer), models.create(config.model, classes=10)
  size = 8 if config.dataset == "digits" else 28
  image, label = jax.ShapeDtypeStruct((4, size, size, 1), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)

  def start(image):
    params = model.init(jax.random.key(0), image)["params"]
    state = tx.init(params)
    masks = jax.tree.map(lambda p: p == p if p.ndim > 1 else optax.MaskedNode(), params)
    return params, js.set_masks(state, masks) if updater.prunes_at_init else state

  params, state = jax.eval_shape(start, image)
  _, train_step, _ = train.make_steps(updater, model, tx)
  new, new_state, _ = jax.eval_shape(train_step, params, state, {"image": image, "label": label})
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds((new, new_state)) == kinds((params, state))
  assert bool(jax.tree.leaves(js.get_masks(state))) == (name != "digits:no_prune" and "fashion_mnist_no" not in name)
  if "stop" in config.updater:
    assert config.updater.stop == 300  # follows the steps


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_says_how_to_run_it(name):
  file, *algorithm = name.split(":")
  text = importlib.import_module(f"configs.{file}").__doc__
  assert f"--config=configs/{file}.py" in text
  assert not algorithm or re.search(rf"\| {algorithm[0]} +\| +\d\d\.\d", text)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sparsity"), [("digits:g2gnet", 0.9), ("digits:step", 0.5), ("digits:snip", 0.9)])
def test_a_toy_run_leaves_metrics_a_checkpoint_and_a_report(tmp_path, name, sparsity):
  out = train.train(toy(name), tmp_path)
  assert out["sparsity"] == pytest.approx(sparsity, abs=2e-3)
  rows = metrics.read_rows(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(4, 25, 4))
  assert out["test_accuracy"] == rows[-1]["test_accuracy"]
  # One of them is computed in a compiled function: XLA may round a mean elsewhere.
  assert rows[-1]["sparsity/_total_sparsity"] == pytest.approx(out["sparsity"], rel=1e-6)
  assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + len(rows)
  assert json.loads((tmp_path / "report.json").read_text()) == out
  assert "sparsity_per_layer.png" in (tmp_path / "report.md").read_text()
  for plot in ("sparsity_per_layer.png", "curves.png"):
    assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
  events = read_events(tmp_path / "tensorboard")
  assert events["train_loss", 24] == pytest.approx(rows[-1]["train_loss"])


def test_synflow_gets_the_sum_of_outputs_on_ones(tmp_path, monkeypatch):
  """By a configuration alone: the masks are those of the flow, not of the training loss."""
  config = toy("digits:synflow", steps=1)
  config.updater.iterations = 5
  config.updater.sparsity = 0.95
  made = []
  original = js.set_masks
  monkeypatch.setattr(js, "set_masks", lambda state, masks: made.append(masks) or original(state, masks))
  train.train(config, tmp_path)
  model = models.create(config.model, classes=10)
  params = jax.jit(model.init)(jax.random.key(config.seed), jnp.zeros((1, 8, 8, 1)))["params"]
  _, want = js.synflow(sparsity=0.95, iterations=5).instant_sparsify(
    params,
    loss_fn=lambda p, ones: model.apply({"params": p}, ones).sum(),
    batches=[jnp.ones((1, 8, 8, 1))],
  )
  jax.tree.map(np.testing.assert_array_equal, made[0], want)
  assert all(mask.any() for mask in jax.tree.leaves(want))


def test_the_cnn_gives_logits():
  model = models.create({"name": "cnn", "features": (8, 16)}, classes=10)
  logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((5, 28, 28, 1)))
  assert logits.shape == (5, 10)


def test_fashion_mnist_from_a_directory_of_idx_files(tmp_path):
  write_fashion_mnist(tmp_path)
  data = datasets.load("fashion_mnist", str(tmp_path))
  assert data.train_images.shape == (64, 28, 28, 1) and data.test_images.shape == (32, 28, 28, 1)
  np.testing.assert_allclose(data.train_images.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(data.train_images.std(0), 1, atol=1e-4)
  config = toy("fashion_mnist_static_sparse", steps=8, data_dir=str(tmp_path))
  out = train.train(config, tmp_path / "run")
  assert out["sparsity"] == pytest.approx(0.9, abs=1e-3)
  assert train.train(config, tmp_path / "run") == out  # Finished: only the report is written again.


def test_a_batch_is_a_function_of_seed_and_step():
  data = datasets.load("digits")
  first = [data.train_batch(3, step, 128)["label"] for step in range(25)]
  assert np.array_equal(data.train_batch(3, 17, 128)["label"], first[17])
  assert not np.array_equal(data.train_batch(4, 17, 128)["label"], first[17])
  # An epoch of 11 batches shows no example twice; the next epoch has another order.
  images = np.concatenate([data.train_batch(3, step, 128)["image"] for step in range(11)]).reshape(11 * 128, -1)
  assert len(np.unique(images, axis=0)) >= len(np.unique(data.train_images.reshape(-1, 64), axis=0)) - (1437 - 11 * 128)
  assert not np.array_equal(first[0], first[11])
  with pytest.raises(ValueError, match="batch_size=2000 is more than the 1437"):
    data.train_batch(0, 0, 2000)


def test_table_counts_a_row_as_reached_within_the_slack():
  runs = [{"test_accuracy": a, "sparsity": 0.9} for a in (0.886, 0.888, 0.887)]
  row = fashion_mnist_table.summarize("magnitude", 0.9, 88.8, runs)
  assert row["mean"] == pytest.approx(88.7) and row["std"] == pytest.approx(0.1) and row["reached"]
  assert not fashion_mnist_table.summarize("magnitude", 0.9, 89.0, runs)["reached"]
  assert "| magnitude | 90 % | 88.70 ± 0.10 | 88.80 | -0.10 | yes |" in fashion_mnist_table.markdown([row])
  assert fashion_mnist_table.get_config("set", 0.95, seed=2).updater.sparsity == 0.95


# -- kills -------------------------------------------------------------------------------------------------------------

# Runs train.py as the command line does; the process kills itself before the update that KILL_STEP names, or
# KILL_SECONDS into the saving of the next checkpoint.
COMMAND = """
import os, runpy, signal, sys, threading
sys.path.insert(0, os.getcwd())
from experiments import checkpoints, datasets
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
train_batch, save = datasets.Dataset.train_batch, checkpoints.Checkpoints.save
def killing_batch(self, seed, step, size):
  if step == int(os.environ.get("KILL_STEP", -1)):
    kill()
  return train_batch(self, seed, step, size)
def killing_save(self, step, state):
  if "KILL_SECONDS" in os.environ:
    threading.Timer(float(os.environ["KILL_SECONDS"]), kill).start()
  save(self, step, state)
datasets.Dataset.train_batch, checkpoints.Checkpoints.save = killing_batch, killing_save
sys.argv[0] = "experiments/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_command(workdir, *flags, **environment):
  arguments = ["--config=configs/digits.py:rigl", f"--workdir={workdir}", *flags]
  # The first process compiles, the others load what it compiled: four compilations would take most of a minute.
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
    "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  environment = os.environ | {"JAX_PLATFORMS": "cpu"} | cache | {k: str(v) for k, v in environment.items()}
  return subprocess.run(
    [sys.executable, "-c", COMMAND, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
  )


def final_state(workdir, step):
  with ocp.CheckpointManager(workdir / "checkpoints") as manager:
    assert manager.latest_step() == step
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
  # SET: besides moments and masks, its random growth has to go on where it was.
  flags = (
    "--config.updater.name=set",
    "--config.updater.sparsity=0.8",
    "--config.updater.every=7",
    "--config.model.features=(32, 16)",
    "--config.steps=60",
    "--config.log_every=4",
    "--config.eval_every=20",
    "--config.checkpoint_every=10",
  )
  whole = run_command(tmp_path / "whole", *flags)
  assert whole.returncode == 0, whole.stderr
  assert "at sparsity 0.80" in whole.stdout
  assert "checkpoint_manager" not in whole.stderr  # orbax is quiet

  step, seconds = random.randrange(1, 50), random.uniform(0.0, 0.06)
  print(f"killed before update {step + 1}, then {seconds:.4f} s into saving")  # shown when the test fails
  killed = run_command(tmp_path / "killed", *flags, KILL_STEP=step)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  saving = run_command(tmp_path / "killed", *flags, KILL_SECONDS=seconds)
  assert saving.returncode == -signal.SIGKILL, saving.stderr
  resumed = run_command(tmp_path / "killed", *flags)
  assert resumed.returncode == 0, resumed.stderr

  expected, got = final_state(tmp_path / "whole", 60), final_state(tmp_path / "killed", 60)
  assert any("masks" in name for name in expected) and any("nu" in name for name in expected)
  jax.tree.map(np.testing.assert_array_equal, expected, got)
  for file in ("metrics.csv", "metrics.jsonl", "report.json", "report.md"):
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes(), file
  assert read_events(tmp_path / "whole" / "tensorboard") == read_events(tmp_path / "killed" / "tensorboard")


def test_metrics_after_a_kill_hold_every_row_once(tmp_path):
  with metrics.MetricsWriter(tmp_path, ["loss", "accuracy"]) as writer:
    for step in (1, 2, 3):
      writer.write(step, loss=1 / step)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "lo')  # the kill came in the middle of a line
  with metrics.MetricsWriter(tmp_path, ["loss", "accuracy"], step=2) as writer:
    writer.write(3, loss=1 / 3, accuracy=0.5)
  assert (tmp_path / "metrics.csv").read_text() == f"step,loss,accuracy\n1,1.0,\n2,0.5,\n3,{1 / 3!r},0.5\n"
  assert [row["step"] for row in metrics.read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
  with pytest.raises(ValueError, match="'speed'.*not among the columns"):
    with metrics.MetricsWriter(tmp_path, ["loss"], step=3) as writer:
      writer.write(4, speed=1.0)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    ({"updater": {"name": "rigll", "sparsity": 0.9}}, ValueError, "no algorithm 'rigll'. Did you mean 'rigl'"),
    ({"updater": {"name": "rigl", "sparsty": 0.9}}, TypeError, "no argument 'sparsty'. Did you mean 'sparsity'"),
    ({"updater": {"name": "rigl", "sparsity": 1.5, "stop": 9}}, ValueError, r"sparsity must be in \[0, 1\)"),
    ({"bach_size": 3}, ValueError, "unknown field 'bach_size'. Did you mean 'batch_size'"),
    ({"dataset": "digit"}, ValueError, "no dataset 'digit'. Did you mean 'digits'"),
    ({"model": {"name": "mlpp", "features": (8,)}}, ValueError, "no model 'mlpp'. Did you mean 'mlp'"),
    (
      {"optimizer": {"name": "adan_", "learning_rate": 0.1, "decay": "cosine"}},
      ValueError,
      "no optimizer 'adan_'. Did you mean 'adan",
    ),
    (
      {"optimizer": {"name": "adam", "learning_rate": 0.1, "decay": "cos"}},
      ValueError,
      "one of cosine, constant, warmup_cosine, got 'cos'",
    ),
    ({"steps": 0}, ValueError, "config.steps must be at least 1"),
  ],
)
def test_a_bad_configuration_fails_before_anything_is_written(tmp_path, change, error, message):
  config = toy("digits:rigl")
  with config.unlocked():
    for field, value in change.items():
      config[field] = ConfigDict(value) if isinstance(value, dict) else value
  with pytest.raises(error, match=message):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError) as error:
    train.train(toy("fashion_mnist_rigl", data_dir=str(tmp_path)), tmp_path / "run")
  for way in ("apt-get install dataset-fashion-mnist", "--config.data_dir=", "configs/digits.py", str(tmp_path)):
    assert way in str(error.value)
  monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", str(tmp_path / "debian"))
  with pytest.raises(FileNotFoundError, match="debian"):
    datasets._find(pathlib.Path(datasets.DEBIAN_FASHION_MNIST), "train-images-idx3-ubyte")


def test_broken_idx_files_are_refused(tmp_path):
  write_fashion_mnist(tmp_path)
  labels = tmp_path / "train-labels-idx1-ubyte"
  labels.write_bytes(labels.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r"is cut off: its header says \(64,\), it holds 63"):
    datasets.load("fashion_mnist", str(tmp_path))
  labels.write_bytes(b"<html>not found</html>")
  with pytest.raises(ValueError, match="is not an IDX file"):
    datasets.load("fashion_mnist", str(tmp_path))


def test_a_checkpoint_of_another_run_is_refused_and_says_what_differs(tmp_path):
  config = toy("digits:rigl")
  state = {"params": {"kernel": jnp.ones((3, 4))}, "count": jnp.zeros((), jnp.int32)}
  with checkpoints.Checkpoints(tmp_path, config) as saved:
    assert saved.restore_or(0, state) == (0, state)
    saved.save(5, state)
  config.checkpoint_every = 3  # changes nothing that was trained
  with checkpoints.Checkpoints(tmp_path, config) as saved:
    step, restored = saved.restore_or(0, state)
    assert step == 5
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    other = {"params": {"kernel": jnp.ones((3, 5))}, "count": jnp.zeros((), jnp.int32), "key": jnp.zeros(2)}
    with pytest.raises(ValueError, match="another state") as error:
      saved.restore_or(0, other)
    assert "params/kernel: float32[3, 4] in the checkpoint, float32[3, 5] now" in str(error.value)
    assert "key: (not there) in the checkpoint, float32[2] now" in str(error.value)
  config.updater.sparsity = 0.8
  with checkpoints.Checkpoints(tmp_path, config) as saved:
    with pytest.raises(ValueError, match=r"another configuration:\n  updater.sparsity: 0.9 in the checkpoint, 0.8 now"):
      saved.restore_or(0, state)
