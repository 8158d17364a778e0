"""The laws every updater obeys, as functions over the recorded history of one scanned training program.

`train` runs a small model for `2 * STEPS` updates in one jitted `lax.scan` program, called twice, and keeps parameters
and optimizer state after every update. `check` then holds the history against every law in `LAWS` with NumPy only;
what a law expects (counts, due steps, units) is worked out here, from the papers' formulas, not taken from jaxsparse.
"""

import dataclasses
from fractions import Fraction
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsparse as js
from references import distributions as ref_distributions
from references import selection as ref

STEPS = 7  # updates in one call of the program
TOTAL = 2 * STEPS
SHAPES = {"a": (16, 32), "b": (32, 8)}
SPARSITY = 0.8
RAMP = dict(every=3, start=2, stop=13)  # due at 2, 5, 8, 11
SWAPS = dict(every=3, start=1, stop=11)  # due at 1, 4, 7, 10
FOLLOW = dict(every=2, start=1, stop=12)  # due at 1, 3, ... 11
CLOSING = dict(every=2, start=1, stop=13)  # masks that follow the weights to the end
FOLLOW_ON = tuple(range(1, 14, 2))
TURNS = dict(sparse_steps=3, dense_steps=2, start=1, stop=12)  # closes at 1, 6, 11, opens at 4, 9


# -- what is run -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Expected:
  """What the paper's rule says about an algorithm.

  Attributes:
    arguments: of the factory.
    due: counts at which masks may change.
    progress: count -> share of the way from no sparsity to the final one (a Fraction), as of the update with that count.
    joint: whether only the total over leaves is fixed.
    erk: whether leaf densities follow ERK instead of being uniform.
    moves: whether kept entries are replaced at a refresh, at a constant count.
    selects: whether the stored mask is the magnitude selection on the stored (dense) weights.
    initial: sparsity at the start of a ramp.
    extra: count -> share of the kept units that grow beyond them until the next refresh.
    ablates: whether whole groups may be emptied and the others share their units.
    pattern: count -> (n, m) that an N:M mask fits after the update with that count, where the pattern changes.
    inner: makes the inner optimizer that the algorithm needs; None takes any.
  """

  arguments: dict[str, Any]
  due: tuple[int, ...] = ()
  progress: Any = lambda t: Fraction(1)
  joint: bool = False
  erk: bool = False
  moves: bool = False
  selects: bool = False
  initial: float = 0.0
  extra: Any = lambda t: Fraction(0)
  ablates: bool = False
  pattern: Any = None
  inner: Any = None


def window(every, start, stop):
  return tuple(range(start, stop, every))


def ramp_progress(t, power=3, every=RAMP["every"], start=RAMP["start"], stop=RAMP["stop"]):
  """1 - (1 - tau)^power at the last refresh up to t, tau running from 0 to 1 over the refreshes."""
  past = [d for d in window(every, start, stop) if d <= t]
  if not past:
    return Fraction(0)
  tau = Fraction(past[-1] - start, window(every, start, stop)[-1] - start)
  return 1 - (1 - tau) ** power


def turn_progress(t):
  closed = [*range(1, 4), *range(6, 9), *range(11, TOTAL)]
  return Fraction(int(t in closed))


def pieces(amounts, boundaries):
  """count -> the amount of the last refresh up to it, by the share of [start, stop) of SWAPS that had passed there."""

  def extra(t):
    past = [d for d in window(**SWAPS) if d <= t]
    if not past:
      return Fraction(0)
    share = Fraction(past[-1] - SWAPS["start"], SWAPS["stop"] - SWAPS["start"])
    return Fraction(str(amounts[sum(share >= Fraction(str(b)) for b in boundaries)]))

  return extra


def pattern_at(t, pairs, boundaries):
  """The pair of the last refresh of `FOLLOW_ON` up to t."""
  last = max([d for d in FOLLOW_ON if d <= t], default=0)
  return pairs[sum(last >= b for b in boundaries)]


