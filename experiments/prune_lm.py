"""Prunes a language model after training: calibrate, prune, repair, compress, save, report.

    python experiments/prune_lm.py --config=configs/smollm2_wanda.py --workdir=runs/smollm2_wanda

The working directory gets model/ (weights, tokenizer and configuration, for experiments/generate.py) and the report:
report.md, report.json and errors.png, written anew after every stage.
"""

from collections.abc import Iterable
import difflib
import functools
import pathlib
import sys
import time
from typing import Any

# `python experiments/prune_lm.py` puts experiments/ on the path; the packages beside it are found from the root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from ml_collections import config_flags
import numpy as np
import optax
import tqdm

from experiments import compilation
from experiments import host_memory
from experiments import language_models
from experiments import llama
from experiments import llama_files
from experiments import model_blocks
from experiments import moving_masks
from experiments import perplexity
from experiments import prune_report
from experiments import pruners
from experiments import repair as repairs
from experiments import text_rows
import jaxsparse as js
from jaxsparse import calibration
from jaxsparse import quant
from jaxsparse import structures

FIELDS = (
  "model data_dir dtype streamed length batch_size method structure sparsity allocation sequential layer_by_layer ridge repair "
  "quantize seed"
).split()

_bar = functools.partial(tqdm.tqdm, mininterval=0.5, leave=False)


def prune_lm(
  config: ConfigDict,
  workdir: str | pathlib.Path,
  *,
  model: language_models.LanguageModel | None = None,
  rows: text_rows.Rows | None = None,
) -> dict[str, Any]:
  """Everything, from the dense model to the report.

  Args:
    config: see configs/smollm2_wanda.py, which describes every field.
    workdir: where the results go.
    model, rows: in place of those that the configuration names.

  Returns:
    The contents of report.json.

  Raises:
    ValueError, TypeError: for a configuration that cannot work.
    FileNotFoundError, ImportError, RuntimeError: model, data or a package are missing; the message says what to do.
    FloatingPointError: activations, losses or weights that are not finite.
  """
  check_fields(config)
  pruner = create_pruner(config)
  model = model or language_models.load(config.model, config.data_dir, config.dtype, streamed=is_streamed(config))
  shapes = llama_files.shapes(model.config)  # those of every block
  pruner.check({f"blocks/0/{name}": shapes[name] for name in llama.LINEARS})
  workdir = pathlib.Path(workdir).expanduser().resolve()
  workdir.mkdir(parents=True, exist_ok=True)
  if rows is None:
    rows = text_rows.load(model.tokenizer, config.length, config.data_dir or None, training=config.repair.steps > 0)
  report = prune_report.Report(config)
  evaluate = _Evaluation(report, workdir, model.config, rows, config.batch_size)

  evaluate("dense", model.params)
  # Pruning puts each pruned block in the place of the dense one; repair, and a caller with a model, keep theirs.
  dense = model.params if config.repair.steps else None
  model = model._replace(params=model_blocks.prunable(model.params))
  start = time.perf_counter()
  errors, scales = prune_model(model, rows.calibration, pruner, config)
  report.seconds["pruning"] = time.perf_counter() - start
  params, pruned = model.params, model.params["blocks"]
  report.layers(pruned.masks(), errors)
  evaluate("pruned", params)

  if config.repair.steps:
    start = time.perf_counter()
    train = functools.partial(
      repairs.repair,
      dense=dense,
      config=model.config,
      rows=rows.training,
      options=config.repair,
      structure=pruner.structure,
      seed=config.seed,
    )
    steps_bar = lambda steps: _bar(steps, desc="repair")
    params, masks, report.losses = train(params, list(pruned.masks()), progress=steps_bar)
    report.seconds["repair"] = time.perf_counter() - start
    evaluate("repaired", params)
    if config.repair.dense_baseline:
      same, *_ = train(dense, None, progress=lambda steps: _bar(steps, desc="dense, the same steps"))
      evaluate("dense, trained as long", same)
      del same
    del dense

  masks = masks if config.repair.steps else pruned.masks()
  compressed = compress(params, masks, pruner.structure, config.quantize, scales)
  report.storage(compressed)
  report.file_bytes = language_models.save(workdir / "model", model._replace(params=compressed))
  if isinstance(pruner.structure, js.NM):
    # What was saved, as it was saved; every linear layer through nm_matmul, which takes no dense weight.
    saved = language_models.load(workdir / "model").params
    evaluate("compressed", saved, language_models.sparse_product)
  return report.write(workdir)


