"""Post-training pruning of SmolLM2-135M: seconds, processor time, memory and perplexity of each method.

  PYTHONPATH=. python benchmarks/prune_lm.py [--rows=wanda:0.5,alps:2:4] [--blocks=30] [--brown] [--out=results/prune_lm]
  PYTHONPATH=. python benchmarks/prune_lm.py --rows=all --brown --threads=8 --batch_size=64   # perplexities on a GPU

Seconds are those of pruning alone, compilation included: from the dense model in memory to the pruned one. Perplexity is that
of the 48 test rows of `experiments/text_rows.py`. Rows are written as they come, and kept by a later run with the same --out.
Memory is the highest resident set of the process so far, above what imports take: for a figure of one method, run it alone.
`alps` is towards corrected targets, `alps_plain` towards the dense weights, `_owl` shares the sparsity out, `_16x16` removes
blocks, `_int8` and `_int4` round to the nearest, `_gptq8` and `_gptq4` while pruning.
"""

from concurrent import futures
import importlib
import json
import pathlib
import resource
import threading
import time

from absl import app
from absl import flags
import jax
from ml_collections import ConfigDict
import report

from experiments import language_models
from experiments import llama
from experiments import perplexity
from experiments import prune_lm
from experiments import text_rows
import jaxsparse as js
from jaxsparse import calibration

ROWS = (
  "dense",
  *(f"magnitude:{pattern}" for pattern in ("0.3", "0.5", "0.6", "2:4")),
  *(
    f"{m}:{pattern}" for m in ("wanda", "dsnot", "sparsegpt", "alps_plain", "alps") for pattern in ("0.5", "0.6", "2:4")
  ),
  *("wanda_owl:0.6", "alps_owl:0.6", "alps_16x16:0.3", "alps_16x16:0.5"),
  *(f"alps_{rounding}:2:4" for rounding in ("int8", "int4", "gptq8", "gptq4")),
)
GOALS = {"wanda": 60, "sparsegpt": 120, "alps": 360}  # seconds on two CPU cores

_ROWS = flags.DEFINE_list(
  "rows", ["dense", "wanda:0.5", "sparsegpt:2:4", "alps:2:4"], f"Any of {', '.join(ROWS)}; or all."
)
_BLOCKS = flags.DEFINE_integer("blocks", None, "Prunes the first blocks only: to try the script.")
_THREADS = flags.DEFINE_integer(
  "threads", 1, "Rows at a time: they compile beside each other; then times mean nothing."
)
_BATCH = flags.DEFINE_integer("batch_size", None, "Calibration rows at a time; those of the configuration by default.")
_BROWN = flags.DEFINE_bool("brown", False, "Perplexity on the Brown corpus, too.")
_DATA = flags.DEFINE_string("data_dir", "", "Where model and texts are kept; data/ beside experiments/ by default.")
_OUT = flags.DEFINE_string("out", "results/prune_lm", "Where the JSON goes, without suffix.")

COLUMNS = ("row", "seconds", "goal", "cpu_seconds", "peak_mb", "perplexity", "brown")


def configuration(method: str, pattern: str) -> ConfigDict:
  """The shipped configuration of a method with another pattern: n:m, or the fraction to remove."""
  method, _, variant = method.partition("_")
  config = importlib.import_module(f"configs.smollm2_{'wanda' if method == 'dsnot' else method}").get_config()
  config.method.name = method
  config.structure = ConfigDict(dict(name="Unstructured" if method == "sparsegpt" else "FixedFanIn"))
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
  else:
    config.sparsity = float(pattern)
  config.data_dir = _DATA.value
  config.batch_size = _BATCH.value or config.batch_size
  return config


def by_magnitude(blocks, pattern):
  """Each layer by the magnitude of its weights, without a look at data."""
  structure = js.NM(*map(int, pattern.split(":"))) if ":" in pattern else js.Unstructured()
  sparsity = None if ":" in pattern else float(pattern)

  @jax.jit
  def prune(w):
    keep = calibration.keep_units(structure, w.shape, sparsity)
    return calibration.prune(w, calibration.magnitude_scores(w), structure, keep)[0]

  return [block | {name: prune(block[name]) for name in llama.LINEARS} for block in blocks]


def measure(row, model, rows) -> dict:
  """A line of the table."""
  method, _, pattern = row.partition(":")
  limit = _BLOCKS.value or len(model.params["blocks"])
  head, tail = model.params["blocks"][:limit], model.params["blocks"][limit:]
  found, params = {"row": row, "blocks": limit}, model.params
  start, start_cpu = time.perf_counter(), time.process_time()
  if method == "magnitude":
    head = jax.block_until_ready(by_magnitude(head, pattern))
  elif method != "dense":
    config = configuration(method, pattern)
    part = model._replace(params=dict(model.params, blocks=list(head)))
    pruner = prune_lm.create_pruner(config)
    masks, errors, scales = prune_lm.prune_model(part, rows.calibration, pruner, config)
    head = jax.block_until_ready(part.params["blocks"])
    if config.quantize.bits:  # what is stored, integers between bfloat16
      params = prune_lm.compress(part.params, masks, pruner.structure, config.quantize, scales)
      head = params["blocks"]
    found["errors"] = {name: sum(e[name] for e in errors) / len(errors) for name in errors[0]}
    if jax.default_backend() == "cpu" and method in GOALS:
      found["goal"] = GOALS[method]
  if method != "dense":
    found |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
  found["peak_mb"] = _peak_mb() - _IMPORTS_MB
  params = dict(params, blocks=[*head, *tail])
  found["perplexity"] = perplexity.perplexity(params, model.config, rows.test)
  if _BROWN.value:
    found["brown"] = perplexity.perplexity(params, model.config, rows.brown)
  return found


def _peak_mb() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


_IMPORTS_MB = _peak_mb()


def main(argv):
  del argv
  wanted = list(ROWS) if _ROWS.value == ["all"] else _ROWS.value
  if unknown := sorted(set(wanted) - set(ROWS)):
    raise app.UsageError(f"--rows: unknown {', '.join(unknown)}. Allowed are all, or any of {', '.join(ROWS)}.")
  out = pathlib.Path(_OUT.value).with_suffix(".json")
  done = json.loads(out.read_text())["rows"] if out.exists() else []
  config = configuration("wanda", "0.5")
  model = language_models.load(config.model, config.data_dir, config.dtype)
  rows = text_rows.load(model.tokenizer, config.length, config.data_dir or None, training=False)
  print(f"model and texts: {_peak_mb() - _IMPORTS_MB:.0f} MB above the imports", flush=True)
  key, lock = lambda found: (found["row"], found["blocks"]), threading.Lock()

  def one(row):
    found = measure(row, model, rows)
    with lock:
      done[:] = [old for old in done if key(old) != key(found)] + [found]
      report.write_json(out, done, threads=_THREADS.value)
      report.print_table([found], COLUMNS)

  with futures.ThreadPoolExecutor(_THREADS.value) as pool:
    jobs = [pool.submit(one, row) for row in wanted]
  for job in jobs:
    job.result()  # a row that failed says so once the others are done
  report.print_table(done, COLUMNS)


if __name__ == "__main__":
  app.run(main)
