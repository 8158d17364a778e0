"""Calibration of a model block after block: what each layer is fed with, and what has been pruned before it."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import calibration

LINEARS = ("up/left", "up/right", "down")


def apply_block(params, x, product):
  """Two layers that share an input, and one that takes their product."""
  left, right = jnp.split(product(x * params["scale"], (params["up"]["left"], params["up"]["right"])), 2, -1)
  return x + product(jnp.tanh(left) * right, params["down"])


def blocks_and_hidden(blocks=3, batches=2):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  make = lambda: {"scale": draw(4), "up": {"left": draw(4, 6), "right": draw(4, 6)}, "down": draw(6, 4)}
  return [make() for _ in range(blocks)], [draw(2, 5, 4) for _ in range(batches)]


def halve(weights, statistics):
  """Halves every weight: all are changed, and what comes after can be told from it."""
  return {name: (w / 2, w > 0) for name, w in weights.items()}


def halved(block):
  block = jax.device_get(block)
  return {"scale": block["scale"], "up": jax.tree.map(lambda w: w / 2, block["up"]), "down": block["down"] / 2}


def scaled(block, x):
  return x * np.asarray(block["scale"])


def as_one(hidden):
  return np.concatenate(jax.device_get(hidden))


def inner(block, x):
  """What `down` is fed with; in NumPy, which compiles nothing."""
  block = jax.device_get(block)
  x = x * block["scale"]
  return np.tanh(x @ block["up"]["left"]) * (x @ block["up"]["right"])


def apply_plainly(block, x):
  return x + inner(block, x) @ np.asarray(block["down"])


def gram(x, y=None):
  x, y = (a.reshape(-1, a.shape[-1]) for a in (x, x if y is None else y))
  return x.T @ y


def watch(seen):
  def prune(weights, statistics):
    seen[tuple(weights)] = statistics
    return halve(weights, statistics)

  return prune


UP, DOWN = ("blocks/1/up/left", "blocks/1/up/right"), ("blocks/1/down",)
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["one pass", "sequential", "layer by layer", "with cross statistics"])
def test_each_layer_is_calibrated_on_what_it_will_be_fed_with(mode):
  blocks, hidden = blocks_and_hidden()
  seen = {}
  kwargs = {
    "one pass": {"sequential": False},
    "sequential": {},
    "layer by layer": {"layer_by_layer": True},
    "with cross statistics": {"layer_by_layer": True, "cross": True},
  }[mode]
  done = list(calibration.prune_blocks(apply_block, blocks, hidden, watch(seen), LINEARS, gram=True, **kwargs))

  whole = as_one(hidden)
  first = blocks[0] if mode == "one pass" else halved(blocks[0])
  x, dense = apply_plainly(first, whole), apply_plainly(blocks[0], whole)
  close(seen[UP].gram, gram(scaled(blocks[1], x)))
  up = halved(blocks[1]) if "layer_by_layer" in kwargs else blocks[1]
  close(seen[DOWN].gram, gram(inner(up, x)))
  close(seen[DOWN].mean, inner(up, x).mean((0, 1)))
  assert int(seen[DOWN].count) == 20
  if "cross" in kwargs:
    close(seen[UP].cross, gram(scaled(blocks[1], x), scaled(blocks[1], dense)))
    close(seen[DOWN].cross, gram(inner(up, x), inner(blocks[1], dense)))
  assert [block.index for block in done] == [0, 1, 2]
  for block, old in zip(done, blocks):
    jax.tree.map(np.testing.assert_array_equal, block.params, halved(old))
    assert set(block.masks) == set(LINEARS) == set(block.errors)
    close(list(block.errors.values()), 0.25)  # |x w / 2 - x w|^2 is a quarter of |x w|^2


def test_the_dense_model_is_streamed():
  blocks, hidden = blocks_and_hidden()
  streamed = list(calibration.stream_statistics(apply_block, blocks, hidden, LINEARS))
  x = as_one(hidden)
  for block, statistics in zip(blocks, streamed):
    assert set(statistics) == set(LINEARS)
    close(statistics["up/left"].sum_squares, (scaled(block, x) ** 2).sum((0, 1)))
    close(statistics["down"].sum, inner(block, x).sum((0, 1)))
    x = apply_plainly(block, x)


def test_compiler_options_reach_the_compiler():
  blocks, hidden = blocks_and_hidden(blocks=1, batches=1)
  options = {"compiler_options": {"no_such_option": 1}}
  with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
    list(calibration.stream_statistics(apply_block, blocks, hidden, LINEARS, **options))
  with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
    list(calibration.prune_blocks(apply_block, blocks, hidden, halve, LINEARS, **options))


def test_devices_sum_up_to_the_whole():
  blocks, hidden = blocks_and_hidden()
  x = jnp.stack(hidden)  # as if each device had one

  def one_device(x):
    _, inputs = calibration.collect(apply_block, blocks[0], x, LINEARS, gram=True)
    return {names: calibration.psum(seen.statistics, "devices") for names, seen in inputs.items()}

  summed = jax.jit(jax.vmap(one_device, axis_name="devices"))(x)
  collect = functools.partial(calibration.collect, apply_block, linears=LINEARS, gram=True)
  _, whole = jax.jit(collect)(blocks[0], as_one(hidden))
  for names, statistics in summed.items():
    jax.tree.map(lambda a, b: close(a[0], b), statistics, whole[names].statistics)
    close(statistics.gram[0], statistics.gram[1])


SHARDED = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from jaxsparse import calibration
from tests.test_sequential_calibration import LINEARS, apply_block, blocks_and_hidden
blocks, hidden = blocks_and_hidden(batches=4)
x = np.concatenate(hidden)
def collect(params, x, dense):
  out, inputs = calibration.collect(apply_block, params, x, LINEARS, gram=True, sketch=True, dense=dense)
  return out, {"/".join(names): seen.statistics for names, seen in inputs.items()}
def each(params, x, dense):
  out, statistics = collect(params, x, dense)
  return out, {names: calibration.psum(s, "d") for names, s in statistics.items()}
mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
args, parts = (blocks[0], x, (blocks[1], x)), (P(), P("d"), (P(), P("d")))
split = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=parts, out_specs=(P("d"), P())))(*args)
whole = jax.jit(collect)(*args)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), split, whole)
assert len(split[0].sharding.device_set) == 4 and int(whole[1]["down"].count) == 40
"""


