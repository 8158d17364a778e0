"""N:M from scratch: decaying masks, changing patterns, STEP, AST, CAST and ASP against their equations."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from references import network, nm_training
from references import selection as ref
from test_references import LR, batches, compare, run

import jaxsparse as js
from jaxsparse import forwards, schedules

STEPS = 24


def run_inner(updater, inner, steps=STEPS, params=None, loss=laws.loss_fn):
  """Masks, parameters and the inner state after every update, the parameters before, and the last optimizer state."""
  tx = updater.wrap_optax(inner)
  params = laws.make_params() if params is None else params
  step = laws.make_step(updater, tx, loss)
  program = jax.jit(lambda c, b: jax.lax.scan(step, c, b))
  (_, state), (history, states, masks) = program((params, tx.init(params)), laws.make_batches(steps))
  at = lambda tree, t: jax.tree.map(lambda a: np.asarray(a[t]), tree)
  return network.double(params), [(at(masks, t), at(history, t), at(states, t)) for t in range(steps)], state


def pairs(history):
  return [h[:2] for h in history]


# -- decaying masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", ["straight_through", "chain"])
@pytest.mark.parametrize("decay,rate", [("exponential", 0.15), ("linear", 0.09), ("linear", None)])
def test_mdgf(decay, rate, flow):
  start, stop = 3, 15
  updater = js.mdgf(structure=js.NM(1, 4), decay=decay, rate=rate, flow=flow, every=2, start=start, stop=stop)
  _, params, history = run(updater)
  share = functools.partial(getattr(nm_training, decay), rate=rate or 1 / (stop - start), start=start, stop=stop)
  want = nm_training.decaying(
    params, batches(), LR, due=range(start, STEPS, 2), pattern=lambda t: (1, 4), first=None, share=share, flow=flow
  )
  compare(history, want, refreshes=3)


def test_mdgf_follows_masks_from_the_start():
  updater = js.mdgf(structure=js.NM(1, 8), rate=0.2, flow="chain", stop=18)
  first, params, history = run(updater)
  for k, mask in first.items():
    np.testing.assert_array_equal(mask, nm_training.select_nm(params[k]["kernel"], 1, 8))
  share = functools.partial(nm_training.exponential, rate=0.2, start=0, stop=18)
  want = nm_training.decaying(
    params, batches(), LR, due=range(STEPS), pattern=lambda t: (1, 8), first=(1, 8), share=share, flow="chain"
  )
  compare(history, want, refreshes=3)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("flow", ["straight_through", "chain"])
def test_a_share_of_one_is_dense_training_bit_for_bit(flow, optimizer):
  """The masks are there and move; b_t = 1 makes the step the inner optimizer's."""
  inner = laws.OPTIMIZERS[optimizer]()
  forward = forwards.DecayingMask(schedules.LinearDecay(1000, start=900), flow)
  updater = js.Updater(js.schedules.Periodic(), js.scorers.Magnitude(), structure=js.NM(1, 4), forward=forward)
  tx, params = updater.wrap_optax(inner), laws.make_params()
  state, plain, plain_state = tx.init(params), params, inner.init(params)
  grad = jax.jit(lambda p, s, b: jax.grad(lambda p: laws.loss_fn(updater.forward_params(p, s), b))(p))
  plain_grad = jax.jit(jax.grad(laws.loss_fn))
  for t in range(4):
    batch = jax.tree.map(lambda a: a[t], laws.make_batches())
    assert not np.asarray(js.get_masks(state)["a"]["kernel"]).all()
    updates, state = jax.jit(tx.update)(grad(params, state, batch), state, params)
    plain_updates, plain_state = jax.jit(inner.update)(plain_grad(plain, batch), plain_state, plain)
    params, plain = optax.apply_updates(params, updates), optax.apply_updates(plain, plain_updates)
    jax.tree.map(np.testing.assert_array_equal, params, plain)


