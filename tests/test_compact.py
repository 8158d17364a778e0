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

INPUTS, OUTPUTS = 12, 20
KEY = jax.random.key(7)
FAN_IN, BLOCK = js.FixedFanIn(5), js.Block((3, 4))
SWAPS = dict(every=3, start=2, stop=30)


def factory(name, structure, **more):
  known = js.get_algorithm(name).__signature__.parameters
  inner = structure.structure if isinstance(structure, js.Compact) else structure
  arguments = {k: v for k, v in SWAPS.items() if k in known} | more
  sparsity = 0.5 if isinstance(inner, js.Block) else None
  rules = js.Rules(("bias", None))
  return js.get_algorithm(name)(
    sparsity=sparsity, structure=structure, distribution=js.Uniform(), rules=rules, **arguments
  )


def both(name, structure, inner, **more):
  """(masked, compact): (updater, tx, params, opt_state) with the same weights and places."""
  compact = factory(name, js.Compact(structure, (INPUTS, OUTPUTS)), **more)
  tree = {"w": jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.float32), "bias": jnp.linspace(-1, 1, OUTPUTS)}
  params, masks = compact.compact_init(tree, key=1)
  tx = compact.wrap_optax(inner, key=3)
  state = js.set_masks(tx.init(params), masks)
  hard = factory(name, structure, **more)
  dense = compact.dense_params(params, state)
  hard_tx = hard.wrap_optax(inner, key=3)
  to_mask = lambda m: m.to_mask() if isinstance(m, js.Positions) else m
  hard_state = js.set_masks(hard_tx.init(dense), jax.tree.map(to_mask, masks, is_leaf=lambda m: hasattr(m, "to_mask")))
  return (hard, hard_tx, dense, hard_state), (compact, tx, params, state)


def loss(params, x, y):
  return jnp.mean((jnp.tanh(x @ params["w"]) + params["bias"] - y) ** 2)


def data(i):
  a, b = jax.random.split(jax.random.fold_in(KEY, i))
  return jax.random.normal(a, (8, INPUTS)), jax.random.normal(b, (8, OUTPUTS))


def updates(updater, tx, compact):
  """A function (params, state, i) -> (params, state) for `lax.scan`."""
  by_gradient = compact and updater.grow is not None and updater.grow.uses_gradient

  def step(params, state, i):
    if compact:
      dense = jax.grad(loss)(updater.dense_params(params, state), *data(i))
      grads, scores = updater.split_gradients(dense, state)
    else:
      grads, scores = jax.grad(loss)(params, *data(i)), None
    more = {"candidate_scores": scores} if by_gradient else {}
    updates, state = tx.update(grads, state, params, **more)
    return optax.apply_updates(params, updates), state

  return step


def moments(state, shape):
  inner = js.get_sparsity_state(state).inner_state
  return [leaf for leaf in jax.tree.leaves(inner) if getattr(leaf, "shape", None) == shape]


def place(values, node):
  """Values at their places in a dense array."""
  return storage.kind(node.structure.structure).join(values, node).to_dense()


CASES = [
  ("static_sparse", FAN_IN, optax.sgd(0.1, momentum=0.9)),
  ("static_sparse", BLOCK, optax.adam(0.05)),
  ("rigl", FAN_IN, optax.adam(0.05)),
  ("rigl", BLOCK, optax.sgd(0.1, momentum=0.9)),
  ("srigl", FAN_IN, optax.adamw(0.05)),
  ("magnitude", BLOCK, optax.adam(0.05)),
]


