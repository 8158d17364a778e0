"""Compact storage against the masked engine, step for step, and against the rules of swapping in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse._compact import fan_in
from jaxsparse._compact import storage
from jaxsparse.ops.block_matmul import _plan as kernel_plan

SHAPES = {"fan": (12, 20), "block": (20, 16)}
FAN_IN, BLOCK = js.FixedFanIn(5), js.Block((4, 4))
KEY = jax.random.key(7)
SWAPS = dict(every=3, start=2, stop=30)


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
  """A refresh takes 7 of 20 outputs at a time; the last chunk reaches back."""
  monkeypatch.setattr(fan_in, "_CHUNK", 10 * 7)


def factory(name, compact=True):
  """An updater over both structures; magnitude pruning leaves the fixed fan-in dense."""
  known = js.get_algorithm(name).__signature__.parameters
  stored = lambda structure, shape: js.Compact(structure, shape) if compact else structure
  fan = None if name == "magnitude" else stored(FAN_IN, SHAPES["fan"])
  rules = js.Rules(("fan", fan), ("block", (stored(BLOCK, SHAPES["block"]), 0.5)), ("bias", None))
  return js.get_algorithm(name)(
    rules=rules, distribution=js.Uniform(), **{k: v for k, v in SWAPS.items() if k in known}
  )


def only(structure, name="set", **more):
  """An updater over a single leaf, "fan"."""
  sparsity = 0.5 if isinstance(structure, js.Block) else None
  rules = js.Rules(("fan", js.Compact(structure, SHAPES["fan"])), (".*", None))
  return js.get_algorithm(name)(sparsity, rules=rules, distribution=js.Uniform(), **SWAPS | more)


def shapes(updater, **more):
  compact = {pattern: rule is not None for pattern, rule in updater.rules.entries}
  leaf = lambda name: jax.ShapeDtypeStruct if compact.get(name, False) else jnp.ones
  return (
    {name: leaf(name)(shape, jnp.float32) for name, shape in SHAPES.items()} | {"bias": jnp.linspace(-1, 1, 16)} | more
  )


def started(updater, inner=optax.adam(0.05), **more):
  params, masks = updater.compact_init(shapes(updater, **more), key=1)
  tx = updater.wrap_optax(inner, key=3)
  return tx, params, js.set_masks(tx.init(params), masks)


def multiply(x, w):
  if isinstance(w, js.BlockArray):
    return js.ops.block_matmul(x, w)
  return js.ops.fan_in_matmul(x, w) if isinstance(w, js.FixedFanInArray) else x @ w


def loss(weights, i):
  x, y = (jax.random.normal(key, (8, n)) for key, n in zip(jax.random.split(jax.random.fold_in(KEY, i)), (12, 16)))
  hidden = jnp.tanh(multiply(x, weights["fan"]))
  # The second term gives gradients to hidden units that have lost all their outputs: ties are broken by slot, not input.
  return jnp.mean((multiply(hidden, weights["block"]) + weights["bias"] - y) ** 2) + jnp.mean((hidden - x.sum()) ** 2)


# -- The same as masked training ---------------------------------------------------------------------------------------


def masked(name, compact, inner, params, state):
  """(tx, params, state) of the masked engine with the weights and places of a compact one."""
  dense = compact.dense_params(params, state)
  tx = factory(name, compact=False).wrap_optax(inner, key=3)
  is_node = lambda m: isinstance(m, js.Positions)
  masks = jax.tree.map(lambda m: m.to_mask() if is_node(m) else m, js.get_masks(state), is_leaf=is_node)
  return tx, dense, js.set_masks(tx.init(dense), masks)


def masked_step(tx, params, state, i):
  updates, state = tx.update(jax.grad(loss)(params, i), state, params)
  return optax.apply_updates(params, updates), state


def dense_gradient_step(updater, tx, params, state, i):
  """A compact update from dense gradients, as a refresh by gradients needs them."""
  grads, scores = updater.split_gradients(jax.grad(loss)(updater.dense_params(params, state), i), state)
  by_gradient = updater.grow is not None and updater.grow.uses_gradient
  updates, state = tx.update(grads, state, params, **({"candidate_scores": scores} if by_gradient else {}))
  return optax.apply_updates(params, updates), state


def moments(state):
  """Trees like the parameters in the inner state."""
  inner = js.get_sparsity_state(state).inner_state[0]
  return [tree for tree in inner if isinstance(tree, dict)]


CASES = {
  "static_sparse": optax.sgd(0.1, momentum=0.9),
  "rigl": optax.adam(0.05),
  "magnitude": optax.adam(0.05),
}


@pytest.mark.parametrize("name", CASES)
def test_trains_like_the_masked_engine(name):
  """Same weights, moments and places after every update, where random growth does not come in."""
  compact = factory(name)
  tx, *start = started(compact, CASES[name])
  hard_tx, *hard_start = masked(name, compact, CASES[name], *start)

  def place(values, node):
    return storage.kind(node.structure.structure).join(values, node).to_dense()

  def body(carry, i):
    (dense, hard_state), (params, state) = carry
    dense, hard_state = masked_step(hard_tx, dense, hard_state, i)
    params, state = dense_gradient_step(compact, tx, params, state, i)
    nodes = {k: m for k, m in js.get_masks(state).items() if isinstance(m, js.Positions)}
    pairs = [(dense, compact.dense_params(params, state))]
    for leaf, node in nodes.items():
      pairs.append((js.get_masks(hard_state)[leaf], node.to_mask()))
      pairs += [(m[leaf], place(n[leaf], node)) for m, n in zip(moments(hard_state), moments(state), strict=True)]
    return ((dense, hard_state), (params, state)), (pairs, {k: n.indices for k, n in nodes.items()})

  run = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(12)))
  (_, (_, state)), (pairs, indices) = run((tuple(hard_start), tuple(start)))
  assert len(pairs) >= 4 and len(indices) == (1 if name == "magnitude" else 2)
  for want, got in pairs:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5), want, got)
  for leaf, history in indices.items():
    assert js.get_masks(state)[leaf].problem() == ""
    assert (name == "static_sparse") == bool(jnp.all(history == history[0]))


# -- Laws of compact storage, for random growth ------------------------------------------------------------------------


@functools.cache
def set_run():
  """One transformation for several tests, so that its program is compiled once."""
  return started(factory("set"))


def value_step(updater, tx, params, state, i):
  grads = jax.grad(lambda p: loss(updater.forward_params(p, state), i))(params)
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state


@functools.cache
def runner(tx):
  step = functools.partial(value_step, factory("set"), tx)
  return jax.jit(lambda carry, counts: jax.lax.scan(lambda c, i: (step(*c, i),) * 2, carry, counts))


def trajectory(tx, params, state, counts):
  """(last, history) of (params, state)."""
  return runner(tx)((params, state), counts)


def test_set_swaps_in_place():
  """Updates 2, 5 and 8: the smallest go, as many that were absent come, at zero and with zero moments; all else stays."""
  tx, params, state = set_run()
  (final, last), (weights, states) = trajectory(tx, params, state, jnp.arange(11))
  exported, dense = factory("set").export(final, last)[0], factory("set").dense_params(final, last)
  assert (np.diff(np.asarray(exported["fan"].indices, np.int32), axis=0) > 0).all()
  for leaf in SHAPES:
    np.testing.assert_array_equal(exported[leaf].to_dense(), dense[leaf])
    start = np.asarray(state.masks[leaf].indices), np.asarray(params[leaf])
    adam = [np.asarray(tree[leaf]) for tree in moments(states)]
    check_swaps(leaf == "fan", start, np.asarray(states.masks[leaf].indices), np.asarray(weights[leaf]), adam)
    assert last.masks[leaf].problem() == ""
  # Another key grows elsewhere, the same one in the same places.
  places = lambda history: np.concatenate([np.asarray(history[1].masks[leaf].indices)[3].ravel() for leaf in SHAPES])
  again = trajectory(tx, params, state, jnp.arange(11))[1]
  np.testing.assert_array_equal(places(again), places((weights, states)))
  other = trajectory(tx, params, state._replace(key=jnp.array([0, 9], jnp.uint32)), jnp.arange(11))[1]
  assert (places(other) != places(again)).any()


def check_swaps(is_fan, start, indices, values, adam):
  before, kept = start
  # One group a column of `[F, O]`, or all blocks together.
  groups = (lambda a: a.T) if is_fan else (lambda a: a.reshape(1, -1))
  for t, (new, now) in enumerate(zip(indices, values)):
    gone = new != before
    if t not in (2, 5, 8):
      assert not gone.any() and (now != kept).any()
    else:
      total, swaps = -(-3 * before.size // 10), groups(gone).sum(1)
      assert new.max() < (12 if is_fan else 20)  # no slot is empty
      # A block that has been dropped may be drawn again, an input not.
      assert swaps.sum() == total and np.ptp(swaps) <= 1 if is_fan else 0 < swaps.sum() <= total
      scores = np.abs(kept) if is_fan else np.abs(kept).sum((1, 2))
      for old, fresh, out, score in zip(*map(groups, (before, new, gone, scores)), strict=True):
        assert set(fresh[out]).isdisjoint(old) and len(set(fresh)) == len(old)
        worst = np.argsort(score, kind="stable")[: out.sum() if is_fan else total]
        assert set(np.flatnonzero(out)) <= set(worst)
      assert (now[gone] == 0).all() and np.array_equal(now[~gone], kept[~gone])
      for moment in adam:
        assert (moment[t][gone] == 0).all() and np.array_equal(moment[t][~gone], moment[t - 1][~gone])
    before, kept = new, now


def test_chunks_of_outputs_draw_for_themselves():
  """Outputs with the same inputs, 7 apart, do not grow the same ones."""
  tx, params, state = set_run()
  node, first = state.masks["fan"], jnp.arange(5, dtype=jnp.uint8)
  same = js.Positions(jnp.broadcast_to(first[:, None], node.shape), node.plan, node.shape, node.structure)
  state = js.set_masks(state, js.get_masks(state) | {"fan": same})
  _, (_, states) = trajectory(tx, params, state, jnp.arange(11))
  grown = [set(column.tolist()) - set(range(5)) for column in np.asarray(states.masks["fan"].indices)[2].T]
  assert all(grown)
  # The last chunk begins at output 13.
  assert not all(a <= b or b <= a for a, b in zip(grown[:6], grown[7:13]))


def test_leaves_draw_for_themselves_and_take_what_there_is():
  shape = (12, 6)
  rules = js.Rules(("[ab]", js.Compact(FAN_IN, shape)), ("c", js.Compact(js.FixedFanIn(9), shape)))
  updater = js.get_algorithm("set")(rules=rules, distribution=js.Uniform(), every=1, stop=9, drop_fraction=0.9)
  params, masks = updater.compact_init(dict.fromkeys("abc", jax.ShapeDtypeStruct(shape, jnp.float32)), key=0)
  assert (params["a"] != params["b"]).any() and (masks["a"].indices != masks["b"].indices).any()
  params, masks = params | {"b": params["a"]}, masks | {"b": masks["a"]}
  tx = updater.wrap_optax(optax.sgd(0.1))
  state = js.set_masks(tx.init(params), masks)
  after = js.get_masks(jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)[1])
  assert (after["a"].indices != after["b"].indices).any()
  # Nine tenths of the nine inputs should go, and three are absent: those come, for the three smallest.
  gone = np.asarray(after["c"].indices != masks["c"].indices)
  assert after["c"].problem() == ""
  np.testing.assert_array_equal(gone, np.argsort(np.argsort(np.abs(params["c"]), axis=0), axis=0) < 3)


def test_restored_training_continues_bit_for_bit(tmp_path):
  tx, params, state = set_run()
  (params, state), _ = trajectory(tx, params, state, jnp.arange(11))
  leaves, treedef = jax.tree.flatten((params, state))
  np.savez(tmp_path / "state.npz", *leaves)
  with np.load(tmp_path / "state.npz") as saved:
    restored = treedef.unflatten([jnp.asarray(saved[f"arr_{i}"]) for i in range(len(leaves))])
  on = trajectory(tx, params, state, jnp.arange(11, 22))[0]
  assert all((on[1].masks[leaf].indices != state.masks[leaf].indices).any() for leaf in SHAPES)
  again = trajectory(tx, *restored, jnp.arange(11, 22))[0]
  jax.tree.map(np.testing.assert_array_equal, on, again)


def test_growth_draws_absent_inputs_uniformly():
  """Each of 7 absent inputs of 1200 outputs comes with probability 3 / 7, and never one that is there or twice."""
  old = jnp.broadcast_to(jnp.array([[9], [2], [4], [0], [11]]), (5, 1200))
  drawn = np.asarray(jax.jit(fan_in._absent, static_argnums=(2, 3))(KEY, old, 3, 12))
  assert all(len(set(column)) == 3 for column in drawn.T)
  counts = np.bincount(drawn.ravel(), minlength=12)
  assert (counts[[0, 2, 4, 9, 11]] == 0).all()
  assert np.abs(counts[counts > 0] - 1200 * 3 / 7).max() < 5 * (1200 * 3 / 7 * 4 / 7) ** 0.5


def test_swap_ignores_candidates_that_do_not_count():
  """What is kept, named twice, or out of range does not grow; what has been dropped fills up."""
  old = jnp.array([[0], [1], [2], [3]])
  drop = jnp.array([[0.1], [0.2], [3.0], [4.0]])
  again = jnp.array([[1.0], [jnp.nan], [0.0], [0.0]])
  new = jnp.array([[2], [5], [5], [8], [-1], [6]])
  ranks = jnp.array([[9.0], [7.0], [8.0], [9.0], [9.0], [jnp.nan]])
  swap = jax.jit(lambda swaps: fan_in.swap(old, drop, again, new, ranks, swaps, 8))
  indices, stay = swap(jnp.array([2]))
  # The first 5 counts; the dropped 0 comes back, since its score is above that of 6, which is unknown.
  assert indices[:, 0].tolist() == [0, 5, 2, 3] and stay[:, 0].tolist() == [True, False, True, True]
  indices, stay = swap(jnp.array([0]))
  assert indices[:, 0].tolist() == [0, 1, 2, 3] and stay.all()
  # Where no candidate counts, all that has been dropped comes back, whatever its score.
  indices, stay = fan_in.swap(old, drop, again, jnp.array([[2], [8]]), jnp.ones((2, 1)), jnp.array([2]), 8)
  assert indices[:, 0].tolist() == [0, 1, 2, 3] and stay.all()


# -- Start -------------------------------------------------------------------------------------------------------------


def test_init_keeps_the_variance_of_activations():
  """N(0, gain^2 / kept inputs of the output), where blocks are unevenly spread too; every place as likely."""
  rules = js.Rules(
    ("fan", js.Compact(js.FixedFanIn(16), (64, 3000))), ("block", js.Compact(js.Block((8, 8)), (64, 512)))
  )
  updater = js.static_sparse(0.75, distribution=js.Uniform(), rules=rules)
  tree = {"fan": jax.ShapeDtypeStruct((64, 3000), jnp.float32), "block": jax.ShapeDtypeStruct((64, 512), jnp.bfloat16)}
  params, masks = updater.compact_init(tree, key=0, gain=2.0)
  assert params["block"].dtype == jnp.bfloat16 and masks["fan"].indices.dtype == jnp.uint8
  assert params["fan"].std() * 16**0.5 == pytest.approx(2.0, rel=0.02)
  counts = np.bincount(np.asarray(masks["fan"].indices).ravel(), minlength=64)
  assert np.abs(counts - 750).max() < 5 * (3000 * 0.25 * 0.75) ** 0.5
  tx = updater.wrap_optax(optax.sgd(0.1))
  state = js.set_masks(tx.init(params), masks)
  weights = updater.forward_params(params, state)
  assert int(weights["block"].count) == 128 and masks["block"].problem() == ""
  columns = np.asarray(masks["block"].to_mask()).sum(0)
  total = np.square(np.asarray(weights["block"].to_dense(jnp.float32))).sum(0)  # of an output: its inputs' variances
  assert len(set(columns)) > 2 and total[columns > 0].mean() ** 0.5 == pytest.approx(2.0, rel=0.03)


def test_starts_from_compressed_weights():
  """A pruned model goes on compactly from its own weights and places."""
  dense = jax.random.normal(KEY, SHAPES["fan"])
  prune = js.magnitude(0.5, structure=BLOCK, distribution=js.Uniform(), stop=1)
  pruned, masks = prune.instant_sparsify(dense)
  block = js.compress(pruned, masks, structure=BLOCK)
  updater = only(BLOCK)
  params, places = updater.compact_init({"fan": block})
  state = js.set_masks(updater.wrap_optax(optax.sgd(0.1)).init(params), places)
  np.testing.assert_array_equal(updater.dense_params(params, state)["fan"], pruned)
  np.testing.assert_array_equal(updater.export(params, state)[0]["fan"].to_dense(), pruned)
  fan = js.FixedFanInArray.from_dense(dense, 5, js.selection.topk_mask(jnp.abs(dense), 5, axis=0))
  params, places = only(FAN_IN).compact_init({"fan": fan})
  np.testing.assert_array_equal(params["fan"], fan.values)
  np.testing.assert_array_equal(places["fan"].indices, fan.indices)
  with pytest.raises(TypeError, match="FixedFanInArray"):
    only(FAN_IN).compact_init({"fan": block})
  with pytest.raises(ValueError, match="keeps"):
    only(js.FixedFanIn(4)).compact_init({"fan": fan})


def test_leaves_of_one_shape_are_refreshed_as_if_alone():
  """The loop over leaves of one shape moves the blocks of each as that leaf's own scores say."""
  named = lambda names: js.Rules(*((name, js.Compact(BLOCK, SHAPES["block"])) for name in names))
  leaf, keys = jax.ShapeDtypeStruct(SHAPES["block"], jnp.float32), jax.random.split(KEY, 2)
  scores = {name: jax.random.uniform(key, BLOCK.view_shape(SHAPES["block"])) for name, key in zip("ab", keys)}

  def refreshed(params, masks):
    updater = js.rigl(0.5, rules=named(params), distribution=js.Uniform(), **SWAPS)
    tx = updater.wrap_optax(optax.sgd(0.1))
    state = js.set_masks(tx.init(params), masks)
    given = {name: scores[name] for name in params}
    for _ in range(3):
      _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, candidate_scores=given)
    return js.get_masks(state)

  params, masks = js.rigl(0.5, rules=named("ab"), distribution=js.Uniform(), **SWAPS).compact_init(dict(a=leaf, b=leaf))
  both = refreshed(params, masks)
  for name in "ab":
    alone = refreshed({name: params[name]}, {name: masks[name]})[name]
    assert not np.array_equal(alone.indices, masks[name].indices)
    np.testing.assert_array_equal(both[name].indices, alone.indices)
  assert not np.array_equal(both["a"].indices, both["b"].indices)