def test_a_share_of_zero_is_masked_training():
  updater = js.mdgf(structure=js.NM(2, 4), decay="linear", rate=1.0, flow="chain", stop=5)
  _, _, history = run(updater)
  for t in range(6, STEPS):
    for k, mask in ((k, m["kernel"]) for k, m in history[t - 1][0].items()):
      before, after = history[t - 1][1][k]["kernel"], history[t][1][k]["kernel"]
      np.testing.assert_array_equal(before[~mask], after[~mask])
      assert (before[mask] != after[mask]).any()


def test_dampen_is_safe_at_the_ends():
  x, mask = jnp.array([jnp.inf, 2.0, -3.0], jnp.bfloat16), jnp.array([False, True, False])
  forward = forwards.DecayingMask(schedules.LinearDecay(10), "chain")
  np.testing.assert_array_equal(forward.project(x, mask, 10), jnp.array([0, 2, 0], jnp.bfloat16))
  np.testing.assert_array_equal(forward.project(x, mask, 0), x)
  gradient = lambda count: jax.grad(lambda x: forward.forward(x, mask, count).astype(jnp.float32).sum())(x[1:2] * x)
  np.testing.assert_array_equal(gradient(5), jnp.array([0.5, 1, 0.5], jnp.bfloat16))
  np.testing.assert_array_equal(gradient(10), jnp.array([0, 1, 0], jnp.bfloat16))


def test_sr_ste_moves_fewer_mask_bits():
  """The decay settles the masks: fewer bits flip than with the plain straight-through gradient, on the same batches."""
  flips = {}
  for decay in (0.0, 0.1):
    _, _, history = run(js.sr_ste(structure=js.NM(1, 4), decay=decay), steps=40)
    kernels = [{k: m["kernel"] for k, m in masks.items()} for masks, _ in history]
    flips[decay] = sum(float(js.mask_churn(a, b)) for a, b in zip(kernels, kernels[1:]))
  assert 0 < flips[0.1] < 0.8 * flips[0.0], flips


# -- changing patterns ---------------------------------------------------------------------------------------------------

FRAMES = {
  "fine": ((8, 16), (4, 8), (2, 4), (1, 2)),
  "sparsify": ((7, 8), (4, 8), (2, 8), (1, 8)),
  "densify": ((1, 16), (1, 8), (1, 4), (1, 2)),
  "custom": ((3, 4), (2, 8), (1, 8)),
}


