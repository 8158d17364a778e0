"""nm_matmul: every implementation and gradient against float64, which one runs, and errors."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import four_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references import nm as nm_reference

import jaxsparse as js
from jaxsparse.ops import _dispatch
from jaxsparse.ops import _mosaic_gpu
from jaxsparse.ops.nm_matmul import api
from jaxsparse.ops.nm_matmul import arg_specs
from jaxsparse.ops.nm_matmul import preference
from jaxsparse.ops.nm_matmul import reference

PORTABLE = ("reference", "xla")
ACTIVATIONS = (None, "relu", "gelu", "silu")
H100 = _dispatch.Target("gpu", "NVIDIA H100 80GB HBM3", (9, 0))


def case(k, o, n, m, batch, dtype=jnp.float32, seed=0):
  """(x, NMArray), random."""
  rng = np.random.default_rng(seed)
  w, mask = nm_reference.prune(rng.normal(size=(k, o)).astype(np.float32), n, m)
  x = rng.normal(size=(*np.atleast_1d(batch), k)).astype(np.float32)
  return jnp.asarray(x, dtype), js.NMArray.from_dense(jnp.asarray(w, dtype), n, m, mask)


def float64(a):
  return np.asarray(a).astype(np.float64)


def dense64(w):
  scales = None if w.scales is None else float64(w.scales)
  return nm_reference.dense(float64(w.values), np.asarray(w.indices), w.m, scales)


def assert_close(got, want, k, dtype, dtype_in=None):
  """Within what summing k products in float32 and one rounding to `dtype` may lose, relative to the size of the sum."""
  scale = np.abs(want).max() + 1e-30
  eps = float(jnp.finfo(dtype).eps)
  if dtype_in is not None:  # operands were rounded on the way, and XLA's tanh is good to some 1e-6
    eps += 2 * float(jnp.finfo(dtype_in).eps) + 5e-6
  tolerance = eps + 4 * k**0.5 * float(jnp.finfo(jnp.float32).eps)
  np.testing.assert_allclose(float64(got) / scale, want / scale, rtol=0, atol=tolerance)


# -- Forward -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(len(arg_specs.ARG_SPECS)), ids=lambda i: arg_specs.ARG_SPECS[i].name)
def test_arg_specs(at):
  """Every shape at toy size; patterns and batches take turns."""
  toy = arg_specs.ARG_SPECS[at].toy()
  batch = toy.batches[at % len(toy.batches)]
  for n, m in (arg_specs.PATTERNS[at % 6], arg_specs.PATTERNS[(at + 3) % 6]):
    x, w = case(toy.k, toy.o, n, m, batch)
    want = float64(x) @ dense64(w)
    for implementation in PORTABLE:
      y = js.ops.nm_matmul(x, w, implementation=implementation)
      assert y.shape == (batch, toy.o) and y.dtype == x.dtype
      assert_close(y, want, toy.k, x.dtype)


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes_bias_activation(dtype, implementation):
  x, w = case(32, 12, 2, 4, (2, 3), dtype)
  bias = jnp.linspace(-1, 1, 12).astype(dtype)
  for activation, out in [(None, None), ("relu", jnp.float32), ("gelu", jnp.bfloat16), ("silu", None)]:
    y = js.ops.nm_matmul(
      x, w, bias=bias, activation=activation, implementation=implementation, preferred_element_type=out
    )
    want, _ = nm_reference.activate(activation, float64(x) @ dense64(w) + float64(bias))
    assert y.shape == (2, 3, 12) and y.dtype == (out or dtype)
    assert_close(y, want, 32, y.dtype)


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised(bits, implementation):
  x, w = case(64, 12, 2, 4, 5, jnp.bfloat16)
  w = js.quant.quantize(w, bits, 16)
  y = js.ops.nm_matmul(x, w, implementation=implementation, preferred_element_type=jnp.float32)
  assert_close(y, float64(x) @ dense64(w), 64, jnp.float32, jnp.bfloat16)


def test_shapes():
  """Odd sizes, no batch axes, empty batches, vmap over x, over w, and over both; scan over stacked layers."""
  x, w = case(20, 7, 3, 5, 3)
  want = float64(x) @ dense64(w)
  assert_close(js.ops.nm_matmul(x[0], w), want[0], 20, x.dtype)
  assert js.ops.nm_matmul(x[:0], w).shape == (0, 7)
  assert_close(jax.vmap(lambda x: js.ops.nm_matmul(x, w))(x), want, 20, x.dtype)
  stacked = jax.tree.map(lambda *a: jnp.stack(a), w, case(20, 7, 3, 5, 3, seed=1)[1])
  both = jax.vmap(js.ops.nm_matmul, in_axes=(None, 0))(x, stacked)
  assert_close(both[0], want, 20, x.dtype)
  _, scanned = jax.lax.scan(lambda c, layer: (c, js.ops.nm_matmul(x, layer)), None, stacked)
  np.testing.assert_allclose(scanned, both, rtol=1e-4, atol=1e-5)  # jax 0.12 sums in another order


def test_strict_promotion():
  x, w = case(32, 12, 2, 4, 5, jnp.bfloat16)
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    for implementation in PORTABLE:
      loss = lambda x: js.ops.nm_matmul(x, w, activation="gelu", implementation=implementation).sum()
      dx = jax.grad(loss)(x)
      assert dx.dtype == x.dtype and dx.shape == x.shape


# -- Gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize(
  "activation,dtype", [(None, jnp.bfloat16), ("gelu", jnp.bfloat16)] + [(a, jnp.float32) for a in ACTIVATIONS]
)
def test_gradients(activation, dtype, implementation):
  x, w = case(24, 10, 2, 8, 5, dtype)
  bias, dy = (jnp.asarray(np.random.default_rng(i).normal(size=s), dtype) for i, s in enumerate([(10,), (5, 10)]))
  trainable, fixed = js.arrays.partition(w)

  def f(x, trainable, bias):
    w = js.arrays.combine(trainable, fixed)
    return js.ops.nm_matmul(x, w, bias=bias, activation=activation, implementation=implementation)

  y, pull = jax.vjp(f, x, trainable, bias)
  got = pull(dy)
  want = nm_reference.gradients(
    float64(x), dense64(w), float64(bias), activation, float64(dy), np.asarray(w.indices), w.m
  )
  assert_close(y, want[0], 24, dtype)
  for a, b in zip((got[0], got[1].values, got[2]), want[1:]):
    assert a.dtype == dtype
    assert_close(a, b, 24, dtype, dtype)


def test_integers_have_no_gradient():
  x, w = case(16, 6, 2, 4, 3)
  grads = jax.grad(lambda w: js.ops.nm_matmul(x, w).sum(), allow_int=True)(w)
  assert grads.indices.dtype == jax.dtypes.float0 and grads.values.dtype == jnp.float32
  with pytest.raises(TypeError, match="uint8"):
    jax.grad(lambda w: js.ops.nm_matmul(x, w).sum())(w)


def test_gradient_of_scales():
  x, w = case(32, 6, 2, 4, 3)
  w = js.quant.quantize(w, 8, 16)
  trainable, fixed = js.arrays.partition(w)
  got = jax.grad(lambda t: (js.ops.nm_matmul(x, js.arrays.combine(t, fixed)) ** 2).sum())(trainable)
  assert got.values is None
  dw = float64(x).T @ (2 * float64(x) @ dense64(w))
  units = nm_reference.dense(float64(w.values), np.asarray(w.indices), w.m)
  assert_close(got.scales, (dw * units).reshape(2, 16, 6).sum(1), 32, jnp.float32)


def test_gradients_under_jit_vmap_and_scan():
  x, w = case(16, 6, 2, 4, (4, 3))
  trainable, fixed = js.arrays.partition(w)
  loss = lambda t, x: (js.ops.nm_matmul(x, js.arrays.combine(t, fixed)) ** 2).sum()
  each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(trainable, x).values
  whole = jax.grad(loss)(trainable, x).values
  np.testing.assert_allclose(np.asarray(each.sum(0)), np.asarray(whole), rtol=2e-5, atol=1e-5)


def test_sparse_fine_tuning():
  """Kept values train with Optax, positions stay, and the loss equals that of the masked dense model."""
  rng = np.random.default_rng(0)
  params = {
    "up": jnp.asarray(rng.normal(size=(16, 32)) / 4, jnp.float32),
    "down": jnp.asarray(rng.normal(size=(32, 4)) / 6, jnp.float32),
    "bias": jnp.zeros(4),
  }
  x, labels = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32), jnp.asarray(rng.integers(0, 4, 64))
  updater = js.magnitude(structure=js.NM(2, 4), schedule=js.schedules.OneShot(at=0))
  pruned, masks = updater.instant_sparsify(params)
  sparse = js.compress(pruned, masks)

  def loss_fn(w, mul):
    logits = mul(jax.nn.relu(mul(x, w["up"])), w["down"]) + w["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  trainable, fixed = js.arrays.partition(sparse)
  tx = optax.adam(1e-2)

  @jax.jit
  def step(trainable, state):
    value, grads = jax.value_and_grad(lambda t: loss_fn(js.arrays.combine(t, fixed), js.ops.nm_matmul))(trainable)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, value

  @jax.jit
  def masked_step(w, state):
    value, grads = jax.value_and_grad(lambda w: loss_fn(w, jnp.matmul))(w)
    grads = jax.tree.map(lambda g, m: g if isinstance(m, optax.MaskedNode) else jnp.where(m, g, 0), grads, masks)
    updates, state = tx.update(grads, state, w)
    return optax.apply_updates(w, updates), state, value

  state, dense, dense_state = tx.init(trainable), pruned, tx.init(pruned)
  losses = []
  for _ in range(15):
    trainable, state, value = step(trainable, state)
    dense, dense_state, want = masked_step(dense, dense_state)
    losses.append(float(value))
    np.testing.assert_allclose(value, want, rtol=1e-4)
  assert losses[-1] < 0.8 * losses[0]
  tuned = js.arrays.combine(trainable, fixed)
  assert (tuned["up"].indices == sparse["up"].indices).all()
  np.testing.assert_allclose(np.asarray(tuned["up"].to_dense()), np.asarray(dense["up"]), rtol=2e-3, atol=2e-4)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import jaxsparse as js
rng = np.random.default_rng(0)
w = rng.normal(size=(16, 4, 8)); w[:, 1::2] = 0
w = js.NMArray.from_dense(jnp.asarray(w.reshape(64, 8), jnp.float32), 2, 4)
x = jnp.asarray(rng.normal(size=(6, 64)), jnp.float32)
mesh = jax.make_mesh((4,), ("o",), axis_types=(jax.sharding.AxisType.Auto,))
specs = P(), P(None, None, "o")
whole = lambda x, w: js.ops.nm_matmul(x, w, activation="silu")
split = jax.shard_map(whole, mesh=mesh, in_specs=specs, out_specs=P(None, "o"))
near = lambda a, b: jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), a, b)
trainable, fixed = js.arrays.partition(w)
loss = lambda f: lambda x, t: (f(x, js.arrays.combine(t, fixed)) ** 2).sum()
near(jax.jit(split)(x, w), whole(x, w))
near(jax.grad(loss(split), (0, 1))(x, trainable), jax.grad(loss(whole), (0, 1))(x, trainable))
placed = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, specs[1])), w)
y = jax.jit(whole)(x, placed)
near(y, whole(x, w))
assert y.sharding.spec == P(None, "o") and placed.to_dense().sharding.spec == P(None, "o")
"""


