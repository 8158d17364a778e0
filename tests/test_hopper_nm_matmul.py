"""The sparse tensor-core matmul: its layout, its body with a dense MMA interpreted, its machine code for sm_90a."""

import json
import pathlib
import subprocess
import sys

import ahead_of_time
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import arrays
from jaxsparse.arrays import NMArray
from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.nm_matmul import _hopper
from jaxsparse.ops.nm_matmul import _hopper_layout as hl
from jaxsparse.ops.nm_matmul import tuning
from jaxsparse.ops.nm_matmul.tuning import choose_tuning, SHARED_BYTES, Tuning

needs_pallas = pytest.mark.skipif(mg.unavailable() is not None, reason=str(mg.unavailable()))
needs_compiler = pytest.mark.skipif(
  (mg.unavailable() or ahead_of_time.unavailable()) is not None,
  reason=str(mg.unavailable() or ahead_of_time.unavailable()),
)


def random_weight(seed, reduction, outputs, n=2, m=4, dtype=jnp.bfloat16):
  rng = np.random.default_rng(seed)
  indices = np.sort(np.argsort(rng.random((reduction // m, m, outputs)), 1)[:, :n], 1).astype(np.uint8)
  values = jnp.asarray(rng.standard_normal(indices.shape), dtype)
  return NMArray(values, jnp.asarray(indices), n=n, m=m)


def dense_f64(w):
  """Obvious and slow: scatter in NumPy."""
  groups, _, outputs = w.values.shape
  dense = np.zeros((groups, w.m, outputs))
  np.put_along_axis(dense, np.asarray(w.indices).astype(int), np.asarray(w.values.astype(jnp.float32), float), 1)
  return dense.reshape(w.shape)


def relative_error(y, reference):
  return np.linalg.norm(np.asarray(y.astype(jnp.float32), float) - reference) / np.linalg.norm(reference)


class TestLayout:
  @pytest.mark.parametrize("n, m", [(2, 4), (1, 2), (1, 4), (2, 8), (1, 8), (1, 16), (2, 16)])
  @pytest.mark.parametrize("reduction_contiguous", [False, True])
  def test_round_trip_is_bit_exact(self, n, m, reduction_contiguous):
    w = random_weight(n * m, 96, 24, n, m)
    packed = hl.pack(w, reduction_contiguous=reduction_contiguous)
    assert (packed.shape, packed.pattern, packed.dtype) == (w.shape, w.pattern, w.dtype)
    back = packed.unpack()
    assert back.indices.dtype == jnp.uint8
    np.testing.assert_array_equal(back.indices, w.indices)
    np.testing.assert_array_equal(back.values.view(jnp.uint16), w.values.view(jnp.uint16))
    np.testing.assert_array_equal(np.asarray(hl.to_dense(packed).astype(jnp.float32), float), dense_f64(w))

  def test_kept_zeros_survive(self):
    w = random_weight(0, 64, 8, 2, 8)
    w = NMArray(w.values.at[0].set(0.0), w.indices, n=2, m=8)
    back = hl.pack(w).unpack()
    np.testing.assert_array_equal(back.indices, w.indices)
    np.testing.assert_array_equal(back.values, w.values)

  def test_values_with_free_slots_among_them_do_not_train(self):
    tree = {"1:4": hl.pack(random_weight(0, 64, 8, 1, 4)), "2:4": hl.pack(random_weight(0, 64, 8))}
    trainable, fixed = arrays.partition(tree)
    assert trainable["1:4"] is None and fixed["1:4"] is tree["1:4"]
    assert trainable["2:4"].values is tree["2:4"].values and fixed["2:4"].values is None

  def test_golden_word(self):
    # Groups of 4 keep (0, 1), (0, 2), (1, 3), (2, 3): nibbles 4, 8, 13, 14, the first group lowest.
    positions = jnp.array([[0, 1], [0, 2], [1, 3], [2, 3]], jnp.uint8)[:, :, None]
    values, metadata = hl.pack_quads(jnp.arange(8, dtype=jnp.bfloat16).reshape(4, 2, 1), positions)
    assert metadata.dtype == jnp.uint16
    assert int(metadata[0, 0]) == 0xED84
    assert int(metadata[1, 0]) == 0x4444  # padding is valid metadata
    assert values[:9, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0]

  def test_words_of_the_instruction(self):
    """PTX ISA 9.7.15.6.1: lane 4 g + c has chunk c, row g in its low and row g + 8 in its high half."""
    w = random_weight(1, 128, 64)
    metadata = np.asarray(hl.pack(w).metadata).astype(np.uint32)
    loaded = np.zeros((2, 128), np.uint32)  # as ldmatrix hands them out, see _hopper._load_metadata
    for k, warp, lane in np.ndindex(2, 4, 32):
      g, c = divmod(lane, 4)
      chunk = metadata[4 * k + c, 16 * warp : 16 * warp + 16]
      loaded[k, 32 * warp + lane] = chunk[g] | chunk[g + 8] << 16
    # The same words written the way a sparse library packs them offline: rows first.
    index = np.asarray(w.indices).transpose(2, 0, 1).reshape(64, 8, 8).astype(np.uint32)
    chunks = sum(index[..., j] << (2 * j) for j in range(8))
    words = chunks.reshape(1, 4, 2, 8, 1, 2, 2, 2).transpose(0, 4, 5, 1, 3, 6, 7, 2)
    np.testing.assert_array_equal(loaded, (words[..., 0] | words[..., 1] << 16).reshape(2, 128))

  def test_two_in_four_costs_nothing(self):
    w = random_weight(2, 128, 64)
    np.testing.assert_array_equal(hl.pack(w).values, w.values.reshape(64, 64))

  def test_rejects(self):
    with pytest.raises(ValueError, match="4:8 can keep more than 2 of 4"):
      hl.pack(random_weight(0, 64, 8, 4, 8))
    with pytest.raises(ValueError, match="values are float32"):
      hl.pack(random_weight(0, 64, 8, dtype=jnp.float32))
    with pytest.raises(ValueError, match="divisible by 4"):
      hl.pack(random_weight(0, 6, 8, 1, 2))


class TestTuning:
  @pytest.mark.parametrize("outputs", [256, 1024, 4096, 6144, 14336, 28672, 128256])
  @pytest.mark.parametrize("reduction", [256, 4096, 14336, 28672])
  def test_every_shape_gets_one_that_fits(self, reduction, outputs):
    for batch in (1, 7, 8, 9, 16, 33, 64, 65, 100, 128, 200, 256, 512, 1000, 2048, 4096, 8192, 100_000):
      chosen = choose_tuning(batch, reduction, outputs)
      assert chosen.shared_bytes() <= SHARED_BYTES
      assert chosen.tile_n >= min(batch, 64)

  def test_agrees_with_what_was_measured(self):
    table = pathlib.Path(tuning.__file__).parent / "measured" / "nvidia_h100.json"
    for row in json.loads(table.read_text())["shapes"]:
      times = {(*key[:3], key[5]): us for *key, us in reversed(row["sparse"])}
      chosen = choose_tuning(*row["shape"])
      taken = times.get((chosen.tile_m, chosen.tile_n, chosen.tile_k, chosen.split_k))
      if taken is not None:
        assert taken <= 1.08 * min(times.values()), (row["shape"], chosen)
      if not row["rotated"] and taken is not None:
        assert 0.85 < tuning._estimate(chosen, *row["shape"]) / 1000 / taken < 1.1, (row["shape"], chosen)

  def test_rejects(self):
    with pytest.raises(ValueError, match="more registers"):
      Tuning(256, 208)
    with pytest.raises(ValueError, match="shared memory"):
      Tuning(256, 192, 128, 4)
    with pytest.raises(ValueError, match="multiple of 8"):
      Tuning(128, 20)


@needs_pallas
class TestInterpreted:
  """Everything but the sparse MMA: loads, barriers, epilogue, with race detection."""

  CASES = {
    "two waves": dict(shape=(128, 128, 256), tuning=Tuning(128, 64, 64, 2)),
    "reduction contiguous": dict(shape=(64, 128, 128), tuning=Tuning(128, 64, 128, 2), reduction_contiguous=True),
    "bias and gelu": dict(shape=(32, 256, 128), tuning=Tuning(128, 16, 128, 2), bias=True, activation="gelu"),
    "split": dict(shape=(16, 256, 128), tuning=Tuning(128, 16, 64, 2, split_k=2), bias=True, activation="silu"),
    "ragged": dict(shape=(20, 200, 72), tuning=Tuning(64, 16, 64, 2, compute_warpgroups=1), out_dtype=jnp.float32),
    "odd": dict(shape=(3, 20, 33), tuning=Tuning(64, 8, 64, 2, compute_warpgroups=1), activation="relu"),
    "float16": dict(shape=(40, 128, 192), tuning=Tuning(192, 40, 64, 3, 3, epilogue_n=16), dtype=jnp.float16),
    "wide": dict(shape=(24, 64, 256), tuning=Tuning(256, 24, 64, 2, epilogue_n=16)),
  }

  @pytest.mark.parametrize("case", CASES)
  def test_against_float64(self, case):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    case = dict(self.CASES[case])
    (batch, reduction, outputs), dtype = case.pop("shape"), case.pop("dtype", jnp.bfloat16)
    rng = np.random.default_rng(batch)
    w = random_weight(batch, reduction, outputs, dtype=dtype)
    packed = hl.pack(w, reduction_contiguous=case.pop("reduction_contiguous", False))
    x = jnp.asarray(rng.standard_normal((batch, reduction)), dtype)
    bias = jnp.asarray(rng.standard_normal(outputs), jnp.float32) if case.pop("bias", False) else None
    y = _hopper.nm_matmul_sparse_core(x, packed, bias=bias, interpret=mg.Interpret(detect_races=True), **case)
    assert not gpu_callbacks.get_races().races_found
    assert y.shape == (batch, outputs) and y.dtype == case.get("out_dtype", dtype)
    reference = np.asarray(x.astype(jnp.float32), float) @ dense_f64(w)
    reference = reference if bias is None else reference + np.asarray(bias, float)
    reference = np.asarray(_hopper.ACTIVATIONS[case.get("activation")](jnp.asarray(reference, jnp.float32)), float)
    limit = {jnp.dtype(jnp.bfloat16): 3e-3, jnp.dtype(jnp.float16): 4e-4}.get(jnp.dtype(y.dtype), 1e-6)
    assert relative_error(y, reference) < limit


@needs_pallas
class TestArguments:
  def test_reasons(self):
    packed = hl.pack(random_weight(0, 64, 64))
    x = jnp.zeros((4, 64), jnp.bfloat16)
    assert "Hopper GPU" in _hopper.supports(x, packed)  # this is a CPU
    with jax.sharding.use_abstract_mesh(ahead_of_time.h100_mesh()):
      assert _hopper.supports(x, packed) is None
      assert "x's last axis" in _hopper.supports(x[:, :32], packed)
      assert "must be equal" in _hopper.supports(x.astype(jnp.float16), packed)
      assert "bfloat16 or float16" in _hopper.supports(x.astype(jnp.float32), packed)
      assert "one per output" in _hopper.supports(x, packed, bias=jnp.zeros(3))
      assert "activation is 'tanh'" in _hopper.supports(x, packed, activation="tanh")
      assert "out_dtype is int8" in _hopper.supports(x, packed, out_dtype=jnp.int8)
    with pytest.raises(ValueError, match="x has shape"):
      _hopper.nm_matmul_sparse_core(x[0], packed)


@needs_compiler
class TestMachineCode:
  CASES = {
    "large": ((4096, 8192, 8192), None, {}),
    "transposed": ((4096, 4096, 4096), None, dict(reduction_contiguous=True)),
    "few rows": ((16, 4096, 14336), None, dict(activation="silu", bias=True)),
    "one row": ((1, 14336, 4096), None, {}),
    "f32": ((512, 4096, 4096), None, dict(out_dtype=jnp.float32, activation="gelu")),
    "f16, ragged": ((100, 1000, 1001), Tuning(256, 200), dict(dtype=jnp.float16)),
    "three warpgroups": ((512, 4096, 6144), Tuning(192, 128, 64, 5, 3), {}),
    "parts added by XLA": ((4096, 8192, 4096), Tuning(128, 256, split_k=2), {}),
    "parts meet": ((512, 14336, 4096), Tuning(128, 256, split_k=2), dict(bias=True, activation="gelu")),
  }

  @pytest.mark.parametrize("case", CASES)
  def test_sparse_instruction_reaches_sm_90a(self, case, tmp_path, monkeypatch):
    (batch, reduction, outputs), tiles, options = self.CASES[case]
    options = dict(options)
    dtype, transposed = options.pop("dtype", jnp.bfloat16), options.pop("reduction_contiguous", False)
    bias = jax.ShapeDtypeStruct((outputs,), jnp.float32) if options.pop("bias", False) else None
    w = jax.eval_shape(lambda: random_weight_like(reduction, outputs, dtype, transposed))
    x = jax.ShapeDtypeStruct((batch, reduction), dtype)
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))

    def f(x, w, bias):
      return _hopper.nm_matmul_sparse_core(x, w, bias=bias, tuning=tiles, **options)

    compiled = ahead_of_time.compile_for_h100(f, x, w, bias)
    assert "nm_matmul_sparse_core" in compiled.as_text()
    (ptx,) = (path.read_text() for path in tmp_path.glob("*.ptx"))
    (report,) = (path.read_text() for path in tmp_path.glob("*.ptxas"))
    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    assert "wgmma.mma_async.sp.sync.aligned.m64n" in ptx and f"k32.f32.{kind}.{kind}" in ptx
    assert f"1, 1, 1, {int(not transposed)}, 0;" in ptx  # A is transposed unless its reduction is contiguous
    assert "for 'sm_90a'" in report and "C7510" not in report  # C7510: wgmma was serialised
    assert ("red.release.gpu" in ptx) == (case == "parts meet")
    spilled = int(report.split(" bytes spill stores")[0].split()[-1])
    assert spilled < 128, report


def random_weight_like(reduction, outputs, dtype, transposed):
  w = NMArray.tree_unflatten(
    (2, 4),
    (jnp.zeros((reduction // 4, 2, outputs), dtype), jnp.zeros((reduction // 4, 2, outputs), jnp.uint8), None),
  )
  return hl.pack(w, reduction_contiguous=transposed)


def test_importing_jaxsparse_does_not_import_pallas():
  code = (
    "import sys, jaxsparse, jaxsparse.ops; print([m for m in sys.modules if 'pallas' in m and 'experimental' in m])"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "[]"
