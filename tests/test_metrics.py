"""Reports on masks, against counts by hand."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse import masks as masks_lib

OLD = {
  "a": jnp.array([[True, True], [False, False]]),
  "b": jnp.array([[True, False, False, False]]),
  "c": optax.MaskedNode(),
}
NEW = {
  "a": jnp.array([[True, False], [True, False]]),
  "b": jnp.array([[False, False, False, True]]),
  "c": optax.MaskedNode(),
}


def floats(report):
  return {k: float(v) for k, v in report.items()}


def test_summarize_sparsity():
  assert floats(js.summarize_sparsity(OLD)) == {"a": 0.5, "b": 0.75, "_total_sparsity": 0.625}
  assert floats(js.summarize_sparsity(OLD, only_total=True)) == {"_total_sparsity": 0.625}
  params = {"w": jnp.array([[0.0, -1.0], [np.nan, -0.0]]), "b": jnp.array([1.0, 0.0])}
  assert floats(js.summarize_sparsity(params)) == {"w": 0.5, "b": 0.5, "_total_sparsity": 0.5}
  assert floats(jax.jit(js.summarize_sparsity)(OLD)) == floats(js.summarize_sparsity(OLD))


def test_summarize_sparsity_with_params_counts_dense_leaves_as_kept():
  """With ERK the second layer is dense: masks alone say 0.6, the kernels say what was asked for, 0.5."""
  params = {"a": {"kernel": jnp.ones((100, 100)), "bias": jnp.zeros(100)}, "b": {"kernel": jnp.ones((100, 20))}}
  updater = js.static_sparse(sparsity=0.5)
  state = updater.wrap_optax(optax.sgd(0.1)).init(params)
  masks = js.get_masks(state)
  assert isinstance(masks["b"]["kernel"], optax.MaskedNode)
  total = lambda *args, **kwargs: float(js.summarize_sparsity(*args, **kwargs)["_total_sparsity"])
  assert total(masks) == pytest.approx(0.6)
  kernels = lambda tree: {k: {"kernel": layer["kernel"]} for k, layer in tree.items()}
  assert total(kernels(masks), params=kernels(params)) == pytest.approx(0.5)
  assert floats(js.summarize_sparsity(masks, params=params)) == pytest.approx(
    {"a/bias": 0, "a/kernel": 0.6, "b/kernel": 0, "_total_sparsity": 6000 / 12100}
  )
  packed = js.get_sparsity_state(
    js.static_sparse(sparsity=0.5, pack_masks=True).wrap_optax(optax.sgd(0.1)).init(params)
  )
  assert total(packed.masks, params=params) == pytest.approx(6000 / 12100)
  assert floats(jax.jit(lambda m, p: js.summarize_sparsity(m, params=p))(masks, params))["a/kernel"] == pytest.approx(
    0.6
  )
  with pytest.raises(ValueError, match="masks"):
    js.summarize_sparsity({"a": masks["a"]}, params=params)


def test_summarize_intersection():
  got = floats(js.summarize_intersection(OLD, NEW))
  assert got == pytest.approx({"a": 0.5, "b": 0.0, "_total_intersection": 1 / 3})
  assert floats(js.summarize_intersection(OLD, OLD, only_total=True)) == {"_total_intersection": 1.0}
  for compare in (js.summarize_intersection, js.mask_churn):
    with pytest.raises(ValueError, match="the trees differ.*'b'"):
      compare(OLD, {"a": OLD["a"]})
    with pytest.raises(ValueError, match=": b has shape"):
      compare(OLD, OLD | {"b": jnp.ones(1, bool)})


def test_mask_churn():
  """SAD: bits that flipped, 2 in each leaf; packed or not."""
  assert float(js.mask_churn(OLD, NEW)) == 4 and float(js.mask_churn(OLD, OLD)) == 0
  packed = {"a": masks_lib.pack(OLD["a"]), "b": OLD["b"], "c": optax.MaskedNode()}
  assert float(js.mask_churn(packed, NEW)) == 4


def test_counts():
  params = {"conv": jnp.zeros((3, 3, 4, 8)), "dense": jnp.zeros((8, 10)), "bias": jnp.zeros(10)}
  masks = {"conv": jnp.arange(288).reshape(3, 3, 4, 8) < 100, "dense": optax.MaskedNode(), "bias": optax.MaskedNode()}
  assert js.count_parameters(params) == 288 + 80 + 10
  assert js.count_parameters(params, masks) == 100 + 80 + 10
  assert js.count_flops(params) == 2 * (288 + 80)
  assert js.count_flops(params, masks, {"conv": 49}) == 2 * (100 * 49 + 80)
  assert js.count_flops(params, masks, {"dense": 0}) == 200
  with pytest.raises(ValueError, match="masks"):
    js.count_parameters(params, {"conv": masks["conv"]})


def test_mask_nbytes():
  plain, packed = (
    js.static_sparse(sparsity=0.5, pack_masks=p).wrap_optax(optax.sgd(0.1)).init(laws.make_params())
    for p in (False, True)
  )
  assert js.mask_nbytes(js.get_sparsity_state(plain).masks) == 16 * 32 + 32 * 8
  assert js.mask_nbytes(js.get_sparsity_state(packed).masks) == (16 * 32 + 32 * 8) // 8


def test_grown_weights_count_as_kept():
  """A freshly grown weight is 0 and kept: the masks are at 0.8, the weights above."""
  updater = js.get_algorithm("set")(sparsity=0.8, every=1, stop=9)
  tx = updater.wrap_optax(optax.sgd(0.1))
  params = laws.make_params()
  state = tx.init(params)
  params = updater.sparse_params(params, state)
  updates, state = jax.jit(tx.update)(params, state, params)
  params = optax.apply_updates(params, updates)
  masks = js.get_masks(state)
  kernels = {k: p["kernel"] for k, p in params.items()}
  of_masks = float(js.summarize_sparsity(masks)["_total_sparsity"])
  assert (
    of_masks == pytest.approx(1 - 154 / 768) and float(js.summarize_sparsity(kernels)["_total_sparsity"]) > of_masks
  )
