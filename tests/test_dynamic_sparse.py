"""Dynamic sparse training methods: whole runs against slow NumPy loops, and the closed forms of their papers."""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from references import distributions
from references import selection as ref
from references import sparse_training as training
from test_references import LR, STEPS, Given, batches, compare, kernel_masks, run, two_batches

import jaxsparse as js

SWAPS = dict(every=3, start=2, stop=24)
DUE = range(2, 24, 3)
STRUCTURES = {"weights": (js.Unstructured(), {}), "blocks": (js.Block((4, 4)), {"kind": "block", "block": (4, 4)})}


def units_for(options):
  return {k: ref.units_of(shape, **options) for k, shape in laws.SHAPES.items()}


def given_noise(updater, seed=5):
  """The updater with random growth replaced by given numbers, those numbers, and the same as an argument of `run`."""
  rng = np.random.default_rng(seed)
  noise = {k: {n: rng.random((STEPS, *w.shape)) for n, w in p.items()} for k, p in laws.make_params().items()}
  extra = {"noise": jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), noise)}
  return dataclasses.replace(updater, grow=Given()), noise, extra


def magnitude(k, t, w, g):
  return np.abs(w)


def gradient(k, t, w, g):
  return np.abs(g)


def pieces(amounts, boundaries):
  return lambda t: amounts[sum((t - 2) / 22 >= b for b in boundaries)]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("initial", [0.0, 0.5])