def prune_model(
  model: language_models.LanguageModel, rows: np.ndarray, pruner: pruners.Pruner, config: ConfigDict
) -> tuple[list[dict[str, float]], dict[str, jax.Array]]:
  """Prunes a model with `model_blocks.prunable` parameters in place: dense blocks go as pruned ones come.

  Returns:
    For each block the errors of its layers, by name; and where GPTQ has rounded them, their scales, by names as
    `blocks/3/q`. The masks are in the model's `PrunedBlocks`.
  """
  apply_block = lambda block, x, product: llama.apply_block(block, x, model.config, product)
  blocks = model.params["blocks"]
  hidden = llama.embed_rows(model.params, rows, config.batch_size)
  sparsities, scales = None, {}
  if config.allocation.name == "owl":
    sparsities = outlier_sparsities(apply_block, blocks, hidden, config)
  prune = pruner.callback(sparsities, scales)
  done = calibration.prune_blocks(
    apply_block,
    blocks,
    hidden,
    _lean(prune) if is_streamed(config) else prune,
    llama.LINEARS,
    sequential=config.sequential,
    layer_by_layer=config.layer_by_layer,
    gram=pruner.gram,
    cross=pruner.ridge is not None,
    compiler_options=compilation.untuned(),
  )
  del hidden  # the generator moves its own list on
  errors = []
  for block in _bar(done, total=len(blocks), unit="block", desc=f"prune with {pruner.name}"):
    blocks.put(block)
    errors.append(block.errors)
    del block  # not held while the next one is pruned
  return errors, scales


def _lean(prune):
  """The same; what calibrating and pruning have freed is not kept for what comes after."""

  def call(weights, statistics):
    host_memory.give_back()
    out = prune(weights, statistics)
    host_memory.give_back()
    return out

  return call


def outlier_sparsities(apply_block, blocks, hidden, config) -> list[float]:
  """OWL: blocks with more outliers keep more, from statistics of the dense model."""
  ratios = []
  options = compilation.untuned()
  statistics = calibration.stream_statistics(apply_block, blocks, hidden, llama.LINEARS, compiler_options=options)
  for block, of_block in zip(blocks, _bar(statistics, total=len(blocks), unit="block", desc="outliers")):
    scores = [calibration.wanda_scores(block[name], s.norm) for name, s in of_block.items()]
    ratios.append(float(calibration.outlier_ratio(scores, config.allocation.multiple)))
  return calibration.owl_sparsities(ratios, config.sparsity, spread=config.allocation.spread)


def compress(
  params: dict[str, Any],
  masks: Iterable[dict[str, jax.Array]],
  structure: Any,
  options: ConfigDict,
  scales: dict[str, jax.Array] | None = None,
) -> Any:
  """bfloat16 parameters, their N:M layers as NMArrays, quantised where that is asked for; one block after the other.

  Layers with `scales` are multiples of them already: they are stored as the integers that they are.
  """
  narrow = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.bfloat16))
  blocks = []
  for i, (block, kept) in enumerate(zip(params["blocks"], masks)):
    if scales:
      names = {name: f"blocks/{i}/{name}" for name in kept}
      packed = {n: _pack(block[n], scales[names[n]], kept[n], structure, options.bits) for n in kept}
      blocks.append(narrow({name: leaf for name, leaf in block.items() if name not in kept}) | packed)
    elif isinstance(structure, js.NM):
      blocks.append(_compress_block(i, narrow(block), kept, structure, options))
    else:
      blocks.append(narrow(block))
  return narrow({name: leaf for name, leaf in params.items() if name != "blocks"}) | {"blocks": blocks}


def _compress_block(index, block, masks, structure, options):
  given = {name: masks.get(name, optax.MaskedNode()) for name in block}
  # Under the block's number, for the names of layers in errors.
  tree = js.compress({"blocks": {index: block}}, {"blocks": {index: given}}, structure=structure, on_mismatch="error")
  block = tree["blocks"][index]
  if not options.bits:
    return block
  quantise = lambda w: quant.quantize(w, options.bits, options.group, scale_dtype=jnp.bfloat16)
  return {name: quantise(leaf) if isinstance(leaf, js.NMArray) else leaf for name, leaf in block.items()}


