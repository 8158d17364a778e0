"""Mask trees: packing, masks from zeros, set_masks, export, and state that is saved and restored."""

import pickle

import flax.serialization
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse import masks as masks_lib


# Few distinct shapes: each costs compiles.
SHAPES = [(*lead, last) for lead in ((), (3,), (2, 3)) for last in (1, 7, 8, 9, 16, 19)]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(hnp.arrays(bool, st.sampled_from(SHAPES)))
def test_pack_round_trip(mask):
  packed = masks_lib.pack(jnp.asarray(mask))
  assert packed.shape == mask.shape
  assert packed.data.dtype == jnp.uint8 and packed.data.shape == (*mask.shape[:-1], -(-mask.shape[-1] // 8))
  np.testing.assert_array_equal(masks_lib.unpack(packed), mask)


def test_packed_layout():
  """Bit b of byte j holds column b * B + j: the layout that kernels and checkpoints rely on."""
  mask = np.zeros((1, 20), bool)
  mask[0, [0, 4, 19]] = True  # B = 3: byte 0 bit 0, byte 1 bit 1, byte 1 bit 6
  np.testing.assert_array_equal(masks_lib.pack(jnp.asarray(mask)).data, [[1, 2 + 64, 0]])
  assert js.mask_nbytes({"w": masks_lib.pack(jnp.ones((16, 64), bool))}) == 128


def test_unpack_tree():
  tree = {"a": masks_lib.pack(jnp.eye(9, dtype=bool)), "b": jnp.ones(3, bool), "c": optax.MaskedNode()}
  out = masks_lib.unpack_tree(tree)
  np.testing.assert_array_equal(out["a"], np.eye(9, dtype=bool))
  assert out["b"].all() and isinstance(out["c"], optax.MaskedNode)


class Tensor:
  """What jaxsparse may use of a torch tensor: detach, cpu, numpy's array protocol."""

  def __init__(self, array, device="cuda"):
    self._array, self._device = np.asarray(array), device

  def detach(self):
    return Tensor(self._array, self._device)

  def cpu(self):
    return Tensor(self._array, "cpu")

  def __array__(self, dtype=None, copy=None):
    if self._device != "cpu":
      raise TypeError("can't convert cuda device type tensor to numpy")
    return self._array if dtype is None else self._array.astype(dtype)


@pytest.mark.parametrize("wrap", [jnp.asarray, np.asarray, Tensor], ids=["jax", "numpy", "tensor"])
def test_masks_from_zeros(wrap):
  kernel = np.array([[1.0, 0.0, -0.0], [np.nan, 2.0, 1e-30]], np.float32)
  masks = js.masks_from_zeros({"kernel": wrap(kernel), "bias": wrap(np.zeros(3, np.float32))})
  np.testing.assert_array_equal(masks["kernel"], [[True, False, False], [True, True, True]])
  assert masks["kernel"].dtype == bool and isinstance(masks["bias"], optax.MaskedNode)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
  "wrap", [jnp.asarray, np.asarray, Tensor, lambda m: m.astype(np.int8), lambda m: Tensor(m.astype(np.float32))]
)
def test_set_masks(wrap, packed):
  updater = js.static_sparse(sparsity=0.5, pack_masks=packed)
  tx = optax.chain(optax.clip(1.0), updater.wrap_optax(optax.adam(0.1)))
  params = laws.make_params()
  state = tx.init(params)
  rng = np.random.default_rng(0)
  new = {k: {"kernel": wrap(rng.random(s) < 0.3), "bias": None} for k, s in laws.SHAPES.items()}
  changed = js.set_masks(state, new)
  rng = np.random.default_rng(0)
  want = {k: rng.random(s) < 0.3 for k, s in laws.SHAPES.items()}
  for k, mask in js.get_masks(changed).items():
    np.testing.assert_array_equal(mask["kernel"], want[k])
  assert jax.tree.structure(changed) == jax.tree.structure(state), "the stored form of the masks changed"
  pruned = updater.sparse_params(params, changed)
  updates, changed = jax.jit(tx.update)(params, changed, pruned)
  after = optax.apply_updates(pruned, updates)
  for k, mask in want.items():
    assert (np.asarray(after[k]["kernel"])[~mask] == 0).all() and (np.asarray(after[k]["kernel"])[mask] != 0).all()
    np.testing.assert_array_equal(js.get_masks(changed)[k]["kernel"], mask)


def test_pruned_checkpoint_continues_with_its_masks():
  params = laws.make_params()
  pruned, masks = js.magnitude(sparsity=0.8, stop=1).instant_sparsify(params)
  tx = js.static_sparse(sparsity=0.8).wrap_optax(optax.sgd(0.1, momentum=0.9))
  state = js.set_masks(tx.init(pruned), js.masks_from_zeros(pruned))
  jax.tree.map(np.testing.assert_array_equal, js.get_masks(state), masks)


@pytest.mark.parametrize(
  "change,words",
  [
    (lambda m: {"a": m["a"]}, "2 leaves, the optimizer state 4"),
    (lambda m: {**m, "a": {**m["a"], "kernel": m["a"]["kernel"][:-1]}}, r"\['a'\]\['kernel'\] has shape \(15, 32\)"),
    (lambda m: {**m, "a": {**m["a"], "kernel": m["a"]["kernel"] * 2.0}}, "other than 0 and 1"),
    (lambda m: {**m, "a": {**m["a"], "kernel": None}}, "is missing"),
    (lambda m: {**m, "a": {**m["a"], "bias": np.zeros(32, bool)}}, "leaves dense"),
  ],
)
def test_masks_that_do_not_fit(change, words):
  state = js.static_sparse(sparsity=0.5).wrap_optax(optax.sgd(0.1)).init(laws.make_params())
  masks = jax.tree.map(np.asarray, js.get_masks(state))
  with pytest.raises(ValueError, match=words):
    js.set_masks(state, change(masks))


def test_masks_must_be_set_before_training():
  updater = js.snip(sparsity=0.5)
  params = laws.make_params()
  tx = updater.wrap_optax(optax.sgd(0.1))
  state = tx.init(params)
  for use in (
    lambda: tx.update(params, state, params),
    lambda: js.get_masks(state),
    lambda: updater.sparse_params(params, state),
    lambda: updater.forward_params(params, state),
  ):
    with pytest.raises(ValueError, match="set_masks"):
      use()


@pytest.mark.parametrize("name", ["rigl", "sr_ste", "magnitude"])
def test_export(name):
  updater = js.get_algorithm(name)(**laws.EXPECTED[name].arguments)
  tx = updater.wrap_optax(optax.sgd(0.05))
  state = tx.init(laws.make_params())
  dense = laws.make_params()
  params, masks = updater.export(dense, state)
  for k in laws.SHAPES:
    mask = np.asarray(masks[k]["kernel"])
    assert mask.dtype == bool and isinstance(masks[k]["bias"], optax.MaskedNode)
    np.testing.assert_array_equal(params[k]["kernel"], np.where(mask, dense[k]["kernel"], 0))
    np.testing.assert_array_equal(params[k]["bias"], dense[k]["bias"])


def test_averages_are_masked_again():
  """An exponential average of the weights still holds what was dropped; sparse_params removes it."""
  updater = js.rigl(sparsity=0.8, every=2, start=1, stop=11)
  tx = updater.wrap_optax(optax.sgd(0.1))
  params = laws.make_params()
  state = tx.init(params)
  params = updater.sparse_params(params, state)
  average = optax.ema(0.9, debias=False)
  ema_state = average.init(params)
  update = jax.jit(tx.update)
  for i in range(4):
    grads = jax.grad(laws.loss_fn)(params, jax.tree.map(lambda a: a[i], laws.make_batches()))
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    mean, ema_state = average.update(params, ema_state)
  masks = js.get_masks(state)
  outside = lambda tree: sum(int((np.asarray(tree[k]["kernel"])[~m["kernel"]] != 0).sum()) for k, m in masks.items())
  assert outside(mean) > 0 and outside(updater.sparse_params(mean, state)) == 0


# -- saving and restoring ------------------------------------------------------------------------------------------------


def through_msgpack(state, template):
  return flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))


