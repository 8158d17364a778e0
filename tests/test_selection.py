"""Tests of selection.py against a slow, obvious NumPy reference."""

import functools
import os
import subprocess
import sys
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import selection as sel


PATHS = ("bisection", "search")  # what small and large leaves take


@functools.lru_cache(maxsize=None)
def jitted(name, path, static):
  return jax.jit(functools.partial(getattr(sel, name)), static_argnames=static)


def run(name, path, *args, **static):
  """A jitted function of selection.py on one of the two ways to a threshold (chosen while tracing)."""
  with mock.patch.object(sel, "_SMALL_SIZE", {"bisection": 1 << 62, "search": 0}[path]):
    return jitted(name, path, tuple(static))(*args, **static)


def topk(scores, keep, axis=None, path="bisection"):
  return run("topk_mask", path, scores, keep, axis=axis)


def norm_axes(axis, ndim):
  return tuple(range(ndim)) if axis is None else tuple(sorted(a % ndim for a in np.atleast_1d(axis)))


def group_shape(shape, axis):
  axes = norm_axes(axis, len(shape))
  return tuple(1 if a in axes else n for a, n in enumerate(shape))


def order(row):
  """Indices from best to worst: NaN last, ties by index."""
  s = np.asarray(row).astype(np.float64)
  nan = np.isnan(s)
  return np.lexsort((np.arange(s.size), -np.where(nan, 0, s), nan))


def by_group(f, axis, out, *arrays):
  """Applies f to each group's flat entries."""
  shape = arrays[0].shape
  axes = norm_axes(axis, len(shape))
  result = np.zeros(shape, out)
  for at in np.ndindex(*[1 if a in axes else n for a, n in enumerate(shape)]):
    where = tuple(slice(None) if a in axes else i for a, i in enumerate(at))
    part = result[where]
    part[...] = np.reshape(f(at, *(np.asarray(x)[where].ravel() for x in arrays)), part.shape)
    result[where] = part
  return result


def reference(scores, keep, axis):
  keep = np.broadcast_to(keep, group_shape(scores.shape, axis))

  def one(at, s):
    mask = np.zeros(s.size, bool)
    mask[order(s)[: max(0, keep[at])]] = True
    return mask

  return by_group(one, axis, bool, np.asarray(scores))


def as_scores(x, dtype):
  if not jnp.issubdtype(dtype, jnp.floating):
    info = jnp.iinfo(dtype)
    x = np.clip(np.nan_to_num(x * 3), float(info.min), float(info.max) * 0.99)
    return jnp.asarray(x.astype(np.int64).astype(dtype))
  return jnp.asarray(x.astype(dtype))


def draw_scores(rng, shape, style):
  x = rng.normal(size=shape).astype(np.float32)
  if style == "ties":
    x = np.round(x * 2) / 2 * rng.choice([-1, 1], shape)  # has both zeros
  elif style == "odd":
    x = rng.choice(np.float32([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 1e-40, -1e-40, 3e38, 6e-8]), shape)
  elif style == "equal":
    x = np.full(shape, rng.choice(np.float32([0.0, np.nan, -np.inf, 2.0])), np.float32)
  elif style == "sparse":
    x[rng.random(shape) < 0.9] = rng.choice(np.float32([-np.inf, np.nan, 0]))
  elif style == "wide":
    x = np.exp(30 * x.clip(-2, 2)).astype(np.float32) * rng.choice([-1, 1], shape)
  return x.astype(np.float32)


STYLES = ["normal", "ties", "odd", "equal", "sparse", "wide"]
# Few distinct shapes: each costs a compile.
LAYOUTS = [
  ((7,), None),
  ((5, 4, 3), -2),
  ((500,), 0),
  ((40, 30), None),
  ((40, 30), 0),
  ((40, 30), 1),
  ((6, 10, 8), (1, 2)),
  ((6, 10, 8), (0, 2)),
  ((9, 3, 20), (-1, -3)),
  ((600, 3), 0),
  ((1, 1), None),
  ((0, 3), 0),
  ((2, 3, 4, 5), None),
]
CASES = [(*layout, jnp.float32) for layout in LAYOUTS]
CASES += [
  (*LAYOUTS[i], dtype) for i, dtype in ((2, jnp.int32), (5, jnp.bfloat16), (7, jnp.float16), (12, jnp.bfloat16))
]


