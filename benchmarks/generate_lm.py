"""Tokens a second of `experiments/generate.py`: SmolLM2-135M dense, with 2:4 weights, and with 2:4 weights as integers.

  PYTHONPATH=. python benchmarks/generate_lm.py [--batches=1,16] [--tokens=256] [--out=results/generate_lm]

Weights are pruned by magnitude: how fast they run does not depend on which are kept. All variants are in bfloat16, with the same
loop, attention and head, and take turns; tokens a second are those of whole answers, the loop being compiled. The model is
so small that its weights are no burden: most of a token's time is the starting of some 370 kernels.
"""

from concurrent import futures
import pathlib
import statistics
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import report

from experiments import generate
from experiments import language_models
from experiments import llama
from experiments import prune_lm
import jaxsparse as js
from jaxsparse import calibration

_BATCHES = flags.DEFINE_list("batches", ["1", "16"], "Sequences at a time.")
_TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens of an answer.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Answers of each variant; the median is reported.")
_DATA = flags.DEFINE_string("data_dir", "", "Where the model is kept; data/ beside experiments/ by default.")
_OUT = flags.DEFINE_string("out", "results/generate_lm", "Where the JSON goes, without suffix.")

PROMPT = "The state of the Union is"
COLUMNS = ("weights", "batch", "tokens/s", "ms a token", "of dense", "megabytes of blocks", "runs on")


def variants(params) -> dict[str, dict]:
  """Parameters in bfloat16: pruned but dense, as `NMArray`s, and these with 8-bit values."""
  structure = js.NM(2, 4)

  @jax.jit
  def prune(w):
    return calibration.prune(w, calibration.magnitude_scores(w), structure, calibration.keep_units(structure, w.shape))

  done = [{name: prune(block[name]) for name in llama.LINEARS} for block in params["blocks"]]
  blocks = [block | {name: w for name, (w, _) in new.items()} for block, new in zip(params["blocks"], done)]
  masks = [{name: mask for name, (_, mask) in new.items()} for new in done]
  stored = lambda bits: prune_lm.compress(
    params | {"blocks": blocks}, masks, structure, ConfigDict(dict(bits=bits, group=64))
  )
  dense = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params | {"blocks": blocks})
  return {"dense": dense, "2:4": stored(0), "2:4 int8": stored(8)}


def check(decoder, weights) -> str:
  """What runs the products; on a Hopper GPU a sparse one must be a kernel."""
  runs = decoder.products()
  device = jax.devices()[0]
  if weights != "dense" and device.platform == "gpu" and not set(runs.values()) <= {"hopper", "decode"}:
    raise RuntimeError(f"{weights}: {runs}, where every product has a kernel.")
  return ", ".join(f"{name} {how}" for name, how in runs.items())


def answer(decoder, prompts) -> float:
  """Seconds of an answer."""
  start = time.perf_counter()
  for _ in decoder.extend(prompts):
    pass
  return time.perf_counter() - start


def main(argv):
  del argv
  model = language_models.load("smollm2", _DATA.value)
  prompt = model.tokenizer.encode(PROMPT).ids
  found, decoders = [], {}
  for weights, params in variants(model.params).items():
    for batch in map(int, _BATCHES.value):
      decoders[weights, batch] = generate.Decoder(
        model._replace(params=params), len(prompt) + _TOKENS.value, batch=batch
      )
  with futures.ThreadPoolExecutor() as pool:  # compiles
    list(pool.map(lambda item: next(item[1].extend([prompt] * item[0][1])), decoders.items()))
  times = {key: [] for key in decoders}
  for _ in range(_ROUNDS.value):
    for key, decoder in decoders.items():
      times[key].append(answer(decoder, [prompt] * key[1]))
  steps = len(prompt) + _TOKENS.value - 1
  for (weights, batch), decoder in decoders.items():
    seconds = statistics.median(times[weights, batch])
    row = {"weights": weights, "batch": batch, "runs on": check(decoder, weights)}
    row |= {"tokens/s": batch * steps / seconds, "ms a token": 1e3 * seconds / steps, "answers": times[weights, batch]}
    row["of dense"] = statistics.median(times["dense", batch]) / seconds
    row["megabytes of blocks"] = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder.layers)) / 1e6
    found.append(row)
  report.write_json(pathlib.Path(_OUT.value).with_suffix(".json"), found, prompt=len(prompt), answer=_TOKENS.value)
  report.print_table(found, COLUMNS)


if __name__ == "__main__":
  app.run(main)