@pytest.mark.parametrize("name, structure, inner", CASES, ids=[f"{name}-{s!r}" for name, s, _ in CASES])
def test_trains_like_the_masked_engine(name, structure, inner):
  """Same weights, moments and places after every update, where random growth does not come in."""
  (hard, hard_tx, *hard_start), (compact, tx, *start) = both(name, structure, inner)
  hard_step, compact_step = updates(hard, hard_tx, False), updates(compact, tx, True)

  def body(carry, i):
    (dense, hard_state), (params, state) = hard_step(*carry[0], i), compact_step(*carry[1], i)
    node = js.get_masks(state)["w"]
    pairs = [(js.get_masks(hard_state)["w"], node.to_mask()), (dense, compact.dense_params(params, state))]
    pairs += [
      (m, place(n, node)) for m, n in zip(moments(hard_state, (INPUTS, OUTPUTS)), moments(state, params["w"].shape))
    ]
    assert len(pairs) > 2
    return ((dense, hard_state), (params, state)), (pairs, node.indices)

  run = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(12)))
  (_, (_, state)), (pairs, indices) = run((tuple(hard_start), tuple(start)))
  for want, got in pairs:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=2e-6, atol=1e-7), want, got)
  assert js.get_masks(state)["w"].problem() == ""
  assert (name == "static_sparse") == bool(jnp.all(indices == indices[0]))


# -- Laws of compact storage, for random growth ------------------------------------------------------------------------


def set_updater(structure):
  return factory("set", js.Compact(structure, (INPUTS, OUTPUTS)))


def started(updater, inner=optax.adam(0.05), key=3, **tree):
  tree = {"w": jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.float32), "bias": jnp.linspace(-1, 1, OUTPUTS)} | tree
  params, masks = updater.compact_init(tree, key=1)
  tx = updater.wrap_optax(inner, key=key)
  return tx, params, js.set_masks(tx.init(params), masks)


@functools.cache
def set_run(structure):
  """One transformation for several tests, so that its program is compiled once."""
  return started(set_updater(structure))


def value_updates(updater, tx):
  """An update by the gradients of the stored values, through the op."""
  multiply = js.ops.fan_in_matmul if isinstance(updater.structure.structure, js.FixedFanIn) else js.ops.block_matmul

  def by_values(params, state, x, y):
    w = updater.forward_params(params, state)
    return jnp.mean((jnp.tanh(multiply(x, w["w"])) + w["bias"] - y) ** 2)

  def step(params, state, i):
    grads = jax.grad(by_values)(params, state, *data(i))
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


@functools.cache
def runner(updater, tx):
  step = value_updates(updater, tx)
  return jax.jit(lambda carry, counts: jax.lax.scan(lambda c, i: (step(*c, i),) * 2, carry, counts))


def trajectory(updater, tx, params, state, counts):
  """(last, history) of (params, state)."""
  return runner(updater, tx)((params, state), counts)