@pytest.mark.parametrize("path", PATHS)
@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**32 - 1),
  case=st.sampled_from(CASES),
  style=st.sampled_from(STYLES),
  per_group=st.booleans(),
)
def test_matches_reference(path, seed, case, style, per_group):
  shape, axis, dtype = case
  rng = np.random.default_rng(seed)
  with np.errstate(all="ignore"):
    scores = as_scores(draw_scores(rng, shape, style), dtype)
  units = int(np.prod([shape[a] for a in norm_axes(axis, len(shape))]))
  keep = rng.integers(-1, units + 2, group_shape(shape, axis) if per_group else ())
  keep = np.broadcast_to(keep, group_shape(shape, axis))  # one compile for both
  mask = topk(scores, jnp.asarray(keep, jnp.int32), axis, path)
  np.testing.assert_array_equal(mask, reference(scores, keep, axis))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [jnp.uint32, jnp.int8, jnp.uint8, jnp.uint16, bool, jnp.int32])
def test_integer_extremes(dtype, path):
  ends = [0, 1] if dtype == bool else [jnp.iinfo(dtype).min, jnp.iinfo(dtype).max, 5]
  x = jnp.asarray(np.random.default_rng(0).choice(np.array(ends, dtype), 300))
  for keep in (0, 1, 99, 150, 299, 300):
    np.testing.assert_array_equal(topk(x, keep, path=path), reference(x, keep, None))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
  "shape,axis,keep",
  [((512, 700), None, 35840), ((512, 700), None, 11), ((512, 700), 0, 51), ((3, 300, 400), (1, 2), 9999)],
)
def test_large(path, style, shape, axis, keep):
  scores = jnp.asarray(draw_scores(np.random.default_rng(3), shape, style))
  np.testing.assert_array_equal(topk(scores, keep, axis, path), reference(scores, keep, axis))


@pytest.mark.parametrize("style", ["normal", "ties", "odd"])
def test_vmap_scan_cond(style):
  x = jnp.asarray(draw_scores(np.random.default_rng(1), (3, 50, 8), style))
  keep = jnp.array([0, 100, 400], jnp.int32)
  want = np.stack([reference(a, int(k), None) for a, k in zip(np.asarray(x), keep)])
  np.testing.assert_array_equal(jax.jit(jax.vmap(sel.topk_mask))(x, keep), want)
  scan = jax.jit(
    lambda x, k: jax.lax.scan(
      lambda c, a: (c, jax.lax.cond(a[1] > 0, sel.topk_mask, lambda s, k: s < -jnp.inf, *a)), 0, (x, k)
    )[1]
  )
  np.testing.assert_array_equal(scan(x, keep)[1:], want[1:])


@pytest.mark.parametrize("path", PATHS)
def test_subnormals_and_zeros(path):
  x = jnp.array([-0.0, 0.0, 1e-45, -1e-45, 2e-45] * 20, jnp.float32)
  for keep in (20, 33, 40, 50, 90):
    np.testing.assert_array_equal(topk(x, keep, path=path), reference(x, keep, None))


def test_keep_count():
  assert sel.keep_count(100, 0.29) == 71
  assert sel.keep_count(3, 1 / 3) == 2
  assert sel.keep_count(3, 2 / 3) == 1
  assert [sel.keep_count(n, s) for n, s in ((0, 0.5), (7, 0.0), (7, 1.0), (10, 0.95))] == [0, 7, 0, 1]
  for bad in ((-1, 0.5), (3, 1.1), (3, float("nan"))):
    with pytest.raises(ValueError):
      sel.keep_count(*bad)