def test_kernels_are_not_told_that_slots_are_in_order():
  """Trained blocks have a plan, without the part that takes the blocks of a column to be neighbours."""
  rules = js.Rules(("w", js.Compact(js.Block((32, 32)), (64, 96))))
  _, masks = js.static_sparse(0.5, rules=rules, distribution=js.Uniform()).compact_init(
    {"w": jax.ShapeDtypeStruct((64, 96), jnp.float32)}
  )
  assert masks["w"].plan.forward.minor.shape == (3,) and masks["w"].plan.heads is None


def test_weight_from_jit_changes_dtype_outside():
  """Blocks in the order of their slots, not of their places."""
  updater = only(BLOCK)
  leaf = {"fan": jax.ShapeDtypeStruct(SHAPES["fan"], jnp.float32)}
  params, masks = updater.compact_init(leaf)
  node = masks["fan"]
  masks = {"fan": js.Positions(node.indices[::-1], node.plan, node.shape, node.structure)}
  state = js.set_masks(updater.wrap_optax(optax.sgd(0.1)).init(params), masks)
  w = jax.jit(updater.forward_params)(params, state)["fan"]
  assert (np.diff(np.asarray(w.cols)) < 0).any()
  outside = updater.forward_params(params, state)["fan"]  # sorted, as a BlockArray is
  js.BlockArray(outside.blocks, outside.rows, outside.cols, shape=outside.shape)
  np.testing.assert_array_equal(outside.to_dense(), w.to_dense())
  narrow = w.astype(jnp.bfloat16)
  assert narrow.dtype == jnp.bfloat16
  np.testing.assert_array_equal(narrow.to_dense(), updater.dense_params(params, state)["fan"].astype(jnp.bfloat16))