@pytest.mark.parametrize("frames", FRAMES)
def test_sdgf(frames):
  pattern = FRAMES[frames]
  start, stop = 2, 22
  updater = js.sdgf(*pattern[-1], frames=pattern if frames == "custom" else frames, start=start, stop=stop)
  assert [(f.n, f.m) for f in updater.structure.frames] == list(pattern)
  _, params, history = run(updater)
  at = lambda t: pattern[min((t - start) * len(pattern) // (stop - start), len(pattern) - 1)]
  # Boundaries are rounded down: the index by time agrees where 20 updates divide into the frames.
  at = at if 20 % len(pattern) == 0 else lambda t: pattern[sum(t >= b for b in updater.structure.boundaries)]
  want = nm_training.decaying(
    params, batches(), LR, due=range(start, STEPS), pattern=at, first=None, share=lambda t: 1.0 if t <= start else 0.0
  )
  compare(history, want, refreshes=3)


@pytest.mark.parametrize("m", [2, 4, 8, 16, 32])
def test_frames_land_on_the_final_pattern(m):
  for n in (n for n in (1, 2, 4, 8, 16) if n < m):
    for frames in ("fine", "sparsify", "densify"):
      updater = js.sdgf(n, m, frames=frames, stop=1000)
      structure = updater.structure
      count = {"fine": 4, "densify": 4, "sparsify": (m // n).bit_length()}[frames]
      assert len(structure.frames) == count and structure.last == js.NM(n, m)
      assert [int(structure.index(b)) for b in structure.boundaries] == list(range(1, count))
      assert structure.boundaries == tuple(1000 * i // count for i in range(1, count))
      masks = updater.instant_sparsify({"w": jnp.ones((8 * m, 2))})[1]
      assert (ref.count_units(masks["w"], ref.units_of((8 * m, 2), "nm", m=m)) == n).all()


def test_decay_recipes_are_presets():
  nm = dict(structure=js.NM(2, 8), start=10, stop=90)
  assert js.mask_decay(**nm) == js.mdgf(decay="linear", flow="straight_through", **nm)
  assert js.mask_decay(decay="exponential", rate=0.1, **nm).forward.decay == schedules.ExponentialDecay(
    90, 0.1, start=10
  )
  assert js.structure_decay(2, 8, stop=90) == js.sdgf(2, 8, frames="sparsify", stop=90)


def test_flops_of_the_phases():
  """Dense, decaying and final phases of a structure decay add up to the sum by hand: the kept share of each update."""
  updater = js.structure_decay(1, 8, start=4, stop=16)
  tx, params = updater.wrap_optax(optax.sgd(0.1)), {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)))}
  state, total, update = tx.init(params), 0, jax.jit(tx.update)
  for _ in range(20):
    total += js.count_flops(params, js.get_masks(state))
    _, state = update(params, state, params)
  # 5 dense forward passes (the update with count 4 chooses masks), three of 7:8, 4:8 and 2:8 each, the rest 1:8.
  assert total == 2 * 128 * 5 + 2 * (3 * 112 + 3 * 64 + 3 * 32) + 6 * 2 * 16


def test_a_trained_pattern_schedule_is_stored_as_its_last_pattern():
  updater = js.sdgf(1, 4, frames="sparsify", stop=9)
  _, history, state = run_inner(updater, optax.sgd(LR), steps=12)
  params, masks = updater.export(jax.tree.map(jnp.asarray, history[-1][1]), state)
  stored = js.compress(params, masks, structure=updater.structure)["a"]["kernel"]
  assert isinstance(stored, js.NMArray) and (stored.n, stored.m) == (1, 4)


def test_frames_in_rules_and_configurations():
  frames = js.Frames((js.NM(4, 8), js.NM(2, 4)), (3,))
  updater = js.magnitude_ste(structure=js.NM(1, 4), rules=js.Rules(("a/kernel", frames), ("bias", None)))
  config = js.updater_config(updater).to_dict()
  again = js.create_updater(json.loads(json.dumps(config)))
  assert again == updater and repr(again) == repr(updater) and hash(again) == hash(updater)
  first, _, history = run(updater)
  assert (ref.count_units(first["a"], ref.units_of((16, 32), "nm", m=8)) == 4).all()
  assert (ref.count_units(first["a"], ref.units_of((16, 32), "nm", m=4)) != 2).any()
  for t, (masks, _) in enumerate(history):
    m = 8 if t < 3 else 4
    kept = ref.count_units(masks["a"]["kernel"], ref.units_of((16, 32), "nm", m=m))
    assert (kept == m // 2).all(), t
    assert (ref.count_units(masks["b"]["kernel"], ref.units_of((32, 8), "nm", m=4)) == 1).all()
  stacked = js.Frames((js.NM(4, 8, stack_axes=(0,)), js.NM(2, 4, stack_axes=(0,))), (3,))
  masks = js.magnitude_ste(structure=stacked).instant_sparsify({"w": jnp.ones((3, 8, 2))})[1]
  assert (ref.count_units(masks["w"], ref.units_of((3, 8, 2), "nm", m=4, stack=1)) == 2).all()


def test_forwards_with_a_decay_in_configurations():
  forward = forwards.DecayingMask(schedules.ExponentialDecay(50, rate=0.1, start=5), flow="chain")
  updater = js.Updater(js.schedules.Periodic(), js.scorers.Magnitude(), structure=js.NM(1, 4), forward=forward)
  config = js.updater_config(updater).to_dict()
  assert config["forward"]["decay"] == {"name": "ExponentialDecay", "stop": 50, "rate": 0.1, "start": 5}
  assert js.create_updater(json.loads(json.dumps(config))) == updater
  given = {"name": "sdgf", "n": 1, "m": 8, "stop": 9, "frames": [[2, 8], [1, 8]]}
  updater = js.create_updater(given)
  assert updater == js.sdgf(1, 8, stop=9, frames=((2, 8), (1, 8))) and hash(updater)


# -- the baseline --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 5])
def test_asp(at):
  _, params, history = run(js.asp(at=at))
  want = nm_training.one_shot(params, batches(), LR, at=at, pattern=(2, 4))
  compare(history, want, refreshes=int(at > 0))


# -- the optimizer -------------------------------------------------------------------------------------------------------


def test_without_options_it_is_adam():
  params, grads = laws.make_params(), laws.make_params(seed=3)
  ours, theirs = js.adamw_nm(0.01, weight_decay=0.1), optax.adamw(0.01, weight_decay=0.1)
  a, b = ours.init(params), theirs.init(params)
  for _ in range(4):
    u, a = jax.jit(ours.update)(grads, a, params)
    v, b = jax.jit(theirs.update)(grads, b, params)
    jax.tree.map(np.testing.assert_array_equal, u, v)
    params = optax.apply_updates(params, u)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["magnitude", "magnitude_ste"])
def test_the_inner_optimizer_receives_the_masks_of_its_step(name, packed):
  """Hard storage: the masks after the refresh. Dense storage: those of the forward pass."""
  # With an axis more, or the engine would clean what is noted like a moment.
  note = optax.GradientTransformationExtraArgs(
    lambda params: {"seen": jax.tree.map(lambda p: jnp.zeros((1, *p.shape), bool), params)},
    lambda updates, state, params=None, *, masks, **extra: (
      updates,
      {"seen": jax.tree.map(lambda s, m: s if isinstance(m, optax.MaskedNode) else m[None], state["seen"], masks)},
    ),
  )
  arguments = dict(every=2, start=1, stop=9)
  updater = js.get_algorithm(name)(sparsity=0.5, pack_masks=packed, **arguments)
  tx, params = updater.wrap_optax(optax.chain(note, optax.sgd(0.1))), laws.make_params()
  state = tx.init(params)
  for _ in range(5):
    before = js.get_masks(state)
    updates, state = jax.jit(tx.update)(params, state, params)
    params = optax.apply_updates(params, updates)
    want = js.get_masks(state) if name == "magnitude" else before
    for k in params:
      np.testing.assert_array_equal(optax.tree.get(state, "seen")[k]["kernel"][0], want[k]["kernel"])


def pulls():
  rising = optax.linear_schedule(0.0, 0.05, 10)
  half = optax.linear_schedule(0.0, 1.0, 20)
  yield (
    "ast",
    js.adamw_nm(0.02, b2=0.9, eps=1e-3, masked_decay="l2", strength=rising),
    nm_training.ast_pull(lambda t: 0.05 * min(t / 10, 1)),
  )
  yield (
    "cast",
    js.adamw_nm(0.02, b2=0.9, eps=1e-3, masked_decay="l1", strength=0.01, mix=half),
    nm_training.cast_pull(0.01, lambda t: min(t / 20, 1)),
  )


@pytest.mark.parametrize("name,inner,pull", list(pulls()), ids=["ast", "cast"])
def test_pull_behind_the_first_moment(name, inner, pull):
  updater = js.get_algorithm(name)(structure=js.NM(1, 4), every=3)
  params, history, _ = run_inner(updater, inner)
  # A small eps, and 1 - 0.999^t at first, would amplify the rounding of float32.
  options = dict(due=range(0, STEPS, 3), pattern=(1, 4), decay=pull, dense_forward=name == "cast", b2=0.9, eps=1e-3)
  want = nm_training.adam_nm(params, batches(), 0.02, **options)
  compare(pairs(history), want, refreshes=2)


def quiet(updater, inner, params, steps):
  """Parameters and masks under zero gradients."""
  tx = updater.wrap_optax(inner)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (params["w"], js.get_masks(state)["w"])

  state = tx.init(params)
  mask = np.asarray(js.get_masks(state)["w"])
  (params, state), history = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps))((params, state))
  return mask, *(np.asarray(h) for h in history), state


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_masked_weights_never_move_away_from_zero(kind):
  """Without a data gradient kept weights stay, masked ones fall at every step (AST's published code does the opposite)."""
  w = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
  w = np.sign(w) * (np.abs(w) + 0.5)  # farther from zero than all steps together
  inner = js.adamw_nm(
    1e-3, masked_decay=kind, strength=optax.linear_schedule(1e-5, 6e-5, 20), mix=None if kind == "l2" else 1.0
  )
  updater = js.ast(structure=js.NM(2, 4)) if kind == "l2" else js.cast(structure=js.NM(2, 4))
  mask, weights, masks, _ = quiet(updater, inner, {"w": jnp.asarray(w)}, 40)
  assert (masks == mask).all()
  path = np.abs(np.concatenate([w[None], weights]))
  assert (path[:, mask] == path[0, mask]).all()
  assert (np.diff(path[:, ~mask], axis=0) < 0).all()


