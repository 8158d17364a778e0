"""Recipes, soft thresholds and gradient masking: closed forms and slow references."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from references import network
from references import selection as ref
from test_references import batches, kernel_masks

import jaxsparse as js
from jaxsparse import recipes
from jaxsparse.recipes import sparse_ift

DATA = laws.make_batches(24)
PARAMS = laws.make_params()


def train(params, masks, *, seed=0, steps=12, updater=js.static_sparse(sparsity=0.5, distribution=js.Uniform())):
  """Plain training inside given masks."""
  tx = updater.wrap_optax(optax.sgd(0.2, momentum=0.9))
  order = np.random.default_rng(seed).permutation(24)[:steps]
  state = js.set_masks(tx.init(params), masks)
  return _scan(updater)(params, state, jax.tree.map(lambda a: a[order], DATA))[0]


@functools.cache
def _scan(updater):
  tx = updater.wrap_optax(optax.sgd(0.2, momentum=0.9))

  def run(params, state, data):
    return jax.lax.scan(laws.make_step(updater, tx), (params, state), data)[0]

  return jax.jit(run)


def counts(masks):
  return [int(m.sum()) for m in kernel_masks(masks)]


# -- iterative pruning and soups -----------------------------------------------------------------------------------------


def test_iterative_pruning_against_numpy():
  """Sparsities, masks and rewound weights of every round; the trainings themselves are seen from outside."""
  calls = []

  def train_fn(params, masks, r):
    calls.append((jax.tree.map(np.asarray, params), kernel_masks(masks)))
    return train(params, masks)

  rounds = list(recipes.iterative_pruning(PARAMS, train_fn, js.global_magnitude(sparsity=0.9, stop=1), rounds=3))
  assert len(rounds) == 4 and rounds[-1].sparsity == 0.9
  size = sum(p["kernel"].size for p in PARAMS.values())
  before = [np.ones(p["kernel"].shape, bool) for p in PARAMS.values()]
  for r, ((start, masks), done) in enumerate(zip(calls, rounds)):
    assert done.sparsity == pytest.approx(1 - 0.1 ** (r / 3))
    assert sum(m.sum() for m in masks) == size - int(size * done.sparsity + 1e-9)
    for k, mask in zip(PARAMS, masks):
      np.testing.assert_array_equal(start[k]["kernel"], np.where(mask, PARAMS[k]["kernel"], 0))
      np.testing.assert_array_equal(start[k]["bias"], PARAMS[k]["bias"])
    if r:
      trained = rounds[r - 1].params
      scores = [np.where(m, np.abs(trained[k]["kernel"]), -1) for k, m in zip(PARAMS, before)]
      for want, mask in zip(ref.global_topk(scores, sum(m.sum() for m in masks)), masks):
        np.testing.assert_array_equal(mask, want)
    before = masks


@pytest.mark.parametrize("how", ["late", "learning rate"])
def test_rewinding(how):
  early = train(PARAMS, recipes.all_kept(js.magnitude(sparsity=0.5, stop=1), PARAMS), steps=3)
  starts = []

  def train_fn(params, masks, r):
    starts.append(params)
    return train(params, masks)

  rewind = {"rewind_to": early} if how == "late" else {"rewind": False}
  rounds = list(recipes.iterative_pruning(PARAMS, train_fn, js.magnitude(sparsity=0.5, stop=1), rounds=1, **rewind))
  source = early if how == "late" else rounds[0].params
  for k, mask in zip(PARAMS, kernel_masks(rounds[1].masks)):
    np.testing.assert_array_equal(starts[1][k]["kernel"], np.where(mask, source[k]["kernel"], 0))
    np.testing.assert_array_equal(starts[1][k]["bias"], source[k]["bias"])


def test_pruning_further_keeps_within_the_masks():
  """Also where kept weights are exactly zero, as freshly grown ones are."""
  updater = js.magnitude(sparsity=0.5, stop=1)
  masks = {"w": jnp.arange(16).reshape(4, 4) >= 8}
  pruned, new = updater.instant_sparsify({"w": jnp.zeros((4, 4))}, masks=masks)
  np.testing.assert_array_equal(new["w"], masks["w"])
  with pytest.raises(ValueError, match=r"params\['w'\].*keep 3 of 16.*8 are to be kept"):
    updater.instant_sparsify({"w": jnp.ones((4, 4))}, masks={"w": jnp.arange(16).reshape(4, 4) >= 13})


def test_sparse_model_soups():
  updater = js.global_magnitude(sparsity=0.8, stop=1)
  seen = []

  def train_fn(params, masks, cycle, member):
    seen.append((cycle, member))
    return train(params, masks, seed=10 * cycle + member)

  rounds = list(recipes.sparse_model_soups(PARAMS, train_fn, updater, cycles=3, members=2))
  assert seen == [(c, m) for c in (1, 2, 3) for m in (0, 1)]
  size = sum(p["kernel"].size for p in PARAMS.values())
  assert [sum(counts(r.masks)) for r in rounds][-1] == ref.keep_count(size, 0.8)
  for r in rounds:
    for k, mask in zip(PARAMS, kernel_masks(r.masks)):
      assert not np.asarray(r.params[k]["kernel"])[~mask].any()
  for a, b in zip(rounds, rounds[1:]):
    assert all((later <= earlier).all() for earlier, later in zip(kernel_masks(a.masks), kernel_masks(b.masks)))
  # The share of what is left that goes is the same in every cycle.
  kept = [size, *(sum(counts(r.masks)) for r in rounds)]
  assert np.allclose([b / a for a, b in zip(kept, kept[1:])], 0.2 ** (1 / 3), atol=2e-3)


def test_soups():
  other = train(PARAMS, recipes.all_kept(js.magnitude(sparsity=0.5, stop=1), PARAMS))
  jax.tree.map(np.testing.assert_array_equal, recipes.soup([PARAMS] * 3), PARAMS)
  mean = recipes.soup([PARAMS, other], weights=[1, 3])
  want = jax.tree.map(lambda a, b: (np.asarray(a, np.float64) + 3 * np.asarray(b, np.float64)) / 4, PARAMS, other)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), mean, want)
  score = lambda p: -float(laws.loss_fn(p, jax.tree.map(lambda a: a[0], DATA)))
  greedy = recipes.greedy_soup([PARAMS, other, jax.tree.map(lambda p: 100 * p, PARAMS)], score)
  assert score(greedy) >= max(score(PARAMS), score(other))
  with pytest.raises(ValueError, match=r"Member 1 .* outside the common mask"):
    recipes.soup([{"w": jnp.array([[0.0, 1.0]])}, {"w": jnp.ones((1, 2))}], {"w": jnp.array([[False, True]])})


# -- densify -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anew", [False, True])
def test_densify(anew):
  updater, inner = js.static_sparse(sparsity=0.75), optax.adam(0.01)
  tx = updater.wrap_optax(inner)
  state = tx.init(PARAMS)
  params = updater.sparse_params(PARAMS, state)
  batch = jax.tree.map(lambda a: a[0], DATA)
  grad = jax.jit(jax.grad(lambda p, s: laws.loss_fn(updater.forward_params(p, s), batch)))
  updates, state = tx.update(grad(params, state), state, params)
  params = optax.apply_updates(params, updates)
  masks = kernel_masks(js.get_masks(state))
  before = laws.mlp(updater.forward_params(params, state), batch[0])
  state = recipes.densify(state, params, inner) if anew else recipes.densify(state)
  np.testing.assert_array_equal(laws.mlp(updater.forward_params(params, state), batch[0]), before)
  assert all(m.all() for m in kernel_masks(js.get_masks(state)))
  moments = optax.tree.get(state, "mu")["a"]["kernel"]
  assert anew == (not np.any(moments))
  updates, state = tx.update(grad(params, state), state, params)
  params = optax.apply_updates(params, updates)
  for k, mask in zip(params, masks):
    assert (np.asarray(params[k]["kernel"])[~mask] != 0).mean() > 0.95, "removed weights train"


def test_flops_of_sparse_pretraining():
  """SPDF's accounting: sparse kernels cost a fourth at 75 %, embeddings and the head cost what they cost."""
  params = {
    "embed": jnp.ones((50, 16)),
    "mlp": jnp.ones((16, 64)),
    "out": jnp.ones((64, 16)),
    "head": jnp.ones((16, 50)),
  }
  updater = js.static_sparse(sparsity=0.75, distribution=js.Uniform(), rules=js.Rules(("embed|head", None)))
  state = updater.wrap_optax(optax.sgd(0.1)).init(params)
  positions = {"embed": 0, ".": 10}
  dense, sparse = (js.count_flops(params, m, positions) for m in (None, js.get_masks(state)))
  assert dense == 20 * (2 * 1024 + 800) and sparse == 20 * (2 * 256 + 800)
  assert js.count_flops(params, js.get_masks(recipes.densify(state)), positions) == dense