def _pack(w, scales, mask, structure, bits):
  """The `NMArray` of a weight that is whole multiples of its scales."""
  steps = jnp.repeat(scales.astype(jnp.float32), w.shape[0] // scales.shape[0], axis=0)
  values = jnp.round(w.astype(jnp.float32) / steps).astype(jnp.int8)
  return quant.pack(values, scales, mask, structure.n, structure.m, bits)


def create_pruner(config: ConfigDict) -> pruners.Pruner:
  """The method with its structure: FixedFanIn, Unstructured, NM or Block, and its arguments."""
  method = config.method.to_dict()
  quantize = config.quantize
  gptq = (quantize.bits, quantize.group) if quantize.bits and quantize.method == "gptq" else None
  return pruners.Pruner(method.pop("name"), structure_of(config), config.sparsity, method, config.ridge, gptq)


def structure_of(config: ConfigDict) -> structures.AbstractStructure:
  """What is removed together, as the configuration says."""
  arguments = config.structure.to_dict()
  name = arguments.pop("name")
  known = ("FixedFanIn", "Unstructured", "NM", "Block")
  if name not in known:
    raise ValueError(f"config.structure.name is {name!r}; allowed are {', '.join(known)}.")
  return getattr(js, name)(**arguments)


def is_streamed(config: ConfigDict) -> bool:
  """Whether blocks are read when they are needed: as the configuration says, or on a CPU."""
  return jax.default_backend() == "cpu" if config.streamed is None else config.streamed


def check_fields(config: ConfigDict) -> None:
  """ValueError for a misspelt field (it would be ignored), a missing one, or values that contradict each other."""
  for field in sorted(set(config.keys()) - set(FIELDS)):
    near = difflib.get_close_matches(field, FIELDS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"The configuration has an unknown field {field!r}.{hint} The fields are: {', '.join(FIELDS)}.")
  if missing := sorted(set(FIELDS) - set(config.keys())):
    raise ValueError(f"The configuration lacks {', '.join(missing)}.")
  if config.allocation.name not in ("uniform", "owl"):
    raise ValueError(f"config.allocation.name is {config.allocation.name!r}; allowed are 'uniform' and 'owl'.")
  if config.allocation.name == "owl" and config.sparsity is None:
    raise ValueError(
      "config.allocation: owl shares out a sparsity; a structure that implies its own leaves none to share."
    )
  if config.repair.attention not in ("xla", "cudnn"):
    raise ValueError(f"config.repair.attention is {config.repair.attention!r}; allowed are 'xla' and 'cudnn'.")
  moving_masks.check(config.repair, structure_of(config))
  if config.quantize.bits and config.structure.name != "NM":
    raise ValueError(f"config.quantize.bits={config.quantize.bits}: only N:M layers are stored with integers.")
  if config.quantize.method not in ("nearest", "gptq"):
    raise ValueError(f"config.quantize.method is {config.quantize.method!r}; allowed are 'nearest' and 'gptq'.")
  if config.quantize.bits and config.quantize.method == "gptq" and config.repair.steps:
    raise ValueError(
      "config.quantize.method='gptq' rounds while it prunes, and repair would move weights off the integers: take "
      "'nearest', which rounds last, or repair.steps=0."
    )


class _Evaluation:
  """Perplexities of a stage, into the report, which is written at once: a crash leaves what was finished."""

  def __init__(
    self, report: prune_report.Report, workdir: pathlib.Path, config: llama.Config, rows: text_rows.Rows, batch: int
  ):
    self._report, self._workdir, self._config, self._batch = report, workdir, config, batch
    self._rows = {"State of the Union": rows.test, "Brown": rows.brown}

  def __call__(self, stage: str, params: Any, product=llama.matmul) -> None:
    start = time.perf_counter()
    self._report.perplexities[stage] = {
      corpus: perplexity.perplexity(
        params,
        self._config,
        rows,
        product=product,
        batch=self._batch,
        progress=lambda batches: _bar(batches, desc=f"{stage} on {corpus}"),
      )
      for corpus, rows in self._rows.items()
      if len(rows)
    }
    self._report.seconds[f"evaluation, {stage}"] = time.perf_counter() - start
    self._report.write(self._workdir)


if __name__ == "__main__":
  config_flag = config_flags.DEFINE_config_file("config", None, "The configuration, such as configs/smollm2_wanda.py.")
  workdir_flag = flags.DEFINE_string("workdir", None, "Directory of the results.")
  flags.mark_flags_as_required(["config", "workdir"])

  def main(argv):
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
      raise app.UsageError(f"Unknown arguments: {argv[1:]}. Options look like --config.sparsity=0.6.")
    done = prune_lm(config_flag.value, workdir_flag.value)
    for stage, corpora in done["perplexities"].items():
      print(f"{stage}: " + ", ".join(f"{corpus} {value:.2f}" for corpus, value in corpora.items()))
    print(f"report: {pathlib.Path(workdir_flag.value) / 'report.md'}")

  app.run(main)