def test_strength_of_ast_rises_linearly():
  """One step after t updates without gradients: u = strength_t w, seen through nu = b2 nu + (1 - b2) u^2."""
  strength = optax.linear_schedule(0.0, 6e-5, 10_000)
  inner = js.scale_by_adam_nm(masked_decay="l2", strength=strength)
  params, masks = {"w": jnp.array([[2.0]])}, {"w": jnp.array([[False]])}
  for t in (0, 2500, 10_000, 20_000):
    state = inner.init(params)._replace(count=jnp.int32(t))
    _, state = inner.update({"w": jnp.zeros((1, 1))}, state, params, masks=masks)
    np.testing.assert_allclose(state.nu["w"], 0.001 * (min(t / 10_000, 1) * 6e-5 * 2) ** 2, rtol=1e-4)


def test_cast_ends_as_a_sparse_model():
  """The L1 pull takes masked weights to zero; once nu knows the pull they stay within a step, and with it reach zero."""
  w = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
  steps, lr = 400, 0.02
  rate = optax.linear_schedule(lr, 0.0, steps)
  inner = js.adamw_nm(rate, b2=0.99, masked_decay="l1", strength=0.1, mix=optax.linear_schedule(0.0, 1.0, 50))
  mask, weights, _, state = quiet(js.cast(structure=js.NM(2, 4)), inner, {"w": jnp.asarray(w)}, steps)
  off = weights[:, ~mask]
  arrived = np.argmax(np.sign(off) != np.sign(w[~mask]), axis=0)
  assert (arrived > 0).all()
  for i, first in enumerate(np.maximum(arrived, 100)):
    rates = lr * (1 - np.arange(first, steps) / steps)
    assert (np.abs(off[first:, i]) <= 1.5 * rates + 1e-6).all()
  x = np.random.default_rng(2).normal(size=(4, 16)).astype(np.float32)
  last = {"w": jnp.asarray(weights[-1])}
  dense, sparse = (
    js.cast(structure=js.NM(2, 4)).forward_params(last, state),
    js.cast(structure=js.NM(2, 4)).sparse_params(last, state),
  )
  np.testing.assert_array_equal(dense["w"], last["w"])
  assert np.abs(x @ (np.asarray(dense["w"]) - np.asarray(sparse["w"]))).max() < 20 * 1.5 * lr / steps


