"""The matmul for few rows: its layout, its register program on an emulated `mma.sp`, its machine code for sm_90a."""

import dataclasses

import ahead_of_time
import jax
import jax.numpy as jnp
import ml_dtypes
import mma_sp
import numpy as np
import pytest

from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.nm_matmul import _decode
from jaxsparse.ops.nm_matmul import _decode_layout as dl
from jaxsparse.ops.nm_matmul import _decode_pack
from jaxsparse.ops.nm_matmul import _decode_program as program

needs_pallas = pytest.mark.skipif(mg.unavailable() is not None, reason=str(mg.unavailable()))
needs_compiler = pytest.mark.skipif(
  (mg.unavailable() or ahead_of_time.unavailable()) is not None,
  reason=str(mg.unavailable() or ahead_of_time.unavailable()),
)
PATTERNS = [(2, 4), (1, 4), (1, 8), (2, 8), (4, 8), (1, 16), (3, 16)]
PATTERN_IDS = [f"{n}:{m}" for n, m in PATTERNS]
# Value dtype, scale group, scale dtype, dtype to multiply in.
VALUES = {
  "bf16": ("bfloat16", 0, "", "bfloat16"),
  "f16": ("float16", 0, "", "float16"),
  "int8": ("int8", 128, "bfloat16", "bfloat16"),
  "int8 in f16": ("int8", 64, "float16", "float16"),
  "int4": ("int4", 256, "float32", "bfloat16"),
  "int4 without scales": ("int4", 0, "", "float16"),
}


