"""The block-sparse transformer at toy size: it stores the blocks only, they move, and one program serves all of it."""

import json

from absl import flags
from absl.testing import flagsaver
import jax
import jax.numpy as jnp
import numpy as np

from experiments import block_sparse_transformer as experiment
from experiments import llama
import jaxsparse as js

flags.FLAGS.mark_as_parsed()


@flagsaver.flagsaver(
  (experiment._DIM, 32), (experiment._HIDDEN, 64), (experiment._LAYERS, 1), (experiment._BATCH, 2),
  (experiment._LENGTH, 8), (experiment._STEPS, 12), (experiment._EVERY, 3),
)  # fmt: skip
def test_blocks_move_without_compiling(tmp_path):
  config = llama.Config(32, 2, 2, 16, 64, 1e4)
  text = jnp.asarray(np.random.default_rng(0).integers(0, 9, 400), jnp.uint8)
  run = experiment.prepare(8, 0.25, config, text, vocabulary=9)
  start = jax.tree.map(jnp.copy, js.get_masks(run["carry"][1]))
  rows = []
  found = experiment.train(
    run | {"carry": jax.tree.map(jnp.copy, run["carry"])}, text, lambda row: rows.append(dict(row))
  )
  assert np.isfinite(found["losses"]).all() and len(found["losses"]) == 4 == len(rows) and found["ms of the MLPs"] > 0
  # Refreshes stop after three quarters of the steps.
  assert found["refreshes that moved blocks"] == 3 and found["compilations while training"] == 0
  assert 0 < experiment.speed_up(found, [found | {"block": None}]) == 1
  for other in (found | {"block": None}, found, found | {"dim": 64}):  # rows of other widths stay
    experiment.write(tmp_path / "rows", [other])
  written = json.loads((tmp_path / "rows.json").read_text())["rows"]
  assert [(row["dim"], row["block"]) for row in written] == [(32, None), (32, 8), (64, 8)]
  dense = 32 * 2 * 64 + 64 * 32
  rest = 9 * 32 + 32 + 32 * 96 + 32 * 32 + 2 * 32
  assert found["parameters"] == dense // 4 + rest
  carry, _ = run["refresh"](run["carry"], text)
  layers = js.get_masks(carry[1])["layers"]
  assert any(
    not np.array_equal(np.sort(a.indices), np.sort(b.indices))
    for old, new in zip(start["layers"], layers)
    for a, b in ((old.gate_up, new.gate_up), (old.down, new.down))
  )
