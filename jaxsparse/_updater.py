"""The updater: a sparsity algorithm as a value."""

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any, Literal

import jax
import optax

from jaxsparse import _engine
from jaxsparse import _instant
from jaxsparse import _plan
from jaxsparse import _state
from jaxsparse import _tree
from jaxsparse import _zero_map
from jaxsparse._compact import engine as _compact_engine
from jaxsparse._compact import storage as _compact_storage
from jaxsparse import distributions
from jaxsparse import forwards
from jaxsparse import masks as masks_lib
from jaxsparse import rules as rules_lib
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse import structures


@dataclasses.dataclass(frozen=True, repr=False)
class Updater:
  """A sparsity algorithm, as a frozen value: what is removed, when, by which score, and what the forward pass sees.

  Use the factories in `jaxsparse.algorithms`; they fill this in as their paper says. Updaters with equal fields are
  equal, hash alike, and print as the call that made them.

  Attributes:
    schedule: when masks are refreshed, and how far towards the final sparsity.
    drop: ranks entries; the lowest are removed. An `AbstractModelScorer` prunes before training only.
    sparsity: final fraction of removed weights in [0, 1) over the leaves that have no sparsity of their own. None only
      where structures (N:M, a fixed fan-in) imply it.
    structure: what is removed together.
    distribution: how the sparsity is shared out over leaves.
    rules: which leaves, with which structure or sparsity; see `Rules`.
    forward: what the forward pass sees; decides whether the stored parameters are sparse or dense.
    init: ranks entries for the masks before the first step (at the final sparsity); None starts dense.
    grow: ranks removed entries for growing back; None only prunes.
    drop_fraction: share of kept units that `grow` replaces at a refresh.
    surplus: share of kept units that grow beyond them at a refresh, until the next one (MEST, Chase); None for none.
    init_distribution: layer densities of the first masks where leaves compete later (`distribution=Global()`).
    initial_sparsity: sparsity at the first refresh of a ramp.
    skip_step_when_due: whether the inner optimizer pauses in an update that refreshes masks.
    pack_masks: store masks at one bit per entry instead of one byte; results are identical.
    on_mismatch: "error", or "skip" to leave leaves dense that the structure cannot tile (logged as a warning).
    needs_inner: entries that the inner optimizer's state must have: options of `scale_by_adam_nm` without which the
      method would silently be another.
  """

  schedule: schedules.AbstractMaskSchedule
  drop: scorers.AbstractScorer | scorers.AbstractModelScorer
  sparsity: float | None = None
  structure: structures.AbstractStructure = structures.Unstructured()
  distribution: distributions.AbstractDistribution = distributions.Uniform()
  rules: rules_lib.Rules = rules_lib.Rules()
  forward: forwards.AbstractForward = forwards.Hard()
  init: scorers.AbstractScorer | None = None
  grow: scorers.AbstractScorer | None = None
  drop_fraction: schedules.AbstractDropFraction | None = None
  surplus: schedules.AbstractDropFraction | None = None
  init_distribution: distributions.AbstractDistribution | None = None
  initial_sparsity: float = 0.0
  skip_step_when_due: bool = False
  pack_masks: bool = False
  on_mismatch: Literal["error", "skip"] = "error"
  needs_inner: tuple[str, ...] = ()
  call: tuple[str, tuple[tuple[str, Any], ...]] | None = dataclasses.field(default=None, compare=False)

  def __post_init__(self):
    for name, (kind, example) in FIELDS.items():
      value = getattr(self, name)
      if not isinstance(value, (kind, type(None)) if name in _OPTIONAL else kind):
        optional = ", or None" if name in _OPTIONAL else ""
        hint = f" Call it: {value.__name__}(...)." if isinstance(value, type) else ""
        hint = " Names are for create_updater({...})." if isinstance(value, str) else hint
        raise TypeError(f"{name} must be {example}{optional}, got {value!r}.{hint}")
    if self.sparsity is not None:
      rules_lib.check_sparsity(self.sparsity, "sparsity")
    rules_lib.check_sparsity(self.initial_sparsity, "initial_sparsity")
    if self.sparsity is not None and self.initial_sparsity > self.sparsity:
      raise ValueError(f"initial_sparsity={self.initial_sparsity} must not exceed sparsity={self.sparsity}.")
    if self.on_mismatch not in ("error", "skip"):
      raise ValueError(f"on_mismatch must be 'error' or 'skip', got {self.on_mismatch!r}.")
    self._check_combination()

  def _check_combination(self):
    at_init = isinstance(self.drop, scorers.AbstractModelScorer)
    starts_sparse = self.init is not None or self.forward.storage == "dense" or at_init
    if not self.schedule.refreshes and not starts_sparse and self.sparsity != 0:
      raise ValueError(f"{self.schedule!r} never refreshes masks and there is no init=, so training would stay dense.")
    if at_init and (self.schedule.refreshes or self.forward.storage != "hard"):
      raise ValueError(f"{self.drop!r} scores a model before training: it needs schedule=Static() and forward=Hard().")
    if self.schedule.event is not None and self.forward.storage != "dense":
      raise ValueError(f"{self.schedule!r} waits for an event in the step that it follows: it needs dense storage.")
    for name in ("init", "grow"):
      scorer = getattr(self, name)
      if name == "init" and scorer is not None and (scorer.uses_gradient or scorer.needs):
        raise ValueError(
          f"init={scorer!r} needs gradients, and there are none before the first step; use instant_sparsify and set_masks."
        )
    if (self.grow is None) != (self.drop_fraction is None):
      raise ValueError("grow= and drop_fraction= belong together: what grows back, and how much.")
    if self.grow is not None and self.forward.storage != "hard":
      raise ValueError(
        "Growing methods need forward=Hard(): under dense storage removed weights come back by themselves."
      )
    if self.surplus is not None and self.grow is None:
      raise ValueError("surplus= says how much more grows; it needs grow=.")
    if self.init_distribution is not None and (self.init is None or not self.distribution.joint):
      raise ValueError("init_distribution= shares out the first masks of init= where distribution=Global() does later.")
    if self.init_distribution is not None and self.init_distribution.joint:
      raise ValueError(f"init_distribution={self.init_distribution!r} must give counts per leaf, such as ERK().")
    if self.storage == "compact":
      _compact_storage.check_updater(self)

  def __repr__(self):
    if self.call is not None:
      name, arguments = self.call
    else:
      name = "Updater"
      arguments = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "call"]
      defaults = {f.name: f.default for f in dataclasses.fields(self)}
      arguments = [(k, v) for k, v in arguments if v != defaults[k]]
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments)})"

  @property
  def prunes_at_init(self) -> bool:
    """Whether masks come from `instant_sparsify` and `set_masks` before the first step (SNIP, GraSP, SynFlow)."""
    return isinstance(self.drop, scorers.AbstractModelScorer)

  @property
  def storage(self) -> Literal["hard", "dense", "compact"]:
    """What is stored while training: masked weights, dense weights, or only what is kept (a `Compact` structure)."""
    said = [value[0] if isinstance(value, tuple) else value for _, value in self.rules.entries]
    compact = any(isinstance(value, structures.Compact) for value in (self.structure, *said))
    return "compact" if compact else self.forward.storage

  # -- training ------------------------------------------------------------------------------------------------------

  def wrap_optax(
    self, inner: optax.GradientTransformation, key: jax.Array | int = 0, tag: str | None = None
  ) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer, so that `optax.apply_updates` keeps the parameters sparse.

    `tx.update(grads, state, params, **extra)` refreshes masks when they are due, hands masked gradients to `inner`,
    keeps `inner`'s moments zero where weights are removed (hard storage), and returns updates that land masked weights
    exactly on zero. Nothing may change the updates after it; whole-optimizer wrappers (`MultiSteps`,
    `apply_if_finite`, `inject_hyperparams`, `masked`, `partition`) may go around it.

    Args:
      inner: any optax optimizer. Keyword arguments of `tx.update` are passed on to it, and `masks=`, a tree like the
        parameters, for optimizers that treat removed weights in their own way (`scale_by_adam_nm`).
      key: seed, or PRNG key, of all random choices.
      tag: a name, where one optimizer holds several updaters over the same leaves.

    Returns:
      An optax transformation whose state is a `SparsityState`.

    Raises:
      ValueError, TypeError: from `tx.init` or while tracing `tx.update`, for a configuration that does not fit the
        parameters; the message names the leaf.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
      hint = f" Call it: {getattr(inner, '__name__', 'it')}(...)." if callable(inner) else ""
      raise TypeError(f"wrap_optax takes an optimizer, such as optax.adam(1e-3), got {inner!r}.{hint}")
    inner = optax.with_extra_args_support(inner)
    zero_map = _zero_map.ZeroMap()
    engine = _compact_engine if self.storage == "compact" else _engine

    def init_fn(params):
      return engine.init(self, inner, params, key, tag)

    def update_fn(updates, state, params=None, **extra):
      _state.require_state(state)
      return engine.update(self, inner, zero_map, updates, state, params, updates, extra)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  def transform(self, key: jax.Array | int = 0, tag: str | None = None) -> optax.GradientTransformationExtraArgs:
    """The chainable form: goes *last* in `optax.chain(optimizer, updater.transform())`.

    It projects finished updates. It cannot clean the optimizer before it, so moments of removed weights stay (use
    `wrap_optax` where that matters), and scorers that use gradients need `tx.update(..., grads=grads)`.

    Args:
      key: seed, or PRNG key, of all random choices.
      tag: as in `wrap_optax`.
    """
    if self.storage == "compact":
      raise ValueError(f"{self!r} must clear the moments of what it replaces: use wrap_optax(inner), not transform().")
    identity = optax.with_extra_args_support(optax.identity())
    zero_map = _zero_map.ZeroMap()

    def init_fn(params):
      return _engine.init(self, identity, params, key, tag)

    def update_fn(updates, state, params=None, *, grads=None, **extra):
      _state.require_state(state)
      return _engine.update(self, identity, zero_map, updates, state, params, grads, extra)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  def forward_params(self, params: Any, opt_state: Any, tag: str | None = None) -> Any:
    """The weights that the forward pass uses; call it inside the loss.

    The identity for methods with sparse storage; for the others (`magnitude_ste`, `sr_ste`, ...) masked weights with
    the method's gradient rule.

    Args:
      params: the stored parameters.
      opt_state: the optimizer state, as in `get_sparsity_state`.
      tag: which updater, where one optimizer holds several.
    """
    state = _state.get_sparsity_state(opt_state, tag)
    if self.storage == "compact":
      return _compact_storage.join(params, state.masks)
    return _map(params, state.masks, lambda p, m: self.forward.forward(p, m, state.count))

  def sparse_params(self, params: Any, opt_state: Any, tag: str | None = None) -> Any:
    """Parameters with the current masks applied: for evaluation, averages (EMA), and the start of sparse training.

    Before the first step, keep the result for methods with sparse storage (`updater.forward.storage == "hard"`), so that
    the first forward pass is sparse too. Methods with dense storage (the straight-through ones) train on the dense
    parameters: there, use it only for evaluation.
    """
    state = _state.get_sparsity_state(opt_state, tag)
    if self.storage == "compact":
      return params
    return _map(params, state.masks, lambda p, m: self.forward.project(p, m, state.count))

  def export(self, params: Any, opt_state: Any, tag: str | None = None) -> tuple[Any, Any]:
    """The final parameters and their masks (bool, `optax.MaskedNode()` for dense leaves), whatever the storage."""
    if self.storage == "compact":
      masks = _state.get_masks(opt_state, tag)
      return _compact_storage.join(params, masks, sort=True), masks
    return self.sparse_params(params, opt_state, tag), _state.get_masks(opt_state, tag)

  def due(self, opt_state: Any, tag: str | None = None) -> jax.Array:
    """shape=(), bool: whether the next `tx.update` refreshes the masks (as far as known, where that waits for an event)."""
    state = _state.get_sparsity_state(opt_state, tag)
    return self.schedule.due(_engine.schedule_count(self.schedule, state.count, state.inner_state))

  def compact_init(self, params: Any, key: jax.Array | int = 0, *, gain: float = 1.0) -> tuple[Any, Any]:
    """Parameters and positions for leaves with a `Compact` structure; the dense weight never exists.

    Args:
      params: a tree like the dense model's. Of compact leaves only shape and dtype are read, so `jax.ShapeDtypeStruct`
        will do; a `FixedFanInArray` or `BlockArray` (of `js.compress`, say) brings its values and positions. Other
        leaves are arrays, and pass.
      key: seed, or PRNG key, of positions and values.
      gain: values are N(0, gain^2 / fan_in), where fan_in counts the kept inputs of an output: 1 keeps the variance of
        activations, sqrt(2) before a relu.

    Returns:
      `(params, masks)`: values in the place of compact leaves, and a tree with their `Positions` for `js.set_masks`
      (`optax.MaskedNode()` for other leaves).

    Raises:
      ValueError, TypeError: for a leaf that does not fit its structure; the message names it.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> import jaxsparse as js
    >>> rules = js.Rules(("head", js.Compact(js.FixedFanIn(2), (8, 5))), ("body", None))
    >>> updater = js.get_algorithm("set")(every=10, stop=100, rules=rules)
    >>> tree = {"body": jnp.ones((4, 8)), "head": jax.ShapeDtypeStruct((8, 5), jnp.float32)}
    >>> params, masks = updater.compact_init(tree, key=0)
    >>> params["head"].shape
    (2, 5)
    >>> tx = updater.wrap_optax(optax.adam(1e-3))
    >>> opt_state = js.set_masks(tx.init(params), masks)
    >>> updater.forward_params(params, opt_state)["head"]
    FixedFanInArray(2 of 8 inputs, shape=(8, 5), dtype=float32)
    """
    if self.storage != "compact":
      raise ValueError(
        f"{self!r} has no Compact structure: nothing is stored compactly, and tx.init takes the parameters."
      )
    key = jax.random.wrap_key_data(_engine.key_data(key), impl="threefry2x32")
    return _compact_storage.init_params(self, params, key, gain)

  def dense_params(self, params: Any, opt_state: Any, tag: str | None = None) -> Any:
    """Parameters with dense weights `[K, O]` in the place of compact leaves: for a refresh by gradients of all weights.

        dense_grads = jax.grad(dense_loss)(updater.dense_params(params, opt_state), batch)
        grads, scores = updater.split_gradients(dense_grads, opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, candidate_scores=scores)

    Args:
      params: the stored parameters.
      opt_state, tag: as in `forward_params`.
    """
    self._require_compact("dense_params")
    return _compact_storage.densify(params, _state.get_sparsity_state(opt_state, tag).masks)

  def split_gradients(self, dense_grads: Any, opt_state: Any, tag: str | None = None) -> tuple[Any, Any]:
    """Gradients of `dense_params` -> (gradients of the stored parameters, `candidate_scores` for `tx.update`).

    A block's score is the sum of |gradient| over it; of a fixed fan-in the candidates are the absent inputs with the
    largest |gradient|, as many as the fan-in. Where the dense gradient is too large to exist, compute scores from the layer's
    input and the derivative by its output: `js.ops.block_gradient_scores`, `js.ops.fan_in_candidates`.

    Args:
      dense_grads: a tree like `dense_params`.
      opt_state, tag: as in `forward_params`.
    """
    self._require_compact("split_gradients")
    return _compact_storage.split_gradients(dense_grads, _state.get_sparsity_state(opt_state, tag).masks)

  def _require_compact(self, method: str):
    if self.storage != "compact":
      raise ValueError(f"{self!r} has no Compact structure: {method} is for parameters that hold only what is kept.")

  # -- without an optimizer ------------------------------------------------------------------------------------------

  def instant_sparsify(
    self,
    params: Any,
    key: jax.Array | int = 0,
    *,
    loss_fn: Callable[[Any, Any], jax.Array] | None = None,
    batches: Iterable[Any] | None = None,
    masks: Any = None,
  ) -> tuple[Any, Any]:
    """Prunes to the final sparsity at once.

    Args:
      params: tree of parameters.
      key: seed, or PRNG key, for random scores.
      loss_fn: `loss_fn(params, batch) -> scalar`, for scores that need gradients (saliency, Fisher, SNIP, ...).
      batches: batches for `loss_fn`.
      masks: what may be kept, such as the masks of an earlier round; None, or `optax.MaskedNode()` in the place of a leaf,
        for everything.

    Returns:
      `(pruned params, masks)`; masks are bool, and `optax.MaskedNode()` where a leaf stays dense.

    Raises:
      ValueError: if the score needs gradients and `loss_fn` or `batches` is missing, or `masks` keep less of a leaf than
        is asked for.

    >>> import jax.numpy as jnp
    >>> from jaxsparse import algorithms
    >>> updater = algorithms.magnitude(sparsity=0.5, stop=1)
    >>> pruned, masks = updater.instant_sparsify({"w": jnp.array([[1., -4.], [3., 2.]])})
    >>> pruned["w"].tolist()
    [[0.0, -4.0], [3.0, 0.0]]
    """
    if self.storage == "compact":
      raise ValueError(
        f"{self!r} has no dense weights to prune: use compact_init, or prune without Compact and compress."
      )
    whole_model = isinstance(self.drop, scorers.AbstractModelScorer)
    if not whole_model and self.drop.needs:
      raise ValueError(
        f"{self!r} scores by {self.drop!r}, which reads {self.drop.needs} of an optimizer's state; there is none in "
        "instant_sparsify. Fisher() gathers squared gradients by itself."
      )
    if (whole_model or self.drop.uses_gradient) and (loss_fn is None or batches is None):
      raise ValueError(
        f"{self!r} scores weights by {type(self.drop).__name__}, which needs gradients: pass loss_fn=(params, batch) "
        f"-> {self.drop.objective if whole_model else 'loss'} and batches=[...] to instant_sparsify."
      )
    return _instant.prune(self, params, key, loss_fn, list(batches) if batches is not None else [], masks)

  def describe(self, params: Any) -> str:
    """A table of what happens to each leaf: shape, structure, sparsity it ends with, and why."""
    rows = [("leaf", "shape", "pattern", "final sparsity", "because")]
    for plan in _plan.make_plan(self, _tree.flatten(params)):
      if plan.structure is None:
        rows.append((plan.name, str(plan.shape), "dense", "0", plan.reason))
        continue
      final = "joint" if plan.final_keep is None else f"{1 - plan.final_keep / plan.leaf_shape.units:.4f}"
      rows.append((plan.name, str(plan.shape), repr(plan.structure), final, plan.reason))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