# -- STEP ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_the_switching_step(mean):
  """A constant gradient has a closed form: b2 = 0.999, g^2 = 1e-4, eps = 1e-8 switch in the update with count 2843."""
  assert nm_training.switching_step(0.999, 1e-4, 1e-8) == 2843
  inner, params = js.scale_by_adam_nm(freeze_nu=js.AutoSwitch(mean=mean)), {"w": jnp.full((4, 4), 1e-2)}

  def step(state, _):
    state = inner.update(params, state, params)[1]
    return state, state.nu["w"]

  state, nu = jax.jit(lambda s: jax.lax.scan(step, s, None, length=3000))(inner.init(params))
  assert int(state.frozen_at) == 2843
  nu = np.asarray(nu)
  assert (nu[2843:] == nu[2843]).all() and (nu[2842] != nu[2843]).all()


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("b2,squared", [(0.9, 1e-6), (0.95, 1e-5), (0.99, 1e-7)])
def test_the_switching_step_elsewhere(b2, squared, mean):
  """With gradients of two sizes: every change of nu is proportional to g^2, so the mean of g^2 decides."""
  squares = np.array([[squared, 16 * squared]])
  inner = js.scale_by_adam_nm(b2=b2, freeze_nu=js.AutoSwitch(mean=mean))
  params = {"w": jnp.asarray(np.sqrt(squares), jnp.float32)}
  step = lambda state, _: (inner.update(params, state, params)[1], None)
  state = jax.jit(lambda s: jax.lax.scan(step, s, None, length=1200)[0])(inner.init(params))
  middle = squares.mean() if mean == "arithmetic" else math.sqrt(squares.prod())
  assert int(state.frozen_at) == nm_training.switching_step(b2, middle, 1e-8)