def step_progress(t):
  return Fraction(int(t >= FOLLOW["start"]))


_ramp = functools.partial(Expected, {"sparsity": SPARSITY, **RAMP}, window(**RAMP), ramp_progress)
_swap = functools.partial(Expected, {"sparsity": SPARSITY, **SWAPS}, window(**SWAPS), erk=True, moves=True)
_follow = functools.partial(Expected, due=window(**FOLLOW), progress=step_progress)
_close = functools.partial(Expected, due=FOLLOW_ON, progress=step_progress, selects=True)
_fine = functools.partial(pattern_at, pairs=((8, 16), (4, 8), (2, 4), (1, 2)), boundaries=(4, 7, 10))
_sparsify = functools.partial(pattern_at, pairs=((3, 4), (2, 4), (1, 4)), boundaries=(5, 9))
_adam_nm = lambda **options: functools.partial(js.adamw_nm, 0.01, **options)
EXPECTED = {
  "acdc": Expected({"sparsity": SPARSITY, **TURNS}, (1, 4, 6, 9, 11), turn_progress),
  "adam_fisher": _ramp(),
  "chase": _swap(joint=True, erk=False, extra=pieces((0.5, 0), (0.1875,))),
  "dsl": _swap(erk=False),
  "g2gnet": Expected({"sparsity": SPARSITY, "modules": 2, **SWAPS}, window(**SWAPS), moves=True),
  "asp": Expected({"at": 4}, (4,), lambda t: Fraction(int(t >= 4))),
  "ast": _follow({"sparsity": SPARSITY, **FOLLOW}, selects=True, inner=_adam_nm(masked_decay="l2", strength=0.01)),
  "cast": _follow(
    {"sparsity": SPARSITY, **FOLLOW}, selects=True, inner=_adam_nm(masked_decay="l1", strength=0.01, mix=0.5)
  ),
  "global_magnitude": _ramp(joint=True),
  "global_saliency": _ramp(joint=True),
  "gmp": _ramp(),
  "granet": Expected(
    {"sparsity": SPARSITY, "initial_sparsity": 0.5, "ramp_stop": 9, **RAMP},
    window(**RAMP),
    functools.partial(ramp_progress, stop=9),
    joint=True,
    moves=True,
    initial=0.5,
  ),
  "grasp": Expected({"sparsity": SPARSITY}, joint=True),
  "grasp_ratio": Expected({"sparsity": SPARSITY}, joint=True),
  "iterative_nm": Expected({"n": 1, "m": 4, **RAMP}, window(**RAMP), functools.partial(ramp_progress, power=1)),
  "magnitude": _ramp(),
  "magnitude_ste": _follow({"sparsity": SPARSITY, **FOLLOW}, selects=True),
  "mest": _swap(erk=False, extra=pieces((0.5, 0.25, 0), (0.5625, 0.75))),
  "movement": _ramp(),
  "mask_decay": _close({"sparsity": SPARSITY, **CLOSING}),
  "mdgf": _close({"sparsity": SPARSITY, "rate": 0.3, "flow": "chain", **CLOSING}),
  "no_prune": Expected({}, progress=lambda t: Fraction(0)),
  "random": _ramp(),
  "random_ste": _follow({"sparsity": SPARSITY, **FOLLOW}, moves=True),
  "rigl": _swap(),
  "saliency": _ramp(),
  "sdgf": _close({"n": 1, "m": 2, **CLOSING}, pattern=_fine),
  "set": _swap(),
  "snfs": _swap(),
  "snip": Expected({"sparsity": SPARSITY}, joint=True),
  "snip_ratio": Expected({"sparsity": SPARSITY}, joint=True),
  "sparcl": Expected(
    {"sparsity": SPARSITY, "amount": 0.2, "boundaries": (0.25, 0.75), **SWAPS},
    window(**SWAPS),
    moves=True,
    extra=pieces((0.2, 0, 0), (0.25, 0.75)),
  ),
  "sr_ste": _follow({"sparsity": SPARSITY, "decay": 0.01, **FOLLOW}, selects=True),
  "srigl": Expected(
    {"sparsity": 0.75, "distribution": js.Uniform(), **SWAPS}, window(**SWAPS), moves=True, ablates=True
  ),
  "static_sparse": Expected({"sparsity": SPARSITY}, erk=True),
  "step": Expected(
    {"sparsity": SPARSITY, "every": 2, "stop": 8},
    (4, 6, 8, 10),
    lambda t: Fraction(int(t >= 4)),
    selects=True,
    inner=_adam_nm(b2=0.9, freeze_nu=js.AutoSwitch(latest=4)),
  ),
  "structure_decay": _close({"n": 1, "m": 4, **CLOSING}, pattern=_sparsify),
  "synflow": Expected({"sparsity": SPARSITY, "iterations": 3}, joint=True),
  "top_kast": _follow({"sparsity": SPARSITY, "explore": 0.1, **FOLLOW}, progress=lambda t: Fraction(1), selects=True),
}