@pytest.mark.parametrize("structure", [FAN_IN, BLOCK], ids=repr)
def test_set_swaps_in_place(structure):
  """Updates 2, 5 and 8: the smallest go, as many that were absent come, at zero and with zero moments; all else stays."""
  updater = set_updater(structure)
  tx, params, state = set_run(structure)
  (_, last), (weights, states) = trajectory(updater, tx, params, state, jnp.arange(11))
  indices = np.asarray(states.masks["w"].indices)
  values = np.asarray(weights["w"])
  adam = [np.asarray(m["w"]) for m in (states.inner_state[0].mu, states.inner_state[0].nu)]
  before = np.asarray(state.masks["w"].indices)
  kept_before = np.asarray(params["w"])
  for t in range(11):
    new, now = indices[t], values[t]
    if t not in (2, 5, 8):
      np.testing.assert_array_equal(new, before)
      assert t == 0 or (now != kept_before).any()
    else:
      # One group a column of `[F, O]`, or all blocks together.
      split = (lambda a: a.T) if structure is FAN_IN else (lambda a: a.reshape(1, -1))
      score = np.abs(kept_before) if structure is FAN_IN else np.abs(kept_before).sum((1, 2))
      swaps, total = [], -(-3 * before.size // 10)
      for old, fresh, s in zip(split(before), split(new), split(score), strict=True):
        gone = old != fresh
        swaps.append(gone.sum())
        assert set(fresh[gone]).isdisjoint(old) and len(set(fresh)) == len(old), (old, fresh)
        worst = np.argsort(s, kind="stable")
        # A block that has been dropped may be drawn again.
        assert set(np.flatnonzero(gone)) <= set(worst[: total if structure is BLOCK else gone.sum()])
      assert structure is BLOCK or (sum(swaps) == total and max(swaps) - min(swaps) <= 1)
      assert 0 < sum(swaps) <= total
      gone = new != before
      assert (now[gone] == 0).all() and np.array_equal(now[~gone], kept_before[~gone])
      for moment, old in zip(adam, adam):
        assert (moment[t][gone] == 0).all() and np.array_equal(moment[t][~gone], old[t - 1][~gone])
    before, kept_before = new, now
  assert last.masks["w"].problem() == ""
  # Another key grows elsewhere, the same one in the same places.
  again = trajectory(updater, tx, params, state, jnp.arange(11))[1][1].masks["w"].indices
  np.testing.assert_array_equal(again, indices)
  other = trajectory(updater, tx, params, state._replace(key=jnp.array([0, 9], jnp.uint32)), jnp.arange(11))
  assert (np.asarray(other[1][1].masks["w"].indices[3]) != indices[3]).any()


def test_restored_training_continues_bit_for_bit(tmp_path):
  updater = set_updater(FAN_IN)
  tx, params, state = set_run(FAN_IN)
  (params, state), _ = trajectory(updater, tx, params, state, jnp.arange(11))
  leaves, treedef = jax.tree.flatten((params, state))
  np.savez(tmp_path / "state.npz", *leaves)
  with np.load(tmp_path / "state.npz") as saved:
    restored = treedef.unflatten([jnp.asarray(saved[f"arr_{i}"]) for i in range(len(leaves))])
  on = trajectory(updater, tx, params, state, jnp.arange(11, 22))[0]
  assert (on[1].masks["w"].indices != state.masks["w"].indices).any()
  # A wrapper with another key: the saved one goes on.
  again = trajectory(updater, updater.wrap_optax(optax.adam(0.05), key=11), *restored, jnp.arange(11, 22))[0]
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


def test_chunks_of_outputs(monkeypatch):
  """A refresh in chunks, the last of which reaches back, keeps counts and places exact."""
  monkeypatch.setattr(fan_in, "_CHUNK", 5 * 2 * 7)
  updater = set_updater(FAN_IN)
  tx, params, state = started(updater)
  node = trajectory(updater, tx, params, state, jnp.arange(3))[0][1].masks["w"]
  assert node.problem() == "" and int((node.indices != state.masks["w"].indices).sum()) == 30


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
  dense = {"w": jax.random.normal(KEY, (INPUTS, OUTPUTS)), "bias": jnp.ones(OUTPUTS)}
  prune = js.magnitude(0.5, structure=BLOCK, distribution=js.Uniform(), stop=1, rules=js.Rules(("bias", None)))
  pruned, masks = prune.instant_sparsify(dense)
  sparse = js.compress(pruned, masks, structure=BLOCK)
  updater = set_updater(BLOCK)
  params, places = updater.compact_init(sparse)
  state = js.set_masks(updater.wrap_optax(optax.sgd(0.1)).init(params), places)
  np.testing.assert_array_equal(updater.dense_params(params, state)["w"], pruned["w"])
  exported, _ = updater.export(params, state)
  np.testing.assert_array_equal(exported["w"].to_dense(), pruned["w"])
  w = js.FixedFanInArray.from_dense(js.ops.fan_in_matmul(jnp.eye(INPUTS), fan_in_of(dense["w"])), 5)
  params, places = set_updater(FAN_IN).compact_init({"w": w, "bias": jnp.ones(OUTPUTS)})
  np.testing.assert_array_equal(params["w"], w.values)
  with pytest.raises(TypeError, match="FixedFanInArray"):
    set_updater(FAN_IN).compact_init(sparse)
  with pytest.raises(ValueError, match="keeps"):
    set_updater(js.FixedFanIn(4)).compact_init({"w": w, "bias": jnp.ones(OUTPUTS)})


def fan_in_of(w, fan_in=5):
  keep = js.selection.topk_mask(jnp.abs(w), fan_in, axis=0)
  return js.FixedFanInArray.from_dense(w, fan_in, keep)


# -- The rest of the contract ------------------------------------------------------------------------------------------


def test_inside_other_wrappers():
  """Positions are found, set and replaced through MultiSteps, clipping, and a second updater beside it."""
  updater = set_updater(FAN_IN)
  wrapped = lambda key: optax.chain(optax.clip_by_global_norm(1.0), updater.wrap_optax(optax.adamw(0.05), key=key))
  params, masks = updater.compact_init(
    {"w": jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.float32), "bias": jnp.ones(OUTPUTS)}, key=1
  )
  tx = optax.MultiSteps(wrapped(3), every_k_schedule=2)
  state = js.set_masks(tx.init(params), masks)
  (params, state), (_, states) = trajectory(updater, tx, params, state, jnp.arange(12))
  node = js.get_masks(state)["w"]
  assert node.problem() == "" and (node.indices != masks["w"].indices).any()
  np.testing.assert_array_equal(js.get_masks(states)["w"].indices[4], masks["w"].indices)  # two updates so far