# -- Sparse-IFT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("family", ["wide", "parallel", "factorized", "doped"])
@pytest.mark.parametrize("inputs,outputs", [(256, 256), (192, 320)])
def test_flops_of_sparse_ift_equal_dense(family, sparsity, inputs, outputs):
  layer = getattr(sparse_ift, family)(inputs, outputs, sparsity)
  params = jax.eval_shape(layer.init, jax.random.key(0))
  params = jax.tree.map(lambda p: jnp.ones(p.shape), params)
  updater = js.static_sparse(sparsity=sparsity, distribution=js.Uniform(), rules=sparse_ift.rules(sparsity))
  masks = js.get_masks(updater.wrap_optax(optax.sgd(0.1)).init(params))
  # A unit of a rounded width or rank costs this much.
  unit = {"wide": 2 * (layer.inputs + layer.outputs), "parallel": 0}.get(family, 2 * (inputs + outputs))
  assert abs(js.count_flops(params, masks) - 2 * inputs * outputs) <= unit + 2 * len(jax.tree.leaves(params))


@pytest.mark.parametrize("family", ["wide", "parallel", "factorized", "doped"])
def test_sparse_ift_at_no_sparsity_is_the_plain_layer(family):
  layer = getattr(sparse_ift, family)(6, 5, 0.0)
  params = layer.init(jax.random.key(0))
  leaves = params["branch_0"] if family == "parallel" else params
  assert set(leaves) == {"sparse", "bias"} and leaves["sparse"].shape == (6, 5)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
  np.testing.assert_array_equal(layer.apply(params, x), jax.nn.relu(x @ leaves["sparse"] + leaves["bias"]))