LABELS = {"a": "one", "b": "two"}
KERNELS = {k: {"kernel": True, "bias": False} for k in SHAPES}
OPTIMIZERS = {
  "momentum": lambda: optax.sgd(0.05, momentum=0.9),
  "adam": lambda: optax.adam(0.01),
  "adamw": lambda: optax.adamw(0.01, weight_decay=0.1),
  "lion": lambda: optax.lion(0.01),
  "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=8, momentum=0.9),
  "adafactor_full": lambda: optax.adafactor(0.01),
  "muon": lambda: optax.contrib.muon(0.01),
  "masked": lambda: optax.chain(optax.masked(optax.trace(0.9), KERNELS), optax.scale(-0.05)),
  "partition": lambda: optax.partition({"one": optax.adam(0.01), "two": optax.sgd(0.05, momentum=0.9)}, LABELS),
  "schedule_free": lambda: optax.contrib.schedule_free(optax.adam(0.01, b1=0.0), learning_rate=0.01, b1=0.9),
  "chain": lambda: optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(0.02, TOTAL, alpha=0.1))
  ),
}


def make_params(dtype=jnp.float32, seed=0, shapes=SHAPES):
  rng = np.random.default_rng(seed)
  return {
    name: {
      "kernel": jnp.asarray(rng.normal(size=s) / math.sqrt(s[-2]), dtype),
      "bias": jnp.asarray(rng.normal(size=s[:-2] + s[-1:]) / 10, dtype),
    }
    for name, s in shapes.items()
  }


def make_batches(steps=TOTAL, seed=1, inputs=16, outputs=8):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(steps, 8, inputs)).astype(np.float32)
  y = np.tanh(x @ rng.normal(size=(inputs, outputs))).astype(np.float32)
  return jnp.asarray(x), jnp.asarray(y)


def mlp(params, x):
  for i, layer in enumerate(params.values()):
    x = x.astype(layer["kernel"].dtype) @ layer["kernel"] + layer["bias"]
    x = jnp.tanh(x) if i + 1 < len(params) else x
  return x


def loss_fn(params, batch):
  return jnp.mean(jnp.square(mlp(params, batch[0]).astype(jnp.float32) - batch[1]))


def flow_fn(params, batch):
  return mlp(params, jnp.ones_like(batch[0])).sum()


@dataclasses.dataclass
class History:
  """What a run left behind; arrays are NumPy, with a leading axis of updates in `params`, `states` and `masks`."""

  name: str
  expected: Expected
  updater: js.Updater
  start: Any
  start_state: Any
  params: Any
  states: Any
  masks: Any
  programs: int