def test_reports():
  updater = set_updater(BLOCK)
  tx, params, state = started(updater)
  masks = js.get_masks(state)
  assert {k: float(v) for k, v in js.summarize_sparsity(masks).items()} == {"w": 0.5, "_total_sparsity": 0.5}
  total = js.summarize_sparsity(masks, params=params)
  assert float(total["_total_sparsity"]) == pytest.approx(120 / 260) and float(total["w"]) == 0.5
  assert js.count_parameters(params, masks) == 120 + OUTPUTS and js.count_flops(params, masks) == 240
  assert js.mask_nbytes(state.masks) == 4 * 10
  for report in (js.mask_churn, js.summarize_intersection):
    with pytest.raises(TypeError, match="to_mask"):
      report(masks, masks)
  assert updater.sparse_params(params, state) is params and bool(updater.due(state)) is False
  assert "Block" in updater.describe(params)
  assert updater == js.create_updater(js.updater_config(updater)) and updater.storage == "compact"


def test_growth_by_gradients_needs_scores():
  updater = factory("rigl", js.Compact(FAN_IN, (INPUTS, OUTPUTS)))
  tx, params, state = started(updater)
  grads = jax.tree.map(jnp.ones_like, params)
  with pytest.raises(ValueError, match="candidate_scores"):
    tx.update(grads, state, params)
  updates, state = tx.update(grads, state, params, candidate_scores=None)
  assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
  late = state._replace(count=jnp.int32(2))
  updates, _ = tx.update(grads, late, params, candidate_scores=None)
  assert all(bool(jnp.isnan(u).all()) for u in jax.tree.leaves(updates))
  for wrong in ({"w": None, "bias": None}, {"w": jnp.ones((INPUTS, OUTPUTS)), "bias": None}):
    with pytest.raises(ValueError, match=r"params\['w'\]"):
      tx.update(grads, late, params, candidate_scores=wrong)
  block = factory("rigl", js.Compact(BLOCK, (INPUTS, OUTPUTS)))
  tx, params, state = started(block)
  grads = jax.tree.map(jnp.ones_like, params)
  with pytest.raises(ValueError, match="each block"):
    tx.update(grads, state, params, candidate_scores={"w": jnp.ones((3, 3)), "bias": None})


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
  node = js.get_masks(state)
  assert (node.indices != masks.indices).any() and (jnp.diff(node.indices) < 0).any()
  order = np.argsort(np.asarray(node.indices))
  plan = kernel_plan.plans_of(updater.export(params, state)[0].freeze())
  for mine, plain in ((w.plan.forward, plan.forward), (w.plan.transposed, plan.transposed)):
    slots = np.append(order, w.capacity)[plain.slots]
    jax.tree.map(np.testing.assert_array_equal, mine, plain._replace(slots=slots))


