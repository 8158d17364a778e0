"""A pruned sentence encoder, all-MiniLM-L6-v2: how far the similarities of sentences move.

  PYTHONPATH=. python benchmarks/prune_encoder.py [--rows=wanda:0.5,sparsegpt:2:4] [--out=results/prune_encoder]

A row is a method of `experiments/pruners.py` and a pattern: n:m, or the fraction that each output loses. Calibrated on 512
sentences of the Brown corpus, the first 32 tokens of each (shorter ones are not taken, so nothing is padding), block by
block on the outputs of pruned blocks. Tested on all pairs of 512 other sentences of any length: Spearman's rank
correlation of their cosine similarities with the dense encoder's, how many sentences keep their nearest neighbour, and
the mean change of a similarity. Rows are written as they come, and kept by a later run with the same --out.
"""

import functools
import json
import pathlib
import time

from absl import app
from absl import flags
import jax.numpy as jnp
import numpy as np
import report

from experiments import corpus
from experiments import encoder as encoders
from experiments import pruners
from experiments import text_rows
import jaxsparse as js
from jaxsparse import calibration

METHODS, PATTERNS = ("magnitude", "wanda", "dsnot", "sparsegpt", "alps"), ("0.5", "2:4")
_ROWS = flags.DEFINE_list(
  "rows", [f"{m}:{p}" for p in PATTERNS for m in METHODS], "method:pattern, any number of them."
)
_DATA = flags.DEFINE_string("data_dir", "", "Where model and texts are kept; data/ beside experiments/ by default.")
_OUT = flags.DEFINE_string("out", "results/prune_encoder", "Where the JSON goes, without suffix.")

COLUMNS = ("row", "spearman", "same_nearest", "mean_change", "seconds")
TESTED, CALIBRATED, LENGTH, LONGEST, BATCH = 512, 512, 32, 128, 64


def load():
  """(encoder, batches of what its first block is fed with, test sentences as tokens and which of them are there)."""
  folder = pathlib.Path(_DATA.value or corpus.FOLDER).expanduser()
  encoder = encoders.minilm(folder)
  sentences = sorted({line for line in text_rows.brown(folder).splitlines() if len(line.split()) > 3})
  sentences = np.random.RandomState(0).permutation(sentences)
  ids, present = encoders.tokens(encoder, sentences[TESTED : 8 * TESTED], LENGTH)
  calibration_ids = ids[present.all(1)][:CALIBRATED]
  hidden = [encoders.embed(encoder, jnp.asarray(part)) for part in np.split(calibration_ids, CALIBRATED // BATCH)]
  return encoder, hidden, encoders.tokens(encoder, sentences[:TESTED], LONGEST)


def prune(row, encoder, hidden):
  """The encoder with its blocks pruned."""
  method, _, pattern = row.partition(":")
  structure = js.NM(*map(int, pattern.split(":"))) if ":" in pattern else js.FixedFanIn()
  pruner = pruners.Pruner(method, structure, None if ":" in pattern else float(pattern))
  apply_block = functools.partial(encoders.apply_block, heads=encoder.heads, epsilon=encoder.epsilon)
  blocks = encoder.params["blocks"]
  pruned = calibration.prune_blocks(apply_block, blocks, hidden, pruner.callback(), encoders.LINEARS, gram=pruner.gram)
  return encoder._replace(params={**encoder.params, "blocks": [block.params for block in pruned]})


def similarities(encoder, ids, present) -> np.ndarray:
  """Cosine similarities of all sentences, `[B, B]`."""
  parts = [encoders.encode(encoder, *part) for part in zip(np.split(ids, 8), np.split(present, 8))]
  vectors = np.concatenate(parts)
  return vectors @ vectors.T


def compare(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
  """What became of the dense encoder's similarities."""
  pairs = np.triu_indices(len(wanted), 1)
  ranks = [np.argsort(np.argsort(values[pairs])) for values in (found, wanted)]
  nearest = [np.argmax(values - 2 * np.eye(len(values)), 1) for values in (found, wanted)]
  return {
    "spearman": float(np.corrcoef(*ranks)[0, 1]),
    "same_nearest": float(np.mean(nearest[0] == nearest[1])),
    "mean_change": float(np.abs(found[pairs] - wanted[pairs]).mean()),
  }


def main(argv):
  del argv
  out = pathlib.Path(_OUT.value).with_suffix(".json")
  done = json.loads(out.read_text())["rows"] if out.exists() else []
  encoder, hidden, test = load()
  wanted = similarities(encoder, *test)
  for row in _ROWS.value:
    begin = time.perf_counter()
    pruned = prune(row, encoder, hidden)
    seconds = time.perf_counter() - begin
    found = {"row": row, **compare(similarities(pruned, *test), wanted), "seconds": seconds}
    done = [old for old in done if old["row"] != row] + [found]
    report.write_json(out, done, sentences=TESTED, calibration=[CALIBRATED, LENGTH])
    report.print_table([found], COLUMNS)
  report.print_table(done, COLUMNS)


if __name__ == "__main__":
  app.run(main)
