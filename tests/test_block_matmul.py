"""Block-sparse products: every implementation and gradient against float64, one compile, plans, errors."""

import dataclasses
import functools

import four_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import all_products64
from block_cases import case
from block_cases import float64
from block_cases import limit
from block_cases import relative_error

import jaxsparse as js
from jaxsparse.ops import _dispatch
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.block_matmul import api
from jaxsparse.ops.block_matmul import arg_specs
from jaxsparse.ops.block_matmul import choice as choices
from jaxsparse.ops.block_matmul import preference
from jaxsparse.ops.sampled_matmul import api as sampled_api

PORTABLE = ("reference", "xla", "dense")


def all_products(x, w, dy, **kwargs):
  return (
    js.ops.block_matmul(x, w, **kwargs),
    js.ops.block_matmul_transposed(dy, w, **kwargs),
    js.ops.sampled_matmul(x, dy, w, **kwargs),
  )


# -- Forward, transposed, sampled --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(len(arg_specs.ARG_SPECS)), ids=lambda i: arg_specs.ARG_SPECS[i].name)
def test_arg_specs(at):
  """Every shape at toy size; blocks and densities take turns."""
  toy = arg_specs.ARG_SPECS[at].toy()
  block = arg_specs.BLOCKS[at % 3]
  grid = (toy.k // block[0], toy.o // block[1])
  x, w, dy = case(block, grid, arg_specs.DENSITIES[at % 5], toy.batches[0])
  for implementation in PORTABLE:
    for got, want in zip(all_products(x, w, dy, implementation=implementation), all_products64(x, w, dy)):
      assert got.shape == want.shape and relative_error(got, want) < limit(got.dtype)


MASKS = {
  "all zero": np.zeros((3, 4)),
  "all dense": np.ones((3, 4)),
  "empty row and column": np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]),
  "one block": np.eye(3, 4) * [[0], [1], [0]],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("static", [False, True])
def test_patterns(mask, static):
  x, w, dy = case((8, 4), (3, 4), 1, 5, mask=MASKS[mask], extra=2, static=static)
  for implementation in (*PORTABLE, None):
    for got, want in zip(all_products(x, w, dy, implementation=implementation), all_products64(x, w, dy)):
      assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes(dtype):
  x, w, dy = case((8, 4), (3, 4), 0.5, 5, dtype)
  for implementation in PORTABLE:
    for out in (None, jnp.float32):
      for got, want in zip(
        all_products(x, w, dy, implementation=implementation, preferred_element_type=out), all_products64(x, w, dy)
      ):
        assert got.dtype == (out or dtype) and relative_error(got, want) < limit(got.dtype)


def test_chunks(monkeypatch):
  """Blocks are taken in chunks where all at once would need much memory; a last chunk may be short."""
  from jaxsparse.ops.block_matmul import reference
  from jaxsparse.ops.sampled_matmul import reference as sampled

  x, w, dy = case((8, 4), (4, 4), 0.7, 5, extra=2)
  monkeypatch.setattr(reference, "_CHUNK", 5 * 8 * 4)
  monkeypatch.setattr(sampled, "_CHUNK", 5 * 12 * 3)
  want = all_products64(x, w, dy)
  got = (reference.xla(x, w, False, "float32"), reference.xla(dy, w, True, "float32"), sampled.xla(x, dy, w, "float32"))
  for a, b in zip(got, want):
    assert relative_error(a, b) < 1e-6


def test_shapes():
  """No batch axes, several, none at all; vmap over x, w and both; scan over stacked layers."""
  x, w, dy = case((4, 2), (3, 4), 0.5, 6, extra=1)
  want, want_t, want_s = all_products64(x, w, dy)
  assert relative_error(js.ops.block_matmul(x[0], w), want[0]) < 1e-6
  assert relative_error(js.ops.block_matmul(x.reshape(2, 3, -1), w), want.reshape(2, 3, -1)) < 1e-6
  assert relative_error(js.ops.sampled_matmul(x.reshape(2, 3, -1), dy.reshape(2, 3, -1), w), want_s) < 1e-6
  assert relative_error(jax.vmap(lambda x: js.ops.block_matmul(x, w))(x), want) < 1e-6
  other = dataclasses.replace(w, blocks=2 * w.blocks)
  stacked = jax.tree.map(lambda *a: jnp.stack(a), w, other)
  both = jax.vmap(js.ops.block_matmul, in_axes=(None, 0))(x, stacked)
  _, scanned = jax.lax.scan(lambda c, layer: (c, js.ops.block_matmul(x, layer)), None, stacked)
  for got in (both, scanned):
    assert relative_error(got, np.stack([want, 2 * want])) < 1e-6


