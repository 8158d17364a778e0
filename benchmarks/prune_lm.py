"""Post-training pruning of SmolLM2-135M: seconds, processor time, memory and perplexity of each method.

  PYTHONPATH=. python benchmarks/prune_lm.py [--rows=wanda:0.5,alps:2:4] [--blocks=30] [--brown] [--out=results/prune_lm]
  PYTHONPATH=. python benchmarks/prune_lm.py --rows=all --brown --threads=8 --batch_size=64   # perplexities on a GPU

Seconds are those of pruning alone, compilation included: from a model on disk to the pruned one in memory. Perplexity is that
of the 48 test rows of `experiments/text_rows.py`. Each row is measured in a process of its own, written as it comes, and
kept by a later run with the same --out. Memory is the highest resident set until the model is pruned, above what imports
take; a list says what of it is what. With --threads, rows share a process, and times and memory mean nothing.

`alps` is towards corrected targets, `alps_plain` towards the dense weights, `_owl` shares the sparsity out, `_16x16` removes
blocks, `_int8` and `_int4` round to the nearest, `_gptq8` and `_gptq4` while pruning.
"""

from concurrent import futures
import importlib
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import threading
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import report

from experiments import corpus
from experiments import language_models
from experiments import llama
from experiments import llama_files
from experiments import model_blocks
from experiments import perplexity
from experiments import prune_lm
from experiments import text_rows
from experiments import tokenizer
from jaxsparse import calibration

ROWS = (
  "dense",
  *(f"magnitude:{pattern}" for pattern in ("0.3", "0.5", "0.6", "2:4")),
  *(f"{m}:{p}" for m in ("wanda", "dsnot", "sparsegpt", "alps_plain", "alps") for p in ("0.5", "0.6", "2:4")),
  *("wanda_owl:0.6", "alps_owl:0.6", "alps_16x16:0.3", "alps_16x16:0.5"),
  *(f"alps_{rounding}:2:4" for rounding in ("int8", "int4", "gptq8", "gptq4")),
)
GOALS = {"wanda": 60, "sparsegpt": 120, "alps": 360}  # seconds on two CPU cores

_ROWS = flags.DEFINE_list(
  "rows", ["dense", "wanda:0.5", "sparsegpt:2:4", "alps:2:4"], f"Any of {', '.join(ROWS)}; or all."
)
_BLOCKS = flags.DEFINE_integer("blocks", None, "Prunes the first blocks only: to try the script.")
_THREADS = flags.DEFINE_integer("threads", 1, "Rows at a time, in one process: they compile beside each other.")
_BATCH = flags.DEFINE_integer("batch_size", None, "Calibration rows at a time; those of the configuration by default.")
_BROWN = flags.DEFINE_bool("brown", False, "Perplexity on the Brown corpus, too.")
_DATA = flags.DEFINE_string("data_dir", "", "Where model and texts are kept; data/ beside experiments/ by default.")
_OUT = flags.DEFINE_string("out", "results/prune_lm", "Where the JSON goes, without suffix.")

COLUMNS = ("row", "seconds", "goal", "cpu_seconds", "peak_mb", "goal_mb", "perplexity", "brown")


def configuration(method: str, pattern: str) -> ConfigDict:
  """The shipped configuration of a method with another pattern: n:m, or the fraction to remove."""
  method, _, variant = method.partition("_")
  shipped = method if method in ("sparsegpt", "alps") else "wanda"
  config = importlib.import_module(f"configs.smollm2_{shipped}").get_config()
  config.method.name = method
  of_layers = method in ("sparsegpt", "magnitude")
  config.structure = ConfigDict(dict(name="Unstructured" if of_layers else "FixedFanIn"))
  config.sparsity = None
  if variant == "plain":
    config.layer_by_layer, config.ridge = False, None
  elif variant == "owl":
    config.allocation.name = "owl"
  elif "x" in variant:
    config.structure = ConfigDict(dict(name="Block", shape=tuple(map(int, variant.split("x")))))
  elif variant:
    config.quantize.bits, config.quantize.method = int(variant[-1]), "gptq" if variant[:-1] == "gptq" else "nearest"
  if ":" in pattern:
    n, m = map(int, pattern.split(":"))
    config.structure = ConfigDict(dict(name="NM", n=n, m=m))
  elif pattern:
    config.sparsity = float(pattern)
  config.data_dir = _DATA.value
  config.batch_size = _BATCH.value or config.batch_size
  return config