# -- The rest of the contract ------------------------------------------------------------------------------------------


def test_inside_other_wrappers():
  """Positions are found, set and replaced in MultiSteps around a clip, with an optimizer that does not keep zeros."""
  updater = factory("set")
  inner = optax.chain(optax.scale_by_factored_rms(), optax.scale(-0.01))
  tx = optax.MultiSteps(optax.chain(optax.clip(1.0), updater.wrap_optax(inner)), every_k_schedule=2)
  params, masks = updater.compact_init(shapes(updater), key=1)
  state = js.set_masks(tx.init(params), masks)
  (_, last), (weights, states) = trajectory(tx, params, state, jnp.arange(6))
  for leaf in SHAPES:
    history = np.asarray(js.get_masks(states)[leaf].indices)
    # The third update, whose count is 2, ends with the sixth call.
    assert (history[:5] == np.asarray(masks[leaf].indices)).all() and (history[5] != history[4]).any()
    second = js.get_sparsity_state(last).inner_state[0].v[leaf]
    gone = history[5] != history[4]
    assert (np.asarray(second)[gone] == 0).all() and (np.asarray(weights[leaf][5])[gone] == 0).all()


def test_reports():
  updater = only(BLOCK)
  _, params, state = started(updater)
  masks = js.get_masks(state)
  assert {k: float(v) for k, v in js.summarize_sparsity(masks).items()} == {
    "fan": pytest.approx(7 / 15),
    "_total_sparsity": pytest.approx(7 / 15),
  }
  total = js.summarize_sparsity(masks, params=params)
  assert float(total["_total_sparsity"]) == pytest.approx(112 / (240 + 320 + 16)) and float(total["block"]) == 0
  assert js.count_parameters(params, masks) == 128 + 320 + 16 and js.count_flops(params, masks) == 2 * (128 + 320)
  assert js.mask_nbytes(state.masks) == 4 * 8
  for report in (js.mask_churn, js.summarize_intersection):
    with pytest.raises(TypeError, match="to_mask"):
      report(masks, masks)
  assert updater.sparse_params(params, state) is params and bool(updater.due(state)) is False
  assert "Block" in updater.describe(params)
  assert updater == js.create_updater(js.updater_config(updater)) and updater.storage == "compact"


