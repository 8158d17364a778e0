"""N:M methods whose heart is in the optimizer: STEP, AST and CAST, all with `scale_by_adam_nm`."""

from jaxsparse import _updater
from jaxsparse import forwards
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.algorithms import _registry


@_registry.algorithm
def step(sparsity: float | None = None, *, every: int = 1, stop: int | None = None, **common) -> _updater.Updater:
  """STEP: dense Adam until its second moment has settled; then the moment is fixed and N:M masks are learned.

  Until the inner optimizer freezes its second moment nu, training is dense. From the next forward pass on the largest
  |w| are used, with the straight-through gradient, and the step is lr m / (sqrt(nu) + eps) with the fixed nu: gradients
  through changing masks do not disturb it.

  Args:
    sparsity: None with `structure=NM(n, m)`, which implies it.
    every: updates between new masks, after the switch.
    stop: updates after the switch from which masks are fixed; None never fixes them.
    **common: as in `magnitude`.

  Needs `scale_by_adam_nm(freeze_nu=AutoSwitch(...))` inside.

  >>> import jaxsparse as js
  >>> updater = step(structure=js.NM(2, 4))
  >>> tx = updater.wrap_optax(js.adamw_nm(1e-3, freeze_nu=js.AutoSwitch(earliest=1000, latest=5000)))

  References:
    Lu et al., STEP: Learning N:M Structured Sparsity Masks from Scratch with Precondition, 2023,
    https://arxiv.org/abs/2302.01172. Differs from the paper: a floor under the fixed nu and its bias
    correction, see `scale_by_adam_nm`; see also `AutoSwitch`.
  """
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, stop=stop, event="frozen_at"),
    drop=scorers.Magnitude(),
    forward=forwards.StraightThrough(),
    sparsity=sparsity,
    needs_inner=("freeze_nu",),
    **common,
  )


@_registry.algorithm
def ast(
  sparsity: float | None = None, *, every: int = 10, start: int = 0, stop: int | None = None, **common
) -> _updater.Updater:
  """Adaptive sparse trainer: straight-through retraining of a dense model, with a slowly growing pull on masked weights.

  The pull is added behind Adam's first moment: u = m + strength_t (1 - mask) w, and u takes m's place in Adam.

  Args:
    sparsity: None with `structure=NM(n, m)`, which implies it.
    every: updates between new masks (the paper: 10).
    start: dense training before this count.
    stop: masks are fixed from this count on; None never fixes them.
    **common: as in `magnitude`.

  Needs `scale_by_adam_nm(masked_decay="l2", strength=...)` inside; the paper's strength rises linearly over 10,000
  updates to 6e-5 (1e-4 in its scripts).

  >>> import jaxsparse as js, optax
  >>> inner = js.adamw_nm(1e-3, masked_decay="l2", strength=optax.linear_schedule(0.0, 6e-5, 10_000))
  >>> tx = ast(structure=js.NM(2, 4)).wrap_optax(inner)

  References:
    Huang et al., Pruning Large Language Models with Semi-Structural Adaptive Sparse Training, 2024,
    https://arxiv.org/abs/2407.20584. Differs from the paper: distillation from the dense model (0.33 task loss + 0.67
    KL at temperature 2) is the training loop's, SLoRB is `jaxsparse.nn.init_slorb`, and masks follow |w|, not Wanda's
    |w| ||x||. The published code's pull has the wrong sign on masked weights; this one has the paper's.
  """
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, stop=stop, start=start),
    drop=scorers.Magnitude(),
    forward=forwards.StraightThrough(),
    sparsity=sparsity,
    needs_inner=("masked_decay",),
    **common,
  )


@_registry.algorithm
def cast(
  sparsity: float | None = None, *, every: int = 10, start: int = 0, stop: int | None = None, **common
) -> _updater.Updater:
  """Continuous N:M: the forward pass stays dense while an L1 pull, growing from 0 to all, takes masked weights to zero.

  u = (1 - a_t) m + a_t strength sign(w) on masked weights takes the place of Adam's first moment m, with a_t = t / T.
  `sparse_params` and `export` apply the masks; by T, what they remove is no larger than about the learning rate, so let
  that decay. Experimental: the paper is known here at second hand.

  Args:
    sparsity: None with `structure=NM(n, m)`, which implies it.
    every: updates between new masks (the paper: 10).
    start: no mask, and so no pull, before this count.
    stop: masks are fixed from this count on; None never fixes them.
    **common: as in `magnitude`.

  Needs `scale_by_adam_nm(masked_decay="l1", mix=..., strength=...)` inside.

  >>> import jaxsparse as js, optax
  >>> rising, falling = optax.linear_schedule(0.0, 1.0, 5000), optax.cosine_decay_schedule(1e-3, 5000)
  >>> inner = js.adamw_nm(falling, masked_decay="l1", strength=1e-3, mix=rising)
  >>> tx = cast(structure=js.NM(2, 4)).wrap_optax(inner)

  References:
    Huang et al., CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for Large Language Models,
    2025, https://arxiv.org/abs/2509.25996. Differs from the paper: distillation from the dense model is the training
    loop's; learned scales of groups are `jaxsparse.nn.scale_groups`; the default strength is not known.
  """
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, stop=stop, start=start),
    drop=scorers.Magnitude(),
    forward=forwards.Dense(),
    sparsity=sparsity,
    needs_inner=("masked_decay",),
    **common,
  )
