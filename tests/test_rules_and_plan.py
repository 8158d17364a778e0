"""Bad input: what is refused, when, and in which words; and which leaves are sparsified."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import jaxsparse as js

ONE_SHOT = js.schedules.OneShot(0)


def zeros(**shapes):
  return {k: jnp.zeros(s) for k, s in shapes.items()}


def magnitude(**arguments):
  return js.magnitude(**{"sparsity": 0.5, "schedule": ONE_SHOT, **arguments})


def start(updater, params):
  tx = updater.wrap_optax(optax.sgd(0.1))
  return tx, tx.init(params)


# -- at construction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", [n for n in sorted(laws.EXPECTED) if "sparsity" in laws.EXPECTED[n].arguments])
def test_sparsity_outside_its_range(name, sparsity):
  with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
    js.get_algorithm(name)(**{**laws.EXPECTED[name].arguments, "sparsity": sparsity})


@pytest.mark.parametrize("sparsity", ["0.9", True, [0.9]])
def test_sparsity_of_another_type(sparsity):
  with pytest.raises(TypeError, match="sparsity must be a number"):
    magnitude(sparsity=sparsity)


@pytest.mark.parametrize(
  "make,kind,words",
  [
    (
      lambda: js.magnitude(sparsity=0.5, every=10, start=10, stop=10),
      ValueError,
      "stop=10 must be greater than start=10",
    ),
    (lambda: js.rigl(sparsity=0.5, start=20, stop=10), ValueError, "stop=10 must be greater than start=20"),
    (lambda: js.rigl(sparsity=0.5), ValueError, "rigl needs stop="),
    (lambda: js.snfs(sparsity=0.5), ValueError, "snfs needs stop="),
    (lambda: js.magnitude(sparsity=0.5), ValueError, "magnitude needs stop="),
    (lambda: js.iterative_nm(2, 4), ValueError, "iterative_nm needs stop="),
    (lambda: js.iterative_nm(2, 4, stop=9, structure=js.Channel()), TypeError, "makes its own structure"),
    (lambda: js.gmp(sparsity=0.5, initial_sparsity=0.8, stop=9), ValueError, "must not exceed"),
    (lambda: js.magnitude(sparsity=0.5, stop=9, sparstiy=0.5), TypeError, "Did you mean 'sparsity'"),
    (lambda: js.magnitude(sparsity=0.5, stop=9, on_mismatch="ignore"), ValueError, "on_mismatch must be"),
    (
      lambda: js.magnitude(sparsity=0.5, stop=9, structure="nm"),
      TypeError,
      "structure must be a structure such as NM.*Names are for",
    ),
    (lambda: js.magnitude(sparsity=0.5, stop=9, structure=js.Unstructured), TypeError, "Call it: Unstructured"),
    (
      lambda: js.rigl(0.5, 100),
      TypeError,
      r"rigl\(\): too many positional arguments. Its signature is rigl\(sparsity=None",
    ),
    (lambda: js.magnitude(sparsity=0.5, stop=9, distribution=js.ERK), TypeError, "distribution must be"),
    (lambda: js.magnitude(sparsity=0.5, stop=9, rules=[("a", None)]), TypeError, "rules must be"),
    (lambda: js.granet(sparsity=0.9, stop=9, init_distribution=js.Global()), ValueError, "counts per leaf"),
    (lambda: js.granet(sparsity=0.4, stop=9), ValueError, "must not exceed"),
    (lambda: js.mest(sparsity=0.9, every=100, stop=150), ValueError, "the final sparsity would not be reached"),
    (lambda: js.snip_ratio(sparsity=0.9, structure=js.Channel()), ValueError, "densities of single weights"),
    (lambda: js.sr_ste(sparsity=0.5, decay=-1.0), ValueError, "must not be negative"),
    (lambda: js.get_algorithm("rigi"), ValueError, "Did you mean 'rigl'"),
  ],
)
def test_impossible_updaters(make, kind, words):
  with pytest.raises(kind, match=words):
    make()


@pytest.mark.parametrize(
  "arguments,words",
  [
    ({"schedule": js.schedules.Static(), "drop": js.scorers.Magnitude()}, "training would stay dense"),
    ({"schedule": ONE_SHOT, "drop": js.scorers.Snip()}, "scores a model before training"),
    ({"schedule": ONE_SHOT, "drop": js.scorers.Magnitude(), "init": js.scorers.GradientMagnitude()}, "needs gradients"),
    ({"schedule": ONE_SHOT, "drop": js.scorers.Magnitude(), "grow": js.scorers.Random()}, "belong together"),
    (
      {"schedule": ONE_SHOT, "drop": js.scorers.Magnitude(), "surplus": js.schedules.ConstantFraction(0.1)},
      "it needs grow=",
    ),
    (
      {
        "schedule": ONE_SHOT,
        "drop": js.scorers.Magnitude(),
        "init": js.scorers.Random(),
        "init_distribution": js.ERK(),
      },
      "where distribution=Global",
    ),
  ],
)
def test_impossible_combinations(arguments, words):
  with pytest.raises(ValueError, match=words):
    js.Updater(sparsity=0.5, **arguments)


@pytest.mark.parametrize(
  "entries,kind,words",
  [
    ([("(", None)], ValueError, "not a regular expression"),
    ([("a", 1.5)], ValueError, "sparsity of the rule 'a'"),
    ([("a", (js.NM(2, 4), 2.0))], ValueError, "sparsity of the rule 'a'"),
    ([("a", "dense")], TypeError, "must say None"),
    ([None], TypeError, "A rule is a pair"),
    ([(1, None)], TypeError, "A rule is a pair"),
  ],
)
def test_impossible_rules(entries, kind, words):
  with pytest.raises(kind, match=words):
    js.Rules(*entries)


# -- against a model -----------------------------------------------------------------------------------------------------


def test_the_error_for_a_130_by_64_kernel():
  params = {"mlp": {"kernel": jnp.zeros((130, 64)), "bias": jnp.zeros(64)}}
  updater = js.magnitude(structure=js.NM(2, 4), schedule=ONE_SHOT)
  with pytest.raises(ValueError) as error:
    start(updater, params)
  want = "params['mlp']['kernel'] has shape (130, 64); NM(n=2, m=4) needs its reduction axis divisible by 4."
  assert str(error.value).startswith(want), str(error.value)
  assert "('mlp/kernel', None)" in str(error.value) and "on_mismatch='skip'" in str(error.value)


def test_mismatches_can_be_skipped(caplog):
  params = zeros(odd=(130, 64), even=(128, 64))
  updater = js.magnitude(structure=js.NM(2, 4), schedule=ONE_SHOT, on_mismatch="skip")
  with caplog.at_level("WARNING"):
    masks = js.get_masks(start(updater, params)[1])
  assert isinstance(masks["odd"], optax.MaskedNode) and masks["even"].shape == (128, 64)
  assert "skipped" in updater.describe(params)
  with pytest.raises(ValueError, match="training would be dense"):
    start(updater, zeros(odd=(130, 64)))


@pytest.mark.parametrize(
  "updater,params,kind,words",
  [
    (
      magnitude(rules=js.Rules(("nothing", 0.5))),
      zeros(w=(4, 4)),
      ValueError,
      "'nothing' matches no leaf. The leaves are: w",
    ),
    (magnitude(), zeros(b=(4,)), ValueError, "sparsifies no leaf.*fewer than two dimensions"),
    (magnitude(rules=js.Rules((".*", None))), zeros(w=(4, 4)), ValueError, "sparsifies no leaf.*dense by rule"),
    (magnitude(), {}, ValueError, "there are no parameters"),
    (magnitude(sparsity=0.01), zeros(w=(4, 4)), ValueError, "share of the sparsity is 0"),
    (magnitude(), {"w": jnp.zeros((4, 4), jnp.int32)}, TypeError, r"params\['w'\] has dtype int32"),
    (magnitude(), {"w": jnp.zeros((4, 4), jnp.complex64)}, TypeError, "complex64"),
    (magnitude(), {"w": "text"}, TypeError, r"params\['w'\] is a str, not an array"),
    (magnitude(), zeros(w=(0, 4)), ValueError, "there is nothing to sparsify"),
    (magnitude(rules=js.Rules(("s", 0.5))), zeros(s=()), ValueError, "there is nothing to sparsify"),
    (magnitude(sparsity=None), zeros(w=(4, 4)), ValueError, "needs sparsity="),
    (magnitude(sparsity=0.9, structure=js.NM(2, 4)), zeros(w=(4, 4)), ValueError, "a sparsity of 0.5, but"),
    (magnitude(sparsity=0.9, structure=js.FixedFanIn(2)), zeros(w=(8, 4)), ValueError, "a sparsity of 0.75, but"),
    (js.rigl(sparsity=0.99, stop=9, distribution=js.Uniform(), structure=js.FixedFanIn()), zeros(w=(4, 4)), None, None),
    (
      js.global_magnitude(sparsity=0.5, stop=9, structure=js.FixedFanIn()),
      zeros(w=(4, 4)),
      ValueError,
      "ranks leaves against each other",
    ),
    (magnitude(structure=js.NM(2, 4), sparsity=None), zeros(w=(4, 4, 4)), ValueError, "state it with axis="),
  ],
)
def test_models_that_do_not_fit(updater, params, kind, words):
  if kind is None:
    assert js.get_masks(start(updater, params)[1])["w"].sum(0).tolist() == [1, 1, 1, 1]
    return
  with pytest.raises(kind, match=words):
    start(updater, params)


def test_a_leaf_that_would_keep_nothing():
  updater = js.rigl(sparsity=0.999, stop=9, structure=js.Block((4, 4)))
  with pytest.raises(ValueError, match="would keep none of its"):
    start(updater, zeros(w=(8, 8), v=(64, 64)))


# -- during training -----------------------------------------------------------------------------------------------------


def test_missing_parameters():
  params = zeros(w=(4, 4))
  tx, state = start(magnitude(), params)
  with pytest.raises(ValueError, match="needs the parameters"):
    tx.update(params, state)


def test_missing_scorer_input():
  params = zeros(w=(4, 4))
  tx, state = start(js.adam_fisher(sparsity=0.5, stop=9), params)
  with pytest.raises(ValueError, match="needs 'nu'"):
    tx.update(params, state, params)
  tx.update(params, state, params, nu=params)


def test_scorer_input_kept_by_parts_of_an_optimizer():
  """Adam over each half keeps two halves of nu; SGD over one of them leaves a gap; two Adams over all are ambiguous."""
  params = zeros(v=(4, 4), w=(4, 4))

  def update(inner, **extra):
    tx = js.adam_fisher(sparsity=0.5, stop=9).wrap_optax(inner)
    return tx.update(params, tx.init(params), params, **extra)

  parts = lambda first, second: optax.partition({"x": first, "y": second}, {"v": "x", "w": "y"})
  update(parts(optax.adam(0.1), optax.adam(0.2)))
  half = parts(optax.adam(0.1), optax.sgd(0.2))
  with pytest.raises(ValueError, match=r"needs 'nu' of params\['w'\], and the inner optimizer keeps none"):
    update(half)
  update(half, nu=params)
  with pytest.raises(ValueError, match=r"needs 'nu' of params\['v'\], and the inner optimizer keeps 2"):
    update(optax.chain(optax.adam(0.1), optax.adam(0.1)))


def test_missing_gradients_before_training():
  with pytest.raises(ValueError, match="pass loss_fn="):
    js.snip(sparsity=0.5).instant_sparsify(zeros(w=(4, 4)))
  with pytest.raises(ValueError, match="batches= is empty"):
    js.snip(sparsity=0.5).instant_sparsify(zeros(w=(4, 4)), loss_fn=lambda p, b: p["w"].sum(), batches=[])
  with pytest.raises(ValueError, match="there is none in instant_sparsify"):
    js.adam_fisher(sparsity=0.5, stop=9).instant_sparsify(zeros(w=(4, 4)))


@pytest.mark.parametrize(
  "other,words",
  [
    (zeros(w=(4, 4), x=(4, 4)), "different trees. Only in the parameters: x"),
    (zeros(w=(4, 6)), r"params\['w'\] has shape \(4, 6\), but the masks in the optimizer state \(4, 4\)"),
  ],
)
def test_another_model_than_at_init(other, words):
  tx, state = start(magnitude(), zeros(w=(4, 4)))
  for fn in (lambda: tx.update(other, state, other), lambda: magnitude().sparse_params(other, state)):
    with pytest.raises(ValueError, match=words):
      fn()


def test_gradients_of_another_model():
  params = zeros(w=(4, 4))
  tx, state = start(magnitude(), params)
  with pytest.raises(ValueError, match="the gradients"):
    tx.update(zeros(w=(4, 6)), state, params)


def test_state_of_another_configuration():
  params = zeros(w=(4, 4), v=(4, 4))
  _, state = start(magnitude(rules=js.Rules(("v", None))), params)
  tx, _ = start(magnitude(), params)
  with pytest.raises(ValueError, match=r"params\['v'\] has no mask in the optimizer state"):
    tx.update(params, state, params)


def test_state_with_scorers_missing():
  """A checkpoint of a method without growth buffers does not continue as one with them."""
  params = zeros(w=(8, 8))
  _, state = start(js.rigl(sparsity=0.5, stop=9), params)
  tx, _ = start(js.snfs(sparsity=0.5, stop=9), params)
  with pytest.raises((ValueError, TypeError)):
    tx.update(params, state, params)


@pytest.mark.parametrize("key", [jnp.zeros(3, jnp.uint32), jnp.zeros((2,), jnp.int32)])
def test_keys_that_are_none(key):
  with pytest.raises(TypeError, match="key must be an integer"):
    magnitude().wrap_optax(optax.sgd(0.1), key=key).init(zeros(w=(4, 4)))


@pytest.mark.parametrize("key", [0, jax.random.key(0), jax.random.key(0, impl="rbg"), np.asarray([0, 0], np.uint32)])
def test_keys_of_every_kind(key):
  state = magnitude().wrap_optax(optax.sgd(0.1), key=key).init(zeros(w=(4, 4)))
  assert state.key.shape == (2,) and state.key.dtype == jnp.uint32


# -- which leaves --------------------------------------------------------------------------------------------------------


def test_first_matching_rule_wins():
  params = {
    "embed": {"w": jnp.ones((8, 8))},
    "mlp": {"w": jnp.ones((8, 8)), "b": jnp.ones(8)},
    "head": {"w": jnp.ones((8, 8))},
    "free": {"w": jnp.ones((8, 8))},
  }
  rules = js.Rules(
    ("embed", None), ("mlp/b", 0.25), ("mlp", js.NM(1, 4)), ("head", (js.Block((2, 2)), 0.75)), ("mlp/w", 0.1)
  )
  updater = magnitude(sparsity=0.5, rules=rules)
  _, masks = updater.instant_sparsify(params)
  assert isinstance(masks["embed"]["w"], optax.MaskedNode)
  assert [int(m.sum()) for m in (masks["mlp"]["b"], masks["mlp"]["w"], masks["head"]["w"], masks["free"]["w"])] == [
    6,
    16,
    16,
    32,
  ]
  assert (masks["mlp"]["w"].reshape(2, 4, 8).sum(1) == 1).all()
  text = updater.describe(params)
  assert [line.split()[0] for line in text.splitlines()] == ["leaf", "embed/w", "free/w", "head/w", "mlp/b", "mlp/w"]
  assert "dense by rule 'embed'" in text and "0.7500" in text