def through_numpy(state, template):
  leaves = pickle.loads(pickle.dumps([np.asarray(leaf) for leaf in jax.tree.leaves(state)]))
  return jax.tree.unflatten(jax.tree.structure(template), leaves)


def through_pickle(state, template):
  return pickle.loads(pickle.dumps(state))


def plain_nodes(tree):
  """flax.serialization knows no PackedMask; leaves in order are what a checkpoint holds."""
  return dict(enumerate(jax.tree.leaves(tree)))


@pytest.mark.parametrize("save", [through_msgpack, through_numpy, through_pickle])
@pytest.mark.parametrize("name,packed", [("rigl", False), ("snfs", True), ("sr_ste", False), ("random", False)])
def test_restored_training_continues_bit_for_bit(name, packed, save):
  updater = js.get_algorithm(name)(**laws.EXPECTED[name].arguments, pack_masks=packed)
  tx = updater.wrap_optax(optax.adam(0.01), key=3)
  params = laws.make_params()
  run = jax.jit(lambda carry, batches: jax.lax.scan(laws.make_step(updater, tx), carry, batches)[0])
  early, late = (jax.tree.map(lambda a: a[s], laws.make_batches()) for s in (slice(0, 7), slice(7, 14)))
  middle = run((params, tx.init(params)), early)
  want = run(middle, late)
  template = (laws.make_params(seed=9), tx.init(laws.make_params(seed=9)))
  if save is through_msgpack:
    loaded = save(plain_nodes(middle), plain_nodes(template))
    restored = jax.tree.unflatten(jax.tree.structure(template), [loaded[i] for i in range(len(loaded))])
  else:
    restored = save(middle, template)
  got = run(jax.tree.map(jnp.asarray, restored), late)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert run._cache_size() == 1, "a restored state compiles again"