def start(updater, tx, params, loss=loss_fn, batches=None):
  """Parameters and state before the first update, as the README says, for methods that prune first, too."""
  if isinstance(updater.drop, js.scorers.AbstractModelScorer):
    loss = flow_fn if isinstance(updater.drop, js.scorers.SynFlow) else loss
    batches = batches or [jax.tree.map(lambda a: a[0], make_batches())]
    pruned, masks = updater.instant_sparsify(params, loss_fn=loss, batches=batches)
    return pruned, js.set_masks(tx.init(pruned), masks)
  state = tx.init(params)
  return updater.sparse_params(params, state), state


def needed(updater, state, grads):
  """The keyword arguments that the scorers ask for and the optimizer does not keep."""
  asked = {n for s in (updater.drop, updater.grow) for n in getattr(s, "needs", ())}
  trees = lambda n: [tree for _, tree in optax.tree.get_all_with_path(state, n)]
  kept = lambda n: sum(leaf.ndim >= 2 for leaf in jax.tree.leaves(trees(n)))
  return {n: jax.tree.map(jnp.square, grads) for n in asked if kept(n) != len(grads)}


def make_step(updater, tx, loss=loss_fn, cast=lambda grads: grads):
  """The training step of the README, as a scan body that records everything."""

  def step(carry, batch):
    params, state = carry
    grads = cast(jax.grad(lambda p: loss(updater.forward_params(p, state), batch))(params))
    updates, state = tx.update(grads, state, params, **needed(updater, state, grads))
    params = optax.apply_updates(params, updates)
    masks = None if updater == js.no_prune() else js.get_masks(state)
    return (params, state), (params, state, masks)

  return step


def train(
  name, inner, *, dtype=jnp.float32, loss=loss_fn, cast=lambda grads: grads, shapes=SHAPES, wrap=None, **arguments
):
  """Trains with one algorithm and records; `arguments` are added to those of `EXPECTED`."""
  expected = EXPECTED[name]
  updater = js.get_algorithm(name)(**{**expected.arguments, **arguments})
  expected = dataclasses.replace(expected, erk=expected.erk and updater.distribution == js.ERK())
  inner = expected.inner() if expected.inner else inner
  tx = (wrap or (lambda tx: tx))(updater.wrap_optax(inner))
  params, state = start(updater, tx, make_params(dtype, shapes=shapes), loss)
  step = make_step(updater, tx, loss, cast)
  program = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
  batches = make_batches()
  parts, carry = [], (params, state)
  for i in range(2):
    carry, part = program(carry, jax.tree.map(lambda a: a[i * STEPS : (i + 1) * STEPS], batches))
    parts.append(jax.tree.map(np.asarray, part))
  history = jax.tree.map(lambda *a: np.concatenate(a), *parts)
  as_numpy = functools.partial(jax.tree.map, np.asarray)
  return History(name, expected, updater, as_numpy(params), as_numpy(state), *history, program._cache_size())


# -- reading a history ---------------------------------------------------------------------------------------------------


def named(tree):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def sparsity_states(tree):
  """Every SparsityState in a tree, found without jaxsparse's own finder."""
  leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, js.SparsityState))
  return [x for x in leaves if isinstance(x, js.SparsityState)]


def kernels(h):
  """path -> (mask before the first update, masks after every update, weights after every update)."""
  first = named(js.get_masks(h.start_state))
  masks, params = named(h.masks), named(h.params)
  return {path: (np.asarray(first[path]), masks[path], params[path]) for path in masks}


def leaf_units(h, path, shape, t=TOTAL):
  """`[groups, units, entries]` of a leaf after update t, by the reference's own view of the structure."""
  s = h.updater.structure
  if h.expected.pattern:
    return ref.units_of(shape, "nm", m=h.expected.pattern(t)[1])
  stack = len(s.stack_axes)
  if isinstance(s, js.NM):
    return ref.units_of(shape, "nm", m=s.m, stack=stack)
  if isinstance(s, js.Block):
    return ref.units_of(shape, "block", block=s.shape, stack=stack)
  if isinstance(s, js.Channel):
    return ref.units_of(shape, "channel", stack=stack)
  return ref.units_of(shape, "fan_in" if isinstance(s, js.FixedFanIn) else "unstructured", stack=stack)


