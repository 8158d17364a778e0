"""Adam for N:M training: one optimizer with the options of STEP, AST and CAST.

Inside `updater.wrap_optax(...)` it receives the masks in every update. Without options it is `optax.scale_by_adam`, bit
for bit.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsparse import _tree

Scalar = float | Callable[[jax.Array], jax.Array]


class AdamNMState(NamedTuple):
  """State of `scale_by_adam_nm`.

  Attributes:
    count: shape=(), int32: updates seen.
    mu, nu: first and second moments, like the parameters.
    frozen_at: shape=(), int32: count of the update after which `nu` is fixed, -1 before; () without `freeze_nu`.
    changes: shape=(window,), float32: the latest changes of `nu`, infinite where there has been none yet; or ().
    options: {"freeze_nu": (), "masked_decay": ()}, with the options in use, so that updaters can ask for them.
  """

  count: jax.Array
  mu: Any
  nu: Any
  frozen_at: Any
  changes: Any
  options: dict[str, tuple[()]]


@dataclasses.dataclass(frozen=True)
class AutoSwitch:
  """When the second moment has settled (STEP): its mean change over the last 1 / (1 - b2) updates falls below eps.

  The change of one update is the mean of |nu_t - nu_(t-1)| over all weights that may be masked.

  Args:
    earliest: no switch before the update with this count.
    latest: a switch in the update with this count, whatever the changes are; None leaves it open.
    mean: "arithmetic" or "geometric", over the weights (the paper's options I and II).

  References:
    Lu et al., STEP: Learning N:M Structured Sparsity Masks from Scratch with Precondition, 2023,
    https://arxiv.org/abs/2302.01172. Differs from the paper: the window must be full before it can switch, and weights
    whose nu does not change at all count as the smallest positive float in the geometric mean.
  """

  earliest: int = 0
  latest: int | None = None
  mean: Literal["arithmetic", "geometric"] = "arithmetic"

  def __post_init__(self):
    if self.mean not in ("arithmetic", "geometric"):
      raise ValueError(f"AutoSwitch: mean must be 'arithmetic' or 'geometric', got {self.mean!r}.")
    if self.earliest < 0 or (self.latest is not None and self.latest < self.earliest):
      raise ValueError(f"AutoSwitch: 0 <= earliest <= latest is needed, got {self.earliest} and {self.latest}.")


def scale_by_adam_nm(
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  *,
  masked_decay: Literal["l2", "l1"] | None = None,
  strength: Scalar = 0.0,
  mix: Scalar | None = None,
  freeze_nu: AutoSwitch | None = None,
  nu_floor: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
  """Adam that pulls masked weights to zero behind its first moment, and that can fix its second moment.

  m = b1 m + (1 - b1) g;  u = m on kept weights and (1 - a_t) m + pull on masked ones;  nu = b2 nu + (1 - b2) u^2 with
  `masked_decay`, with g^2 without;  update = u / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps).

  Args:
    b1, b2, eps: as in Adam.
    masked_decay: the pull on masked weights. "l2": strength_t w (AST); "l1": strength_t sign(w) (CAST's AdamS). It goes
      in after the first moment, so that momentum does not delay it, and is part of what `nu` normalises.
    strength: number or schedule (of the count of updates before this one).
    mix: a_t in [0, 1], number or schedule. With it the pull replaces the gradient bit by bit: (1 - a_t) m + a_t pull.
      None adds the pull to all of m.
    freeze_nu: when to fix `nu` (STEP). Afterwards the update is m / (1 - b1^t) / (sqrt(nu / (1 - b2^t0)) + eps), with `nu` as
      it was after t0 updates.
    nu_floor: in the switching update `nu` is raised to this share of its mean in each leaf. With 0, units that were
      dead in the first phase get an unbounded step when a mask wakes them.

  Returns:
    A transformation that needs `params` and `masks=` (True = kept, MaskedNode for dense leaves) in `update` for
    `masked_decay`, and uses the masks, where given, to see which leaves count for `freeze_nu`.

  Raises:
    ValueError: for impossible options; while tracing, if `params` or `masks` are missing.

  >>> import optax, jaxsparse as js
  >>> inner = optax.chain(js.scale_by_adam_nm(freeze_nu=js.AutoSwitch(100, 500)), optax.scale_by_learning_rate(1e-3))
  >>> tx = js.step(structure=js.NM(2, 4)).wrap_optax(inner)

  References:
    STEP: https://arxiv.org/abs/2302.01172. AST: Huang et al., Pruning Large Language Models with Semi-Structural
    Adaptive Sparse Training, 2024, https://arxiv.org/abs/2407.20584. CAST: Huang et al., CAST: Continuous and
    Differentiable Semi-Structured Sparsity-Aware Training for Large Language Models, 2025,
    https://arxiv.org/abs/2509.25996.
    Differs from the papers: `nu_floor` is not in STEP (plain STEP became NaN on small networks with dead units), and
    STEP's fixed `nu` is used there without its bias correction, which is 1 after a long first phase. AST's
    published GPT-2 code pushes masked weights away from zero (a bitwise not of an integer mask); this is its equation.
    CAST's pull is experimental: its exact place and default strength could not be checked.
    With `masked_decay` the moment in the denominator is that of u, as AST has it. Where gradients are mostly noise, u is
    sqrt((1 - b1) / (1 + b1)) times as large as they are, and steps are 1 / that (4.4 at b1 = 0.9) times as long as Adam's.
  """
  if not (0 <= b1 < 1 and 0 <= b2 < 1):
    raise ValueError(f"scale_by_adam_nm: b1 and b2 must be in [0, 1), got {b1} and {b2}.")
  if masked_decay not in (None, "l2", "l1"):
    raise ValueError(f"scale_by_adam_nm: masked_decay must be 'l2', 'l1' or None, got {masked_decay!r}.")
  if masked_decay is None and (mix is not None or callable(strength) or strength != 0):
    raise ValueError("scale_by_adam_nm: strength= and mix= belong to masked_decay='l2' or 'l1'.")
  if not 0 <= nu_floor <= 1:
    raise ValueError(f"scale_by_adam_nm: nu_floor={nu_floor!r} must be in [0, 1].")
  # 1 / (1 - 0.999) is 999.99... in floating point: int() would lose one.
  window = round(1 / (1 - b2))
  used = {"masked_decay": masked_decay, "freeze_nu": freeze_nu}
  options = {name: () for name, value in used.items() if value is not None}

  def init_fn(params):
    freezes = freeze_nu is not None
    return AdamNMState(
      count=jnp.zeros((), jnp.int32),
      mu=optax.tree.zeros_like(params),
      nu=optax.tree.zeros_like(params),
      frozen_at=jnp.full((), -1, jnp.int32) if freezes else (),
      changes=jnp.full((window,), jnp.inf, jnp.float32) if freezes else (),
      options=options,
    )

  def update_fn(updates, state, params=None, *, masks=None, **extra):
    del extra
    t = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    signal = mu
    if masked_decay is not None:
      share = None if mix is None else _at(mix, state.count)
      signal = _pulled(mu, params, masks, masked_decay, _at(strength, state.count), share)
    squared = updates if masked_decay is None else signal
    nu = optax.tree.update_moment_per_elem_norm(squared, state.nu, b2, 2)
    direction = optax.tree.bias_correction(signal, b1, t)
    scale = optax.tree.bias_correction(nu, b2, t)
    frozen_at, changes = state.frozen_at, state.changes
    if freeze_nu is not None:
      changes, now = _settled(freeze_nu, state, squared, masks, b2, eps)
      nu, frozen_at = _held(state, now, squared, nu, b2, nu_floor)
      correction = 1 - b2 ** jnp.where(state.frozen_at >= 0, frozen_at + 1, t)
      scale = jax.tree.map(lambda n: n / correction.astype(n.dtype), nu)
    out = jax.tree.map(lambda u, s: u / (jnp.sqrt(s) + eps), direction, scale)
    return out, AdamNMState(t, mu, nu, frozen_at, changes, options)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adamw_nm(
  learning_rate: Scalar,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """`scale_by_adam_nm` with decoupled weight decay and a learning rate: w - lr (update + weight_decay w).

  Args:
    learning_rate: number or schedule.
    b1, b2, eps: as in Adam.
    weight_decay: on all weights, as in `optax.adamw`.
    **options: of `scale_by_adam_nm`.

  >>> import optax, jaxsparse as js
  >>> inner = adamw_nm(1e-3, masked_decay="l2", strength=optax.linear_schedule(0.0, 6e-5, 10_000))
  >>> tx = js.ast(structure=js.NM(2, 4)).wrap_optax(inner)
  """
  return optax.chain(
    scale_by_adam_nm(b1, b2, eps, **options),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )


def _at(value: Scalar, count: jax.Array) -> jax.Array:
  return jnp.asarray(value(count) if callable(value) else value, jnp.float32)


def _flatten(tree):
  """Leaves and structure; a MaskedNode, which may stand for a branch that the masks still have, is a leaf."""
  return jax.tree.flatten(tree, is_leaf=_tree.is_masked_node)


def _pulled(mu, params, masks, kind, strength, mix):
  """The first moment with the pull on masked weights; leaves without a mask pass."""
  if params is None or masks is None:
    missing = "params" if params is None else "masks="
    raise ValueError(
      f"scale_by_adam_nm(masked_decay={kind!r}) needs {missing} in update: use it inside updater.wrap_optax(...), which "
      "hands over both."
    )

  def pull(m, p, mask):
    # In bfloat16 a strength of 6e-5 would round away against the moment: add in float32.
    wide = _tree.wider(m.dtype, jnp.float32)
    to_zero = strength.astype(wide) * (jnp.sign(p) if kind == "l1" else p).astype(wide)
    rest = m.astype(wide)
    pulled = rest + to_zero if mix is None else (1 - mix).astype(wide) * rest + mix.astype(wide) * to_zero
    return jnp.where(mask, rest, pulled).astype(m.dtype)

  leaves, structure = _flatten(mu)
  values, nodes = structure.flatten_up_to(params), structure.flatten_up_to(masks)
  return structure.unflatten(
    [
      m if _tree.is_masked_node(m) or _tree.is_masked_node(mask) else pull(m, p, mask)
      for m, p, mask in zip(leaves, values, nodes)
    ]
  )


def _settled(switch, state, squared, masks, b2, eps):
  """(the latest changes of `nu`, whether it is fixed from this update on: bool, shape=())."""
  frozen = state.frozen_at >= 0
  # Sums over all weights are slow beside the elementwise rest: none after the switch.
  measure = lambda: _change(squared, state.nu, b2, masks, switch.mean)
  latest = jax.lax.cond(frozen, lambda: jnp.float32(0), measure)
  changes = state.changes.at[state.count % state.changes.size].set(latest)
  settled = (state.count >= switch.earliest) & (jnp.mean(changes) < eps)
  if switch.latest is not None:
    settled |= state.count >= switch.latest
  return changes, settled & ~frozen


def _held(state, now, squared, nu, b2, floor):
  """(`nu`, `frozen_at`): the old ones once fixed; in the update that fixes `nu`, with its floor."""
  # The means are taken in that update only.
  lowest = jax.lax.cond(now, lambda: _floors(squared, state.nu, b2, floor), lambda: _zeros(state.nu))
  # The step reads the moment that is stored, so that XLA can write it in place of the old one.
  hold = lambda old, new, low: jnp.where(state.frozen_at >= 0, old, jnp.maximum(new, low.astype(new.dtype)))
  return jax.tree.map(hold, state.nu, nu, lowest), jnp.where(now, state.count, state.frozen_at)


def _change(signal, nu, b2, masks, mean):
  """shape=(), float32: the mean of |nu_t - nu_(t-1)| = (1 - b2) |signal^2 - nu_(t-1)|.

  Over all entries of leaves that have a mask; over all leaves where there are no masks.
  """
  leaves, structure = _flatten(nu)
  values = structure.flatten_up_to(signal)
  nodes = leaves if masks is None else structure.flatten_up_to(masks)
  steps = [
    (1 - b2) * jnp.abs(jnp.square(s.astype(jnp.float32)) - n.astype(jnp.float32))
    for s, n, m in zip(values, leaves, nodes)
    if not (_tree.is_masked_node(n) or _tree.is_masked_node(m))
  ]
  size = sum(s.size for s in steps)
  if not size:
    return jnp.float32(jnp.inf)
  if mean == "geometric":
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.exp(sum(jnp.sum(jnp.log(jnp.maximum(s, tiny))) for s in steps) / size)
  return sum(jnp.sum(s) for s in steps) / size


def _floors(signal, nu, b2, floor):
  """For each leaf `floor` times the mean of the new second moment; float32 scalars."""
  mean = lambda x: jnp.mean(x.astype(jnp.float32))
  return jax.tree.map(lambda s, n: floor * (b2 * mean(n) + (1 - b2) * mean(jnp.square(s))), signal, nu)


def _zeros(tree):
  return jax.tree.map(lambda _: jnp.float32(0), tree)