@pytest.mark.parametrize("name", ["set", "random"])
def test_the_saved_key_goes_on_whatever_seed_the_new_process_has(name):
  updater = js.get_algorithm(name)(**laws.EXPECTED[name].arguments)
  first, second = (updater.wrap_optax(optax.sgd(0.1), key=key) for key in (3, 4))
  params = laws.make_params()
  state = first.init(params)
  run = lambda tx: jax.jit(lambda s: jax.lax.scan(lambda s, _: (tx.update(params, s, params)[1], None), s, length=6)[0])
  want, got = (js.get_masks(run(tx)(state)) for tx in (first, second))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  fresh = js.get_masks(run(second)(second.init(params)))
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(fresh), jax.tree.leaves(want)))


def test_msgpack_of_the_state_itself():
  """Unpacked state goes through flax.serialization as it is."""
  tx = js.snfs(sparsity=0.8, every=2, stop=9).wrap_optax(optax.adam(0.01))
  params = laws.make_params()
  _, state = jax.jit(tx.update)(params, tx.init(params), params)
  restored = flax.serialization.from_bytes(tx.init(params), flax.serialization.to_bytes(state))
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_orbax(tmp_path):
  checkpoint = pytest.importorskip("orbax.checkpoint")
  tx = js.rigl(sparsity=0.8, every=2, stop=9, pack_masks=True).wrap_optax(optax.adam(0.01))
  params = laws.make_params()
  _, state = jax.jit(tx.update)(params, tx.init(params), params)
  with checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "state", tx.init(params))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_packed_masks_count_alike(seed):
  mask = jnp.asarray(np.random.default_rng(seed).random((5, 13)) < 0.4)
  plain, packed = js.summarize_sparsity({"w": mask}), js.summarize_sparsity({"w": masks_lib.pack(mask)})
  assert float(plain["w"]) == float(packed["w"]) == pytest.approx(1 - float(mask.mean()), abs=1e-6)