# What a field must be, and an example for who gives something else.
FIELDS = {
  "schedule": (schedules.AbstractMaskSchedule, "a schedule such as schedules.Polynomial(every=100, stop=5000)"),
  "drop": ((scorers.AbstractScorer, scorers.AbstractModelScorer), "a scorer such as scorers.Magnitude()"),
  "structure": (structures.AbstractStructure, "a structure such as NM(2, 4), Block((16, 16)) or Unstructured()"),
  "distribution": (distributions.AbstractDistribution, "a distribution such as Uniform(), ERK() or Global()"),
  "rules": (rules_lib.Rules, "Rules((regular expression, None | structure | sparsity), ...)"),
  "forward": (forwards.AbstractForward, "a forward such as forwards.Hard() or forwards.StraightThrough()"),
  "init": (scorers.AbstractScorer, "a scorer such as scorers.Random()"),
  "grow": (scorers.AbstractScorer, "a scorer such as scorers.GradientMagnitude()"),
  "drop_fraction": (schedules.AbstractDropFraction, "a number or schedule such as schedules.CosineFraction(0.3)"),
  "surplus": (schedules.AbstractDropFraction, "a schedule such as schedules.ConstantFraction(0.1)"),
  "init_distribution": (distributions.AbstractDistribution, "a distribution such as ERK()"),
}
_OPTIONAL = ("init", "grow", "drop_fraction", "surplus", "init_distribution")


def _map(params, masks, fn):
  """fn(parameter, mask) on sparsified leaves; the others pass."""
  leaves = _tree.flatten(params)
  nodes = [_state.require_set(node) for node in _tree.match(leaves, masks, "the masks in the optimizer state")]
  return leaves.treedef.unflatten(
    [p if _tree.is_masked_node(m) else fn(p, masks_lib.unpack(m)) for p, m in zip(leaves.values, nodes)]
  )