def test_sharded():
  """Split along O over four devices: by shard_map, gradients included, and by the compiler."""
  four_devices.run(SHARDED)


# -- Which one runs ----------------------------------------------------------------------------------------------------


def test_choice_on_this_device():
  x, w = case(16, 6, 2, 4, 3)
  choice = js.ops.which_nm_matmul(x, w)
  assert choice.implementation == "xla" and set(choice.rejected) == {"reference", "hopper", "decode"}
  assert "NVIDIA" in choice.rejected["hopper"] and "not hopper: it needs" in str(choice)
  assert js.ops.which_nm_matmul(x, w, implementation="reference").reason == "it was named."
  for name in ("hopper", "decode"):
    with pytest.raises(
      NotImplementedError, match=f"nm_matmul: implementation='{name}' cannot run here: it needs an NVIDIA"
    ):
      js.ops.nm_matmul(x, w, implementation=name)
  with pytest.raises(
    ValueError, match="implementation='cublas' is unknown; allowed are None, 'reference', 'xla', 'hopper', 'decode'"
  ):
    js.ops.nm_matmul(x, w, implementation="cublas")


@dataclasses.dataclass
class FakeKernels:
  """Stands for the GPU kernels: counts its calls, computes with the reference."""

  reasons: dict[str, str | None]
  calls: list[str] = dataclasses.field(default_factory=list)

  def kernel(self, name):
    def run(x, w, *, bias=None, activation=None, out_dtype=None):
      self.calls.append(name)
      assert x.ndim == 2
      return reference.reference(x, w, bias, activation, out_dtype)

    return (lambda *args, **kwargs: self.reasons.get(name)), run