def test_growth_by_gradients_needs_scores():
  updater = factory("rigl")
  tx, params, state = started(updater)
  grads = jax.tree.map(jnp.ones_like, params)
  with pytest.raises(ValueError, match="candidate_scores"):
    tx.update(grads, state, params)
  step = jax.jit(lambda state: tx.update(grads, state, params, candidate_scores=None))
  updates, state = step(state)
  assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
  late = state._replace(count=jnp.int32(2))
  updates, _ = step(late)
  assert all(bool(jnp.isnan(u).all()) for u in jax.tree.leaves(updates))
  fan = js.ops.Candidates(jnp.zeros((3, 20), jnp.int32), jnp.zeros((3, 20)))
  for wrong, words in (
    ({"fan": None, "block": jnp.ones((5, 4))}, r"\['fan'\].*missing"),
    ({"fan": jnp.ones(SHAPES["fan"]), "block": jnp.ones((5, 4))}, r"\['fan'\].*candidates"),
    ({"fan": fan, "block": jnp.ones((4, 5))}, r"\['block'\].*each block"),
  ):
    with pytest.raises(ValueError, match=words):
      tx.update(grads, late, params, candidate_scores=wrong | {"bias": None})


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_strict_promotion(name):
  """The module's own arithmetic, in bfloat16, where no dtype or rank is promoted implicitly."""
  updater = factory(name)
  tree = {k: v if k == "bias" else jax.ShapeDtypeStruct(v.shape, jnp.bfloat16) for k, v in shapes(updater).items()}
  params, masks = updater.compact_init(tree, key=1)
  tx = updater.wrap_optax(optax.sgd(0.1))
  state = js.set_masks(tx.init(params), masks)

  def step(params, state, x, dy):
    w = updater.forward_params(params, state)
    y, pull = jax.vjp(lambda w: js.ops.fan_in_matmul(x, w), w["fan"])
    grads, scores = updater.split_gradients(updater.dense_params(params, state), state)
    fan = js.ops.fan_in_candidates(x, dy, w["fan"], 2, sample=6, key=KEY)
    scores |= {"fan": fan, "block": js.ops.block_gradient_scores(y, dy[:, :16], BLOCK.shape)}
    more = {"candidate_scores": scores} if name == "rigl" else {}
    return tx.update(grads | {"fan": pull(dy)[0].values}, state, params, **more)

  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    updates, _ = jax.eval_shape(step, params, state, jnp.ones((3, 12), jnp.bfloat16), jnp.ones((3, 20), jnp.bfloat16))
  assert updates["fan"].dtype == updates["block"].dtype == jnp.bfloat16