def test_sparse_ift_layers_compute_what_they_say():
  x = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)
  relu = lambda h: np.maximum(h, 0)
  layers = {f: getattr(sparse_ift, f)(12, 10, 0.75) for f in ("parallel", "factorized", "doped")}
  params = {f: jax.tree.map(np.asarray, layer.init(jax.random.key(1))) for f, layer in layers.items()}
  p = params["parallel"]
  want = {
    "parallel": sum(relu(x @ b["sparse"] + b["bias"]) for b in p.values()),
    "factorized": relu(x @ params["factorized"]["sparse_in"] @ params["factorized"]["sparse_out"]),
    "doped": relu(x @ (params["doped"]["sparse"] + params["doped"]["u"] @ params["doped"]["v"])),
  }
  assert len(p) == 4
  for f, layer in layers.items():
    np.testing.assert_allclose(layer.apply(params[f], x), want[f], rtol=1e-4, atol=1e-4)


# -- task masks ----------------------------------------------------------------------------------------------------------


def test_tasks_are_isolated_bit_for_bit():
  updater = recipes.Tasks.updater(
    js.get_algorithm("set")(sparsity=0.75, every=3, drop_fraction=0.5, distribution=js.Uniform())
  )
  tx = updater.wrap_optax(optax.adam(0.02))
  tasks = recipes.Tasks.start(updater, PARAMS)
  x = DATA[0][0]
  outputs, done = [], []

  @jax.jit
  def run(params, state, used):
    def step(carry, batch):
      params, state = carry
      grads = jax.grad(lambda p: laws.loss_fn(p, batch))(params)
      updates, state = tx.update(grads, state, params, used=used)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), DATA)[0]

  for task in range(4):
    params, state = tasks.begin(updater, tx, PARAMS, key=task)
    first = kernel_masks(js.get_masks(state))
    params, state = run(params, state, tasks.used)
    last = kernel_masks(js.get_masks(state))
    assert any((a != b).any() for a, b in zip(first, last)) or task == 3, "connections move inside a task"
    tasks = tasks.finish(params, state)
    outputs.append(np.asarray(laws.mlp(params, x)))
    done.append(last)
    for i, want in enumerate(outputs):
      np.testing.assert_array_equal(laws.mlp(tasks.params(i), x), want, f"task {i} after task {task}")
  for i in range(len(PARAMS)):
    owners = sum(masks[i].astype(int) for masks in done)
    assert owners.max() == 1 and [masks[i].sum() for masks in done] == [owners.size // 4] * 4
  with pytest.raises(ValueError, match="keep 0 of 512 weights, but 128 are to be kept"):
    tasks.begin(updater, tx, PARAMS)
  with pytest.raises(ValueError, match="grew into weights of an earlier one"):
    tasks.finish(params, state)


# -- random search, distillation, correlation ----------------------------------------------------------------------------


def test_random_search():
  updater = js.get_algorithm("random")(sparsity=0.9, stop=1)
  sample = lambda key: updater.instant_sparsify(PARAMS, key)
  loss = jax.jit(lambda p: laws.loss_fn(p, jax.tree.map(lambda a: a[0], DATA)))
  results = [recipes.random_search(0, sample, lambda c: loss(c[0]), n) for n in (1, 3, 6)]
  bests = [min(scores) for _, scores in results]
  assert bests == sorted(bests, reverse=True) and results[2][1][:3] == results[1][1]
  for best, scores in results:
    assert float(loss(best[0])) == min(scores)
  one = sample(jax.random.fold_in(jax.random.key(0), 0))
  jax.tree.map(np.testing.assert_array_equal, results[0][0][1]["a"]["kernel"], one[1]["a"]["kernel"])


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_kl_divergence(temperature):
  rng = np.random.default_rng(0)
  student, teacher = rng.normal(size=(2, 6, 5)) * 3
  soft = lambda x: np.exp(x / temperature) / np.exp(x / temperature).sum(-1, keepdims=True)
  p, q = soft(teacher), soft(student)
  want = temperature**2 * (p * np.log(p / q)).sum(-1).mean()
  got, grads = jax.value_and_grad(recipes.kl_divergence, (0, 1))(
    jnp.asarray(student), jnp.asarray(teacher), temperature
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(grads[0], temperature * (q - p) / 6, rtol=1e-4, atol=1e-6)
  assert not np.any(grads[1])
  mixed = recipes.distill(
    jnp.float32(3.0), jnp.asarray(student), jnp.asarray(teacher), weight=0.25, temperature=temperature
  )
  np.testing.assert_allclose(mixed, 0.75 * 3 + 0.25 * want, rtol=1e-5)


def test_correlation():
  rng = np.random.default_rng(0)
  before, after = rng.normal(size=(5, 8, 6)), rng.normal(size=(5, 8, 3))
  want = np.corrcoef(before.reshape(40, 6), after.reshape(40, 3), rowvar=False)[:6, 6:]
  np.testing.assert_allclose(recipes.correlation(jnp.asarray(before), jnp.asarray(after)), want, atol=1e-5)


# -- gradient masking ----------------------------------------------------------------------------------------------------


def test_topk_gradient():
  """At most 20 % of an update is not zero, positions are held for `every` updates, and they are the largest then."""
  tx = js.topk_gradient(0.2, every=3)
  rng = np.random.default_rng(0)
  state, held = tx.init(PARAMS), {}
  update = jax.jit(tx.update)
  for t in range(7):
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)
    out, state = update(grads, state)
    for k in PARAMS:
      g = np.asarray(grads[k]["kernel"])
      if t % 3 == 0:
        held[k] = ref.topk(np.abs(g), int(0.2 * g.size))
      np.testing.assert_array_equal(out[k]["kernel"], np.where(held[k], g, 0))
      np.testing.assert_array_equal(out[k]["bias"], grads[k]["bias"])


def test_topk_gradient_inside_an_updater():
  updater = js.sparcl(sparsity=0.75, every=3, stop=20)
  tx = updater.wrap_optax(optax.chain(js.topk_gradient(0.2, every=2), optax.sgd(0.1)))
  state = tx.init(PARAMS)
  params = updater.sparse_params(PARAMS, state)
  params, states = jax.jit(lambda c: jax.lax.scan(laws.make_step(updater, tx), c, DATA))((params, state))[1][:2]
  for k in PARAMS:
    kernel = np.asarray(params[k]["kernel"])
    moved = (kernel[1:] != kernel[:-1]) & (kernel[1:] != 0)
    assert moved.any() and moved.mean((1, 2)).max() <= 0.2


# -- soft thresholds -----------------------------------------------------------------------------------------------------


def str_reference(params, thresholds, data, lr, decay):
  """w' = sign(w) relu(|w| - sigmoid(s)); gradients by hand; plain descent with decay on weights and thresholds."""
  sigmoid = lambda s: 1 / (1 + np.exp(-s))
  soft = lambda w, s: np.sign(w) * np.maximum(np.abs(w) - sigmoid(s), 0)
  for x, y in data:
    sparse = {k: {"kernel": soft(p["kernel"], thresholds[k]), "bias": p["bias"]} for k, p in params.items()}
    grads = network.gradients(sparse, x, y)
    for k in params:
      w, g, s = params[k]["kernel"], grads[k]["kernel"], thresholds[k]
      kept = np.abs(w) > sigmoid(s)
      slope = -(g * np.sign(w))[kept].sum() * sigmoid(s) * (1 - sigmoid(s))
      thresholds = thresholds | {k: s - lr * (slope + decay * s)}
      params = params | {
        k: {
          "kernel": w - lr * (np.where(kept, g, 0) + decay * w),
          "bias": params[k]["bias"] - lr * (grads[k]["bias"] + decay * params[k]["bias"]),
        }
      }
    yield params, thresholds, {k: np.abs(p["kernel"]) > sigmoid(thresholds[k]) for k, p in params.items()}


def test_soft_threshold_against_numpy():
  method = js.SoftThreshold(start=-2.0)
  params = method.init(PARAMS)
  assert params["thresholds"]["a"]["bias"] is None and float(params["thresholds"]["a"]["kernel"]) == -2.0
  tx = method.wrap_optax(optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.3)))
  state = tx.init(params)

  def step(carry, batch):
    params, state = carry
    grads = jax.grad(lambda p: laws.loss_fn(method.forward_params(p, state), batch))(params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (params, js.get_masks(state))

  (last, state), (history, masks) = jax.jit(lambda c: jax.lax.scan(step, c, DATA))((params, state))
  p = network.double(PARAMS)
  want = str_reference(p, {k: -2.0 for k in p}, batches(), 0.3, 0.05)
  for t, (weights, thresholds, kept) in enumerate(want):
    for k in weights:
      np.testing.assert_allclose(history["weights"][k]["kernel"][t], weights[k]["kernel"], rtol=3e-4, atol=3e-6)
      np.testing.assert_allclose(history["thresholds"][k]["kernel"][t], thresholds[k], rtol=1e-4)
      np.testing.assert_array_equal(masks[k]["kernel"][t], kept[k])
  sparse, exported = method.export(last, state)
  total = float(js.summarize_sparsity(js.get_masks(state), only_total=True)["_total_sparsity"])
  assert 0.05 < total < 0.95 and len(set(counts(exported))) == 2
  for k in PARAMS:
    np.testing.assert_array_equal(np.asarray(sparse[k]["kernel"]) != 0, exported[k]["kernel"])
    np.testing.assert_array_equal(sparse[k]["bias"], last["weights"][k]["bias"])
  assert js.get_sparsity_state(state).count == 24


def test_soft_threshold_errors():
  with pytest.raises(ValueError, match="may only say None"):
    js.SoftThreshold(rules=js.Rules(("a", 0.5)))
  with pytest.raises(ValueError, match="matches no leaf"):
    js.SoftThreshold(rules=js.Rules(("zzz", None))).init(PARAMS)
  with pytest.raises(ValueError, match="finds no leaf"):
    js.SoftThreshold().init({"b": jnp.ones(3)})
  with pytest.raises(ValueError, match="init"):
    js.SoftThreshold().forward_params(PARAMS)
  method = js.SoftThreshold(rules=js.Rules(("b/kernel", None)))
  masks = js.get_masks(method.wrap_optax(optax.adam(0.1)).init(method.init(PARAMS)))
  assert isinstance(masks["b"]["kernel"], optax.MaskedNode) and masks["a"]["kernel"].dtype == bool
