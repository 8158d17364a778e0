"""NMArray, compress, files, quantised values: bit-exact round trips, and errors that name the array and the rule."""

import dataclasses
import os
import sys

from flax import linen
from flax import nnx
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from references import nm as nm_reference

import jaxsparse as js

PATTERNS = [(2, 4), (1, 4), (2, 8), (4, 8), (1, 8), (1, 16), (3, 5), (1, 2)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def weight(k, o, n, m, dtype=jnp.float32, stack=(), seed=0):
  """(dense pruned weight, mask, NMArray)."""
  w = np.random.default_rng(seed).normal(size=(*stack, k, o)).astype(np.float32)
  w, mask = nm_reference.prune(w, n, m)
  w = jnp.asarray(w, dtype)
  return w, jnp.asarray(mask), js.NMArray.from_dense(w, n, m, mask)


def same(a, b):
  """Whether two trees agree in structure, dtypes and bits."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))
  return True


# -- Round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,m", PATTERNS)
def test_round_trip(n, m, dtype):
  w, mask, a = weight(4 * m, 7, n, m, dtype)
  assert a.shape == w.shape and a.dtype == dtype and a.pattern == f"{n}:{m}" and a.ndim == 2
  assert a.values.shape == a.indices.shape == (4, n, 7) and a.indices.dtype == jnp.uint8
  assert same(a.to_dense(), w)
  assert same(js.NMArray.from_dense(w, n, m), a), "zeros say the same as the mask"
  np.testing.assert_array_equal(nm_reference.dense(np.asarray(a.values), np.asarray(a.indices), m), np.asarray(w))
  assert (np.diff(np.asarray(a.indices).astype(int), axis=1) > 0).all()


@settings(max_examples=20, deadline=None)
@given(
  pattern=st.sampled_from([(2, 4), (2, 8), (3, 5)]),
  sizes=st.sampled_from([((), 1, 1), ((2,), 3, 4)]),  # few, for each compiles anew
  density=st.floats(0, 1),
  seed=st.integers(0, 99),
)
def test_any_mask_that_keeps_no_more(pattern, sizes, density, seed):
  """Groups may keep fewer than n, or nothing; weights off the mask are dropped."""
  (n, m), (stack, groups, outputs) = pattern, sizes
  rng = np.random.default_rng(seed)
  w = rng.normal(size=(*stack, groups * m, outputs)).astype(np.float32)
  mask = nm_reference.prune(w, n, m)[1] & (rng.uniform(size=w.shape) < density)
  a = js.NMArray.from_dense(w, n, m, mask)
  assert (np.diff(np.asarray(a.indices).astype(int), axis=-2) > 0).all() and (np.asarray(a.indices) < m).all()
  np.testing.assert_array_equal(np.asarray(a.to_dense()), np.where(mask, w, 0))


def test_inside_transformations():
  w, mask, a = weight(16, 6, 2, 4, stack=(3,))
  assert same(jax.jit(lambda a: a.to_dense())(a), w)
  assert same(jax.vmap(lambda a: a.to_dense())(a), w)
  assert same(jax.lax.scan(lambda _, layer: (None, layer.to_dense()), None, a)[1], w)
  assert same(jax.jit(lambda w: js.NMArray.from_dense(w, 2, 4, mask))(w), a)
  assert jax.eval_shape(lambda: a).shape == (3, 16, 6)
  assert "None" in repr(jax.tree.map(lambda _: None, a))
  keys = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path({"w": a})[0]]
  assert keys == ["['w'].values", "['w'].indices"]
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    assert same(js.NMArray.from_dense(w, 2, 4).to_dense(), w)


def test_constants_are_checked_while_tracing():
  w = np.ones((4, 2), np.float32)
  with pytest.raises(ValueError, match="2:4"):
    jax.jit(lambda: js.NMArray.from_dense(w, 2, 4).to_dense())()


@pytest.mark.parametrize("n,m,share", [(2, 4, 0.5625), (1, 4, 0.28125), (2, 8, 0.296875), (1, 8, 0.1484375), (1, 16, 0.078125), (4, 8, 0.59375)])  # fmt: skip
def test_nbytes(n, m, share):
  w, _, a = weight(64, 32, n, m, jnp.bfloat16)
  assert a.nbytes == share * w.nbytes


# -- Bad input ---------------------------------------------------------------------------------------------------------


def parts(**changes):
  _, _, a = weight(8, 3, 2, 4)
  return dict(values=a.values, indices=a.indices, n=2, m=4) | {k: f(a) for k, f in changes.items()}


BAD_PARTS = {
  "index out of range": (dict(indices=lambda a: a.indices.at[1, 1, 2].set(4)), r"indices\[1, 1, 2\] is 4; allowed are 0 to 3"),
  "not increasing": (dict(indices=lambda a: a.indices[:, ::-1]), r"indices\[0, 0, 0\] is \d and the next one \d; .* strictly increase"),
  "twice the same": (dict(indices=lambda a: a.indices.at[:, 1].set(a.indices[:, 0])), "strictly increase"),
  "NaN": (dict(values=lambda a: a.values.at[1, 0, 2].set(jnp.nan)), r"values\[1, 0, 2\] is NaN"),
  "shapes": (dict(indices=lambda a: a.indices[:1]), r"indices has shape \(1, 2, 3\), values \(2, 2, 3\)"),
  "n": (dict(n=lambda a: 1), r"values has shape \(2, 2, 3\); allowed is \[\*S, K/4, 1, O\]"),
  "pattern": (dict(m=lambda a: 2), "0 < n < m"),
  "rank": (dict(values=lambda a: a.values[0], indices=lambda a: a.indices[0]), r"values has shape \(2, 3\)"),
  "scales of another shape": (dict(values=lambda a: a.values.astype(jnp.int8), scales=lambda a: jnp.ones((3, 3))), r"scales has shape \(3, 3\)"),
  "NaN scale": (dict(values=lambda a: a.values.astype(jnp.int8), scales=lambda a: jnp.full((1, 3), jnp.nan)), r"scales\[0, 0\] is NaN"),
}  # fmt: skip
BAD_TYPES = {
  "index dtype": (dict(indices=lambda a: a.indices.astype(jnp.int32)), "indices are int32; uint8"),
  "value dtype": (dict(values=lambda a: a.values.astype(jnp.int32)), "values is int32; allowed are bfloat16"),
  "integers without scales": (dict(values=lambda a: a.values.astype(jnp.int8)), "int8 values need scales"),
  "floats with scales": (dict(scales=lambda a: jnp.ones((1, 3))), "values are float32; with scales"),
  "no array": (dict(values=lambda a: 3.0), "values must be an array, got float"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_parts(case):
  changes, message = BAD_PARTS[case]
  with pytest.raises(ValueError, match=message):
    js.NMArray(**parts(**changes))


@pytest.mark.parametrize("case", BAD_TYPES)
def test_bad_types(case):
  changes, message = BAD_TYPES[case]
  with pytest.raises(TypeError, match=message):
    js.NMArray(**parts(**changes))


def test_bad_dense_weights():
  w, mask, _ = weight(8, 3, 2, 4)
  full = mask.at[4:8, 1].set(True)
  with pytest.raises(
    ValueError, match=r"w: the mask is not 2:4 along axis -2: rows 4-7 of column 1 keep 4 entries.* \(1 of 6"
  ):
    js.NMArray.from_dense(w, 2, 4, full)
  with pytest.raises(ValueError, match=r"up: the weight is not 2:4 .* rows 0-3 of layer 1, column 0 keep"):
    js.NMArray.from_dense(jnp.stack([w, w + 1]), 2, 4, name="up")
  with pytest.raises(ValueError, match=r"w: the mask is not 2:4 along axis -2"):
    js.NMArray.from_dense(*weight(8, 8, 2, 4)[0].T[None], 2, 4, jnp.zeros((8, 8), bool).at[:, :4].set(True))
  with pytest.raises(ValueError, match=r"w has shape \(6, 3\); 2:4 needs its reduction axis \(-2\) divisible by 4"):
    js.NMArray.from_dense(w[:6], 2, 4)
  with pytest.raises(ValueError, match=r"w has shape \(8, 3\), its mask \(4, 3\)"):
    js.NMArray.from_dense(w, 2, 4, mask[:4])
  with pytest.raises(ValueError, match="two dimensions"):
    js.NMArray.from_dense(w[0], 2, 4)
  with pytest.raises(TypeError, match="w is int32; allowed are"):
    js.NMArray.from_dense(w.astype(jnp.int32), 2, 4)
  at = tuple(int(i) for i in jnp.argwhere(mask)[0])
  with pytest.raises(ValueError, match="NaN"):
    js.NMArray.from_dense(w.at[at].set(jnp.nan), 2, 4, mask)
  off = tuple(int(i) for i in jnp.argwhere(~mask)[0])
  assert same(js.NMArray.from_dense(w.at[off].set(jnp.nan), 2, 4, mask).to_dense(), w), "NaN off the mask is dropped"


# -- compress ----------------------------------------------------------------------------------------------------------


def pruned_model():
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {
    "embed": normal(10, 8),
    "mlp": {"up": {"kernel": normal(8, 12), "bias": normal(12)}, "down": {"kernel": normal(12, 8), "bias": normal(8)}},
    "conv": normal(3, 3, 4, 8),
    "odd": normal(10, 6),
  }
  rules = js.Rules(("embed", None), ("odd", js.Unstructured()))
  updater = js.magnitude(sparsity=0.5, structure=js.NM(2, 4), rules=rules, schedule=js.schedules.OneShot(at=0))
  return updater, params


def test_compress():
  updater, params = pruned_model()
  pruned, masks = updater.instant_sparsify(params)
  tree, report = js.compress(pruned, masks, structure=js.NM(2, 4), return_report=True)
  assert same(js.compress(pruned, masks, structure=js.NM(2, 4)), tree)
  for name in ("up", "down"):
    assert same(tree["mlp"][name]["kernel"].to_dense(), pruned["mlp"][name]["kernel"])
    assert tree["mlp"][name]["bias"] is pruned["mlp"][name]["bias"]
  found = {leaf.name: leaf for leaf in report.leaves}
  assert found["mlp/up/kernel"].pattern == "2:4" and found["mlp/up/kernel"].bytes_after == 8 * 12 // 2 * 4 + 12
  assert found["mlp/up/bias"].reason == "it has no mask." and found["embed"].reason == "it has no mask."
  assert "HWIO" in found["conv"].reason
  assert found["odd"].reason == "axis -2 of shape (10, 6) is not divisible by 4."
  assert report.bytes_before == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert report.bytes_after == sum(
    leaf.nbytes for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, js.NMArray))
  )
  assert "mlp/up/kernel" in str(report) and "dense: it is a convolution kernel" in str(report)
  assert js.compress(pruned, masks, dtype=jnp.bfloat16)["mlp"]["up"]["kernel"].dtype == jnp.bfloat16


def test_compress_from_the_optimizer_state():
  """Also with packed masks as stored, and with dense storage, whose weights are not zero off the mask."""
  _, params = pruned_model()
  params = params["mlp"]
  magnitude = js.magnitude(structure=js.NM(2, 4), schedule=js.schedules.OneShot(at=0))
  is_packed = lambda mask: isinstance(mask, js.PackedMask)
  for updater, packed in ((magnitude, True), (js.sr_ste(structure=js.NM(2, 4)), False)):
    tx = dataclasses.replace(updater, pack_masks=packed).wrap_optax(optax.sgd(0.01))
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    stored = optax.apply_updates(params, updates)
    masks = js.get_sparsity_state(state).masks if packed else js.get_masks(state)
    assert packed == any(map(is_packed, jax.tree.leaves(masks, is_leaf=is_packed)))
    tree = js.compress(stored, masks, structure=js.NM(2, 4))
    want = updater.sparse_params(stored, state)
    assert same(tree["up"]["kernel"].to_dense(), want["up"]["kernel"])


def test_compress_finds_the_smallest_pattern():
  params = {p: weight(16, 4, *p, seed=i)[0] for i, p in enumerate([(1, 16), (1, 8), (2, 8), (1, 4), (2, 4), (4, 8)])}
  tree = js.compress(params, js.masks_from_zeros(params))
  assert {p: (tree[p].n, tree[p].m) for p in params} == {p: p for p in params}
  loose = {"w": jnp.ones((16, 4)), "fits": params[2, 4]}
  _, report = js.compress(loose, js.masks_from_zeros(loose), return_report=True)
  assert report.leaves[1].reason.startswith("the mask is none of 1:16, 1:8")


def test_compress_containers():
  net = linen.Sequential([linen.Dense(8), linen.Dense(4)])
  params = net.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
  model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
  updater = js.magnitude(structure=js.NM(2, 4), schedule=js.schedules.OneShot(at=0))
  for tree in (params, nnx.state(model, nnx.Param), [jnp.eye(8), jnp.ones(3)]):
    pruned, masks = updater.instant_sparsify(tree)
    out = js.compress(pruned, masks)
    dense = jax.tree.map(
      lambda x: x.to_dense() if isinstance(x, js.NMArray) else x, out, is_leaf=lambda x: isinstance(x, js.NMArray)
    )
    assert same(dense, pruned)
  assert isinstance(js.compress(pruned, masks)[0], js.NMArray)


def test_compress_stacked_layers():
  w, mask, _ = weight(8, 6, 2, 4, stack=(3,))
  tree = js.compress({"w": w}, {"w": mask}, structure=js.NM(2, 4, stack_axes=(0,)))
  assert tree["w"].shape == (3, 8, 6) and same(tree["w"].to_dense(), w)
  with pytest.raises(ValueError, match=r"it has 3 dimensions, a kernel \[K, O\] 2. .*stack_axes=\(0,\)"):
    js.compress({"w": w}, {"w": mask}, structure=js.NM(2, 4))


def test_compress_errors():
  w, mask, _ = weight(8, 8, 2, 4)
  with pytest.raises(
    ValueError, match=r"params\['w'\]: the mask is not 1:4 along axis -2: rows 0-3 of column 0 keep 2"
  ):
    js.compress({"w": w}, {"w": mask}, structure=js.NM(1, 4), on_mismatch="error")
  with pytest.raises(ValueError, match=r"no leaf can be stored[^$]*dense: the mask is not 2:4"):
    js.compress({"w": w.T}, {"w": mask.T.at[:4, 0].set(True)}, structure=js.NM(2, 4))  # the wrong axis
  with pytest.raises(ValueError, match="no leaf can be stored"):
    js.compress({"w": w}, {"w": optax.MaskedNode()})
  with pytest.raises(ValueError, match="another axis than the reduction axis"):
    js.compress({"w": w}, {"w": mask}, structure=js.NM(2, 4, axis=-1))
  with pytest.raises(ValueError, match=r"params\['w'\] has shape \(8, 8\), but masks \(4, 8\)"):
    js.compress({"w": w}, {"w": mask[:4]})
  with pytest.raises(ValueError, match="different trees"):
    js.compress({"w": w}, {"w": mask, "v": mask})
  with pytest.raises(TypeError, match=r"params\['w'\]: compress looks at masks .* outside"):
    jax.jit(lambda w: js.compress({"w": w}, {"w": mask}))(w)
  with pytest.raises(TypeError, match="structure=Channel"):
    js.compress({"w": w}, {"w": mask}, structure=js.Channel())
  with pytest.raises(ValueError, match="on_mismatch='warn'"):
    js.compress({"w": w}, {"w": mask}, on_mismatch="warn")
  assert js.compress({"w": w}, {"w": mask}, structure=js.NM(2, 4, axis=0))["w"].pattern == "2:4"


# -- Files -------------------------------------------------------------------------------------------------------------


def compressed_tree():
  plain = weight(32, 6, 2, 4)[2]
  return {
    "blocks": [{"up": weight(16, 5, 1, 8, jnp.float16)[2]}, {"up": weight(16, 3, 3, 8)[2]}],
    "stacked": weight(8, 6, 2, 4, jnp.bfloat16, stack=(2,))[2],
    "int8": js.quant.quantize(plain, 8, 16, scale_dtype=jnp.bfloat16),
    "int4": js.quant.quantize(plain, 4, 32),
    "bias": jnp.ones(3, jnp.bfloat16),
    "step": jnp.int32(7),
  }


def test_orbax(tmp_path):
  tree = compressed_tree()
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "tree", tree)
    checkpointer.wait_until_finished()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    assert same(checkpointer.restore(tmp_path / "tree", abstract), tree)


def test_safetensors(tmp_path):
  path, tree = tmp_path / "w.safetensors", compressed_tree()
  js.arrays.save_safetensors(path, tree)
  assert same(js.arrays.load_safetensors(path), tree)
  assert same(js.arrays.load_safetensors(path, like=jax.eval_shape(lambda: tree)), tree)
  assert os.listdir(tmp_path) == ["w.safetensors"]
  big = {"w": weight(256, 64, 2, 4, jnp.bfloat16)[2]}
  js.arrays.save_safetensors(path, big)
  assert big["w"].nbytes == 0.5625 * 256 * 64 * 2 <= path.stat().st_size < big["w"].nbytes + 1000


def test_safetensors_of_flax_and_a_bare_array(tmp_path):
  path = tmp_path / "w.safetensors"
  _, _, a = weight(8, 3, 2, 4)
  js.arrays.save_safetensors(path, a)
  assert same(js.arrays.load_safetensors(path), a)
  state = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Param)
  updater = js.magnitude(structure=js.NM(2, 4), schedule=js.schedules.OneShot(at=0))
  state = js.compress(*updater.instant_sparsify(state))
  js.arrays.save_safetensors(path, state)
  assert same(js.arrays.load_safetensors(path, like=state), state)
  assert set(js.arrays.load_safetensors(path)) == {"bias", "kernel"}


def test_safetensors_errors(tmp_path, monkeypatch):
  path, tree = tmp_path / "w.safetensors", {"w": weight(8, 3, 2, 4)[2], "b": jnp.ones(3)}
  with pytest.raises(FileNotFoundError):
    js.arrays.load_safetensors(path)
  js.arrays.save_safetensors(path, tree)
  with pytest.raises(ValueError, match=r"another tree: it lacks \['v'\] and has \['w'\]"):
    js.arrays.load_safetensors(path, like={"v": tree["w"], "b": tree["b"]})
  with pytest.raises(
    ValueError, match=r"'b' is a dense float32 of shape \(3,\), wanted is a dense float32 of shape \(4,\)"
  ):
    js.arrays.load_safetensors(path, like={"w": tree["w"], "b": jnp.ones(4)})
  with pytest.raises(ValueError, match=r"'w' is NMArray\(2:4.*wanted is NMArray\(1:4"):
    js.arrays.load_safetensors(path, like={"w": weight(8, 3, 1, 4)[2], "b": tree["b"]})
  with pytest.raises(ValueError, match="'b' is a dense float32 .*wanted is a dense bfloat16"):
    js.arrays.load_safetensors(path, like={"w": tree["w"], "b": jnp.ones(3, jnp.bfloat16)})
  whole = path.read_bytes()
  path.write_bytes(whole.replace(b'{\\"version\\": 1', b'{\\"version\\": 9', 1))
  with pytest.raises(ValueError, match="has format 9; this jaxsparse reads up to 1"):
    js.arrays.load_safetensors(path)
  path.write_bytes(whole[:-5])
  with pytest.raises(ValueError, match="no complete safetensors file"):
    js.arrays.load_safetensors(path)
  path.write_bytes(whole)
  import safetensors.numpy

  tensors = safetensors.numpy.load(whole)
  with safetensors.safe_open(path, "np") as file:
    metadata = file.metadata()
  tensors["w.indices"] = tensors["w.indices"] * 0
  safetensors.numpy.save_file(tensors, path, metadata)
  with pytest.raises(ValueError, match=r"'w' is damaged. NMArray\(2:4\): indices\[0, 0, 0\] is 0 and the next one 0"):
    js.arrays.load_safetensors(path)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError, match="was not written by save_safetensors"):
    js.arrays.load_safetensors(path)
  with pytest.raises(TypeError, match=r"tree\['o'\] is a"):
    js.arrays.save_safetensors(path, {"o": object()})
  with pytest.raises(ValueError, match="Two leaves are called 'a/b'"):
    js.arrays.save_safetensors(path, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})

  def broken(tensors, partial, metadata):
    partial.write_bytes(b"half")
    raise OSError("disk full")

  path.write_bytes(whole)
  monkeypatch.setattr(safetensors.numpy, "save_file", broken)
  with pytest.raises(OSError, match="disk full"):
    js.arrays.save_safetensors(path, tree)
  assert os.listdir(tmp_path) == ["w.safetensors"] and path.read_bytes() == whole
  monkeypatch.setitem(sys.modules, "safetensors", None)
  with pytest.raises(ImportError, match=r"pip install 'jaxsparse\[safetensors\]'"):
    js.arrays.load_safetensors(path)


# -- What trains -------------------------------------------------------------------------------------------------------


def test_partition():
  tree = compressed_tree()
  trainable, fixed = js.arrays.partition(tree)
  assert same(js.arrays.combine(trainable, fixed), tree)
  assert trainable["stacked"].indices is None and trainable["int8"].values is None and trainable["step"] is None
  assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(trainable))
  assert trainable["int8"].scales is tree["int8"].scales and fixed["stacked"].values is None
  with pytest.raises(ValueError):
    js.arrays.combine(trainable, {"other": fixed})


# -- Quantised values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,m", [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("bits,group", [(8, 16), (8, 64), (4, 16), (4, 64)])
def test_quantize(bits, group, n, m):
  w, _, a = weight(64, 6, n, m)
  q = js.quant.quantize(a, bits, group)
  want, scales = nm_reference.quantize(np.asarray(a.values), bits, group // m)
  assert q.values.dtype == (jnp.int8 if bits == 8 else jnp.int4) and q.bits == bits and q.scale_group == group
  np.testing.assert_allclose(np.asarray(q.scales), scales, rtol=1e-6)
  assert (np.abs(np.asarray(q.values).astype(int) - want) <= 1).all()  # a tie may fall either way
  assert (np.asarray(q.values).astype(int) == want).mean() > 0.99
  limit = np.repeat(np.asarray(q.scales), group, axis=0) / 2
  assert (np.abs(np.asarray(q.to_dense()) - np.asarray(w)) <= limit * (1 + 1e-5)).all(), "half a step at most"
  assert same(js.quant.dequantize(q).to_dense(), q.to_dense())
  np.testing.assert_allclose(
    np.asarray(q.to_dense()),
    nm_reference.dense(np.asarray(q.values), np.asarray(q.indices), m, scales),
    rtol=1e-5,
    atol=1e-7,
  )
  error = np.linalg.norm(np.asarray(q.to_dense() - w)) / np.linalg.norm(np.asarray(w))
  assert error < (0.01 if bits == 8 else 0.12)


def test_quantize_corners():
  _, _, a = weight(16, 3, 2, 4, stack=(2,))
  zero = js.NMArray(a.values.at[0, :2, :, 1].set(0), a.indices, n=2, m=4)
  q = js.quant.quantize(zero, 8, 8)
  assert q.scales.shape == (2, 2, 3) and q.scales[0, 0, 1] == 1 and bool((q.values[0, :2, :, 1] == 0).all())
  coarse = js.quant.quantize(a, 8, 8, scale_dtype=jnp.bfloat16)
  assert int(jnp.abs(coarse.values.astype(jnp.int32)).max()) <= 127 and coarse.dtype == jnp.bfloat16
  assert coarse.astype(jnp.float32).dtype == jnp.float32
  big = js.quant.quantize(weight(256, 128, 2, 4, jnp.bfloat16)[2], 8, 128, scale_dtype=jnp.bfloat16)
  assert big.nbytes / (256 * 128 * 2) == (128 * 128 * 10 / 8 + 2 * 128 * 2) / (256 * 128 * 2)


def test_quantize_errors():
  _, _, a = weight(16, 3, 2, 4)
  with pytest.raises(ValueError, match="bits=3: 8 and 4"):
    js.quant.quantize(a, 3)
  for group in (6, 128, 0, 12):
    with pytest.raises(ValueError, match=f"group={group} .*multiple of 4 that divides K = 16"):
      js.quant.quantize(a, 8, group)
  with pytest.raises(TypeError, match="quantised already"):
    js.quant.quantize(js.quant.quantize(a, 8, 16), 8, 16)
  with pytest.raises(TypeError, match="takes an NMArray"):
    js.quant.quantize(jnp.ones((4, 4)))
  with pytest.raises(TypeError, match="takes a quantised NMArray"):
    js.quant.dequantize(a)
