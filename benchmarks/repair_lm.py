"""Repair of a pruned SmolLM2-135M by a loss, next to the dense model trained as long on the same text.

  PYTHONPATH=. python benchmarks/repair_lm.py --rows=dense/text/200,2:4/distill/200,2:4/text/200 [--out=results/repair_lm]

A row is a pattern (the fraction to remove, n:m, or `dense`), a loss (`distill`: the divergence from the dense model, `text`:
the next token, or the share of the divergence, such as 0.5; `ast` and `cast`: the divergence, with masks that move and the
learning rate of `configs/smollm2_retrain.py`, for n:m) and the number of steps; pruned is by `configs/smollm2_alps.py`.
Seconds are those of the steps, compilation apart. Perplexity is that of the test rows of `experiments/text_rows.py`, which
nothing is trained or calibrated on. Rows are written as they come, and kept by a later run with the same --out.
"""

from concurrent import futures
import dataclasses
import json
import pathlib
import time
from typing import Any, NamedTuple

from absl import app
from absl import flags
import jax
from ml_collections import ConfigDict
import report

from configs import smollm2_alps
from configs import smollm2_repair
from configs import smollm2_retrain
from experiments import language_models
from experiments import model_blocks
from experiments import perplexity
from experiments import prune_lm
from experiments import repair
from experiments import text_rows

_ROWS = flags.DEFINE_list("rows", ["2:4/distill/300"], "pattern/loss/steps, any number of them.")
_RATE = flags.DEFINE_float("learning_rate", None, "Of the repair; that of the configuration by default.")
_ATTENTION = flags.DEFINE_string("attention", "cudnn", "xla, or cudnn on a GPU.")
_BATCH = flags.DEFINE_integer("batch_size", None, "Calibration rows at a time; those of the configuration by default.")
_DATA = flags.DEFINE_string("data_dir", "", "Where model and texts are kept; data/ beside experiments/ by default.")
_LAYERS = flags.DEFINE_integer("layers", None, "Keeps the first blocks only: to try the script.")
_OUT = flags.DEFINE_string("out", "results/repair_lm", "Where the JSON goes, without suffix.")

LOSSES = {"distill": 1.0, "text": 0.0}
MOVING = ("ast", "cast")
COLUMNS = (
  "row",
  "learning_rate",
  "seconds",
  "before",
  "before_brown",
  "after",
  "after_brown",
  "first_loss",
  "last_loss",
)


class Start(NamedTuple):
  """A model before repair: its parameters, masks by block, structure, and (test, Brown) perplexities."""

  params: Any
  masks: Any
  structure: Any
  perplexities: list[float]


def evaluate(params, model, rows) -> list[float]:
  return [perplexity.perplexity(params, model.config, part) for part in (rows.test, rows.brown)]


def pruned(pattern, model, rows) -> Start:
  """By ALPS with corrected targets; `dense` as it is."""
  if pattern == "dense":
    return Start(model.params, None, None, evaluate(model.params, model, rows))
  config = smollm2_alps.get_config()
  if ":" not in pattern:
    config.structure, config.sparsity = ConfigDict(dict(name="FixedFanIn")), float(pattern)
  part = model._replace(params=model_blocks.prunable(model.params))
  config.batch_size = _BATCH.value or config.batch_size
  prune_lm.prune_model(part, rows.calibration, prune_lm.create_pruner(config), config)
  masks = list(part.params["blocks"].masks())
  return Start(part.params, masks, prune_lm.structure_of(config), evaluate(part.params, model, rows))


def measure(row, start, model, rows) -> dict:
  """A line of the table; start is what `pruned` gives."""
  _, loss, steps = row.split("/")
  options = (smollm2_retrain if loss in MOVING else smollm2_repair).get_config().repair
  if loss in MOVING:
    options.algorithm = loss
  else:
    options.distill = LOSSES[loss] if loss in LOSSES else float(loss)
  options.attention, options.learning_rate = _ATTENTION.value, _RATE.value or options.learning_rate
  train = lambda: repair.repair(
    start.params, start.masks, model.params, model.config, rows.training, options, structure=start.structure
  )
  found = {"row": row, "learning_rate": options.learning_rate, "batch": options.batch_size}
  found["before"], found["before_brown"] = start.perplexities
  options.steps = 1
  train()  # compiles
  options.steps = int(steps)
  begin = time.perf_counter()
  after, _, losses = jax.block_until_ready(train())
  found["seconds"] = time.perf_counter() - begin
  found["after"], found["after_brown"] = evaluate(after, model, rows)
  return found | {"first_loss": losses[0], "last_loss": losses[-1]}


def main(argv):
  del argv
  out = pathlib.Path(_OUT.value).with_suffix(".json")
  done = json.loads(out.read_text())["rows"] if out.exists() else []
  config = smollm2_alps.get_config()
  model = language_models.load(config.model, _DATA.value, config.dtype)
  if _LAYERS.value:
    shorter = dataclasses.replace(model.config, layers=_LAYERS.value)
    model = model._replace(config=shorter, params=dict(model.params, blocks=model.params["blocks"][: _LAYERS.value]))
  rows = text_rows.load(model.tokenizer, config.length, _DATA.value or None, training=True)
  patterns = sorted({row.split("/")[0] for row in _ROWS.value})
  at_a_time = len(patterns) if jax.default_backend() == "gpu" else 1  # there, compiling takes longest
  with futures.ThreadPoolExecutor(at_a_time) as pool:
    starts = dict(zip(patterns, pool.map(lambda pattern: pruned(pattern, model, rows), patterns)))
  for row in _ROWS.value:
    found = measure(row, starts[row.split("/")[0]], model, rows)
    key = lambda line: (line["row"], line["learning_rate"])
    done = [old for old in done if key(old) != key(found)] + [found]
    report.write_json(out, done)
    report.print_table([found], COLUMNS)
  report.print_table(done, COLUMNS)


if __name__ == "__main__":
  app.run(main)