@pytest.fixture
def gpu(monkeypatch):
  """A device that says it is an H100, and kernels that run anywhere."""
  fake = FakeKernels({})
  monkeypatch.setattr(_dispatch, "current_target", lambda: H100)
  monkeypatch.setattr(api, "_kernel", fake.kernel)
  monkeypatch.setattr(api, "_pack_as", lambda name, w: w)
  monkeypatch.setattr(_mosaic_gpu, "unavailable", lambda: None)
  monkeypatch.setattr(preference, "dense_wins", lambda *args: False)
  api._run_kernel.cache_clear()
  api._run.clear_cache()
  yield fake
  api._run_kernel.cache_clear()
  api._run.clear_cache()


def test_choice_on_a_gpu(gpu, monkeypatch):
  pick = lambda batch, n, m, **kwargs: js.ops.which_nm_matmul(*case(16, 6, n, m, batch, jnp.bfloat16), **kwargs)
  assert pick(512, 2, 4).implementation == "hopper" and "packed in every call" in pick(512, 2, 4).reason
  assert pick(1, 1, 8).implementation == "decode" and pick(512, 1, 8).implementation == "hopper"
  gpu.reasons["hopper"] = "it is asleep."
  assert pick(512, 2, 4).rejected["hopper"] == "it is asleep."
  with pytest.raises(NotImplementedError, match="it is asleep. implementation=None"):
    pick(512, 2, 4, implementation="hopper")
  gpu.reasons["decode"] = "too many rows."
  assert pick(512, 2, 4).implementation == "xla"
  monkeypatch.setattr(
    _dispatch, "current_target", lambda: dataclasses.replace(H100, kind="NVIDIA A100", capability=(8, 0))
  )
  assert (
    pick(512, 2, 4).rejected["decode"]
    == "it is written for Hopper (compute capability 9.0); this is NVIDIA A100 (gpu)."
  )