def load():
  """The model, streamed on a CPU, the rows, and what of the memory in use by then is what."""
  memory = {"XLA, before anything is compiled for the model": _megabytes_of(lambda: jnp.zeros(3).block_until_ready())}
  config = configuration("wanda", "0.5")
  source = language_models.smollm2(pathlib.Path(config.data_dir or corpus.FOLDER).expanduser())
  before = _resident_mb()
  rows = text_rows.load(tokenizer.load(source), config.length, config.data_dir or None)
  memory["left behind by tokeniser and texts"] = _resident_mb() - before
  model = llama_files.load_gguf(source, config.dtype, streamed=_THREADS.value == 1 and prune_lm.is_streamed(config))
  return language_models.LanguageModel(*model, None), rows, memory


def measure(row, model, rows, memory) -> dict:
  """A line of the table."""
  method, _, pattern = row.partition(":")
  limit = _BLOCKS.value or model.config.layers
  found, params, batch = {"row": row, "blocks": limit}, model.params, _BATCH.value or 8
  if method != "dense":
    config = configuration(method, pattern)
    batch = config.batch_size
    found, params = _prune(found, model, limit, rows, config, memory)
  evaluate = lambda part: perplexity.perplexity(params, model.config, part, batch=batch)
  found["perplexity"] = evaluate(rows.test)
  if _BROWN.value:
    found["brown"] = evaluate(rows.brown)
  return found


def _prune(found, model, limit, rows, config, memory):
  """Prunes; the line with what that took, and the parameters."""
  pruner = prune_lm.create_pruner(config)
  dense = model.params["blocks"]
  if limit < len(dense):
    streamed = isinstance(dense, model_blocks.StreamedBlocks)
    head = model_blocks.StreamedBlocks(dense.__getitem__, limit) if streamed else dense[:limit]
    model = model._replace(params={**model.params, "blocks": head})
  model = model._replace(params=model_blocks.prunable(model.params))
  start, start_cpu = time.perf_counter(), time.process_time()
  errors, scales = prune_lm.prune_model(model, rows.calibration, pruner, config)
  params, blocks = model.params, model.params["blocks"]
  found |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
  found["errors"] = {name: sum(e[name] for e in errors) / len(errors) for name in errors[0]}
  if jax.default_backend() == "cpu" and pruner.name in GOALS:
    found["goal"] = GOALS[pruner.name]
  if _THREADS.value == 1:
    found |= _memory(model.config, pruner, config, rows, blocks, memory)
  if config.quantize.bits:  # what is stored, integers between bfloat16
    params = prune_lm.compress(params, blocks.masks(), pruner.structure, config.quantize, scales)
  return found, params if limit == len(dense) else {**params, "blocks": [*params["blocks"], *dense[limit:]]}


def _memory(model_config, pruner, config, rows, blocks, memory) -> dict:
  """The peak and what of it is what, which is printed too."""
  peak = _peak_mb() - _IMPORTS_MB
  budget = _budget(model_config, pruner, config, len(rows.calibration))
  memory = memory | {"pruned blocks, as they are held": blocks.nbytes / 1e6}
  memory["the block in work: dense, pruned, masks"] = 2.25 * _block_mb(model_config, config.dtype)
  memory |= {name: size for name, size in budget.items() if name != "model"}
  memory["work arrays of the largest program"] = _largest_work_arrays()
  memory["the rest: compilation, programs, memory that the allocator keeps"] = peak - sum(memory.values())
  goal = 1.1 * sum(budget.values())
  print(f"{peak:6.0f} MB at the peak; the goal, a model of {budget['model']:.0f} MB included, is {goal:.0f}")
  for name, size in memory.items():
    print(f"  {size:6.1f} MB  {name}")
  malloc = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
  return {"peak_mb": peak, "goal_mb": goal, "model_mb": budget["model"], "memory_mb": memory, "malloc": malloc}