COMPACT = js.Compact(FAN_IN, (INPUTS, OUTPUTS))
BAD = {
  "another structure": (lambda: js.Compact(js.NM(2, 4), (8, 8)), TypeError, "FixedFanIn"),
  "no shape": (lambda: js.Compact(FAN_IN, (8,)), ValueError, "shape"),
  "ablation": (lambda: js.Compact(js.FixedFanIn(5, min_salient=0.3), (8, 8)), ValueError, "min_salient"),
  "outputs first": (lambda: js.Compact(js.FixedFanIn(5, output_axis=0), (8, 8)), ValueError, "last axis"),
  "stacked": (lambda: js.Compact(js.Block((2, 2), stack_axes=(0,)), (8, 8)), ValueError, "stacked"),
  "too many inputs": (lambda: started(set_updater(js.FixedFanIn(13))), ValueError, "more inputs"),
  "blocks do not tile": (lambda: started(set_updater(js.Block((5, 4)))), ValueError, "divisible"),
  "dense storage": (lambda: js.sr_ste(structure=COMPACT), ValueError, "Hard"),
  "joint": (lambda: js.granet(0.5, stop=10, structure=COMPACT), ValueError, "joint"),
  "surplus": (lambda: js.mest(0.5, every=1, stop=100, structure=COMPACT), ValueError, "surplus"),
  "momentum": (lambda: js.snfs(0.5, stop=10, structure=COMPACT), ValueError, "grow="),
  "no growth": (lambda: js.magnitude(stop=10, structure=COMPACT), ValueError, "constant fan-in"),
  "first masks by weights": (
    lambda: js.Updater(js.schedules.Static(), js.scorers.Magnitude(), init=js.scorers.Magnitude(), structure=COMPACT),
    ValueError,
    "random start",
  ),
  "a mask beside": (
    lambda: started(js.get_algorithm("set")(0.5, stop=9, rules=js.Rules(("w", COMPACT))), other=jnp.ones((4, 4))),
    ValueError,
    r"params\['other'\].*optax.partition",
  ),
  "another shape": (lambda: started(set_updater(FAN_IN), w=jnp.ones((INPUTS, OUTPUTS + 1))), ValueError, "dense shape"),
  "no values": (
    lambda: started(set_updater(FAN_IN), bias=jax.ShapeDtypeStruct((OUTPUTS,), jnp.float32)),
    ValueError,
    r"params\['bias'\].*values",
  ),
  "dense parameters": (
    lambda: (
      set_updater(FAN_IN).wrap_optax(optax.sgd(1.0)).init({"w": jnp.ones((INPUTS, OUTPUTS)), "bias": jnp.ones(OUTPUTS)})
    ),
    ValueError,
    "compact_init",
  ),
  "chained": (lambda: set_updater(FAN_IN).transform(), ValueError, "wrap_optax"),
  "instant": (
    lambda: set_updater(FAN_IN).instant_sparsify({"w": jnp.ones((INPUTS, OUTPUTS))}),
    ValueError,
    "compact_init",
  ),
  "not compact": (
    lambda: js.rigl(0.5, stop=9).compact_init({"w": jnp.ones((INPUTS, OUTPUTS))}),
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
  updater = set_updater(FAN_IN)
  tx, params, state = started(updater)
  empty = tx.init(params)
  with pytest.raises(ValueError, match="compact_init"):
    updater.forward_params(params, empty)
  node = js.get_masks(state)["w"]
  put = lambda node: js.set_masks(empty, {"w": node, "bias": None})
  with pytest.raises(ValueError, match=r"masks\['w'\] must be Positions"):
    put(jnp.ones((INPUTS, OUTPUTS), bool))
  twice = node.indices.at[0, 3].set(node.indices[1, 3])
  with pytest.raises(ValueError, match="different numbers"):
    put(js.Positions(twice, (), node.shape, node.structure))
  with pytest.raises(ValueError, match="the leaf stores"):
    put(js.Positions(node.indices, (), node.shape, js.Compact(FAN_IN, (INPUTS + 1, OUTPUTS))))
  hard = js.static_sparse(0.5).wrap_optax(optax.sgd(0.1)).init({"w": jnp.ones((5, OUTPUTS))})
  with pytest.raises(ValueError, match="not stored compactly"):
    js.set_masks(hard, {"w": node})
