"""Structures against plain NumPy views, and the laws for every structure."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from references import selection as ref

import jaxsparse as js

NM24, NM18, BLOCK, CHANNEL, FAN_IN = js.NM(2, 4), js.NM(1, 8), js.Block((2, 2)), js.Channel(), js.FixedFanIn()
STRUCTURES = {"nm24": NM24, "nm18": NM18, "block": BLOCK, "channel": CHANNEL, "fan_in": FAN_IN}
ALGORITHMS = ("magnitude", "set", "rigl", "snfs", "magnitude_ste", "sr_ste")


def arguments(structure, sparsity=0.75):
  implied = isinstance(structure, js.NM)
  return {"structure": structure, "sparsity": None if implied else sparsity, "distribution": js.Uniform()}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_laws_hold(name, structure):
  laws.check(laws.train(name, optax.sgd(0.05, momentum=0.9), **arguments(STRUCTURES[structure])))


STACKED = {
  "unstructured": js.Unstructured(stack_axes=(0,)),
  "nm": js.NM(2, 4, stack_axes=(0,)),
  "block": js.Block((2, 2), stack_axes=(0,)),
  "channel": js.Channel(stack_axes=(0,)),
  "fan_in": js.FixedFanIn(stack_axes=(0,)),
}


def stacked_loss(params, batch):
  x = batch[0]
  for layer in range(3):
    x = jnp.tanh(x @ params["layers"]["kernel"][layer] + params["layers"]["bias"][layer])
  return jnp.mean(jnp.square(x[:, :8] - batch[1]))


@pytest.mark.parametrize("structure", STACKED)
@pytest.mark.parametrize("name", ["magnitude", "rigl", "magnitude_ste"])
def test_stacked_layers_are_groups_of_their_own(name, structure):
  rules = js.Rules(("bias", None))
  h = laws.train(
    name,
    optax.sgd(0.05, momentum=0.9),
    shapes={"layers": (3, 16, 16)},
    loss=stacked_loss,
    rules=rules,
    **arguments(STACKED[structure]),
  )
  laws.check(h)
  units = laws.leaf_units(h, "['layers']['kernel']", (3, 16, 16))
  per_layer = ref.units_of((16, 16), *unstacked(STACKED[structure])[:1], **unstacked(STACKED[structure])[1])
  assert len(units) == 3 * len(per_layer)


def unstacked(s):
  if isinstance(s, js.NM):
    return "nm", {"m": s.m}
  if isinstance(s, js.Block):
    return "block", {"block": s.shape}
  return {js.Channel: "channel", js.FixedFanIn: "fan_in", js.Unstructured: "unstructured"}[type(s)], {}


VIEWS = [
  (js.Unstructured(), (6, 8)),
  (js.NM(2, 4), (8, 6)),
  (js.NM(1, 8), (3, 3, 16, 5)),
  (js.NM(2, 4, stack_axes=(0,)), (2, 8, 6)),
  (js.Block((2, 4)), (6, 8)),
  (js.Block((2, 4)), (3, 6, 8)),
  (js.Block((3, 1), stack_axes=(0,)), (2, 6, 5)),
  (js.Channel(), (5, 7)),
  (js.Channel(), (3, 3, 4, 7)),
  (js.Channel(stack_axes=(0,)), (2, 5, 7)),
  (js.FixedFanIn(), (6, 5)),
  (js.FixedFanIn(), (3, 3, 4, 5)),
  (js.FixedFanIn(stack_axes=(0, 1)), (2, 2, 6, 5)),
]


@pytest.mark.parametrize("structure,shape", VIEWS, ids=repr)
def test_view_is_the_references(structure, shape):
  structure.validate(shape)
  kind, arguments = unstacked(structure)
  units = ref.units_of(shape, kind, stack=len(structure.stack_axes), **arguments)
  assert (structure.group_count(shape), structure.units_per_group(shape)) == units.shape[:2]
  # Powers of two would overflow; distinct integers identify the entries that a unit sums.
  scores = np.random.default_rng(0).permutation(int(np.prod(shape))).astype(np.float32).reshape(shape)
  view = structure.to_units(jnp.asarray(scores))
  axes = structure.unit_axes(shape)
  grouped = np.moveaxis(np.asarray(view), axes, range(-len(axes), 0)).reshape(units.shape[0], -1)
  want = scores.ravel()[units].sum(-1)
  np.testing.assert_array_equal(
    sorted(map(tuple, np.sort(grouped, 1).tolist())), sorted(map(tuple, np.sort(want, 1).tolist()))
  )
  assert view.shape == structure.view_shape(shape)


@pytest.mark.parametrize("structure,shape", VIEWS, ids=repr)
@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_unit_masks_round_trip(structure, shape, seed):
  units = np.random.default_rng(seed).random(structure.view_shape(shape)) < 0.5
  mask = structure.from_units(jnp.asarray(units), shape)
  assert mask.shape == shape and mask.dtype == bool
  np.testing.assert_array_equal(structure.mask_to_units(mask), units)
  kind, arguments = unstacked(structure)
  kept = ref.count_units(mask, ref.units_of(shape, kind, stack=len(structure.stack_axes), **arguments))
  assert kept.sum() == units.sum()


def test_nm_axes():
  out = js.NM(2, 4, axis=(0, 1))  # the (heads, dim) of an attention output projection
  assert out.view_shape((2, 6, 5)) == (3, 4, 5)
  assert js.NM(2, 4, axis=-1).view_shape((5, 8)) == (5, 2, 4)
  assert js.NM(2, 4, axis=0).view_shape((8, 2, 3)) == (2, 4, 2, 3)
  mask = out.from_units(out.to_units(jnp.arange(60.0).reshape(2, 6, 5)) % 4 < 2, (2, 6, 5))
  assert mask.shape == (2, 6, 5)


@pytest.mark.parametrize(
  "structure,shape,words",
  [
    (js.NM(2, 4), (6, 8), "reduction axis divisible by 4"),
    (js.NM(2, 4), (4, 4, 4), "state it with axis="),
    (js.NM(2, 4, axis=3), (8, 8), "axis 3 does not exist"),
    (js.NM(2, 4, axis=(1, 0)), (8, 8), "adjacent"),
    (js.NM(2, 4, axis=(0, 2)), (8, 8, 8), "adjacent"),
    (js.Block((3, 2)), (8, 8), "divisible by 3 and 2"),
    (js.Block((2, 2)), (8,), "two dimensions"),
    (js.Block((2, 2), stack_axes=(0,)), (8, 8), "two dimensions"),
    (js.Channel(), (8,), "two dimensions"),
    (js.Channel(axis=2), (8, 8), "axis 2 does not exist"),
    (js.FixedFanIn(9), (8, 8), "more inputs than the 8"),
    (js.FixedFanIn(), (8,), "two dimensions"),
    (js.Unstructured(stack_axes=(0, 1)), (8,), "2 dimensions"),
  ],
)
def test_shapes_that_do_not_fit(structure, shape, words):
  with pytest.raises(ValueError, match=words):
    structure.validate(shape)


@pytest.mark.parametrize(
  "make",
  [
    lambda: js.NM(4, 4),
    lambda: js.NM(0, 4),
    lambda: js.NM(2.0, 4),
    lambda: js.Block((0, 2)),
    lambda: js.Block((2,)),
    lambda: js.Block((2.0, 2)),
    lambda: js.FixedFanIn(0),
    lambda: js.Unstructured(stack_axes=(1,)),
    lambda: js.NM(2, 4, stack_axes=(-1,)),
  ],
)
def test_impossible_structures(make):
  with pytest.raises(ValueError):
    make()


def test_block_scores_are_sums_for_drop_and_grow():
  """A block of many middling weights beats one with a single large weight."""
  kernel = np.full((4, 4), 0.1, np.float32)
  kernel[:2, :2] = 0.5  # sum 2.0
  kernel[2, 2] = 1.5  # sum 1.8
  _, masks = js.magnitude(sparsity=0.75, stop=1, structure=BLOCK).instant_sparsify({"w": jnp.asarray(kernel)})
  assert masks["w"][:2, :2].all() and masks["w"].sum() == 4


def test_structures_are_values():
  assert js.Block([2, 2]) == js.Block((2, 2)) and hash(js.NM(2, 4)) == hash(js.NM(2, 4)) and js.NM(2, 4) != js.NM(1, 4)
  assert js.Unstructured(stack_axes=0) == js.Unstructured(stack_axes=(0,))
  for structure in STRUCTURES.values():
    assert eval(repr(structure), {**vars(js)}) == structure
  assert jax.tree.leaves(js.NM(2, 4)) == [js.NM(2, 4)]  # static: no arrays inside