@pytest.mark.parametrize("implementation", PORTABLE)
def test_no_rows(implementation):
  """Products of nothing are empty, and sums of nothing 0."""
  x, w, dy = case((4, 2), (3, 4), 0.5, 6)
  y, dx, blocks = all_products(x[:0], w, dy[:0], implementation=implementation)
  assert y.shape == (0, 8) and dx.shape == (0, 12) and blocks.shape == w.blocks.shape and not blocks.any()


SHARDED = """
import dataclasses, jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
import jaxsparse as js
from jaxsparse.ops.block_matmul import reference
reference._CHUNK = 40  # a loop over blocks, whose sums vary with x
rng = np.random.default_rng(0)
dense, mask = jnp.asarray(rng.normal(size=(12, 8)), jnp.float32), rng.random((3, 4)) < 0.6
x = jnp.asarray(rng.normal(size=(8, 12)), jnp.float32)
mesh = jax.make_mesh((4,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
near = lambda a, b: jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), a, b)
fan = js.FixedFanInArray.from_dense(dense, 3, js.selection.topk_mask(jnp.abs(dense), 3, axis=0))
w = js.BlockArray.from_dense(dense, (4, 2), mask, capacity=10)
masked = lambda x, w: js.ops.masked_block_matmul(x, w, mask, (4, 2), capacity=9)
ops = [(lambda x, w, i=i: js.ops.block_matmul(x, w, implementation=i), v) for v in (w, w.freeze()) for i in ("xla", "dense")]
for op, w in [*ops, (js.ops.fan_in_matmul, fan), (masked, dense)]:
  trainable, fixed = js.arrays.partition(w)
  loss = lambda f: lambda x, t: (f(x, js.arrays.combine(t, fixed)) ** 2).sum()
  for check in (True, False):
    split = jax.shard_map(op, mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"), check_vma=check)
    run = jax.jit(jax.value_and_grad(loss(split), (0, 1)))
    near(run(x, trainable), jax.value_and_grad(loss(op), (0, 1))(x, trainable))
"""


def test_sharded():
  """Rows of x split over four devices by shard_map: gradients of the replicated weight are their sum."""
  four_devices.run(SHARDED)


def test_strict_promotion():
  x, w, dy = case((4, 2), (3, 4), 0.5, 6, jnp.bfloat16)
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    for implementation in PORTABLE:
      dx = jax.grad(lambda x: js.ops.block_matmul(x, w, implementation=implementation).sum())(x)
      assert dx.dtype == x.dtype and dx.shape == x.shape