def test_granet(initial, structure):
  pattern, options = STRUCTURES[structure]
  updater = js.granet(sparsity=0.875, initial_sparsity=initial, ramp_stop=15, structure=pattern, **SWAPS)
  first, params, history = run(updater)
  units = units_for(options)
  size = sum(m.size for m in first.values())
  entries = units["a"].shape[-1]
  kept = training.granet_total(size, 3, 2, 15, initial, 0.875)
  want = training.elastic(
    params,
    first,
    batches(),
    LR,
    due=DUE,
    total=lambda t: kept(t) // entries,
    low=lambda t: training.cosine(t, 2, 24, 0.5, 0.005),
    high=lambda t: 0.0,
    units=units,
    drop=magnitude,
    grow=gradient,
    joint=True,
  )
  compare(history, want, refreshes=3)
  if initial:
    first_masks_follow_erk(first, initial, entries)
  # The paper's formula, in real numbers.
  for t, (masks, _) in enumerate(history):
    if t >= 2:
      tau = min((t - 2) // 3, 4) / 4
      density = (1 - initial) + (initial - 0.875) * (1 - (1 - tau) ** 3)
      assert abs(sum(m["kernel"].sum() for m in masks.values()) - size * density) <= entries


def first_masks_follow_erk(first, sparsity, entries):
  densities = distributions.erk([mask.shape for mask in first.values()], sparsity)
  assert len(set(densities)) > 1
  for mask, density in zip(first.values(), densities):
    assert abs(mask.sum() - density * mask.size) <= entries, "the first masks follow ERK"


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mest soft", "mest hard", "sparcl"])
def test_elastic_budgets(name, structure):
  pattern, options = STRUCTURES[structure]
  weight = 0.5 if name == "sparcl" else 0.3
  common = dict(sparsity=0.75, structure=pattern, gradient_weight=weight, **SWAPS)
  if name == "sparcl":
    updater = js.sparcl(amount=0.2, boundaries=(0.3, 0.7), **common)
    low, high = pieces((0, 0.2, 0), (0.3, 0.7)), pieces((0.2, 0, 0), (0.3, 0.7))
  else:
    updater = js.mest(soft=name == "mest soft", **common)
    amounts = (0.5, 0.25, 0) if name == "mest soft" else (0.2, 0.1, 0)
    moving, none = pieces(amounts, (0.5625, 0.75)), lambda t: 0
    low, high = (none, moving) if name == "mest soft" else (moving, none)
  updater, noise, extra = given_noise(updater)
  first, params, history = run(updater, extra=extra)
  units = units_for(options)
  want = training.elastic(
    params,
    first,
    batches(),
    LR,
    due=DUE,
    total=lambda t, k: ref.keep_count(units[k].shape[1], 0.75),
    low=low,
    high=high,
    units=units,
    drop=lambda k, t, w, g: np.abs(w) + weight * np.abs(g),
    grow=lambda k, t, w, g: noise[k]["kernel"][t],
    joint=False,
  )
  compare(history, want, refreshes=3)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_chase(structure):
  pattern, options = STRUCTURES[structure]
  first, params, history = run(js.chase(sparsity=0.875, surplus=0.4, elastic_until=0.4, structure=pattern, **SWAPS))
  units = units_for(options)
  total = sum(ref.keep_count(u.shape[1], 0.875) for u in units.values())
  early = lambda t: (t - 2) / 22 < 0.4
  want = training.elastic(
    params,
    first,
    batches(),
    LR,
    due=DUE,
    total=lambda t: total,
    low=lambda t: 0.0 if early(t) else training.cosine(t, 2, 24, 0.5, 0.005),
    high=lambda t: 0.4 if early(t) else 0.0,
    units=units,
    drop=magnitude,
    grow=gradient,
    joint=True,
  )
  compare(history, want, refreshes=6)
  first_masks_follow_erk(first, 0.875, units["a"].shape[-1])


@pytest.mark.parametrize("salient", [0.0, 0.3, 0.95])
def test_srigl(salient):
  structure = js.FixedFanIn(min_salient=salient or 1e-9)
  updater = js.srigl(sparsity=0.75, distribution=js.Uniform(), structure=structure, **SWAPS)
  first, params, history = run(updater)
  fan_in = {k: ref.keep_count(shape[0], 0.75) for k, shape in laws.SHAPES.items()}
  want = training.srigl(params, first, batches(), LR, fraction=0.3, fan_in=fan_in, salient=salient, **SWAPS)
  compare(history, want, refreshes=6)
  ablated = [(m["kernel"].sum(0) == 0).sum() for masks, _ in history for m in masks.values()]
  assert (max(ablated) > 0) == (salient > 0)
  for masks, _ in history:
    for k, mask in masks.items():
      counts = mask["kernel"].sum(0)
      assert len(set(counts[counts > 0])) == 1, "active outputs keep the same number of inputs"
      assert mask["kernel"].sum() <= fan_in[k] * mask["kernel"].shape[1]


def test_srigl_stacked_layers_are_ranked_apart():
  shape = (3, 8, 6)
  structure = js.FixedFanIn(stack_axes=(0,), min_salient=0.9)
  rng = np.random.default_rng(0)
  mask = np.zeros(shape, bool)
  mask[:, :2] = True
  drop, grow = np.abs(rng.normal(size=(2, *shape))).astype(np.float32)
  drop[1] *= 100  # were layers ranked together, nothing of this one would be dropped
  axes = structure.unit_axes(shape)
  low, high = structure.counts_around_swap(mask, drop, grow, jnp.int32(2), jnp.int32(9), axes)
  for layer in range(3):
    one = js.FixedFanIn(min_salient=0.9)
    alone = one.counts_around_swap(mask[layer], drop[layer], grow[layer], jnp.int32(2), jnp.int32(3), (0,))
    np.testing.assert_array_equal(low[layer], alone[0])
    np.testing.assert_array_equal(high[layer], alone[1])


DENSE = {
  "weights": (js.Unstructured(), {}, 0.8),
  "nm": (js.NM(1, 4), {"kind": "nm", "m": 4}, None),
  "blocks": (js.Block((4, 4)), {"kind": "block", "block": (4, 4)}, 0.75),
  "fan in": (js.FixedFanIn(), {"kind": "fan_in"}, 0.75),
}


def units_and_keeps(options, sparsity):
  units = units_for(options)
  return units, {k: 1 if sparsity is None else ref.keep_count(u.shape[1], sparsity) for k, u in units.items()}


@pytest.mark.parametrize("structure,every", [("weights", 1), ("weights", 4), ("nm", 1), ("blocks", 2), ("fan in", 1)])
def test_top_kast(structure, every):
  pattern, options, sparsity = DENSE[structure]
  updater = js.top_kast(sparsity=sparsity, structure=pattern, explore=0.15, decay=0.02, every=every, stop=20)
  first, params, history = run(updater)
  units, keep = units_and_keeps(options, sparsity)
  due = range(0, 20, every)
  want = training.top_kast(params, batches(), LR, due=due, keep=keep, units=units, explore=0.15, decay=0.02)
  compare(history, want, refreshes=1 if structure == "blocks" else 2)
  for k, mask in first.items():
    np.testing.assert_array_equal(mask, ref.topk_units(np.abs(params[k]["kernel"]), keep[k], units[k]))
  moved = np.asarray(history[0][1]["a"]["kernel"]) != np.asarray(laws.make_params()["a"]["kernel"])
  assert moved.sum() == first["a"].sum() + int(0.15 * first["a"].size), "weights outside the larger set do not move"


@pytest.mark.parametrize("structure", DENSE)
def test_movement(structure):
  pattern, options, sparsity = DENSE[structure]
  ramp = dict(every=3, start=2, stop=22)
  _, params, history = run(js.movement(sparsity=sparsity, structure=pattern, **ramp))
  units, keep = units_and_keeps(options, sparsity)
  compare(history, training.movement(params, batches(), LR, keep=keep, units=units, **ramp), refreshes=3)


@pytest.mark.parametrize("initial", [0.0, 0.5])
def test_granet_in_nm_groups(initial):
  """A pattern with its own count ramps from m:m (or what `initial_sparsity` leaves) to n:m; every group follows."""
  first, _, history = run(js.granet(structure=js.NM(1, 4), initial_sparsity=initial, ramp_stop=15, **SWAPS))
  for k, mask in first.items():
    units = ref.units_of(mask.shape, "nm", m=4)
    kept = [ref.count_units(m, units) for m in (mask, *(masks[k]["kernel"] for masks, _ in history))]
    assert all(len(set(counts)) == 1 for counts in kept)
    counts = [c[0] for c in kept]
    assert counts == sorted(counts, reverse=True) and counts[0] == 4 - 4 * initial and counts[-1] == 1


def test_a_surplus_needs_room_in_the_pattern():
  with pytest.raises(ValueError, match=r"params\['a'\]\['kernel'\]: NM\(n=2, m=4\) keeps the count of every group"):
    js.mest(structure=js.NM(2, 4), every=3, stop=24).wrap_optax(optax.sgd(0.1)).init(laws.make_params())


def test_dsl():
  """RigL's loop with a cosine to 0.005."""
  first, params, history = run(js.dsl(sparsity=0.75, **SWAPS))
  want = training.elastic(
    params,
    first,
    batches(),
    LR,
    due=DUE,
    total=lambda t, k: ref.keep_count(first[k].size, 0.75),
    low=lambda t: training.cosine(t, 2, 24, 0.5, 0.005),
    high=lambda t: 0.0,
    units=units_for({}),
    drop=magnitude,
    grow=gradient,
    joint=False,
  )
  compare(history, want, refreshes=6)


def test_unfired_entries_grow_first():
  first, _, history = run(js.dsl(sparsity=0.75, grow=js.scorers.RandomUnfired(), **SWAPS))
  for k, mask in first.items():
    used, before, again = mask.copy(), mask, 0
    for masks, _ in history:
      grown = masks[k]["kernel"] & ~before
      again += (grown & used).sum()
      before = masks[k]["kernel"]
      used |= before
    # Entries of units without any connection onwards get no gradient, never move and so do not count as used.
    assert again <= 3 and used.mean() > 0.7


def test_dsl_includes_embeddings():
  params = {"embed": jnp.ones((30, 8)), "out": jnp.ones((8, 30)), "bias": jnp.ones((30,))}
  state = js.dsl(stop=10).wrap_optax(optax.sgd(0.1)).init(params)
  masks = js.get_masks(state)
  assert masks["embed"].sum() == masks["out"].sum() == 120


# -- layer densities of others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_ratios(name):
  params, loss, data = laws.make_params(), laws.loss_fn, two_batches()
  _, theirs = js.get_algorithm(name)(sparsity=0.8).instant_sparsify(params, loss_fn=loss, batches=data)
  updater = js.get_algorithm(f"{name}_ratio")(sparsity=0.8)
  draws = [updater.instant_sparsify(params, key=key, loss_fn=loss, batches=data)[1] for key in (0, 0, 1)]
  counts = [m.sum() for m in kernel_masks(theirs)]
  assert len(set(c / m.size for c, m in zip(counts, kernel_masks(theirs)))) > 1, "densities differ between the layers"
  for masks in draws:
    assert [m.sum() for m in kernel_masks(masks)] == counts
  same, other = [[(a == b).all() for a, b in zip(kernel_masks(draws[0]), kernel_masks(d))] for d in draws[1:]]
  assert all(same) and not any(other)
  overlap = [(a & b).sum() / a.sum() for a, b in zip(kernel_masks(theirs), kernel_masks(draws[0]))]
  assert max(overlap) < 0.5, "positions are not the scorer's"


# -- modules and correlations --------------------------------------------------------------------------------------------


def test_modules_without_connections_between_them_are_block_diagonal():
  updater = js.g2gnet(sparsity=0.75, modules=4, between=0.0, stop=10)
  masks = js.get_masks(updater.wrap_optax(optax.sgd(0.1)).init({"w": jnp.ones((16, 32))}))
  np.testing.assert_array_equal(masks["w"], np.kron(np.eye(4), np.ones((4, 8))).astype(bool))


def test_modular_weights():
  """At weight 0.25 between modules, a thin draw holds a fourth as many of those as of entries inside, per place."""
  scorer = js.scorers.Modular(2, between=0.25)
  inputs = lambda key: js.scorers.LeafInputs(jnp.ones((40, 40)), None, key, {})
  draw = jax.vmap(lambda key: js.selection.topk_mask(scorer.score((), inputs(key)), 32))
  masks = np.asarray(draw(jax.random.split(jax.random.key(0), 400)))
  inside = masks[:, :20, :20].sum() + masks[:, 20:, 20:].sum()
  between = masks.sum() - inside
  assert abs(between / inside - 0.25) < 0.03


def test_g2gnet():
  """SET's loop, without its pause, and with growth by |corr|, which is read in due updates only."""
  rng = np.random.default_rng(6)
  corr = {k: {n: rng.uniform(-1, 1, (STEPS, *w.shape)) for n, w in p.items()} for k, p in laws.make_params().items()}
  for t in set(range(STEPS)) - set(DUE):
    corr["a"]["kernel"][t] = np.nan
  extra = {"corr": jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), corr)}
  first, params, history = run(js.g2gnet(sparsity=0.75, modules=2, **SWAPS), extra=extra)
  want = training.elastic(
    params,
    first,
    batches(),
    LR,
    due=DUE,
    total=lambda t, k: ref.keep_count(first[k].size, 0.75),
    low=lambda t: 0.3,
    high=lambda t: 0.0,
    units=units_for({}),
    drop=magnitude,
    grow=lambda k, t, w, g: np.abs(corr[k]["kernel"][t]),
    joint=False,
  )
  compare(history, want, refreshes=6)