def test_several_devices():
  """Rows split over four devices of a mesh, with every part of the statistics."""
  root = pathlib.Path(__file__).parents[1]
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
  env = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"linears": ["up/middle"]}, "no 'up/middle'; its leaves are down, scale, up/left, up/right"),
    ({"apply_block": lambda p, x, product: x @ p["up"]["left"].weight @ p["down"].weight}, "did not multiply"),
    ({"sequential": False, "cross": True}, "they need sequential=True"),
    ({"prune": lambda weights, statistics: {}}, "prune returned nothing for blocks/0/up/left, blocks/0/up/right"),
    ({"hidden": []}, "no calibration data"),
    ({"hidden": [jnp.full((2, 5, 4), jnp.nan)]}, "blocks/0/up/left, blocks/0/up/right: inputs of feature 0 are NaN"),
    ({"hidden": [jnp.ones((1, 3, 4))], "gram": True}, "3 calibration rows cannot give a Gram matrix of full rank"),
  ],
)
def test_what_cannot_be_calibrated_is_named(kwargs, message):
  blocks, hidden = blocks_and_hidden()
  kwargs = {"apply_block": apply_block, "blocks": blocks, "hidden": hidden, "prune": halve, "linears": LINEARS} | kwargs
  with pytest.raises(ValueError, match=message):
    list(calibration.prune_blocks(**kwargs))


def test_a_weight_used_twice_is_an_error():
  blocks, hidden = blocks_and_hidden()

  def twice(params, x, product):
    for _ in range(2):
      x = product(jnp.concatenate([x, x], -1)[..., :6], params["down"])
    return x

  def itself(params, x, product):
    return x @ params["down"]

  def cast(params, x, product):
    return product(x, params["down"].astype(x.dtype))

  with pytest.raises(TypeError, match="multiplied with 'down' itself; call its `product`"):
    calibration.collect(itself, {"down": jnp.ones((6, 6))}, jnp.ones((1, 2, 6)), ["down"])
  with pytest.raises(AttributeError, match="used .astype of 'down' itself"):
    calibration.collect(cast, {"down": jnp.ones((6, 6))}, jnp.ones((1, 2, 6)), ["down"])
  with pytest.raises(ValueError, match="'down' is multiplied with twice"):
    list(calibration.prune_blocks(twice, blocks, hidden, halve, ("down",)))