# -- Gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("static", [False, True])
def test_gradients(implementation, static):
  """Of each product, against jax.vjp of the plain formula on the dense weight."""
  x, w, dy = case((4, 8), (3, 2), 0.6, 5, extra=0 if static else 2, static=static)
  g = jnp.asarray(np.random.default_rng(1).normal(size=w.blocks.shape), jnp.float32)
  trainable, fixed = js.arrays.partition(w)
  build = lambda t: js.arrays.combine(t, fixed)
  live = (np.asarray(w.cols) < w.grid[1])[:, None, None]

  def dense(t):
    b = build(t)
    return b.to_dense()

  def plain_sampled(x, dy):
    tiles = (x.T @ dy).reshape(3, 4, 2, 8).transpose(0, 2, 1, 3)
    return jnp.where(live, tiles[np.asarray(w.rows), np.minimum(np.asarray(w.cols), 1)], 0)

  pairs = [
    (lambda x, t: js.ops.block_matmul(x, build(t), implementation=implementation), lambda x, t: x @ dense(t), x, dy),
    (
      lambda x, t: js.ops.block_matmul_transposed(x, build(t), implementation=implementation),
      lambda x, t: x @ dense(t).T,
      dy,
      x,
    ),
  ]
  for op, plain, operand, cotangent in pairs:
    got, want = (jax.vjp(f, operand, trainable)[1](cotangent) for f in (op, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)
  op = lambda x, dy, b: js.ops.sampled_matmul(x, dy, dataclasses.replace(w, blocks=b), implementation=implementation)
  *got, unread = jax.vjp(op, x, dy, w.blocks)[1](g)
  want = list(jax.vjp(plain_sampled, x, dy)[1](g))
  assert not unread.any()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


def test_second_derivative():
  x, w, _ = case((4, 2), (3, 4), 0.5, 6)
  loss = lambda x, b: jnp.sum(js.ops.block_matmul(x, dataclasses.replace(w, blocks=b)) ** 3)
  plain = lambda x, b: jnp.sum((x @ dataclasses.replace(w, blocks=b).to_dense()) ** 3)
  second = lambda f: jax.grad(lambda x, b: jnp.sum(jax.grad(f, 1)(x, b) ** 2), (0, 1))(x, w.blocks)
  for got, want in zip(second(loss), second(plain)):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3 * np.abs(want).max())


def test_padding_has_no_gradient():
  """Whatever the values of slots without a block are."""
  x, w, dy = case((4, 2), (3, 4), 0.3, 6, extra=3)
  w = dataclasses.replace(w, blocks=w.blocks.at[-3:].set(jnp.nan))
  grads = jax.grad(lambda b: jnp.sum(js.ops.block_matmul(x, dataclasses.replace(w, blocks=b))))(w.blocks)
  assert np.isfinite(grads).all() and not grads[-3:].any()
  for implementation in PORTABLE:
    assert all(np.isfinite(a).all() for a in all_products(x, w, dy, implementation=implementation))


# -- Changing masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["xla", None])
def test_one_compile_while_the_mask_changes(implementation):
  @jax.jit
  def step(x, w, dy):
    product = lambda x, b: js.ops.block_matmul(x, dataclasses.replace(w, blocks=b), implementation=implementation)
    y, pull = jax.vjp(product, x, w.blocks)
    return y, *pull(dy)

  for seed in range(4):
    x, w, dy = case((8, 4), (4, 5), 0.2 * seed, 6, seed=seed)
    w = js.BlockArray.from_dense(w.to_dense(), (8, 4), capacity=20)
    for got, want in zip(step(x, js.ops.plan_blocks(w), dy), all_products64(x, w, dy)):
      assert relative_error(got, want) < 1e-6
  assert step._cache_size() == 1


def test_masked_block_matmul_overflows_to_dense():
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 16), (16, 12)))
  run = jax.jit(functools.partial(js.ops.masked_block_matmul, block_shape=(4, 4), capacity=3))
  for count in (0, 2, 3, 4, 12):
    mask = np.zeros(12, bool)
    mask[rng.permutation(12)[:count]] = True
    mask = mask.reshape(4, 3)
    kept = float64(w) * np.kron(mask, np.ones((4, 4)))
    np.testing.assert_allclose(run(x, w, mask), float64(x) @ kept, atol=1e-5)
    dx, dw = jax.grad(lambda x, w: jnp.sum(run(x, w, mask) ** 2), (0, 1))(x, w)
    np.testing.assert_allclose(dw, (float64(x).T @ (2 * float64(x) @ kept)) * np.kron(mask, np.ones((4, 4))), atol=1e-3)
    np.testing.assert_allclose(dx, 2 * float64(x) @ kept @ kept.T, atol=1e-3)
  assert run._cache_size() == 1
  for change, message in (
    (dict(mask=np.ones((3, 3))), r"one entry for each block of 4x4: \(4, 3\)"),
    (dict(mask=np.ones(4)), "mask has shape"),
    (dict(block_shape=(5, 4)), "blocks of 5x4 need two axes"),
    (dict(block_shape=(4,)), r"block_shape=\(4,\); two positive integers"),
    (dict(capacity=0), "capacity=0; a positive integer"),
    (dict(x=x[:, :3]), "the last axis of x must be 16"),
    (dict(mask=None), "mask is a NoneType; a dense weight and a mask"),
    (dict(w=js.BlockArray.from_dense(w, (4, 4))), "w is a BlockArray; a dense weight"),
    (dict(x=x.astype(jnp.bfloat16)), "x is bfloat16, w float32; make them equal"),
  ):
    arguments = dict(x=x, w=w, mask=np.ones((4, 3)), block_shape=(4, 4), capacity=3) | change
    with pytest.raises((ValueError, TypeError), match=message):
      js.ops.masked_block_matmul(**arguments)


