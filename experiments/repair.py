"""Repair of a pruned language model: kept weights and norms are trained on with fixed masks, following the dense model."""

from collections.abc import Callable
from collections.abc import Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from experiments import causal_attention
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
    options: `steps`, `batch_size`, `learning_rate` (Adam; a cosine to 0, rising over the first tenth of the steps), `distill` (share of
      the divergence from the dense model in the loss; the rest is the loss on the text), `dtype` (of products) and
      `attention` ("xla", or "cudnn" on a GPU, in 16 bits: half the time of a step there).
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
  linears = None if masks is None else tuple(masks[0])
  tx, step = _program(config, linears, options.distill, options.dtype, options.attention)
  trained = _stacked(params)
  fixed = {name: value for name, value in dense.items() if name in ("embedding", "head")}
  opt_state = jax.jit(tx.init)(trained)
  if masks is not None:
    named = jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)
    by_leaf = {"norm": None, "blocks": {name: named.get(name) for name in trained["blocks"]}}
    opt_state = js.set_masks(opt_state, by_leaf)
  at = (np.arange(options.steps) + 0.5) / options.steps
  rates = options.learning_rate * np.minimum(1, 10 * at) * (1 + np.cos(np.pi * at)) / 2
  rates = rates.astype(np.float32)
  teacher = jax.tree.map(lambda leaf: leaf.astype(options.dtype), _stacked(dense))
  losses = []
  for i in progress(range(options.steps)):
    tokens = jnp.asarray(_batch(rows, seed, i, options.batch_size), jnp.int32)
    trained, opt_state, loss = step(trained, opt_state, teacher, fixed, tokens, rates[i])
    losses.append(loss)
  losses = [float(loss) for loss in jax.device_get(losses)]
  if not np.isfinite(losses).all():
    at = int(np.flatnonzero(~np.isfinite(losses))[0])
    raise FloatingPointError(f"repair: the loss of step {at} is {losses[at]}; lower repair.learning_rate.")
  blocks = [jax.tree.map(lambda leaf: leaf[i], trained["blocks"]) for i in range(config.layers)]
  return {**params, "blocks": blocks, "norm": trained["norm"]}, losses


@functools.cache
def _program(
  config: llama.Config, linears: tuple[str, ...] | None, distill: float, dtype: str, attention: str
) -> tuple[Any, Any]:
  """The optimizer and the compiled step, the same for every mask and number of steps."""
  # Given masks: of the updaters whose masks never change, this one does not make any of its own first.
  rules = lambda: js.Rules((rf"blocks/({'|'.join(linears)})", js.Unstructured()), (".*", None))
  updater = js.no_prune() if linears is None else js.snip(sparsity=0.5, rules=rules())
  tx = updater.wrap_optax(optax.chain(optax.scale_by_adam(b2=0.98), _scale_by_rate()))
  attend = {
    "xla": causal_attention.causal_attention,
    "cudnn": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
  }[attention]
  hidden = functools.partial(_hidden, config=config, attend=attend)

  def step(trained, opt_state, teacher, fixed, tokens, rate):
    # The last token is fed too, although nothing is known of what follows it: 255 positions would misalign products.
    theirs = hidden(teacher, fixed, tokens)[:, :-1] if distill else None

    def loss_fn(trained):
      narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), trained)
      ours = hidden(narrow, fixed, tokens)[:, :-1]
      return _loss(narrow, ours, teacher, theirs, fixed, tokens[:, 1:], config, distill)

    loss, grads = jax.value_and_grad(loss_fn)(trained)
    updates, opt_state = tx.update(grads, opt_state, trained, rate=rate)
    return optax.apply_updates(trained, updates), opt_state, loss

  return tx, jax.jit(step, donate_argnums=(0, 1))


def _scale_by_rate() -> optax.GradientTransformationExtraArgs:
  """The learning rate as an argument of the update."""

  def update(updates, state, params=None, *, rate, **extra):
    del params, extra
    return jax.tree.map(lambda u: -rate * u, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _hidden(params, fixed, tokens, config, attend):
  """The residual stream after the last block; the backward pass finds the results of products, and no more."""
  x = llama.embed(fixed, tokens).astype(params["norm"].dtype)
  kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  body = jax.checkpoint(lambda x, block: (llama.apply_block(block, x, config, attend=attend), None), policy=kept)
  return jax.lax.scan(body, x, params["blocks"])[0]


def _loss(params, ours, teacher, theirs, fixed, targets, config, distill):
  """The mean over rows, of which a few at a time have their logits in memory, forwards and backwards at once."""
  fixed = {name: value.astype(ours.dtype) for name, value in fixed.items()}

  def of_some(ours, norm, theirs, targets):
    mine = llama.logits(fixed | {"norm": norm}, ours, config)
    text = optax.softmax_cross_entropy_with_integer_labels(mine, targets).mean()
    if theirs is None:
      return text
    wanted = llama.logits(fixed | {"norm": teacher["norm"]}, theirs, config)
    return recipes.distill(text, mine, wanted, weight=distill, temperature=1.0)

  groups = 1 if targets.shape[0] % _ROWS else targets.shape[0] // _ROWS
  split = lambda a: None if a is None else a.reshape(groups, -1, *a.shape[1:])
  here = jax.lax.stop_gradient((ours, params["norm"]))
  some = lambda args: jax.value_and_grad(of_some, argnums=(0, 1))(args[0], here[1], *args[1:])
  losses, slopes = jax.lax.map(some, (split(here[0]), split(theirs), split(targets)))
  slopes = slopes[0].reshape(ours.shape) / groups, slopes[1].mean(0)
  # What is differentiated is linear in what the logits depend on, so that they are computed once.
  away = [jnp.vdot(slope, a - at) for slope, a, at in zip(slopes, (ours, params["norm"]), here)]
  return losses.mean() + sum(away).astype(jnp.float32)


def _stacked(params):
  """What is trained, in float32; every leaf of the blocks with the layers on a leading axis."""
  blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves).astype(jnp.float32), *params["blocks"])
  return {"blocks": blocks, "norm": jnp.array(params["norm"], jnp.float32)}  # a copy: what is trained is donated


def _batch(rows, seed, step, size):
  """Rows of a step: every epoch is a new order of all of them, less those that do not fill a batch."""
  epoch, index = divmod(step, len(rows) // size)
  order = np.random.default_rng((seed, epoch)).permutation(len(rows))
  return rows[order[index * size : (index + 1) * size]]
