"""Distributions: totals, closed forms, and the papers' numbers."""

import math

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from references import distributions as ref
from references import selection as ref_selection

import jaxsparse as js
from jaxsparse import distributions


def leaf(name, shape, unit_size=1, groups=1):
  return distributions.LeafShape(name, shape, math.prod(shape) // (unit_size * groups), groups, unit_size)


def leaves(*shapes):
  return [leaf(f"layer_{i}", shape) for i, shape in enumerate(shapes)]


def test_erk_two_layers_closed_form():
  """(a + b) / (ab) ratios of 64x128 and 128x10 scaled to 30 % of 9472 entries."""
  shapes = [(64, 128), (128, 10)]
  total = 2842  # 9472 - floor(0.7 * 9472)
  factor = total / (64 + 128 + 128 + 10)
  assert np.allclose([factor * 192 / 8192, factor * 138 / 1280], [0.2018, 0.9284], atol=2e-4)
  counts = distributions.ERK().keep_counts(leaves(*shapes), 0.7)
  assert np.allclose([counts[0] / 8192, counts[1] / 1280], [0.2018, 0.9284], atol=5e-4)
  assert sum(counts) == total


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.98])
def test_erk_resnet50(sparsity):
  shapes = ref.resnet50()
  sizes = [math.prod(s) for s in shapes]
  assert len(shapes) == 54 and sum(sizes) == 25_502_912  # torchvision's 25,557,032 less 53,120 BN and 1,000 biases
  counts = distributions.ERK().keep_counts(leaves(*shapes), sparsity)
  want = ref.erk(shapes, sparsity)
  assert sum(counts) == ref_selection.keep_count(sum(sizes), sparsity)
  for shape, size, count, density in zip(shapes, sizes, counts, want):
    assert abs(count - density * size) <= 1, f"{shape}: {count} kept, {density * size} wanted"
  wide, narrow = shapes.index((3, 3, 512, 512)), shapes.index((1, 1, 64, 64))
  assert counts[wide] / sizes[wide] < 1 - sparsity < counts[narrow] / sizes[narrow], "large layers must be sparser"


PROMISES = {
  "uniform": distributions.Uniform(),
  "erdos_renyi": distributions.ErdosRenyi(),
  "erk": distributions.ERK(),
  "erk_half": distributions.ERK(power=0.5),
  "erk_plus": distributions.ERKPlus(last="layer_2", last_density=0.5),
  "uniform_plus": distributions.UniformPlus(last="layer_2"),
}


@pytest.mark.parametrize("name", PROMISES)
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  st.lists(st.tuples(st.integers(20, 90), st.integers(20, 90)), min_size=3, max_size=6),
  st.integers(1, 97),
)
def test_totals(name, shapes, percent):
  sparsity = percent / 100
  shapes = [*shapes[:2], (shapes[2][0], 10), *shapes[3:]]
  distribution = PROMISES[name]
  sizes = [math.prod(s) for s in shapes]
  total = ref_selection.keep_count(sum(sizes), sparsity)
  try:
    counts = distribution.keep_counts(leaves(*shapes), sparsity)
  except ValueError as error:
    assert "lower the sparsity" in str(error) and name in ("erk_plus", "uniform_plus")
    hypothesis.reject()
  assert all(0 <= c <= n for c, n in zip(counts, sizes))
  if name == "uniform":
    assert counts == [ref_selection.keep_count(n, sparsity) for n in sizes]
  elif name == "erk_plus" and sum(counts) < total:
    assert [c for i, c in enumerate(counts) if i != 2] == [n for i, n in enumerate(sizes) if i != 2]
  else:
    assert sum(counts) == total


