"""Perplexity of a language model on rows of tokens."""

from collections.abc import Callable, Iterable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import compilation
from experiments import llama


def perplexity(
  params: Any,
  config: llama.Config,
  rows: np.ndarray,
  *,
  product: Callable = llama.matmul,
  batch: int = 8,
  progress: Callable[[Iterable], Iterable] = iter,
) -> float:
  """exp of the mean loss of every token but the first of each row.

  Args:
    params: of the model; blocks may hold sparse weights.
    config: of the model.
    rows: int `[R, T]`; rows are independent.
    product: how weights are multiplied with.
    batch: rows at a time.
    progress: wraps the blocks, such as `tqdm.tqdm`.

  Raises:
    FloatingPointError: the model's loss is not finite; the message names the first row.
  """
  losses = np.asarray(_row_losses(params, config, rows, product, batch, progress), np.float64)
  if not np.isfinite(losses).all():
    row = int(np.flatnonzero(~np.isfinite(losses))[0])
    raise FloatingPointError(
      f"The loss of row {row} is {losses[row]}: the model has weights or activations that are not finite."
    )
  return math.exp(losses.mean())


def _row_losses(params, config, rows, product, batch, progress) -> np.ndarray:
  """Mean loss of each row of tokens `[R, T]`: float32 `[R]`.

  All rows go through a block before the next one is looked at, so that parameters may be streamed from a file. A block is
  compiled once and called for every layer.
  """
  starts = range(0, len(rows), batch)
  apply_block, losses_of = _programs()
  hidden = llama.embed_rows(params, rows[:, :-1], batch)
  for block in progress(params["blocks"]):
    hidden = [apply_block(block, x, config, product) for x in hidden]
  top = {name: value for name, value in params.items() if name != "blocks"}
  losses = [losses_of(top, x, jnp.asarray(rows[i : i + batch, 1:]), config) for i, x in zip(starts, hidden)]
  return np.concatenate(losses)


@functools.cache
def _programs():
  """`_block` and `_losses`, compiled when they are first called: only then is it known for what."""
  compiled = functools.partial(jax.jit, compiler_options=compilation.untuned())
  return compiled(_block, static_argnums=(2, 3)), compiled(_losses, static_argnums=3)


def _block(block, x, config, product):
  return llama.apply_block(block, x, config, product)


def _losses(top, x, targets, config):
  # Row by row: the logits of one row of 256 tokens take 50 MB at a vocabulary of 49152.
  def one(args):
    row, target = args
    return optax.softmax_cross_entropy_with_integer_labels(llama.logits(top, row, config), target).mean()

  return jax.lax.map(one, (x, targets))