@pytest.mark.parametrize("switch", [(0, 9), (14, 20), (0, 10**6)])
def test_step(switch):
  """By `latest`, by `earliest`, and by the window of changes; masks start in the forward pass after the switch."""
  earliest, latest = switch
  eps = 2e-4 if latest == 10**6 or earliest == 14 else 1e-8
  inner = js.adamw_nm(0.02, b2=0.8, eps=eps, freeze_nu=js.AutoSwitch(earliest, latest), nu_floor=0.1)
  params, history, state = run_inner(js.step(structure=js.NM(1, 4)), inner)
  options = dict(pattern=(1, 4), earliest=earliest, latest=latest, floor=0.1, b2=0.8, eps=eps)
  compare(pairs(history), nm_training.step(params, batches(), 0.02, **options), refreshes=2)
  frozen_at = int(optax.tree.get(state, "frozen_at"))
  assert frozen_at == {9: 9, 20: 14, 10**6: 10}[latest]
  nu = [optax.tree.get(states, "nu") for _, _, states in history]
  for t, (masks, _, _) in enumerate(history):
    dense = all(m["kernel"].all() for m in masks.values())
    assert dense == (t < frozen_at)
    if t > frozen_at:
      jax.tree.map(np.testing.assert_array_equal, nu[t], nu[frozen_at])


def test_step_stays_finite_with_dead_units():
  """Units dead in phase 1 have nu = 0; awake in phase 2, the plain rule divides by eps."""
  params = {"w": jnp.ones((8, 4))}
  masks = {"w": jnp.ones((8, 4), bool)}
  dead = jnp.ones((8, 4)).at[0].set(0.0)
  sizes = {}
  for floor in (0.0, 0.1):
    inner = js.scale_by_adam_nm(freeze_nu=js.AutoSwitch(latest=5), nu_floor=floor)
    state, update = inner.init(params), jax.jit(inner.update)
    for t in range(7):
      grads = {"w": dead if t < 6 else jnp.ones((8, 4))}
      updates, state = update(grads, state, params, masks=masks)
    sizes[floor] = np.abs(np.asarray(updates["w"][0])).max()
  assert sizes[0.0] > 1e5
  mean = 0.001 * 5.985 * 7 / 8  # of nu after six squared gradients of one, and an eighth of zeros
  np.testing.assert_allclose(sizes[0.1], 0.1 / (1 - 0.9**7) / np.sqrt(0.1 * mean / (1 - 0.999**6)), rtol=1e-3)