def test_references_agree():
  shapes = [(3, 3, 3, 16), (3, 3, 16, 32), (1, 1, 32, 64), (64, 10)]
  sizes = [math.prod(s) for s in shapes]
  for distribution, densities in (
    (distributions.ERK(), ref.erk(shapes, 0.7)),
    (distributions.ERK(power=0.5), ref.erk(shapes, 0.7, 0.5)),
    (distributions.ErdosRenyi(), ref.erdos_renyi(shapes, 0.7)),
    (distributions.UniformPlus(first="layer_0", last="layer_3"), ref.uniform_plus(shapes, 0.7)),
  ):
    counts = distribution.keep_counts(leaves(*shapes), 0.7)
    assert np.allclose(counts, np.multiply(densities, sizes), atol=1), distribution


def test_erk_of_zero_power_is_uniform():
  shapes = [(40, 30), (30, 20), (20, 10)]
  counts = distributions.ERK(power=0.0).keep_counts(leaves(*shapes), 0.75)
  assert counts == distributions.Uniform().keep_counts(leaves(*shapes), 0.75)


def test_whole_units_never_exceed_the_budget():
  """Channels of 100 entries and groups: what is kept comes as near to the total as units allow, from below."""
  shapes = [leaf("a", (100, 40), unit_size=100), leaf("b", (100, 10), groups=10), leaf("c", (30, 30))]
  for percent in range(5, 96, 5):
    total = ref_selection.keep_count(sum(s.size for s in shapes), percent / 100)
    counts = distributions.ERK().keep_counts(shapes, percent / 100)
    kept = sum(c * s.groups * s.unit_size for c, s in zip(counts, shapes))
    assert total - 100 < kept <= total


def test_uniform_plus_spares_first_and_last():
  shapes = leaves((30, 40), (40, 40), (40, 40), (40, 10))
  counts = distributions.UniformPlus(first="layer_0", last="layer_3").keep_counts(shapes, 0.7)
  assert counts[0] == 1200 and counts[3] == 120 and abs(counts[1] - counts[2]) <= 1
  assert distributions.UniformPlus(last="layer_3").keep_counts(shapes, 0.9)[3] == 80


@pytest.mark.parametrize(
  "make",
  [
    lambda: distributions.UniformPlus(),
    lambda: distributions.UniformPlus(first="a", last_density=0.0),
    lambda: distributions.ERKPlus(last="a", last_density=1.5),
    lambda: distributions.UniformPlus(first="nothing").keep_counts(leaves((8, 8), (8, 8)), 0.5),
    lambda: distributions.UniformPlus(first="layer_0").keep_counts(leaves((80, 80), (8, 8)), 0.5),
    lambda: distributions.UniformPlus(first="layer").keep_counts(leaves((8, 8), (8, 8)), 0.0),
    lambda: distributions.ERKPlus(last="layer_0").keep_counts(leaves((80, 80), (8, 8)), 0.9),
  ],
)
def test_impossible_distributions(make):
  with pytest.raises(ValueError):
    make()


def test_global_allocates_jointly():
  rng = np.random.default_rng(0)
  scores = [rng.normal(size=s).astype(np.float32) * w for s, w in (((20, 30), 1.0), ((30, 10), 3.0))]
  masks = ref_selection.global_topk(scores, 200)
  got = distributions.Global().allocate([jnp.asarray(s) for s in scores], leaves((20, 30), (30, 10)), 200)
  assert [int(n) for n in got] == [m.sum() for m in masks]
  with pytest.raises(TypeError, match="allocate"):
    distributions.Global().keep_counts(leaves((20, 30)), 0.5)


def test_global_compares_channels_per_entry():
  """A channel of 4 entries with score 1 each beats one of 2 entries with score 0.9 each, though budgets differ."""
  a, b = jnp.array([4.0, 4.0]), jnp.array([1.8, 1.8, 8.0])
  shapes = [leaf("a", (4, 2), unit_size=4), leaf("b", (2, 3), unit_size=2)]
  assert [int(n) for n in distributions.Global().allocate([a, b], shapes, 6)] == [1, 1]
  assert [int(n) for n in distributions.Global().allocate([a, b], shapes, 10)] == [2, 1]
  assert [int(n) for n in distributions.Global().allocate([a, b], shapes, 14)] == [2, 3]
  assert js.Global().joint