def test_dense_wins_and_says_so(gpu, monkeypatch):
  monkeypatch.setattr(preference, "dense_wins", lambda *args: True)
  choice = js.ops.which_nm_matmul(*case(16, 6, 2, 4, 8, jnp.bfloat16))
  assert choice.implementation == "xla" and "is small: kernels win from" in choice.reason
  assert choice.rejected["hopper"] == "'xla' is preferred here."
  # Packed, it would be unpacked in every call.
  monkeypatch.setattr(api, "_packed_as", lambda w: "decode")
  assert js.ops.which_nm_matmul(*case(16, 6, 2, 4, 8, jnp.bfloat16)).implementation == "decode"


def test_small_weights_go_dense():
  assert preference.dense_wins(512, 512) and preference.dense_wins(1 << 20, 8)
  assert not preference.dense_wins(1024, 1024)


def test_a_named_kernel_runs(gpu):
  """Named: it is called, folded over vmap, and its gradients come from the same derivative rule."""
  x, w = case(16, 6, 2, 4, (2, 3))
  want = float64(x) @ dense64(w)
  y = js.ops.nm_matmul(x, w, implementation="hopper")
  assert gpu.calls == ["hopper"]
  assert_close(y, want, 16, x.dtype)
  folded = jax.vmap(lambda x: js.ops.nm_matmul(x, w, implementation="hopper"))(x)
  assert_close(folded, want, 16, x.dtype)
  stacked = jax.tree.map(lambda a: jnp.stack([a, a]), w)
  mapped = jax.vmap(lambda x, w: js.ops.nm_matmul(x, w, implementation="hopper"))(x, stacked)
  assert_close(mapped, want, 16, x.dtype)
  grad = lambda i: jax.grad(lambda x: (js.ops.nm_matmul(x, w, implementation=i, activation="silu") ** 2).sum())(x)
  np.testing.assert_allclose(np.asarray(grad("hopper")), np.asarray(grad("reference")), rtol=1e-4, atol=1e-4)


