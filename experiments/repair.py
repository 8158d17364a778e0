"""Repair of a pruned language model: kept weights and norms are trained on with fixed masks, following the dense model."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from experiments import llama
import jaxsparse as js
from jaxsparse import recipes

_ROWS = 8  # whose logits are held at a time


def repair(
  params: dict[str, Any],
  masks: list[dict[str, Any]] | None,
  dense: dict[str, Any],
  config: llama.Config,
  rows: np.ndarray,
  options: ConfigDict,
  *,
  seed: int = 0,
  progress: Callable[[Iterator], Iterator] = iter,
) -> tuple[dict[str, Any], list[float]]:
  """Trains everything but the embedding and the head, with masked weights held at 0.

  Args:
    params: pruned parameters.
    masks: for each block, bool masks by name; None trains a dense model, the baseline of the same budget and data.
    dense: parameters of the model that is followed.
    config: of the model.
    rows: int `[R, T]`, to train on.
    options: `steps`, `batch_size`, `learning_rate` (Adam; a tenth of the steps rise, then cosine to 0), `distill` (share of
      the divergence from the dense model in the loss; the rest is the loss on the text) and `dtype` (of products).
    seed: of the order of rows.
    progress: wraps the steps, such as `tqdm.tqdm`.

  Returns:
    The parameters, and the loss of every step.

  Raises:
    ValueError: fewer rows than a batch has.
    FloatingPointError: the loss is not finite.
  """
  if options.batch_size > len(rows):
    raise ValueError(f"repair.batch_size={options.batch_size} is more than the {len(rows)} training rows.")
  trained = _stacked(params)
  fixed = {name: value for name, value in dense.items() if name in ("embedding", "head")}
  updater = _updater(masks)
  schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, max(1, options.steps // 10), options.steps)
  tx = updater.wrap_optax(optax.adam(schedule, b2=0.98), key=seed)
  opt_state = jax.jit(tx.init)(trained)
  if masks is not None:
    named = {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)}
    opt_state = js.set_masks(opt_state, _like(trained, named))
  step = jax.jit(_step_fn(tx, config, options), donate_argnums=(0, 1))
  teacher = _cast(_stacked(dense), options.dtype)
  losses = []
  for i in progress(range(options.steps)):
    tokens = jnp.asarray(_batch(rows, seed, i, options.batch_size))
    trained, opt_state, loss = step(trained, opt_state, teacher, fixed, tokens)
    losses.append(loss)
  losses = [float(loss) for loss in jax.device_get(losses)]
  if not np.isfinite(losses).all():
    at = int(np.flatnonzero(~np.isfinite(losses))[0])
    raise FloatingPointError(f"repair: the loss of step {at} is {losses[at]}; lower repair.learning_rate.")
  blocks = [jax.tree.map(lambda leaf: leaf[i], trained["blocks"]) for i in range(config.layers)]
  return {**params, "blocks": blocks, "norm": trained["norm"]}, losses


def _updater(masks: Any) -> js.Updater:
  if masks is None:
    return js.no_prune()
  # The masks are given; of the updaters whose masks never change, this one makes none of its own first.
  linears = "|".join(masks[0])
  return js.snip(sparsity=0.5, rules=js.Rules((rf"blocks/({linears})", js.Unstructured()), (".*", None)))


def _step_fn(tx, config, options):
  def step(trained, opt_state, teacher, fixed, tokens):
    theirs = None
    if options.distill:
      theirs = _hidden(teacher, fixed, tokens[:, :-1], config)

    def loss_fn(trained):
      ours = _hidden(_cast(trained, options.dtype), fixed, tokens[:, :-1], config)
      return _loss(trained, ours, teacher, theirs, fixed, tokens[:, 1:], config, options.distill)

    loss, grads = jax.value_and_grad(loss_fn)(trained)
    updates, opt_state = tx.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state, loss

  return step


def _hidden(params, fixed, tokens, config):
  """The residual stream after the last block; the blocks' activations are computed again in the backward pass."""
  x = llama.embed(fixed, tokens).astype(params["norm"].dtype)
  body = jax.checkpoint(lambda x, block: (llama.apply_block(block, x, config), None))
  return jax.lax.scan(body, x, params["blocks"])[0]


def _loss(trained, ours, teacher, theirs, fixed, targets, config, distill):
  """The mean over rows, of which a few at a time have their logits in memory."""
  logits = lambda params, x: llama.logits(_cast(fixed, x.dtype) | {"norm": params["norm"].astype(x.dtype)}, x, config)

  @jax.checkpoint
  def some(args):
    ours, theirs, targets = args
    mine = logits(trained, ours)
    text = optax.softmax_cross_entropy_with_integer_labels(mine, targets).mean()
    if theirs is None:
      return text
    return recipes.distill(text, mine, logits(teacher, theirs), weight=distill, temperature=1.0)

  groups = 1 if targets.shape[0] % _ROWS else targets.shape[0] // _ROWS
  split = lambda a: None if a is None else a.reshape(groups, -1, *a.shape[1:])
  return jax.lax.map(some, (split(ours), split(theirs), split(targets))).mean()


def _stacked(params):
  """What is trained, in float32; every leaf of the blocks with the layers on a leading axis."""
  blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves).astype(jnp.float32), *params["blocks"])
  return {"blocks": blocks, "norm": jnp.array(params["norm"], jnp.float32)}  # a copy: what is trained is donated


def _cast(tree, dtype):
  return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _like(tree, masks):
  """Masks by name in a tree of the containers of `tree`, None elsewhere."""
  return {"norm": None, "blocks": {name: masks["blocks"].get(name) for name in tree["blocks"]}}


def _batch(rows, seed, step, size):
  """Rows of a step: every epoch is a new order of all of them, less those that do not fill a batch."""
  epoch, index = divmod(step, len(rows) // size)
  order = np.random.default_rng((seed, epoch)).permutation(len(rows))
  return rows[order[index * size : (index + 1) * size]]