def weight(seed, reduction, outputs, n, m, dtype="bfloat16", group=0, scale_dtype=""):
  """(values, indices, scales or None), ragged reductions too."""
  rng = np.random.default_rng(seed)
  groups = -(-reduction // m)
  indices = np.sort(np.argsort(rng.random((groups, m, outputs)), 1)[:, :n], 1).astype(np.uint8)
  if dtype.startswith("int"):
    half = 1 << int(dtype[3:]) - 1
    values = jnp.asarray(rng.integers(-half, half, indices.shape), jnp.int8).astype(dtype)
  else:
    values = jnp.asarray(rng.standard_normal(indices.shape), dtype)
  scales = None
  if group:
    scales = jnp.asarray(rng.uniform(0.5, 2.0, (-(-reduction // group), outputs)), scale_dtype)
  return values, jnp.asarray(indices), scales


def dense_f64(values, indices, scales, reduction, m, group):
  """Obvious and slow: scatter in NumPy."""
  groups, _, outputs = values.shape
  dense = np.zeros((groups, m, outputs))
  np.put_along_axis(dense, np.asarray(indices).astype(int), np.asarray(values.astype(jnp.float32), float), 1)
  dense = dense.reshape(groups * m, outputs)[:reduction]
  return dense if scales is None else dense * np.repeat(np.asarray(scales, float), group, 0)[:reduction]


def spec(batch, reduction, outputs, n, m, dtype="bfloat16", group=0, scale_dtype="", x_dtype=None):
  """Shapes of (x, layout)."""
  chunk = dl.chunk_of(n, m, dl.VALUE_DTYPES[dtype], group, scale_dtype)
  step = 64 * chunk.parts
  data = jax.ShapeDtypeStruct((-(-outputs // 64), -(-reduction // step), chunk.nbytes // 4), jnp.int32)
  layout = dl.DecodeLayout(data, n, m, (reduction, outputs), dtype, group, scale_dtype)
  return jax.ShapeDtypeStruct((batch, reduction), x_dtype or (dtype if group == 0 else "bfloat16")), layout


def bits(x):
  return np.asarray(x.astype(jnp.int8) if x.dtype.name.startswith("int") else x.view(f"uint{8 * x.dtype.itemsize}"))


class TestLayout:
  @pytest.mark.parametrize("n, m", PATTERNS, ids=PATTERN_IDS)
  @pytest.mark.parametrize("kind", VALUES)
  def test_round_trip_is_bit_exact(self, n, m, kind):
    dtype, group, scale_dtype, _ = VALUES[kind]
    values, indices, scales = weight(n * m, 272, 70, n, m, dtype, group, scale_dtype)
    layout = _decode_pack.pack_decode(values, indices, n, m, scales)
    assert layout.shape == (272, 70) and layout.nbytes == layout.data.size * 4
    back = _decode_pack.unpack_decode(layout)
    assert back[1].dtype == jnp.uint8
    np.testing.assert_array_equal(back[1], indices)
    np.testing.assert_array_equal(bits(back[0]), bits(values))
    assert back[0].dtype == values.dtype and (back[2] is None) == (scales is None)
    if scales is not None:
      assert back[2].dtype == scales.dtype
      np.testing.assert_array_equal(bits(back[2]), bits(scales))

  @pytest.mark.parametrize("group", [32, 64, 128, 384])
  def test_scale_groups(self, group):
    values, indices, scales = weight(0, 700, 64, 2, 4, "int4", group, "bfloat16")
    layout = _decode_pack.pack_decode(values, indices, 2, 4, scales, shape=(700, 64))
    assert layout.group == group
    np.testing.assert_array_equal(bits(_decode_pack.unpack_decode(layout)[2]), bits(scales))

  def test_special_values_survive(self):
    values, indices, _ = weight(1, 64, 64, 2, 4)
    values = values.at[0, 0].set(jnp.inf).at[1, 1].set(-0.0).at[2, 0].set(0.0).at[3, 0].set(jnp.nan)
    back, _, _ = _decode_pack.unpack_decode(_decode_pack.pack_decode(values, indices, 2, 4))
    np.testing.assert_array_equal(bits(back), bits(values))

  @pytest.mark.parametrize(
    "n, m, dtype, group, share",
    [(2, 4, "bfloat16", 0, 0.5625), (1, 4, "bfloat16", 0, 0.28125), (2, 8, "bfloat16", 0, 0.296875)]
    + [(1, 8, "bfloat16", 0, 0.1484375), (1, 16, "bfloat16", 0, 0.078125), (4, 8, "bfloat16", 0, 0.59375)]
    + [(2, 4, "int8", 128, 0.3203125), (2, 4, "int4", 128, 0.1953125)],
  )
  def test_nothing_but_values_and_positions_is_stored(self, n, m, dtype, group, share):
    _, layout = spec(1, 1024, 128, n, m, dtype, group, "bfloat16" if group else "")
    assert layout.nbytes == share * 2 * 1024 * 128

  def test_crosses_jit_and_scan(self):
    parts = [_decode_pack.pack_decode(*weight(s, 64, 64, 1, 8)[:2], 1, 8) for s in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    _, unpacked = jax.lax.scan(lambda c, layout: (c, _decode_pack.unpack_decode(layout)[0]), 0, stacked)
    np.testing.assert_array_equal(bits(unpacked[2]), bits(_decode_pack.unpack_decode(parts[2])[0]))

  def test_bad_arguments(self):
    values, indices, _ = weight(0, 64, 64, 2, 4)
    with pytest.raises(ValueError, match="m = 4, 8 or 16, got 1:2"):
      _decode_pack.pack_decode(values, indices, 1, 2)
    with pytest.raises(ValueError, match="1 <= n <= m / 2, got 3:4"):
      _decode_pack.pack_decode(values, indices, 3, 4)
    with pytest.raises(TypeError, match="values are float32"):
      _decode_pack.pack_decode(values.astype(jnp.float32), indices, 2, 4)
    with pytest.raises(ValueError, match=r"must both be \[K / 4, 2, O\]"):
      _decode_pack.pack_decode(values, indices[:4], 2, 4)
    with pytest.raises(ValueError, match=r"shape \(80, 64\) does not fit"):
      _decode_pack.pack_decode(values, indices, 2, 4, shape=(80, 64))
    with pytest.raises(ValueError, match="5 scale rows for K = 64"):
      _decode_pack.pack_decode(values.astype(jnp.int8), indices, 2, 4, jnp.ones((5, 64), jnp.bfloat16))
    with pytest.raises(TypeError, match="scales are int8"):
      _decode_pack.pack_decode(values.astype(jnp.int8), indices, 2, 4, jnp.ones((1, 64), jnp.int8))
    values, indices, scales = weight(0, 64, 64, 1, 8, "int8", 32, "bfloat16")
    with pytest.raises(ValueError, match="groups of 32 need m = 4, got 1:8"):
      _decode_pack.pack_decode(values, indices, 1, 8, scales)


class TestProgram:
  """The lanes' own instructions, on NumPy, with `mma.sp` emulated from the PTX documentation."""

  @pytest.mark.parametrize("n, m", PATTERNS, ids=PATTERN_IDS)
  @pytest.mark.parametrize("kind", VALUES)
  def test_every_entry_meets_its_x(self, n, m, kind):
    dtype, group, scale_dtype, multiply = VALUES[kind]
    values, indices, scales = weight(n + m, 144, 70, n, m, dtype, group, scale_dtype)
    layout = _decode_pack.pack_decode(values, indices, n, m, scales)
    x = np.random.default_rng(0).standard_normal((3, 144))
    reference = x @ dense_f64(values, indices, scales, 144, m, group)
    np.testing.assert_allclose(
      mma_sp.decode(x, layout, multiply), reference, rtol=1e-12, atol=1e-12 * abs(reference).max()
    )

  def test_scale_groups_of_32(self):
    values, indices, scales = weight(7, 160, 64, 2, 4, "int8", 32, "float32")
    layout = _decode_pack.pack_decode(values, indices, 2, 4, scales)
    x = np.random.default_rng(1).standard_normal((9, 160))
    reference = x @ dense_f64(values, indices, scales, 160, 4, 32)
    np.testing.assert_allclose(mma_sp.decode(x, layout, "bfloat16"), reference, rtol=1e-12, atol=1e-10)

  @pytest.mark.parametrize("width, dtype", [(8, "bfloat16"), (8, "float16"), (4, "bfloat16"), (4, "float16")])
  def test_every_integer_widens_exactly(self, width, dtype):
    integers = np.arange(-(1 << width - 1), 1 << width - 1)
    halves = jnp.asarray(np.tile(integers, 8 // width + 1)[: len(integers)].reshape(1, -1), jnp.int32).astype(
      jnp.uint16
    )
    words = np.asarray(_decode_pack._value_words(halves, width))[0]
    got = [
      program._widen(mma_sp.NumpyOps(np.zeros(16, np.uint8), dtype), w, width, dtype) for w in words.reshape(-1, 1)
    ]
    got = np.concatenate([mma_sp.floats(w, dtype).reshape(-1) for ws in got for w in ws])
    np.testing.assert_array_equal(got.astype(int), integers)

  def test_emulated_mma_against_a_dense_product(self):
    rng = np.random.default_rng(2)
    a = rng.standard_normal((16, 8, 2)).astype(ml_dtypes.bfloat16)
    first = rng.integers(0, 3, (16, 8))
    second = rng.integers(first + 1, 4)
    dense = np.zeros((16, 8, 4))
    np.put_along_axis(dense, np.stack([first, second], -1), a.astype(float), -1)
    registers, meta = np.zeros((4, 32), np.uint32), np.zeros(32, np.uint32)
    pairs = a.view(np.uint32)[..., 0]
    for lane in range(32):
      g, c = lane // 4, lane % 4
      registers[:, lane] = [pairs[g, c], pairs[g + 8, c], pairs[g, c + 4], pairs[g + 8, c + 4]]
      nibble = first | second << 2
      if c < 2:
        for j in range(4):
          meta[lane] |= nibble[g, 4 * c + j] << 4 * j | nibble[g + 8, 4 * c + j] << 16 + 4 * j
    b = rng.standard_normal((32, 8))
    np.testing.assert_allclose(mma_sp.mma_sp(registers, b, meta, 0, "bfloat16"), dense.reshape(16, 32) @ b)


def supported(x, layout, **arguments):
  return _decode.supports(x, layout, **arguments)


class TestArguments:
  def test_reasons(self):
    x, layout = spec(4, 64, 64, 2, 4)
    assert supported(x, layout) is None
    change = lambda **changes: jax.ShapeDtypeStruct(changes.get("shape", x.shape), changes.get("dtype", x.dtype))
    assert "needs [B, 64]" in supported(change(shape=(4, 32)), layout)
    assert "1 to 64, got 65" in supported(change(shape=(65, 64)), layout)
    assert "bfloat16 or float16" in supported(change(dtype=jnp.float32), layout)
    assert "cast x to the weight's dtype" in supported(change(dtype=jnp.float16), layout)
    assert "activation is 'tanh'" in supported(x, layout, activation="tanh")
    assert "of shape (64,)" in supported(x, layout, bias=jnp.zeros(3))
    assert "out_dtype is int8" in supported(x, layout, out_dtype=jnp.int8)
    with pytest.raises(ValueError, match="x has shape"):
      _decode.nm_matmul_decode(jnp.zeros((4, 32), jnp.bfloat16), layout)

  def test_tunings_fit(self):
    rng = np.random.default_rng(0)
    kinds = [(2, 4), (1, 16), (8, 16), (2, 4, "int4", 128, "float32"), (4, 8, "int8", 64, "bfloat16")]
    for _ in range(300):
      reduction, outputs, batch = int(2 ** rng.uniform(3, 16)), int(2 ** rng.uniform(0, 16)), int(rng.integers(1, 65))
      x, layout = spec(batch, reduction, outputs, *kinds[rng.integers(len(kinds))])
      tuning = _decode.default_tuning(batch, layout)
      plan = _decode.make_plan(min(batch, 32), layout, "bfloat16", tuning=tuning)
      assert plan.phases * plan.phase >= plan.share and tuning.split * plan.share >= plan.chunks
      assert plan.threads <= (512 if batch <= 16 else 256), "more would not leave enough registers"

  def test_bad_tunings(self):
    _, layout = spec(16, 4096, 14336, 2, 4)
    for tuning, message in [
      (_decode.Tuning(4, 4, stages=8), "shared memory"),
      (_decode.Tuning(3, 1), "multiple of 4"),
      (_decode.Tuning(2, 4, chunks=3), "do not divide"),
    ]:
      with pytest.raises(ValueError, match=message):
        _decode.make_plan(16, layout, "bfloat16", tuning=tuning)


@needs_pallas
class TestCopiesOfX:
  """The address arithmetic of every thread, with words that are NumPy arrays."""

  @pytest.mark.parametrize(
    "case, tuning, batch, reduction",
    [
      ((1, 16), (2, 4, 1, 3, 4, 16), 16, 4096),
      ((2, 4), (2, 4, 1, 3, 1, 8), 16, 1024),
      ((2, 4, "int4", 128, "bfloat16"), (1, 8, 2, 4, 1, 8), 3, 1160),
      ((1, 8), (4, 4, 2, 3), 1, 1096),
      ((1, 4), (4, 2, 4, 3, 1, 14), 24, 7168),
      ((1, 16), (2, 4, 4, 2, 2, 24), 7, 14336),
    ],
  )
  def test_each_piece_lands_once(self, case, tuning, batch, reduction, monkeypatch):
    from jaxsparse.ops.nm_matmul import _decode_device

    _, layout = spec(batch, reduction, 512, *case)
    plan = _decode.make_plan(batch, layout, "bfloat16", tuning=_decode.Tuning(*tuning))
    copies, masks = [], [np.ones(plan.threads, bool)]

    def asm(ptx, outputs, inputs):
      assert ptx.startswith("cp.async.ca.shared.global")
      to, source, size = (np.broadcast_to(getattr(i, "v", i), plan.threads)[masks[-1]] for i in inputs)
      copies.extend(zip(to.tolist(), source.tolist(), size.tolist(), strict=True))

    def when(condition, body):
      masks.append(masks[-1] & condition)
      body()
      masks.pop()

    monkeypatch.setattr(_decode_device, "Word", Lanes)
    monkeypatch.setattr(_decode_device, "select", lambda c, a, b: Lanes(np.where(c, Lanes(a).v, Lanes(b).v)))
    monkeypatch.setattr(_decode_device, "arith", Lanes)
    monkeypatch.setattr(_decode_device, "when", when)
    monkeypatch.setattr(_decode_device, "asm", asm)
    monkeypatch.setattr(_decode_device, "offset64", lambda base, offset, scale: offset * scale)
    monkeypatch.setattr(_decode_device, "loop", lambda a, b, c, f: [f(Lanes(i), c) for i in range(a.v, b.v)])
    size = 16 if layout.m == 4 else 8
    place = mma_sp.position_of_k(layout.m)
    for phase in range(plan.phases):
      copies.clear()
      start = phase * plan.phase * layout.step
      _decode_device._load_x(plan, 0, Lanes(0), Lanes(start), Lanes(np.arange(plan.threads)), Lanes(5))
      expected = set()
      for row in range(batch):
        for k in range(0, plan.phase * layout.step, size // 2):
          source = row * reduction + min(start + k, reduction - size // 2)
          to = row * plan.row_bytes + 2 * (k // 64 * 64 + int(place[k % 64]))
          expected.add((to, 2 * source, size if start + k < reduction else 0))
      assert set(copies) == expected


class Lanes:
  """Stands in for a Word: the value of every thread."""

  def __init__(self, v):
    self.v = getattr(v, "v", v)

  andi = staticmethod(np.logical_and)

  def compare(self, kind, other):
    return {"lt": np.less, "ge": np.greater_equal, "eq": np.equal}[kind](self.v, Lanes(other).v)

  def min(self, other):
    return Lanes(np.minimum(self.v, Lanes(other).v))


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "lshift", "rshift"):
  _name = f"__{_name}__"
  setattr(
    Lanes, _name, lambda self, other, _op=getattr(np.ndarray, _name): Lanes(_op(np.asarray(self.v), Lanes(other).v))
  )


@needs_compiler
class TestMachineCode:
  CASES = {
    "2:4": ((16, 4096, 14336, 2, 4), {}),
    "2:4, one row": ((1, 14336, 4096, 2, 4), dict(activation="silu", bias=jnp.bfloat16)),
    "1:4": ((16, 4096, 14336, 1, 4), {}),
    "1:8": ((16, 28672, 8192, 1, 8), {}),
    "1:16": ((16, 4096, 14336, 1, 16), {}),
    "4:8, f16": ((8, 4096, 4096, 4, 8, "float16"), {}),
    "int8": ((16, 4096, 14336, 2, 4, "int8", 128, "bfloat16"), dict(activation="gelu")),
    "int4, 32 rows": ((32, 4096, 14336, 2, 4, "int4", 128, "bfloat16"), {}),
    "ragged": ((3, 1085, 330, 2, 4), dict(out_dtype=jnp.float32, bias=jnp.float32)),
  }

  @pytest.mark.parametrize("case", CASES)
  def test_sparse_instruction_reaches_sm_90a(self, case, tmp_path, monkeypatch):
    shape, options = self.CASES[case]
    options = dict(options)
    x, layout = spec(*shape)
    bias = options.pop("bias", None)
    bias = bias if bias is None else jax.ShapeDtypeStruct((shape[2],), bias)
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))

    def f(x, layout, bias):
      return _decode.nm_matmul_decode(x, layout, bias=bias, **options)

    compiled = ahead_of_time.compile_for_h100(f, x, layout, bias)
    assert "nm_matmul_decode" in compiled.as_text()
    (ptx,) = (path.read_text() for path in tmp_path.glob("*.ptx"))
    (report,) = (path.read_text() for path in tmp_path.glob("*.ptxas"))
    kind = "f16" if x.dtype == jnp.float16 else "bf16"
    variant = "sp::ordered_metadata" if shape[3:5] == (2, 4) else "sp"
    assert f"mma.{variant}.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32" in ptx
    assert "cp.async.bulk.shared::cluster.global" in ptx
    assert "fence.proxy.async" not in ptx  # waits for all memory
    assert "for 'sm_90a'" in report and " 0 bytes spill stores" in report.replace("\t", " "), report


def test_slices_of_a_large_batch(monkeypatch):
  """More rows than a launch takes come back in order."""
  calls = []

  def call(plan):
    def run(x, data, *bias):
      calls.append(plan.batch)
      return x[:, : plan.layout.shape[1]]

    return run

  monkeypatch.setattr(_decode, "_call", call)
  x = jnp.arange(50 * 64, dtype=jnp.bfloat16).reshape(50, 64)
  layout = _decode_pack.pack_decode(*weight(0, 64, 64, 2, 4)[:2], 2, 4)
  np.testing.assert_array_equal(np.asarray(_decode.nm_matmul_decode(x, layout), float), np.asarray(x, float))
  assert calls == [32, 18]
  assert dataclasses.replace(layout, shape=(64, 64)).bits == 16