def test_only_maskable_leaves_decide_the_switch():
  params = {"w": jnp.ones((2, 2)), "b": jnp.ones((2,))}
  inner = js.scale_by_adam_nm(b2=0.5, eps=1e-3, freeze_nu=js.AutoSwitch())
  masks = {"w": jnp.ones((2, 2), bool), "b": optax.MaskedNode()}
  state, update = inner.init(params), jax.jit(inner.update)
  for t in range(4):
    grads = {"w": jnp.full((2, 2), 1e-6), "b": jnp.full((2,), 10.0 * (t % 2))}
    _, state = update(grads, state, params, masks=masks)
  assert int(state.frozen_at) == 1


def test_partition_and_masked_trees():
  """The optimizer may see a part of the tree, with the masks of all of it."""
  inner = optax.partition(
    {"ours": js.adamw_nm(0.01, masked_decay="l2", strength=0.1), "sgd": optax.sgd(0.1)}, {"a": "ours", "b": "sgd"}
  )
  _, history, state = run_inner(js.ast(structure=js.NM(2, 4), every=2), inner, steps=6)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(history[-1][1]))
  switching = optax.partition(
    {"ours": js.adamw_nm(0.01, b2=0.5, freeze_nu=js.AutoSwitch(latest=2)), "sgd": optax.sgd(0.1)},
    {"a": "ours", "b": "sgd"},
  )
  _, history, state = run_inner(js.step(structure=js.NM(2, 4)), switching, steps=6)
  kept = [m["b"]["kernel"].mean() for m, _, _ in history]
  assert kept == [1, 1, 0.5, 0.5, 0.5, 0.5]
  assert not bool(
    js.step(structure=js.NM(2, 4)).due(js.step(structure=js.NM(2, 4)).wrap_optax(switching).init(laws.make_params()))
  )
  assert bool(js.step(structure=js.NM(2, 4)).due(state))


# -- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "make,kind,words",
  [
    (lambda: js.mdgf(sparsity=0.5), ValueError, "mdgf needs stop="),
    (lambda: js.mdgf(sparsity=0.5, stop=9, decay="cubic"), ValueError, "'exponential' or 'linear'"),
    (lambda: js.mdgf(sparsity=0.5, stop=9, flow="none"), ValueError, "flow must be"),
    (lambda: js.mdgf(sparsity=0.5, stop=9, rate=-1.0), ValueError, "rate=-1.0 must be positive"),
    (lambda: js.mdgf(sparsity=0.5, start=9, stop=9), ValueError, "stop=9 must be greater"),
    (lambda: forwards.DecayingMask(0.5), TypeError, "decay must be LinearDecay"),
    (lambda: js.mask_decay(sparsity=0.5), ValueError, "mask_decay needs stop="),
    (lambda: js.sdgf(1, 4), ValueError, "sdgf needs stop="),
    (lambda: js.structure_decay(1, 4), ValueError, "structure_decay needs stop="),
    (lambda: js.structure_decay(3, 8, stop=9), ValueError, "structure_decay: m=8 is halved"),
    (lambda: js.structure_decay(1, 4, structure=js.NM(1, 4), stop=9), TypeError, "structure_decay.* makes its own"),
    (lambda: js.mask_decay(structure=js.NM(1, 4), decay="cubic", stop=9), ValueError, "mask_decay: decay must be"),
    (lambda: js.sdgf(3, 8, frames="sparsify", stop=9), ValueError, "power of two"),
    (lambda: js.sdgf(1, 4, frames="finest", stop=9), ValueError, "'fine', 'sparsify', 'densify'"),
    (lambda: js.sdgf(1, 4, frames=((2, 4), (1, 8)), stop=9), ValueError, "the last of frames="),
    (lambda: js.sdgf(1, 4, structure=js.NM(1, 4), stop=9), TypeError, "makes its own structure"),
    (lambda: js.sdgf(1, 4, stop=2), ValueError, "increasing, positive"),
    (lambda: js.Frames((js.NM(2, 4),), ()), ValueError, "two or more NM"),
    (lambda: js.Frames((js.NM(2, 4), js.NM(1, 4)), (1, 2)), ValueError, "need 1 boundaries"),
    (lambda: js.Frames((js.NM(2, 4), js.NM(1, 4)), (1,), stack_axes=(0,)), ValueError, "stack_axes in the frames"),
    (lambda: js.magnitude(sparsity=0.5, schedule=schedules.Periodic(event="frozen_at")), ValueError, "dense storage"),
    (lambda: js.AutoSwitch(5, 3), ValueError, "earliest <= latest"),
    (lambda: js.AutoSwitch(mean="median"), ValueError, "mean must be"),
    (lambda: js.scale_by_adam_nm(masked_decay="l3"), ValueError, "must be 'l2', 'l1' or None"),
    (lambda: js.scale_by_adam_nm(strength=0.1), ValueError, "belong to masked_decay"),
    (lambda: js.scale_by_adam_nm(nu_floor=2.0), ValueError, "nu_floor=2.0"),
    (lambda: js.scale_by_adam_nm(b2=1.0), ValueError, "b1 and b2"),
  ],
)
def test_impossible_arguments(make, kind, words):
  with pytest.raises(kind, match=words):
    make()