@pytest.mark.parametrize("axis", ["rows", "reduction"])
def test_compact(axis):
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((12, 12), (12, 5)))
  x = x.at[0, 0].set(jnp.nan)  # what is masked may be anything
  run = jax.jit(functools.partial(js.ops.compact_matmul, axis=axis, capacity=2))
  for kept in ([], [2], [1, 5], [1, 3, 5], [1, 2, 3, 4]):
    mask = np.isin(np.arange(6), kept)
    keep = np.repeat(mask, 2)
    if axis == "rows":
      want = np.where(keep[:, None], float64(x), 0) @ float64(w)
    else:
      want = np.where(keep, float64(x), 0) @ np.where(keep[:, None], float64(w), 0)
    np.testing.assert_allclose(run(x, w, mask), want, atol=1e-5)
    grads = jax.grad(lambda w: jnp.sum(run(x, w, mask)))(w)
    assert np.isfinite(grads).all()
  assert run._cache_size() == 1
  found = js.ops.compact(mask, np.int64(2))  # more than fit: the first of them, and how many there are
  assert (found.indices.tolist(), int(found.count)) == ([1, 2], 4)
  with pytest.raises(ValueError, match="capacity=0"):
    js.ops.compact(mask, 0)
  with pytest.raises(ValueError, match="one dimension"):
    js.ops.compact(mask[None], 2)
  with pytest.raises(ValueError, match="must divide the axis"):
    js.ops.compact_matmul(x, w, np.ones(5, bool), axis=axis, capacity=2)
  with pytest.raises(ValueError, match="axis='columns'"):
    js.ops.compact_matmul(x, w, mask, axis="columns", capacity=2)
  for a, b in ((x.astype(jnp.bfloat16), w), (x.astype(int), w.astype(int))):
    with pytest.raises(TypeError, match=f"x is {a.dtype} and w {b.dtype}; one of bfloat16"):
      js.ops.compact_matmul(a, b, mask, axis=axis, capacity=2)