def _budget(config, pruner, options, rows) -> dict[str, float]:
  """MB of what must be in memory: the model, a block's statistics, and the hidden states of the calibration rows."""
  shapes = llama_files.shapes(config)
  top = sum(math.prod(shapes[name]) for name in ("embedding", "norm", *(() if config.tied_embedding else ("head",))))
  cross = options.ridge is not None
  one_input = lambda k: jax.eval_shape(
    lambda: calibration.init_statistics(k, gram=pruner.gram, cross=k if cross else None)
  )
  sizes = [_megabytes(one_input(shapes[name][0])) for name in ("q", "out", "gate", "down")]
  streams = 2 if cross else 1
  width = jnp.dtype(options.dtype).itemsize
  return {
    "model": top * width / 1e6 + config.layers * _block_mb(config, options.dtype),
    "one block's statistics": max(sizes) if options.layer_by_layer else sum(sizes),
    "hidden states" + (" of the pruned and of the dense model" if cross else ""): (
      streams * rows * options.length * config.dim * width / 1e6
    ),
  }


def _block_mb(config, dtype) -> float:
  shapes = llama_files.shapes(config)
  size = sum(math.prod(shapes[name]) for name in (*llama.LINEARS, "attention_norm", "mlp_norm"))
  return size * jnp.dtype(dtype).itemsize / 1e6


def _largest_work_arrays() -> float:
  programs = jax.devices()[0].client.live_executables()
  return max(program.get_compiled_memory_stats().temp_size_in_bytes for program in programs) / 1e6


def _megabytes(tree) -> float:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 1e6


def _megabytes_of(call) -> float:
  """What a call leaves behind in memory."""
  before = _resident_mb()
  call()
  return _resident_mb() - before


def _resident_mb() -> float:
  status = pathlib.Path("/proc/self/status")  # Linux
  lines = status.read_text().splitlines() if status.exists() else []
  return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS")), math.nan)


def _peak_mb() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


_IMPORTS_MB = _peak_mb()


def main(argv):
  del argv
  wanted = list(ROWS) if _ROWS.value == ["all"] else _ROWS.value
  if unknown := sorted(set(wanted) - set(ROWS)):
    raise app.UsageError(f"--rows: unknown {', '.join(unknown)}. Allowed are all, or any of {', '.join(ROWS)}.")
  out = pathlib.Path(_OUT.value).with_suffix(".json")
  key, lock = lambda found: (found["row"], found["blocks"], bool(found.get("malloc"))), threading.Lock()

  def one(row):
    found = measure(row, model, rows, memory)
    with lock:
      done = json.loads(out.read_text())["rows"] if out.exists() else []
      report.write_json(out, [old for old in done if key(old) != key(found)] + [found], threads=_THREADS.value)
      report.print_table([found], COLUMNS)

  if len(wanted) > 1 and _THREADS.value == 1:
    for row in wanted:
      subprocess.run([sys.executable, *sys.argv, f"--rows={row}"], check=True)
  elif len(wanted) == 1:
    model, rows, memory = load()
    one(wanted[0])  # in this thread: memory that other threads allocate is fragmented more
  else:
    model, rows, memory = load()
    with futures.ThreadPoolExecutor(_THREADS.value) as pool:
      jobs = [pool.submit(one, row) for row in wanted]
    for job in jobs:
      job.result()  # a row that failed says so once the others are done
  report.print_table(json.loads(out.read_text())["rows"], COLUMNS)


if __name__ == "__main__":
  app.run(main)