def test_an_unnamed_kernel_gives_way_on_another_platform(gpu):
  """On a machine with a GPU a computation may be placed on the CPU: XLA runs there, and the kernel for CUDA."""
  x, w = case(16, 6, 2, 4, 3)
  f = jax.jit(lambda x: js.ops.nm_matmul(x, w))
  assert_close(f(x), float64(x) @ dense64(w), 16, x.dtype)
  lower = lambda platform: f.trace(x).lower(lowering_platforms=(platform,)).as_text()
  assert "gather" in lower("cuda") and "gather" not in lower("cpu"), "the reference gathers, the dense path does not"


def test_target_of_an_abstract_device():
  if not hasattr(jax.sharding, "AbstractDevice"):
    pytest.skip("this JAX has no abstract devices")
  device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert _dispatch.current_target() == H100
  assert _dispatch.current_target().platform == "cpu"
  with jax.default_device(jax.devices("cpu")[0]):
    assert _dispatch.current_target().capability is None


# -- Packed for the sparse tensor cores -----------------------------------------------------------------------------


@pytest.mark.parametrize("n,m", [(2, 4), (1, 4), (2, 8), (1, 8), (1, 16), (1, 2)])
def test_packed_for_tensor_cores(n, m):
  """The layout comes back bit for bit; products and gradients through it are those of the NMArray."""
  x, w = case(48, 10, n, m, 3, jnp.bfloat16)
  packed = js.ops.pack(w, "hopper")
  back = js.ops.unpack(packed)
  assert jax.tree.structure(back) == jax.tree.structure(w)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(w)):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  assert packed.shape == w.shape and packed.dtype == w.dtype and packed.pattern == w.pattern
  want = js.ops.nm_matmul(x, w)
  for implementation in (None, "reference"):
    y = js.ops.nm_matmul(x, packed, implementation=implementation)
    np.testing.assert_allclose(float64(y), float64(want), rtol=0.02, atol=0.02)

  def grads(w):
    loss = lambda w, x: (js.ops.nm_matmul(x, w).astype(jnp.float32) ** 2).sum()
    return jax.grad(loss, argnums=(0, 1), allow_int=True)(w, x)

  (got, got_x), (plain, plain_x) = grads(packed), grads(w)
  np.testing.assert_array_equal(np.asarray(got_x), np.asarray(plain_x))
  trainable, fixed = js.arrays.partition({"w": packed})
  assert jax.tree.structure(js.arrays.combine(trainable, fixed)) == jax.tree.structure({"w": packed})
  stored = float64(packed.values)
  if (n, m) in ((2, 4), (1, 2)):  # no free slots: the same numbers in another order
    np.testing.assert_array_equal(np.sort(float64(got.values)[stored != 0]), np.sort(float64(plain.values).ravel()))
    assert len(jax.tree.leaves(trainable)) == 1
  else:
    assert not float64(got.values)[stored == 0].any(), "what fills free slots does not train"
    assert np.count_nonzero(float64(got.values)) == np.count_nonzero(float64(plain.values))
    assert not jax.tree.leaves(trainable)


