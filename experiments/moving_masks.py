"""Repair whose masks move: updaters of AST and CAST for stacked blocks, with the Adam and the start that they need."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

import jaxsparse as js

# The pull on masked weights, and the share of the steps over which it grows: AST's is 10,000 of 40,000. CAST's replaces
# the gradient, and the steps after that are for the weights to come to 0.
_PULLS = {"ast": ("l2", 0.25), "cast": ("l1", 0.8)}
_BELOW = 0.5  # of the smallest kept weight: just below it, weights swap places with every bit of noise


def check(options: ConfigDict, structure: Any) -> None:
  """ValueError for a `repair.algorithm` that is unknown, that repair has no use for, or that needs another structure.

  Args:
    options: of repair.
    structure: that the model was pruned to.
  """
  if options.algorithm == "static":
    return
  if options.algorithm not in _PULLS:
    js.get_algorithm(options.algorithm)  # an error with the nearest name where there is none
    raise ValueError(
      f"repair.algorithm is {options.algorithm!r}, which is not made for a trained model; allowed are 'static' (masks "
      f"stay) and {', '.join(map(repr, _PULLS))} (masks move)."
    )
  if not isinstance(structure, js.NM):
    raise ValueError(
      f"repair.algorithm={options.algorithm!r} trains towards N:M, and the model is pruned to {structure!r}: take "
      "structure NM(n, m), or repair.algorithm='static'."
    )
  if options.every < 1:
    raise ValueError(f"repair.every={options.every}: updates between new masks, at least 1.")


def create_updater(algorithm: str, structure: js.NM, every: int, linears: tuple[str, ...]) -> js.Updater:
  """The updater for `{"blocks": {name: [L, K, O]}, ...}`, of which only `linears` get masks."""
  rules = js.Rules((rf"blocks/({'|'.join(linears)})", stacked(structure)), (".*", None))
  return js.get_algorithm(algorithm)(every=every, rules=rules)


def scale_by_adam(algorithm: str, strength: float, share: jax.Array, b2: float) -> optax.GradientTransformation:
  """The Adam that the algorithm needs.

  Args:
    algorithm: "ast" or "cast".
    strength: of the full pull.
    share: shape=(), float32: of the steps that are done. A traced value in place of a schedule: runs of every length
      are one program.
    b2: of Adam.
  """
  kind, growing = _PULLS[algorithm]
  grown = jnp.minimum(1, share / growing)
  pull = dict(strength=strength, mix=grown) if kind == "l1" else dict(strength=strength * grown)
  return js.scale_by_adam_nm(b2=b2, masked_decay=kind, **pull)


def start(
  updater: js.Updater, pruned: dict[str, Any], dense: dict[str, Any], masks: dict[str, Any], structure: js.NM
) -> dict[str, Any]:
  """Weights from which the pruned model's masks are those of the largest |w|, and in which every weight can come back.

  Masked weights are the dense ones, cut to half the smallest kept weight of their group: the first refresh, which goes
  by |w|, would otherwise throw away what the pruning method chose. Kept weights are the pruned model's where the forward
  pass applies the masks. Where it is dense (CAST) they are the dense model's: the pruned ones make up for weights that
  are there.

  Args:
    updater: of `create_updater`.
    pruned, dense: `{name: float32 [L, K, O]}` and other leaves, which are the pruned ones' in the result.
    masks: bool `[L, K, O]` by name.
    structure: that the model was pruned to.
  """
  structure = stacked(structure)
  kept = dense if isinstance(updater.forward, js.forwards.Dense) else pruned

  def of(name):
    mask, shape = masks[name], masks[name].shape
    size = structure.to_units(jnp.where(mask, jnp.abs(kept[name]), jnp.inf))
    smallest = size.min(structure.unit_axes(shape), keepdims=True) * _BELOW
    limit = structure.from_units(jnp.broadcast_to(smallest, size.shape), shape)
    return jnp.where(mask, kept[name], jnp.clip(dense[name], -limit, limit))

  return {name: of(name) if name in masks else leaf for name, leaf in pruned.items()}


def stacked(structure: js.NM) -> js.NM:
  """The structure of a leaf with the layers on a leading axis."""
  return js.NM(structure.n, structure.m, stack_axes=(0,))
