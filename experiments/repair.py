"""Repair of a pruned language model: training on, with masks that stay or move, following the dense model."""

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
from experiments import compilation
from experiments import llama
from experiments import moving_masks
import jaxsparse as js
from jaxsparse import recipes

_ROWS = 8  # whose logits are held at a time
_B2 = 0.98


def repair(
  params: dict[str, Any],
  masks: list[dict[str, Any]] | None,
  dense: dict[str, Any],
  config: llama.Config,
  rows: np.ndarray,
  options: ConfigDict,
  *,
  structure: Any = None,
  seed: int = 0,
  progress: Callable[[Iterator], Iterator] = iter,
) -> tuple[dict[str, Any], list[dict[str, Any]] | None, list[float]]:
  """Trains everything but the embedding and the head; what it returns is 0 where it is masked.

  Args:
    params: pruned parameters.
    masks: for each block, bool masks by name; None trains a dense model, the baseline of the same budget and data.
    dense: parameters of the model that is followed.
    config: of the model.
    rows: int `[R, T]`, to train on.
    options: `algorithm` ("static": masks stay; "ast" or "cast": they move, see `experiments/moving_masks.py`, with
      `every` updates between new ones and a pull of `strength` on masked weights), `steps`, `batch_size`,
      `learning_rate` (Adam; a cosine to 0, rising over the first tenth of the steps), `distill` (share of the
      divergence from the dense model in the loss; the rest is the loss on the text), `dtype` (of products) and
      `attention` ("xla", or "cudnn" on a GPU, in 16 bits: half the time of a step there).
    structure: that the model was pruned to, for masks that move.
    seed: of the order of rows.
    progress: wraps the steps, such as `tqdm.tqdm`.

  Returns:
    The parameters, their masks (the given ones where they stay), and the loss of every step; CAST's forward pass is
    dense, so its losses are not those of a sparse model.

  Raises:
    ValueError: fewer rows than a batch has, or an algorithm that is unknown or does not suit.
    FloatingPointError: the loss is not finite.
  """
  if options.batch_size > len(rows):
    raise ValueError(f"repair.batch_size={options.batch_size} is more than the {len(rows)} training rows.")
  moving = masks is not None and options.algorithm != "static"
  if moving:
    moving_masks.check(options, structure)
  linears = None if masks is None else tuple(masks[0])
  moves = (options.algorithm, structure, options.every, options.strength) if moving else None
  updater, init, step = _program(config, linears, moves, options.distill, options.dtype, options.attention)
  trained = _stacked(params)
  fixed = {name: value for name, value in dense.items() if name in ("embedding", "head")}
  named = None if masks is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)
  if moving:
    trained["blocks"] = moving_masks.start(updater, trained["blocks"], _stacked(dense)["blocks"], named, structure)
  opt_state = init(trained)
  if masks is not None:
    by_leaf = {"norm": None, "blocks": {name: named.get(name) for name in trained["blocks"]}}
    opt_state = js.set_masks(opt_state, by_leaf)
  at = (np.arange(options.steps) + 0.5) / options.steps
  rates = options.learning_rate * np.minimum(1, 10 * at) * (1 + np.cos(np.pi * at)) / 2
  rates, shares = rates.astype(np.float32), at.astype(np.float32)
  teacher = jax.tree.map(lambda leaf: leaf.astype(options.dtype), _stacked(dense))
  losses = []
  for i in progress(range(options.steps)):
    tokens = jnp.asarray(_batch(rows, seed, i, options.batch_size), jnp.int32)
    trained, opt_state, loss = step(trained, opt_state, teacher, fixed, tokens, rates[i], shares[i])
    losses.append(loss)
  losses = [float(loss) for loss in jax.device_get(losses)]
  if not np.isfinite(losses).all():
    at = int(np.flatnonzero(~np.isfinite(losses))[0])
    raise FloatingPointError(f"repair: the loss of step {at} is {losses[at]}; lower repair.learning_rate.")
  if moving:
    trained, found = updater.export(trained, opt_state)
    masks = _split({name: found["blocks"][name] for name in linears}, config.layers)
  return {**params, "blocks": _split(trained["blocks"], config.layers), "norm": trained["norm"]}, masks, losses


@functools.cache
def _program(
  config: llama.Config, linears: tuple[str, ...] | None, moves: tuple | None, distill: float, dtype: str, attention: str
) -> tuple[Any, Any, Any]:
  """The updater, and the compiled start and step of its optimizer, the same for every mask and number of steps."""
  updater, optimizer = _updater(linears, moves)
  attend = {
    "xla": causal_attention.causal_attention,
    "cudnn": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
  }[attention]
  hidden = functools.partial(_hidden, config=config, attend=attend)

  def step(trained, opt_state, teacher, fixed, tokens, rate, share):
    # The last token is fed too, although nothing is known of what follows it: 255 positions would misalign products.
    theirs = hidden(teacher, fixed, tokens)[:, :-1] if distill else None

    def loss_fn(trained):
      used = updater.forward_params(trained, opt_state)
      narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), used)
      ours = hidden(narrow, fixed, tokens)[:, :-1]
      return _loss(narrow, ours, teacher, theirs, fixed, tokens[:, 1:], config, distill)

    loss, grads = jax.value_and_grad(loss_fn)(trained)
    updates, opt_state = optimizer(share).update(grads, opt_state, trained, rate=rate)
    return optax.apply_updates(trained, updates), opt_state, loss

  compiled = functools.partial(jax.jit, compiler_options=compilation.untuned())
  return updater, compiled(optimizer(0.0).init), compiled(step, donate_argnums=(0, 1))


def _updater(linears, moves):
  """(updater, its optimizer as a function of the share of the steps that are done)."""
  if moves is not None:
    algorithm, structure, every, strength = moves
    updater = moving_masks.create_updater(algorithm, structure, every, linears)
    adam = lambda share: moving_masks.scale_by_adam(algorithm, strength, share, _B2)
  else:
    # Given masks: of the updaters whose masks never change, this one does not make any of its own first.
    rules = lambda: js.Rules((rf"blocks/({'|'.join(linears)})", js.Unstructured()), (".*", None))
    updater = js.no_prune() if linears is None else js.snip(sparsity=0.5, rules=rules())
    adam = lambda share: optax.scale_by_adam(b2=_B2)
  return updater, lambda share: updater.wrap_optax(optax.chain(adam(share), _scale_by_rate()))


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


def _split(blocks, layers):
  """A dictionary for each layer."""
  return [jax.tree.map(lambda leaf: leaf[i], blocks) for i in range(layers)]


def _batch(rows, seed, step, size):
  """Rows of a step: every epoch is a new order of all of them, less those that do not fill a batch."""
  epoch, index = divmod(step, len(rows) // size)
  order = np.random.default_rng((seed, epoch)).permutation(len(rows))
  return rows[order[index * size : (index + 1) * size]]