def test_errors_that_need_a_model():
  params = laws.make_params()
  with pytest.raises(ValueError, match="step.* needs an inner optimizer whose state has 'freeze_nu'.*adamw_nm"):
    js.step(structure=js.NM(2, 4)).wrap_optax(js.adamw_nm(0.1)).init(params)
  for name in ("ast", "cast"):
    with pytest.raises(ValueError, match="whose state has 'masked_decay'"):
      js.get_algorithm(name)(structure=js.NM(2, 4)).wrap_optax(optax.adam(0.1)).init(params)
  alone = js.scale_by_adam_nm(masked_decay="l2", strength=0.1)
  with pytest.raises(ValueError, match=r"needs masks= in update: use it inside updater.wrap_optax"):
    alone.update(params, alone.init(params), params)
  with pytest.raises(ValueError, match="needs params in update"):
    alone.update(params, alone.init(params))
  waits = js.Updater(
    schedules.Periodic(event="frozen_at"),
    js.scorers.Magnitude(),
    structure=js.NM(2, 4),
    forward=forwards.StraightThrough(),
  )
  tx = waits.wrap_optax(optax.adam(0.1))
  with pytest.raises(ValueError, match="waits for 'frozen_at', of which the inner optimizer's state has 0"):
    tx.update(params, tx.init(params), params)
  frames = js.Frames((js.NM(4, 8), js.NM(2, 4)), (3,))
  for updater in (js.asp(structure=frames), js.magnitude_ste(structure=frames, distribution=js.Global())):
    with pytest.raises(ValueError, match=r"params\['a'\]\['kernel'\]: a finer pattern .* needs dense storage"):
      updater.wrap_optax(optax.sgd(0.1)).init(params)
  with pytest.raises(
    ValueError, match=r"has shape \(16, 32\); NM\(n=8, m=32\) needs its reduction axis divisible by 32"
  ):
    js.sdgf(1, 4, stop=9).wrap_optax(optax.sgd(0.1)).init(params)


def test_frames_events_and_needs_are_off_by_default():
  """Frames, events and needs are off by default."""
  for name in js.all_algorithm_names():
    updater = js.get_algorithm(name)(**laws.EXPECTED[name].arguments)
    assert (updater.schedule.event is not None) == (name == "step")
    assert bool(updater.needs_inner) == (name in ("step", "ast", "cast"))
    assert dataclasses.replace(updater) == updater