# -- Packed for few rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,m,bits", [(2, 4, 16), (1, 4, 16), (4, 8, 16), (1, 16, 16), (2, 4, 8), (2, 4, 4)])
def test_packed_for_decoding(n, m, bits):
  """The layout comes back bit for bit; the dense path and the gradient of x work from it."""
  x, w = case(128, 10, n, m, 3, jnp.bfloat16)
  w = w if bits == 16 else js.quant.quantize(w, bits, 64, scale_dtype=jnp.bfloat16)
  packed = js.ops.pack(w, "decode")
  back = js.ops.unpack(packed)
  assert jax.tree.structure(back) == jax.tree.structure(w)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(w)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  np.testing.assert_array_equal(*(np.asarray(js.ops.nm_matmul(x, a)) for a in (packed, w)))
  trainable, fixed = js.arrays.partition(packed)
  assert not jax.tree.leaves(trainable), "what is packed for decoding does not train"
  loss = lambda x, w: js.ops.nm_matmul(x, w).astype(jnp.float32).sum()
  np.testing.assert_array_equal(*(np.asarray(jax.grad(loss)(x, a)) for a in (packed, w)))


# -- Bad input ---------------------------------------------------------------------------------------------------------


def test_bad_operands():
  x, w = case(16, 6, 2, 4, 3)
  with pytest.raises(TypeError, match="w is a ArrayImpl; an NMArray"):
    js.ops.nm_matmul(x, w.to_dense())
  with pytest.raises(ValueError, match=r"x has shape \(3, 12\), w \(16, 6\); the last axis of x must be 16"):
    js.ops.nm_matmul(x[:, :12], w)
  with pytest.raises(ValueError, match="one layer"):
    js.ops.nm_matmul(x, jax.tree.map(lambda a: a[None], w))
  with pytest.raises(TypeError, match=r"x is bfloat16, w float32; make them equal: x.astype\(w.dtype\)"):
    js.ops.nm_matmul(x.astype(jnp.bfloat16), w)
  with pytest.raises(TypeError, match="x is int32; allowed are bfloat16, float16, float32"):
    js.ops.nm_matmul(x.astype(jnp.int32), w)
  with pytest.raises(ValueError, match=r"bias has shape \(5,\); it must be \(6,\)"):
    js.ops.nm_matmul(x, w, bias=jnp.ones(5))
  with pytest.raises(TypeError, match="bias is int32"):
    js.ops.nm_matmul(x, w, bias=jnp.ones(6, jnp.int32))
  with pytest.raises(ValueError, match="activation='swish'; allowed are"):
    js.ops.nm_matmul(x, w, activation="swish")
  with pytest.raises(TypeError, match="preferred_element_type=int32"):
    js.ops.nm_matmul(x, w, preferred_element_type=jnp.int32)