def test_plan_of_the_kernels_follows_the_blocks():
  """Kernels read blocks by the slots in the plan: that of unsorted blocks names the same blocks as that of sorted ones."""
  structure = js.Compact(js.Block((32, 32)), (96, 128))
  updater = js.get_algorithm("set")(0.5, structure=structure, distribution=js.Uniform(), every=1, stop=9)
  params, masks = updater.compact_init(jax.ShapeDtypeStruct((96, 128), jnp.float32), key=1)
  tx = updater.wrap_optax(optax.sgd(0.1))

  @jax.jit
  def run(params, state):
    _, state = tx.update(jnp.ones_like(params), state, params)
    return state, updater.forward_params(params, state)

  state, w = run(params, js.set_masks(tx.init(params), masks))
  indices = np.asarray(js.get_masks(state).indices)
  assert (indices != np.asarray(masks.indices)).any() and (np.diff(indices) < 0).any()
  order = np.argsort(indices)
  like = js.BlockArray(np.asarray(params)[order], indices[order] % 3, indices[order] // 3, shape=(96, 128), static=True)
  plan = kernel_plan.plans_of(like)
  for mine, plain in ((w.plan.forward, plan.forward), (w.plan.transposed, plan.transposed)):
    slots = np.append(order, w.capacity)[plain.slots]
    jax.tree.map(np.testing.assert_array_equal, mine, plain._replace(slots=slots))


COMPACT = js.Compact(FAN_IN, SHAPES["fan"])
BAD = {
  "another structure": (lambda: js.Compact(js.NM(2, 4), (8, 8)), TypeError, "FixedFanIn"),
  "no shape": (lambda: js.Compact(FAN_IN, (8,)), ValueError, "shape"),
  "ablation": (lambda: js.Compact(js.FixedFanIn(5, min_salient=0.3), (8, 8)), ValueError, "min_salient"),
  "outputs first": (lambda: js.Compact(js.FixedFanIn(5, output_axis=0), (8, 8)), ValueError, "last axis"),
  "stacked": (lambda: js.Compact(js.Block((2, 2), stack_axes=(0,)), (8, 8)), ValueError, "stacked"),
  "too many inputs": (lambda: started(only(js.FixedFanIn(13))), ValueError, "more inputs"),
  "blocks do not tile": (lambda: started(only(js.Block((5, 4)))), ValueError, "divisible"),
  "dense storage": (lambda: js.sr_ste(structure=COMPACT), ValueError, "Hard"),
  "joint": (lambda: js.granet(0.5, stop=10, structure=COMPACT), ValueError, "joint"),
  "surplus": (lambda: js.mest(0.5, every=1, stop=100, structure=COMPACT), ValueError, "surplus"),
  "packed": (lambda: js.static_sparse(structure=COMPACT, pack_masks=True), ValueError, "pack_masks=False"),
  "momentum": (lambda: js.snfs(0.5, stop=10, structure=COMPACT), ValueError, "grow="),
  "no growth": (lambda: js.magnitude(stop=10, structure=COMPACT), ValueError, "constant fan-in"),
  "first masks by weights": (
    lambda: js.Updater(js.schedules.Static(), js.scorers.Magnitude(), init=js.scorers.Magnitude(), structure=COMPACT),
    ValueError,
    "random start",
  ),
  "a mask beside": (
    lambda: started(
      js.get_algorithm("set")(0.5, stop=9, rules=js.Rules(("fan", COMPACT), ("block|bias", None))),
      other=jnp.ones((4, 4)),
    ),
    ValueError,
    r"params\['other'\].*optax.partition",
  ),
  "another shape": (lambda: started(only(FAN_IN), fan=jnp.ones((12, 21))), ValueError, "dense shape"),
  "no values": (
    lambda: started(only(FAN_IN), bias=jax.ShapeDtypeStruct((16,), jnp.float32)),
    ValueError,
    r"params\['bias'\].*values",
  ),
  "dense parameters": (
    lambda: only(FAN_IN).wrap_optax(optax.sgd(1.0)).init({"fan": jnp.ones(SHAPES["fan"])}),
    ValueError,
    "compact_init",
  ),
  "chained": (lambda: only(FAN_IN).transform(), ValueError, "wrap_optax"),
  "instant": (
    lambda: only(FAN_IN).instant_sparsify({"fan": jnp.ones(SHAPES["fan"])}),
    ValueError,
    "compact_init",
  ),
  "not compact": (
    lambda: js.rigl(0.5, stop=9).compact_init({"fan": jnp.ones(SHAPES["fan"])}),
    ValueError,
    "no Compact",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
  call, kind, words = BAD[case]
  with pytest.raises(kind, match=words):
    call()


def test_set_masks_wants_positions():
  updater = only(FAN_IN)
  tx, params, state = started(updater)
  empty = tx.init(params)
  with pytest.raises(ValueError, match="compact_init"):
    updater.forward_params(params, empty)
  node = js.get_masks(state)["fan"]
  put = lambda node: js.set_masks(empty, {"fan": node, "block": None, "bias": None})
  with pytest.raises(ValueError, match=r"masks\['fan'\] must be Positions"):
    put(jnp.ones(SHAPES["fan"], bool))
  twice = node.indices.at[0, 3].set(node.indices[1, 3])
  with pytest.raises(ValueError, match="different numbers"):
    put(js.Positions(twice, (), node.shape, node.structure))
  with pytest.raises(ValueError, match="the leaf stores"):
    put(js.Positions(node.indices, (), node.shape, js.Compact(FAN_IN, (13, 20))))
  hard = js.static_sparse(0.5).wrap_optax(optax.sgd(0.1)).init({"fan": jnp.ones((5, 20))})
  with pytest.raises(ValueError, match="not stored compactly"):
    js.set_masks(hard, {"fan": node})