def test_a_planted_correlation_grows_first():
  updater = js.g2gnet(sparsity=0.5, modules=2, every=1, stop=10, drop_fraction=0.1)
  params = {"w": jnp.ones((8, 8)) * 0.1, "b": jnp.ones((8,))}
  tx = updater.wrap_optax(optax.sgd(0.1))
  state = tx.init(params)
  mask = np.asarray(js.get_masks(state)["w"])
  place = tuple(np.argwhere(~mask)[5])
  corr = {"w": jnp.zeros((8, 8)).at[place].set(-0.9), "b": optax.MaskedNode()}
  grads = jax.tree.map(jnp.zeros_like, params)
  _, state = tx.update(grads, state, updater.sparse_params(params, state), corr=corr)
  assert js.get_masks(state)["w"][place] and js.get_masks(state)["w"].sum() == 32
  with pytest.raises(ValueError, match="needs 'corr'"):
    tx.update(grads, state, params)


def test_dsl_recommends_as_well_as_dense():
  """On ratings of low rank, half of the weights reach at least 99 % of the dense recall, embeddings included."""
  rng = np.random.default_rng(7)
  likes = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 100))
  liked = likes >= np.sort(likes, 1)[:, -30:-29]
  seen = liked & (rng.random(liked.shape) < 0.7)
  x = jnp.asarray(seen, jnp.float32)
  start = {
    "embed": jnp.asarray(rng.normal(size=(100, 32)) / 12, jnp.float32),
    "out": jnp.asarray(rng.normal(size=(32, 100)) / 7, jnp.float32),
  }
  scores = lambda p, x: jnp.tanh(x @ p["embed"]) @ p["out"]
  loss = lambda p, x: -(x * jax.nn.log_softmax(scores(p, x))).sum(-1).mean()

  def recall(updater):
    tx = updater.wrap_optax(optax.adam(0.01))

    def step(carry, key):
      params, state = carry
      grads = jax.grad(loss)(params, x[jax.random.randint(key, (50,), 0, 300)])
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), js.get_masks(state)

    state = tx.init(start)
    carry = updater.sparse_params(start, state), state
    (params, _), masks = jax.jit(lambda c: jax.lax.scan(step, c, jax.random.split(jax.random.key(0), 200)))(carry)
    ranked = np.argsort(-np.where(seen, -np.inf, scores(params, x)), 1)[:, :20]
    held = liked & ~seen
    hits = np.take_along_axis(held, ranked, 1).sum(1) / np.clip(held.sum(1), 1, 20)
    return hits.mean(), masks

  dense, _ = recall(js.no_prune())
  sparse, masks = recall(js.dsl(sparsity=0.5, every=16, stop=150))
  assert sparse > 0.99 * dense > 0.6
  for mask in masks.values():
    assert set(np.asarray(mask.sum((1, 2))).tolist()) == {1600}, "the budget of every leaf is constant"
