"""BlockArray: invariants and their errors, round trips, both forms, compress, files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js


def case(block=(4, 8), grid=(3, 5), density=0.4, dtype=np.float32, seed=0):
  """(dense weight with whole blocks removed, block mask)."""
  rng = np.random.default_rng(seed)
  mask = rng.random(grid) < density
  w = rng.normal(size=(grid[0] * block[0], grid[1] * block[1])).astype(dtype)
  return np.where(np.kron(mask, np.ones(block)), w, 0), mask


def array(**change):
  """Three blocks on a grid of 2 x 3, with what the test changes."""
  fields = dict(blocks=jnp.ones((3, 4, 2)), rows=jnp.array([0, 1, 0]), cols=jnp.array([0, 0, 2]), shape=(8, 6))
  fields |= change
  for name in ("rows", "cols"):
    if isinstance(fields[name], list):
      fields[name] = jnp.array(fields[name])
  return js.BlockArray(**fields)


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("block", [(4, 8), (8, 2), (1, 1), (12, 40)])
@pytest.mark.parametrize("static", [False, True])
def test_round_trip(block, density, static):
  grid = (12 // block[0], 40 // block[1])
  w, mask = case(block, grid, density)
  for given in (None, mask, np.kron(mask, np.ones(block, bool))):
    a = js.BlockArray.from_dense(jnp.asarray(w), block, given, static=static)
    assert (a.shape, a.grid, a.block_shape, a.static) == (w.shape, grid, block, static)
    assert int(a.count) == mask.sum() and a.capacity == max(1, mask.sum())
    np.testing.assert_array_equal(a.to_dense(), w)
  assert a.to_dense(jnp.bfloat16).dtype == jnp.bfloat16


def test_mask_entries_win_over_values():
  w = jnp.full((4, 4), jnp.nan).at[:2, :2].set(1.0)
  mask = np.zeros((4, 4), bool)
  mask[0, 0] = True
  a = js.BlockArray.from_dense(w, (2, 2), mask)
  np.testing.assert_array_equal(a.to_dense(), np.eye(4) * mask)


def test_capacity_and_padding():
  w, mask = case()
  a = js.BlockArray.from_dense(jnp.asarray(w), (4, 8), mask, capacity=15)
  assert a.capacity == 15 and int(a.count) == mask.sum()
  assert np.all(np.asarray(a.cols)[mask.sum() :] == 5)
  assert not js.BlockArray.from_dense(jnp.ones(w.shape), (4, 8), mask, capacity=15).blocks[mask.sum() :].any()
  np.testing.assert_array_equal(a.to_dense(), w)
  for capacity in (1, int(mask.sum()) - 1):
    with pytest.raises(ValueError, match=f"do not fit into capacity={capacity}; at least {mask.sum()}"):
      js.BlockArray.from_dense(jnp.asarray(w), (4, 8), mask, capacity=capacity)
  assert (
    js.BlockArray.from_dense(jnp.asarray(w), (4, 8), mask, capacity=mask.sum()).capacity == mask.sum()
  )  # NumPy's int


def test_inside_jit():
  """One compile while the mask changes, and the same array as outside."""
  build = jax.jit(lambda w, mask: js.BlockArray.from_dense(w, (4, 8), mask, capacity=9))
  for seed in range(3):
    w, mask = case(seed=seed, density=0.5)
    keep = np.zeros(15, bool)
    keep[np.random.default_rng(seed).permutation(15)[: 3 * seed]] = True
    keep = keep.reshape(3, 5)
    inside, outside = build(w, keep), js.BlockArray.from_dense(jnp.asarray(w), (4, 8), keep, capacity=9)
    jax.tree.map(np.testing.assert_array_equal, inside, outside)
    dataclasses.replace(inside)  # checks the invariants
  assert build._cache_size() == 1
  with pytest.raises(ValueError, match="say capacity=, .* NumPy array"):
    jax.jit(lambda w, mask: js.BlockArray.from_dense(w, (4, 8), mask))(w, keep)


@pytest.mark.parametrize("capacity", [None, 9])
def test_numpy_masks_are_known_inside_jit(capacity):
  """No capacity is needed, and the static form can be made of them; lists will do."""
  w, mask = case()
  for given in (mask, np.kron(mask, np.ones((4, 8))), mask.tolist()):
    for static in (False, True):
      build = lambda w: js.BlockArray.from_dense(w, (4, 8), given, capacity=capacity, static=static)
      a = jax.jit(build)(jnp.asarray(w))
      assert a.static == static and a.capacity == (capacity or mask.sum())
      np.testing.assert_array_equal(a.to_dense(), w)
  like = build(jnp.asarray(w))
  again = jax.jit(lambda b: js.BlockArray.from_blocks(b[::-1], like.rows[::-1], like.cols[::-1], w.shape, static=True))
  np.testing.assert_array_equal(again(like.blocks).to_dense(), w)


def test_from_blocks_sorts():
  blocks = jnp.arange(24.0).reshape(3, 4, 2)
  a = js.BlockArray.from_blocks(blocks, [0, 1, 0], [2, 0, 0], (8, 6), capacity=5)
  assert a.rows.tolist() == [0, 1, 0, 0, 0] and a.cols.tolist() == [0, 0, 2, 3, 3]
  np.testing.assert_array_equal(a.to_dense()[:4, 4:], blocks[0])
  with pytest.raises(ValueError, match="3 blocks do not fit into capacity=2"):
    js.BlockArray.from_blocks(blocks, [0, 1, 0], [2, 0, 0], (8, 6), capacity=2)
  with pytest.raises(ValueError, match="integers"):
    js.BlockArray.from_blocks(blocks, [0.0, 1, 0], [2, 0, 0], (8, 6))
  for capacity in (0, 3.0, True):
    with pytest.raises(ValueError, match=f"capacity={capacity}; a positive integer"):
      js.BlockArray.from_blocks(blocks, [0, 1, 0], [2, 0, 0], (8, 6), capacity=capacity)
  for rows, message in (([0, 2, 0], "lies at row 2"), ([0, 0, 0], "blocks 0 and 1 overlap")):
    with pytest.raises(ValueError, match=message):
      js.BlockArray.from_blocks(blocks, rows, [2, 0, 0], (8, 6))


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(rows=[0, 0, 0]), r"blocks 0 and 1 overlap, both lie at row 0, column 0"),
    (dict(rows=[1, 0, 0]), r"not sorted by column, then row: block 0 at \(1, 0\) comes before block 1 at \(0, 0\)"),
    (dict(cols=[0, 2, 1]), r"not sorted"),
    (dict(cols=[3, 0, 0]), r"not sorted"),
    (dict(rows=[0, 2, 0]), r"block 1 lies at row 2, column 0; the grid has 2 rows and 3 columns"),
    (dict(cols=[0, 0, 4]), r"block 2 lies at row 0, column 4"),
    (dict(cols=[-1, 0, 0]), r"block 0 lies at row 0, column -1"),
    (dict(blocks=jnp.ones((0, 4, 2)), rows=[], cols=[]), r"capacity 0"),
    (dict(blocks=jnp.ones((3, 5, 2))), r"shape \(8, 6\); blocks of 5x2 need two axes"),
    (dict(blocks=jnp.ones((4, 2))), r"blocks has shape \(4, 2\); allowed is \[N, bk, bo\]"),
    (dict(rows=[0, 1]), r"rows is int32\[2\]; int32 \[3\] is needed"),
    (dict(blocks=jnp.ones((2, 3, 4, 2))), r"Take stacked layers one at a time"),
    (dict(shape=(8, 6, 1)), r"shape=\(8, 6, 1\); two integers \(K, O\)"),
    (dict(shape=8), r"shape=8; two integers \(K, O\)"),
    (dict(shape=(8.5, 6)), r"shape=\(8.5, 6\); two integers \(K, O\)"),
    (dict(shape=(-8, 6)), r"shape \(-8, 6\); blocks of 4x2 need two axes"),
    (dict(rows=np.array([0, 0.5, 0]), static=True), r"rows is float64\[3\]; int32 \[3\] is needed"),
    (dict(rows=np.array([0, 2**32, 0]), static=True), r"rows is int64\[3\]; int32 \[3\] is needed"),
  ],
)
def test_bad_arrays(change, message):
  with pytest.raises(ValueError, match=message):
    array(**change)


def test_bad_types():
  with pytest.raises(TypeError, match="blocks is int32; allowed are bfloat16"):
    array(blocks=jnp.ones((3, 4, 2), jnp.int32))
  with pytest.raises(TypeError, match="rows must be an array, got int"):
    array(rows=3)
  with pytest.raises(TypeError, match="known while tracing"):
    jax.jit(lambda rows: array(rows=rows, static=True))(jnp.array([0, 1, 0]))


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(block_shape=(5, 8)), r"w has shape \(12, 40\); blocks of 5x8 need two axes \[K, O\] divisible by them"),
    (dict(block_shape=(4, 0)), r"block_shape=\(4, 0\); two positive integers"),
    (dict(block_shape=4), r"block_shape=4"),
    (dict(block_shape=(4, 8), capacity=0), r"capacity=0; a positive integer"),
    (dict(block_shape=(4, 8), mask=np.ones((3, 4))), r"its mask \(3, 4\); allowed are \(12, 40\).* and \(3, 5\)"),
  ],
)
def test_bad_dense(kwargs, message):
  with pytest.raises(ValueError, match=message):
    js.BlockArray.from_dense(jnp.ones((12, 40)), **kwargs)
  with pytest.raises(TypeError, match="w is int32"):
    js.BlockArray.from_dense(jnp.ones((12, 40), jnp.int32), (4, 8))


def test_static_and_dynamic():
  w, mask = case()
  dynamic = js.BlockArray.from_dense(jnp.asarray(w), (4, 8), mask)
  static = dynamic.freeze()
  assert len(jax.tree.leaves(static)) == 1 and len(jax.tree.leaves(dynamic)) == 3
  assert static.thaw().freeze().rows.tolist() == static.rows.tolist()
  # The same mask is the same type, another one is not: so `jit` compiles once for a mask.
  dense = jax.jit(lambda a: a.to_dense())
  again = js.BlockArray.from_dense(jnp.asarray(2 * w), (4, 8), mask, static=True)
  for a in (static, again):
    dense(a)
  assert dense._cache_size() == 1
  other = js.BlockArray.from_dense(jnp.asarray(w[::-1].copy()), (4, 8), mask[::-1], static=True)
  assert jax.tree.structure(other) != jax.tree.structure(static) == jax.tree.structure(again)
  with pytest.raises(TypeError, match="known while tracing"):
    jax.jit(lambda a: a.freeze())(dynamic)


def test_tree():
  w, mask = case()
  a = js.BlockArray.from_dense(jnp.asarray(w), (4, 8), mask)
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(a)[0]]
  assert names == [".blocks", ".rows", ".cols"]
  trainable, fixed = js.arrays.partition({"w": a})
  assert trainable["w"].rows is None and fixed["w"].blocks is None
  jax.tree.map(np.testing.assert_array_equal, js.arrays.combine(trainable, fixed), {"w": a})
  assert "BlockArray" in repr(jax.tree.structure(a).unflatten([object()] * 3))
  assert a.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(a))
  assert a.astype(jnp.bfloat16).dtype == jnp.bfloat16
  assert a.density == a.capacity / 15


def test_compress():
  w, mask = case((4, 8), (3, 5))
  wide = np.kron(mask, np.ones((4, 8), bool))
  params = {"a": jnp.asarray(w), "b": jnp.ones(3), "full": jnp.ones((8, 8)), "odd": jnp.ones((6, 8))}
  masks = {"a": wide, "b": np.ones(3, bool), "full": np.ones((8, 8), bool), "odd": np.zeros((6, 8), bool)}
  tree, report = js.compress(params, masks, structure=js.Block((4, 8)), return_report=True, dtype=jnp.bfloat16)
  assert isinstance(tree["a"], js.BlockArray) and tree["a"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(tree["a"].to_dense(), jnp.asarray(w, jnp.bfloat16))
  reasons = {leaf.name: leaf.reason for leaf in report.leaves}
  assert reasons["a"] == "" and "every block of 4x8" in reasons["full"] and "do not tile" in reasons["odd"]
  assert report.leaves[0].pattern == "4x8 blocks" and report.leaves[0].bytes_after == tree["a"].nbytes
  empty = js.compress({"a": params["a"]}, {"a": np.zeros((12, 40), bool)}, structure=js.Block((4, 8)))["a"]
  assert empty.capacity == 1 and int(empty.count) == 0 and not empty.to_dense().any()
  with pytest.raises(ValueError, match="no leaf can be stored as a block-sparse array"):
    js.compress({"full": params["full"]}, {"full": masks["full"]}, structure=js.Block((4, 8)))
  with pytest.raises(TypeError, match="is neither"):
    js.compress(params, masks, structure=js.Channel())


def test_compress_stacked_layers():
  """Layers that keep different numbers of blocks, as `lax.scan` runs over them."""
  w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 16)), jnp.float32)
  units = np.random.default_rng(1).random((3, 2, 4)) < np.array([0.2, 0.5, 0.8])[:, None, None]
  mask = np.kron(units, np.ones((1, 4, 4))).astype(bool)
  block = js.Block((4, 4), stack_axes=0)
  tree, report = js.compress({"w": w}, {"w": jnp.asarray(mask)}, structure=block, return_report=True)
  stacked = tree["w"]
  most = int(units.sum((1, 2)).max())
  assert stacked.ndim == 3 and stacked.capacity == most and stacked.count.tolist() == units.sum((1, 2)).tolist()
  assert repr(stacked) == f"BlockArray(3 x {most} blocks of 4x4, shape=(8, 16), dtype=float32)"
  assert report.leaves[0].pattern == "4x4 blocks" and report.leaves[0].bytes_after == stacked.nbytes
  assert stacked.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(stacked))
  np.testing.assert_array_equal(stacked.to_dense(), np.where(mask, w, 0))
  x = jnp.ones((5, 8))
  _, y = jax.lax.scan(lambda _, layer: (None, js.ops.block_matmul(x, layer)), None, stacked)
  np.testing.assert_allclose(y, jnp.where(mask, w, 0).sum(1, keepdims=True).repeat(5, 1), rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match="one layer is needed"):
    js.ops.block_matmul(x, stacked)


def test_compress_after_pruning():
  params = {"k": jax.random.normal(jax.random.key(0), (32, 32))}
  pruned, masks = js.magnitude(sparsity=0.75, stop=1, structure=js.Block((8, 8))).instant_sparsify(params)
  tree = js.compress(pruned, masks, structure=js.Block((8, 8)))
  assert int(tree["k"].count) == 4
  np.testing.assert_array_equal(tree["k"].to_dense(), pruned["k"])


@pytest.mark.parametrize("static", [False, True])
def test_files(tmp_path, static):
  pytest.importorskip("safetensors")
  w, mask = case()
  tree = {"w": js.BlockArray.from_dense(jnp.asarray(w), (4, 8), mask, static=static), "b": jnp.ones(2)}
  js.arrays.save_safetensors(tmp_path / "w.safetensors", tree)
  for like in (None, tree):
    back = js.arrays.load_safetensors(tmp_path / "w.safetensors", like)
    assert back["w"].static == static and back["w"].shape == (12, 40)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
  with pytest.raises(ValueError, match="wanted is a dense"):
    js.arrays.load_safetensors(tmp_path / "w.safetensors", {"w": jnp.ones((12, 40)), "b": jnp.ones(2)})