def test_errors():
  x = jnp.ones((3, 4))
  for axis in (2, (0, 0), (0, -2)):
    with pytest.raises(ValueError):
      sel.topk_mask(x, 1, axis)
  with pytest.raises(ValueError):
    sel.topk_mask(x, jnp.ones((5, 1), jnp.int32), 1)
  with pytest.raises(TypeError):
    sel.topk_mask(x, 1.5)
  with pytest.raises(TypeError):
    sel.topk_mask(jnp.ones(3, jnp.complex64), 1)
  with pytest.raises(ValueError):
    sel.global_keep_counts([x], 1, [0])
  with pytest.raises(ValueError):
    sel.drop_and_grow(x > 0, x, x[:2], 1, 1)


def reference_counts(scores, total, sizes):
  flat = np.concatenate([np.asarray(s).astype(np.float64).ravel() for s in scores])
  owner = np.concatenate([np.full(s.size, i) for i, s in enumerate(scores)])
  flat = np.where(np.isnan(flat), -np.inf, flat)  # callers keep NaN and -inf apart
  kept = [0] * len(scores)
  for value in np.unique(flat)[::-1]:
    tied = [int(((flat == value) & (owner == i)).sum()) for i in range(len(scores))]
    weight = sum(t * w for t, w in zip(tied, sizes))
    whole = weight <= total
    for i, (t, w) in enumerate(zip(tied, sizes)):
      take = min(t, total // w)
      kept[i] += take
      total -= take * w
    if not whole:
      break
  return kept


@pytest.mark.parametrize("path", PATHS)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**32 - 1),
  style=st.sampled_from(["normal", "ties", "sparse", "equal"]),
  sizes=st.sampled_from([(1, 1, 1), (16, 1, 4)]),
)
def test_global_keep_counts(path, seed, style, sizes):
  rng = np.random.default_rng(seed)
  arrays = [draw_scores(rng, s, style) for s in ((20, 30), (50,), (4, 5, 6))]
  arrays = [np.where(np.isneginf(a), np.nan, a) for a in arrays]
  scores = [jnp.asarray(a, d) for a, d in zip(arrays, (jnp.float32, jnp.bfloat16, jnp.float32))]
  total = int(rng.integers(0, 1 + sum(w * s.size for w, s in zip(sizes, scores))))
  got = run("global_keep_counts", path, scores, total, unit_sizes=sizes)
  assert all(g.shape == () and g.dtype == jnp.int32 for g in got)
  assert [int(g) for g in got] == reference_counts(scores, total, sizes)
  if sizes == (1, 1, 1):
    assert sum(int(g) for g in got) == total


@pytest.mark.parametrize("path", PATHS)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 2**32 - 1),
  style=st.sampled_from(STYLES),
  layout=st.sampled_from([((40, 30), None), ((10, 4, 6), 1), ((50, 8), 0)]),
)
def test_drop_and_grow(path, seed, style, layout):
  shape, axis = layout
  rng = np.random.default_rng(seed)
  drop, grow = (draw_scores(rng, shape, style) for _ in range(2))
  mask = rng.random(shape) < 0.5
  units = int(np.prod([shape[a] for a in norm_axes(axis, len(shape))]))
  after_drop, after_grow = (rng.integers(0, units + 1, group_shape(shape, axis)) for _ in "ab")

  def one(at, m, d, g):
    kept = [i for i in order(d) if m[i]][: after_drop[at]]
    more = [i for i in order(g) if i not in set(kept)]
    new = np.zeros(m.size, bool)
    new[(kept + more[: max(0, after_grow[at] - len(kept))])] = True
    return new

  got = run("drop_and_grow", path, mask, drop, grow, jnp.asarray(after_drop), jnp.asarray(after_grow), axis=axis)
  np.testing.assert_array_equal(got, by_group(one, axis, bool, mask, drop, grow))


swap = jax.jit(sel.swap_counts, static_argnums=4)