def test_bad_packing():
  _, w = case(16, 6, 2, 4, 3)
  with pytest.raises(ValueError, match="layout='ampere' is unknown; allowed are 'auto', 'hopper', 'decode'"):
    js.ops.pack(w, "ampere")
  with pytest.raises(TypeError, match="pack takes an NMArray, got"):
    js.ops.pack(w.to_dense())
  with pytest.raises(ValueError, match="pack takes one layer"):
    js.ops.pack(jax.tree.map(lambda a: a[None], w))
  with pytest.raises(TypeError, match="unpack takes what pack made"):
    js.ops.unpack(w.to_dense())
  assert js.ops.unpack(w) is w
  for bad, message in [(w, "bfloat16 or float16"), (case(16, 6, 4, 8, 3, jnp.bfloat16)[1], "4:8 can keep more than 2")]:
    with pytest.raises(ValueError, match=message):
      js.ops.pack(bad, "hopper")


def test_preferred_layout():
  _, w = case(16, 6, 2, 4, 3, jnp.bfloat16)
  assert preference.layout(w, None) == "hopper"
  leaf = lambda o, dtype: jax.ShapeDtypeStruct((4, 2, o), dtype)
  shaped = lambda o: js.NMArray(leaf(o, jnp.bfloat16), leaf(o, jnp.uint8), n=2, m=4)
  assert [preference.layout(shaped(o), 1) for o in (1024, 4096, 10240, 14336)] == [
    "decode",
    "hopper",
    "decode",
    "hopper",
  ]
  assert preference.layout(js.quant.quantize(w, 8, 16), None) == "decode"
  assert preference.layout(w.astype(jnp.float32), None) == "decode"
  for n, m, one, many in [(1, 4, "decode", "hopper"), (4, 8, "decode", "decode"), (2, 8, "decode", "hopper")]:
    w = case(16, 6, n, m, 3, jnp.bfloat16)[1]
    assert (preference.layout(w, 1), preference.layout(w, 512)) == (one, many)


def test_preference_agrees_with_what_was_measured():
  table = pathlib.Path(preference.__file__).parent / "measured" / "few_rows_nvidia_h100.json"
  rows = json.loads(table.read_text())["rows"]
  for pattern, k, o, batch, decode, tensor_cores in rows:
    n, m = map(int, pattern.split(":"))
    leaf = lambda dtype: jax.ShapeDtypeStruct((k // m, n, o), dtype)
    w = js.NMArray.tree_unflatten((n, m), (leaf(jnp.bfloat16), leaf(jnp.uint8), None))
    taken = {"decode": decode, "hopper": tensor_cores}[preference.layout(w, batch)]
    assert taken <= 1.1 * min(decode, tensor_cores), (pattern, k, o, batch)
  assert {row[3] for row in rows} == {1, 8, 16, 24, 32, 48, 64}


# -- The benchmark -----------------------------------------------------------------------------------------------------


def test_benchmark_at_toy_size(tmp_path):
  root = pathlib.Path(__file__).parents[1]

  def run(script, *arguments):
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, f"benchmarks/{script}.py", *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done

  arguments = ["--quick", "--patterns=2:4", "--rounds=1", "--iterations=1", f"--out={tmp_path}/nm"]
  run("nm_matmul", *arguments, "--shapes=square/4096")
  first = json.loads((tmp_path / "nm.json").read_text())["rows"]
  done = run("nm_matmul", *arguments, "--shapes=square/4096,llama3-8b/down", "--batches=13", "--resume")
  found = json.loads((tmp_path / "nm.json").read_text())
  assert len(found["rows"]) == 2 and not found["failed"] and not found["not_measured"]
  assert first[0] in found["rows"], "what is there is not measured again"
  assert "| 2:4 | llama3-8b/down | 224 x 64 |" in run("nm_matmul_table", f"{tmp_path}/nm.json", "--columns=13").stdout
  assert all(row["implementation"] == "xla*" and row["error"] < 4e-3 and row["ratio"] > 0 for row in found["rows"])
  assert found["cusparselt"] == "no GPU" and "cuSPARSELt: no GPU" in done.stdout and (tmp_path / "nm.png").exists()