# -- Plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(32, 32), (64, 128), (128, 64), (256, 32)])
@pytest.mark.parametrize("density", [0.0, 0.3])
def test_plans(block, density):
  """Every block appears once in each plan, where it belongs; static and dynamic plans are equal."""
  grid = (512 // block[0], 384 // block[1])
  _, w, _ = case(block, grid, density, 1, extra=3)
  plans = js.ops.plan_blocks(w).plan
  jax.tree.map(np.testing.assert_array_equal, plans, _plan.plans_of(w.freeze()))
  stale = dataclasses.replace(w, plan=jax.tree.map(lambda a: a + 1, plans))
  jax.tree.map(np.testing.assert_array_equal, js.ops.plan_blocks(stale).plan, plans)
  assert stale.freeze().plan is None
  n, rows, cols = w.capacity, np.asarray(w.rows), np.asarray(w.cols)
  for name, major, minor, size in (("forward", cols, rows, block[1]), ("transposed", rows, cols, block[0])):
    plan, shared, own = jax.tree.map(np.asarray, getattr(plans, name)), max(1, 128 // size), max(1, 64 // size)
    seen = []
    for which, (lo, hi) in enumerate(zip(plan.starts[:-1], plan.starts[1:])):
      entries = plan.minor[lo:hi]
      assert (np.diff(entries) > 0).all()
      for e in range(lo, hi):
        slots = plan.slots[e * shared : (e + 1) * shared]
        assert (slots < n).any()
        for j, slot in enumerate(slots):
          if slot < n:
            seen.append(slot)
            place = which if shared == 1 else plan.units[2 * which + j // own] * own + j % own
            assert (major[slot], minor[slot]) == (place, plan.minor[e])
    assert sorted(seen) == list(range(int(w.count)))
    check_parts(plan)


@pytest.mark.parametrize("side, density", [(128, 0.3), (64, 0.1), (64, 0.5), (32, 0.1), (32, 0.5)])
def test_sampled_plan(side, density):
  """Every kept block lies in one tile, whichever the height of tiles, and empty slots are listed."""
  _, w, _ = case((side, side), (9, 40), density, 1, extra=3, static=True)
  plan, kept, n = _plan.plans_of(w).sampled, w.count, w.capacity
  height = _plan.sampled_height(w.grid, w.block_shape, w.density)
  assert height == (128 if side == 128 or density == 0.5 else 64)
  square = 8192 // side, 8192 // side
  assert _plan.sampled_height(square, (side, side), w.density) == (height if side > 32 else 128)
  shared, most = max(1, height // side), _plan.sampled_entries(side, height)
  number, empty = plan.counts
  pieces = plan.items[:number, 1:]
  assert (pieces[:, 1] - pieces[:, 0] <= most).all() and (pieces[:, 1] > pieces[:, 0]).all()
  entries = np.concatenate([np.arange(*piece) for piece in pieces])
  slots = plan.slots.reshape(-1, shared)[entries]
  assert np.sort(slots[slots < n]).tolist() == list(range(kept)) and len(set(entries)) == len(entries)
  columns = np.where(slots < n, w.cols[np.minimum(slots, n - 1)], plan.minor[entries][:, None])
  assert (columns == plan.minor[entries][:, None]).all()
  if height == 64:  # neighbouring block rows, in their order
    lists = np.repeat(plan.items[:number, 0], np.diff(pieces).ravel())
    rows = np.where(slots < n, w.rows[np.minimum(slots, n - 1)], -1)
    want = lists[:, None] * shared + np.arange(shared)
    assert (np.where(rows >= 0, rows, want) == want).all()
  assert empty == 3 and plan.empty[:3].tolist() == list(range(kept, n))


def test_pieces_fill_rounds():
  """More and shorter pieces where the longest possible would leave a third of the last round empty, and only there."""
  for counts, block, height, want in (
    ([22, 26] * 32, (64, 64), 64, [4, 4] * 32),  # longest: 3 and 4, 224 tiles for 2 x 132 multiprocessors
    ([22, 26] * 26, (64, 64), 64, [3, 4] * 26),  # 182: those of the second round can be cut among multiprocessors
    ([4, 5] * 40, (64, 64), 64, [1, 1] * 40),  # as few as these are loaded faster than multiplied
    ([21, 0, 3] * 50, (128, 128), 128, [11, 0, 2] * 50),
    ([2, 3, 0, 4] * 20, (256, 64), 128, [1, 1, 0, 1] * 20),
    ([2, 1, 1, 0] * 18, (64, 256), 128, [2, 1, 1, 0] * 18),
  ):
    counts = np.array(counts, np.int32)
    got = _plan._pieces(np, counts, block, height)
    assert got.tolist() == want
    np.testing.assert_array_equal(jax.jit(lambda a: _plan._pieces(jnp, a, block, height))(counts), got)


def check_parts(plan):
  """Every entry is in one part; parts come longest first, those of a list together, and name the places of their sums."""
  live, lists = int(plan.parts[0]), plan.starts.shape[0] - 1
  parts, places = plan.parts[_plan.HEADER :].reshape(-1, _plan.PART)[:live], []
  assert lists <= live <= lists + _plan.extra_parts(lists) == (plan.parts.shape[0] - _plan.HEADER) // _plan.PART
  covered = sorted((begin, end) for _, begin, end, *_ in parts if begin < end)
  assert [a for a, _ in covered] == [0, *(b for _, b in covered)][: len(covered)]
  assert max((b for _, b in covered), default=0) == plan.starts[-1]
  i, longest = 0, []
  while i < live:
    which, begin, _, _, pieces, place = parts[i]
    mine = parts[i : i + pieces]
    assert begin == plan.starts[which] and mine[-1, 2] == plan.starts[which + 1]
    assert (
      (mine[:, 0] == which).all() and mine[:, 3].tolist() == list(range(pieces)) and (mine[:, 4:] == mine[0, 4:]).all()
    )
    places += range(place, place + pieces - 1)
    longest.append((mine[:, 2] - mine[:, 1]).max())
    i += pieces
  assert places == list(range(len(places))) and len(longest) == lists and (np.diff(longest) <= 0).all()


@pytest.mark.parametrize(
  "lengths", [[60, 3, 3, 90, 3, 3, 3, 3, 3, 3, 3, 9], [100, 90, 80, 70] + [1] * 60, [7] * 5, [50], [0, 0]]
)
@pytest.mark.parametrize("depth", [32, 256])
def test_long_lists_are_cut(lengths, depth):
  starts = np.append(0, np.cumsum(lengths)).astype(np.int32)
  parts = _plan._parts(np, starts, depth)
  np.testing.assert_array_equal(parts, jax.jit(lambda a: _plan._parts(jnp, a, depth))(starts))
  check_parts(_plan.Plan(minor=None, slots=None, starts=starts, parts=parts, units=None, whole=None))
  # There is always room for cuts at three times the mean; short lists are not cut.
  long = [n for n in lengths if n > max(3 * np.mean(lengths), _plan._LEAST / depth)]
  assert (parts[0] > len(lengths)) == bool(long)


class _Rounded(np.ndarray):
  """Quotients in float32 that are `ulps` off, as XLA's on a GPU may be."""

  ulps = 0

  def __truediv__(self, other):
    quotient = (np.asarray(self) / np.asarray(other)).astype(np.float32)
    return (quotient * np.float32(1 + self.ulps * 2.0**-23)).view(type(self))


@pytest.mark.parametrize("ulps", [-1, 1])
def test_cuts_need_no_exact_division(ulps, monkeypatch):
  """No entry is lost where quotients of multiples lie beside integers."""
  monkeypatch.setattr(_Rounded, "ulps", ulps)
  for lengths in ([100, 90, 80, 70] + [1] * 60, [96] + [3] * 31, [60, 48, 36] + [0] * 45):
    starts = np.append(0, np.cumsum(lengths)).astype(np.int32)
    got = np.asarray(_plan._parts(np, starts.view(_Rounded), 128))
    check_parts(_plan.Plan(minor=None, slots=None, starts=starts, parts=got, units=None, whole=None))
    np.testing.assert_array_equal(got, _plan._parts(np, starts, 128))


def test_plan_puts_columns_with_common_rows_together():
  mask = np.zeros((6, 6), bool)
  mask[:2, [0, 3]] = mask[2:4, [1, 5]] = mask[4:, [2, 4]] = True
  _, w, _ = case((64, 64), mask.shape, 1, 1, mask=mask)
  plan = js.ops.plan_blocks(w).plan.forward
  assert sorted(map(sorted, np.asarray(plan.units).reshape(-1, 2).tolist())) == [[0, 3], [1, 5], [2, 4]]
  assert np.diff(plan.starts).tolist() == [2, 2, 2]  # and not 4 of neighbours


# -- Kernels under transformations -------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
  """A device that says it is an H100, and kernels that run anywhere; the rows of x that each of them gets."""
  from jaxsparse.ops import _mosaic_gpu
  from jaxsparse.ops.block_matmul import _hopper
  from jaxsparse.ops.block_matmul import reference
  from jaxsparse.ops.sampled_matmul import _hopper as sampled_hopper
  from jaxsparse.ops.sampled_matmul import reference as sampled_reference

  rows = []

  def product(x, w, *, transposed, out_dtype):
    assert x.dtype == w.dtype, "kernels want one dtype"
    rows.append(("dx" if transposed else "fwd", x.shape[0]))
    return reference.reference(x, w, transposed, out_dtype)

  def sampled(x, dy, at, *, out_dtype):
    assert x.dtype == dy.dtype == at.dtype, "kernels want one dtype"
    rows.append(("dw", x.shape[0]))
    return sampled_reference.reference(x, dy, at, out_dtype)

  monkeypatch.setattr(_dispatch, "current_target", lambda: _dispatch.Target("gpu", "NVIDIA H100 80GB HBM3", (9, 0)))
  monkeypatch.setattr(_mosaic_gpu, "unavailable", lambda: None)
  monkeypatch.setattr(_hopper, "block_matmul_hopper", product)
  monkeypatch.setattr(sampled_hopper, "sampled_matmul_hopper", sampled)
  for function in (api._run, sampled_api._run):
    function.clear_cache()
  yield rows
  for function in (api._run, sampled_api._run):
    function.clear_cache()


def test_kernels_under_vmap(kernels):
  """vmap over x alone is one product of more rows; over weights, and of sums over rows, a loop."""
  x, w, dy = case((32, 32), (2, 3), 0.5, 6, jnp.bfloat16)
  want, want_dx, want_dw = all_products64(x, w, dy)
  product = lambda x, w, **more: js.ops.block_matmul(x, w, implementation="hopper", **more)
  wide = jax.vjp(lambda x: product(x, w, preferred_element_type=jnp.float32), x)[1](dy.astype(jnp.float32))[0]
  assert wide.dtype == jnp.bfloat16 and relative_error(wide, want_dx) < limit(jnp.bfloat16)
  twice = jax.vmap(product, (0, None))(jnp.stack([x, 2 * x]), w)
  # What is traced last is what runs.
  assert kernels[-1] == ("fwd", 12) and relative_error(twice, np.stack([want, 2 * want])) < limit(jnp.bfloat16)
  other = dataclasses.replace(w, blocks=2 * w.blocks)
  stacked = jax.tree.map(lambda *a: jnp.stack(a), w, other)
  for xs, axes in ((x, (None, 0)), (jnp.stack([x, x]), (0, 0))):
    kernels.clear()
    both = jax.vmap(product, axes)(xs, stacked)
    assert set(kernels) <= {("fwd", 6)} and relative_error(both, np.stack([want, 2 * want])) < limit(jnp.bfloat16)
  kernels.clear()
  pull = lambda x, dy: jax.vjp(lambda x, b: product(x, dataclasses.replace(w, blocks=b)), x, w.blocks)[1](dy)
  dx, dw = jax.vmap(pull)(jnp.stack([x, x]), jnp.stack([dy, 2 * dy]))
  assert {("dw", 6), ("dx", 12)} <= set(kernels) and ("dw", 12) not in kernels
  for got, one in ((dx, want_dx), (dw, want_dw)):
    assert got.dtype == jnp.bfloat16 and relative_error(got, np.stack([one, 2 * one])) < limit(jnp.bfloat16)


def test_each_product_goes_dense_by_itself(kernels, monkeypatch):
  """The backward pass of a kernel takes the dense dot where that was faster, and the other way round."""
  x, w, dy = case((32, 32), (2, 3), 0.5, 6, jnp.bfloat16)
  for dense in ("fwd", "dx", "dw"):
    limits = {"fwd": 1.0, "dx": 1.0, "dw": 1.0} | {dense: 0.1}
    rows = [[64, 96, "32x32", 8, product, limit] for product, limit in limits.items()]
    monkeypatch.setattr(preference, "measured", lambda rows=rows: {"device": "an H100", "rows": rows})
    first = js.ops.which_block_matmul(x, w)
    call = choices.call(first, "fwd", 6, w, None, jnp.bfloat16)
    taken = {"fwd": call.fwd, "dx": call.dx, "dw": call.dw}
    assert taken == {"fwd": "hopper", "dx": "hopper", "dw": "hopper"} | {dense: "dense"} and not call.strict
  for batch, name in ((0, "xla"), (6, "hopper")):
    monkeypatch.setattr(preference, "PORTABLE_BREAK_EVEN", 1.0)
    assert choices.choose("fwd", batch, w.dtype, w, None, w.dtype).implementation == name


def test_break_even_is_that_of_the_nearest_measurement(monkeypatch):
  """By product, narrower side of the blocks, shape and rows of x; up to and with that density kernels run."""
  rows = [[64, 256, "32x32", 8, "fwd", 0.1], [64, 256, "128x128", 8, "fwd", 0.2], [64, 256, "32x32", 512, "fwd", 0.3],
          [4096, 256, "32x32", 8, "fwd", 0.4], [64, 4096, "32x32", 8, "fwd", 0.5], [64, 256, "32x32", 8, "dw", 0.6]]  # fmt: skip
  monkeypatch.setattr(preference, "measured", lambda: {"device": "an H100", "rows": rows})
  limit = lambda block, grid, batch, product="fwd": preference.break_even(case(block, grid, 0.5, 1)[1], batch, product)[
    0
  ]
  assert limit((32, 128), (2, 2), 8) == limit((128, 32), (1, 8), 8) == limit((32, 32), (2, 8), 1) == 0.1
  assert limit((128, 256), (1, 1), 8) == 0.2 and limit((32, 128), (2, 2), 400) == 0.3
  assert limit((32, 32), (99, 8), 8) == 0.4 and limit((32, 32), (2, 99), 8) == 0.5
  assert limit((32, 128), (2, 2), 8, "dw") == 0.6
  w = case((32, 128), (2, 5), 1, 1, mask=[[1, 0, 0, 0, 0], [0] * 5])[1]
  target = _dispatch.Target("gpu", "NVIDIA H100 80GB HBM3", (9, 0))
  assert w.density == 0.1 and preference.order(w, target, 8, "fwd")[0][0] == "hopper"


# -- Which implementation, and errors ----------------------------------------------------------------------------------


def test_which():
  x, w, dy = case((64, 64), (4, 4), 0.3, 8, jnp.bfloat16)
  choice = js.ops.which_block_matmul(x, w)
  assert choice.implementation == "xla" and "needs an NVIDIA GPU" in choice.rejected["hopper"]
  full = js.BlockArray.from_dense(jnp.ones((256, 256), jnp.bfloat16), (64, 64))
  assert js.ops.which_block_matmul(x, full).implementation == "dense"
  with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
    js.ops.block_matmul(x, w, implementation="hopper")
  with pytest.raises(ValueError, match="implementation='fast' is unknown"):
    js.ops.block_matmul(x, w, implementation="fast")


def test_errors():
  x, w, dy = case((4, 2), (3, 4), 0.5, 6)
  with pytest.raises(TypeError, match="w is a .*; a BlockArray"):
    js.ops.block_matmul(x, jnp.ones((12, 8)))
  with pytest.raises(ValueError, match="the last axis of x must be 12"):
    js.ops.block_matmul(dy, w)
  with pytest.raises(ValueError, match="the last axis of x must be 8"):
    js.ops.block_matmul_transposed(x, w)
  with pytest.raises(TypeError, match="make them equal"):
    js.ops.block_matmul(x.astype(jnp.bfloat16), w)
  with pytest.raises(TypeError, match="block_matmul: x is int32; allowed are"):
    js.ops.block_matmul(x.astype(int), w)
  for bad in ("int8", "nothing"):
    with pytest.raises(TypeError, match=f"block_matmul: preferred_element_type='?{bad}'?; allowed are bfloat16"):
      js.ops.block_matmul(x, w, preferred_element_type=bad)
  with pytest.raises(ValueError, match=r"dy must be \(6, 8\)"):
    js.ops.sampled_matmul(x, dy[:3], w)
  with pytest.raises(TypeError, match="sampled_matmul: at is a ndarray; a BlockArray"):
    js.ops.sampled_matmul(x, dy, np.ones((3, 4), bool))
  with pytest.raises(TypeError, match="plan_blocks takes a BlockArray"):
    js.ops.plan_blocks(x)
  with pytest.raises(ValueError, match="one layer is needed"):
    api.block_matmul(x, jax.tree.map(lambda a: a[None], w))