@pytest.mark.parametrize("total", [0, 5, 60, 119, 120, 121, 10**6])
def test_swap_counts(total):
  rng = np.random.default_rng(total)
  drop, grow = (jnp.asarray(rng.normal(size=(10, 4, 6)), jnp.float32) for _ in range(2))
  mask = topk(jnp.asarray(rng.normal(size=(10, 4, 6)), jnp.float32), 2, axis=1)
  got = np.asarray(swap(mask, drop, grow, total, 1))
  assert got.shape == (10, 1, 6) and got.dtype == np.int32 and got.max() <= 2
  assert got.sum() == min(total, 120)
  gain = np.max(np.where(mask, -np.inf, grow), 1) - np.min(np.where(mask, drop, np.inf), 1)
  if total < 60:
    np.testing.assert_array_equal(got[:, 0], reference(gain, total, None))
  empty = swap(jnp.zeros((3, 4), bool), drop[:3, :, 0], grow[:3, :, 0], 7, 1)
  assert int(empty.sum()) == 0


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, functools, re
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxsparse import selection as sel
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
x = jax.random.normal(jax.random.key(0), (256, 384))
views = (x, jnp.round(x * 3), jnp.ones_like(x))
for axis, keep in ((None, 9830), (0, 30), (1, 30)):
    plain = jax.jit(functools.partial(sel.topk_mask, axis=axis))
    for spec in (P("a", "b"), P(("a", "b"),)):
        sharding = NamedSharding(mesh, spec)
        f = jax.jit(functools.partial(sel.topk_mask, axis=axis), out_shardings=sharding)
        for y in views:
            got = f(jax.device_put(y, sharding), keep)
            assert (np.asarray(got) == np.asarray(plain(y, keep))).all(), (spec, axis)
y = views[1].reshape(64, 4, 384)
z = jax.device_put(y, NamedSharding(mesh, P("a", None, "b")))
f = jax.jit(lambda s: sel.topk_mask(s, 2, -2))
assert (np.asarray(f(z)) == np.asarray(f(y))).all()
for spec in (P("a", "b"),):
    sharding = NamedSharding(mesh, spec)
    text = jax.jit(sel.topk_mask, out_shardings=sharding).lower(
        jax.ShapeDtypeStruct((4096, 8192), jnp.float32, sharding=sharding), 9).compile().as_text()
    for line in text.splitlines():  # nothing as large as a shard may travel
        found = re.search(r"= .*?\\[([\\d,]*)\\].* (all-gather|all-to-all|collective-permute|all-reduce)\\(", line)
        if found:
            size = np.prod([int(n) for n in found[1].split(",") if n] or [1])
            print(found[2], found[1])
            assert size <= 1 << 17, line
print("sharded ok")
"""


def test_sharded():
  env = dict(
    os.environ,
    XLA_FLAGS=os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
    JAX_PLATFORMS="cpu",
    PYTHONPATH=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
  )
  done = subprocess.run([sys.executable, "-W", "error", "-c", SHARDED], env=env, capture_output=True, text=True)
  assert done.returncode == 0 and "sharded ok" in done.stdout, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("path", PATHS)
def test_without_jit(path):
  """Loops then run in Python, with Python integers for indices; whoever debugs sees the same masks."""
  scores = jnp.asarray(np.random.default_rng(0).normal(size=(5, 9)), jnp.float32)
  want = topk(scores, 7, path=path), run("global_keep_counts", path, [scores, scores[0]], 11, unit_sizes=(1, 1))
  with jax.disable_jit(), mock.patch.object(sel, "_SMALL_SIZE", {"bisection": 1 << 62, "search": 0}[path]):
    np.testing.assert_array_equal(sel.topk_mask(scores, 7), want[0])
    assert sel.global_keep_counts([scores, scores[0]], 11, (1, 1)) == want[1]


def test_a_search_stores_no_copy_of_the_scores():
  """Beside the mask, a leaf of 8 MB needs a few samples; a stored copy of its scores or keys would show."""
  x = jax.ShapeDtypeStruct((2048, 1024), jnp.float32)
  mask = jax.ShapeDtypeStruct(x.shape, bool)

  def prune(x, mask):
    return sel.topk_mask(sel.Elementwise(jnp.abs, (x,)), x.size // 10, where=mask)

  def swap(x, grad, mask):
    drop, grow = (sel.Elementwise(jnp.abs, (v,)) for v in (x, grad))
    return sel.drop_and_grow(mask, drop, grow, x.size // 10, x.size // 5)

  def temporary(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes

  assert temporary(prune, x, mask) < 1e6
  assert temporary(swap, x, x, mask) < 1e6 + mask.size  # the mask between drop and growth