def final_keeps(h, t=TOTAL):
  """path -> units kept in each group in the end, or by the pattern of update t."""
  shapes = {path: mask.shape[1:] for path, (_, mask, _) in kernels(h).items()}
  s = h.updater.structure
  if h.expected.pattern:
    return dict.fromkeys(shapes, h.expected.pattern(t)[0])
  if isinstance(s, js.NM):
    return dict.fromkeys(shapes, s.n)
  if isinstance(s, js.FixedFanIn) and s.fan_in is not None:
    return dict.fromkeys(shapes, s.fan_in)
  if h.expected.erk:
    sizes = [math.prod(x) for x in shapes.values()]
    densities = ref_distributions.erk(list(shapes.values()), h.updater.sparsity)
    counts = ref_distributions.counts(densities, sizes, ref.keep_count(sum(sizes), h.updater.sparsity))
    return dict(zip(shapes, counts))
  return {p: ref.keep_count(leaf_units(h, p, x).shape[1], h.updater.sparsity) for p, x in shapes.items()}


def keep_at(units, final, progress, initial=0.0, extra=Fraction(0)):
  """Units kept at a share of the way: what is removed is rounded down, what grows beyond the count rounded up."""
  first = max(ref.keep_count(units, initial), final)
  keep = units - (units - first) - math.floor((first - final) * progress)
  return min(keep + math.ceil(keep * extra), units)


# -- the laws ------------------------------------------------------------------------------------------------------------


def masked_weights_are_zero(h):
  """Hard storage: a stored weight is exactly 0 wherever its mask is off, after every update."""
  if h.updater.forward.storage != "hard":
    return
  for path, (_, masks, weights) in kernels(h).items():
    bad = np.argwhere((weights != 0) & ~masks)
    assert not bad.size, f"{path}: {len(bad)} masked weights are not zero, first at (update, *index) {bad[0]}"


def inner_state_is_zero(h):
  """Hard storage: every parameter-shaped leaf of the inner state is exactly 0 off-mask, after every update."""
  if h.updater.forward.storage != "hard":
    return
  seen = 0
  for state in sparsity_states(h.states):
    for path, (_, masks, _) in kernels(h).items():
      for name, leaf in named(state.inner_state).items():
        if name.endswith(path) and leaf.shape == masks.shape:
          seen += 1
          bad = np.argwhere((leaf != 0) & ~masks)
          assert not bad.size, f"{name}: {len(bad)} masked entries are not zero, first at {bad[0]}"
  assert seen or not h.masks or not jax.tree.leaves(h.masks), "the inner optimizer keeps nothing; nothing was checked"


def masks_select_stored_weights(h):
  """Dense storage: the mask is the selection on the weights stored at the last due update."""
  if not h.expected.selects:
    return
  for path, (_, masks, weights) in kernels(h).items():
    for t in range(h.expected.due[0], TOTAL):
      last = max(d for d in h.expected.due if d <= t)
      units, keep = leaf_units(h, path, masks.shape[1:], t), final_keeps(h, t)[path]
      want = ref.topk_units(np.abs(weights[last].astype(np.float64)), keep, units)
      np.testing.assert_array_equal(masks[t], want, f"{path} after update {t}, refreshed at {last}")
    assert (weights[-1][~masks[-1]] != 0).any(), f"{path}: stored weights are not dense"


def counts_are_exact(h):
  """Every group keeps exactly the paper's number of units after every update; joint methods in total."""
  progress = [h.expected.progress(t) for t in range(TOTAL)]
  if h.expected.joint:
    first = sum(int(first.sum()) for first, _, _ in kernels(h).values())
    size = sum(first.size for first, _, _ in kernels(h).values())
    final = ref.keep_count(size, h.updater.sparsity)
    early = h.expected.progress(-1) if h.expected.due else 1
    assert first == keep_at(size, final, early, h.expected.initial), f"before training {first} of {size} are kept"
    for t in range(TOTAL):
      kept = sum(int(masks[t].sum()) for _, masks, _ in kernels(h).values())
      want = keep_at(size, final, progress[t], h.expected.initial, h.expected.extra(t))
      assert kept == want, f"after update {t} {kept} of {size} are kept, not {want}"
    assert kept == final, f"the final sparsity is missed: {kept} kept, not {final}"
    return
  for path, (_, masks, _) in kernels(h).items():
    for t in range(TOTAL):
      units, keep = leaf_units(h, path, masks.shape[1:], t), final_keeps(h, t)[path]
      kept = ref.count_units(masks[t], units)
      want = keep_at(units.shape[1], keep, progress[t], h.expected.initial, h.expected.extra(t))
      if h.expected.ablates:
        active = max((kept > 0).sum(), 1)
        want = np.where(kept > 0, min(keep * len(units) // active, units.shape[1]), 0)
      assert (kept == want).all(), f"{path} after update {t}: groups keep {np.unique(kept)}, not {want}"
    assert (kept == keep).all() or h.expected.ablates, f"{path}: the final count {keep} is missed: {np.unique(kept)}"


def masks_change_when_due(h):
  """Masks are fixed between refreshes; methods that move connections do move them, at constant counts."""
  for path, (first, masks, _) in kernels(h).items():
    before = np.concatenate([first[None], masks[:-1]])
    changed = {t for t in range(TOTAL) if (before[t] != masks[t]).any()}
    assert changed <= set(h.expected.due), f"{path} changed at {sorted(changed)}, due is {h.expected.due}"
  if h.expected.moves:
    moved = {t for f, m, _ in kernels(h).values() for t in range(1, TOTAL) if (m[t - 1] & ~m[t]).any()}
    assert len(moved) >= len(h.expected.due) // 2, f"connections moved only at {sorted(moved)} of {h.expected.due}"


def removed_stay_removed(h):
  """Pruning methods with hard storage never bring a weight back."""
  if h.updater.forward.storage == "hard" and not h.expected.moves and h.name != "acdc":
    for path, (first, masks, _) in kernels(h).items():
      back = masks & ~np.concatenate([first[None], masks[:-1]])
      assert not back.any(), f"{path}: {back.sum()} removed weights came back"


def one_program(h):
  """Two calls, from the state of `init` and from the state of an update, are one compilation."""
  assert h.programs == 1, f"{h.programs} compilations"


def training_goes_on(h):
  """Everything stays finite, every unselected leaf and every kernel moves, and updates are counted."""
  masks = named(h.masks) if h.masks else {}
  for path, leaf in named(h.params).items():
    assert np.isfinite(leaf).all(), f"{path} is not finite"
    assert (leaf[0] != leaf[-1]).any(), f"{path} does not train"
    assert path.endswith("['bias']") or not masks or path in masks, f"{path} has no mask"
  for state in sparsity_states(h.states):
    np.testing.assert_array_equal(state.count, np.arange(1, TOTAL + 1))


LAWS = (
  masked_weights_are_zero,
  inner_state_is_zero,
  masks_select_stored_weights,
  counts_are_exact,
  masks_change_when_due,
  removed_stay_removed,
  one_program,
  training_goes_on,
)
NEED_MASKS = LAWS[:-2]


def check(h):
  for law in LAWS:
    if h.masks is None and law in NEED_MASKS:
      continue
    try:
      law(h)
    except AssertionError as error:
      raise AssertionError(f"{law.__name__} is broken by {h.updater!r}: {error}") from error
