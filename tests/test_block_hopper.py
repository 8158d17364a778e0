"""The block-sparse kernels: interpreted on a CPU with race detection, and compiled to machine code of an H100."""

import dataclasses
import json
import math
import pathlib

import ahead_of_time
from block_cases import all_products64
from block_cases import case
from block_cases import limit
from block_cases import relative_error
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.ops import _dispatch
from jaxsparse.ops import _mosaic_gpu as mg
from jaxsparse.ops.block_matmul import _decode
from jaxsparse.ops.block_matmul import _hopper
from jaxsparse.ops.block_matmul import _narrow
from jaxsparse.ops.block_matmul import _plan
from jaxsparse.ops.block_matmul import preference
from jaxsparse.ops.block_matmul import tuning
from jaxsparse.ops.sampled_matmul import tuning as sampled_tuning

needs_pallas = pytest.mark.skipif(mg.unavailable() is not None, reason=str(mg.unavailable()))
needs_compiler = pytest.mark.skipif(
  (mg.unavailable() or ahead_of_time.unavailable()) is not None,
  reason=str(mg.unavailable() or ahead_of_time.unavailable()),
)


def interpreted(kernel, *args, **kwargs):
  """A kernel on the CPU with race detection."""
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

  y = kernel(*args, interpret=mg.Interpret(detect_races=True), **kwargs)
  assert not gpu_callbacks.get_races().races_found
  return y


KERNEL_CASES = {
  "128": dict(block=(128, 128), grid=(2, 2), density=0.6, batch=20, tuning=dict(tile_b=16)),
  "64, ragged tiles": dict(block=(64, 64), grid=(3, 3), density=0.5, batch=8, tuning=dict(tile_b=8)),
  "32, ragged tiles": dict(block=(32, 32), grid=(3, 5), density=0.4, batch=8, tuning=dict(tile_b=8)),
  "32, split": dict(
    block=(32, 32), grid=(4, 4), density=0.5, batch=8, tuning=dict(tile_b=16, split_k=2, stages=8, step=32, once=True)
  ),
  "high": dict(block=(256, 64), grid=(1, 2), density=1, batch=8, tuning=dict(tile_b=8)),
  "wide": dict(block=(32, 256), grid=(3, 1), density=0.7, batch=8, tuning=dict(tile_b=8)),
  # One list is cut in three parts, and those of the last tiles along B come first.
  "skewed": dict(
    block=(64, 128),
    mask=[[1, 0, 0, 0, 0, 1]] + [[1, 0, 0, 0, 0, 0]] * 11,
    batch=24,
    least=256,
    tuning=dict(tile_b=8, tail=2),
  ),
  "all zero": dict(block=(64, 32), grid=(2, 3), density=0, batch=8, tuning=dict(tile_b=8)),
  "all dense, float16": dict(
    block=(64, 64), grid=(2, 2), density=1, batch=12, dtype=jnp.float16, tuning=dict(tile_b=16)
  ),
  "empty row": dict(block=(64, 64), mask=[[1, 0, 1], [0, 0, 0], [1, 0, 0]], batch=8, tuning=dict(tile_b=8, stages=3)),
  "skewed, split": dict(
    block=(32, 64), mask=[[1] * 13] + [[1] + [0] * 12] * 7, batch=8, least=64, tuning=dict(tile_b=8, once=True, step=32)
  ),
}


def kernel_case(options, transposed):
  options = dict(options)
  options["grid"] = options.get("grid") or np.shape(options["mask"])
  options.pop("tuning"), options.pop("least", None)
  extra = 2 if transposed else 0
  return case(options.pop("block"), options.pop("grid"), options.pop("density", 1), options.pop("batch"),
              options.pop("dtype", jnp.bfloat16), extra=extra, **options)  # fmt: skip


# The other orientation of a case is another kernel, of which each part is in one of these.
INTERPRETED = [(name, i % 2 == 1) for i, name in enumerate(KERNEL_CASES)] + [("32, ragged tiles", True)]


@needs_pallas
@pytest.mark.parametrize("name, transposed", INTERPRETED)
def test_kernel_interpreted(name, transposed, monkeypatch):
  monkeypatch.setattr(_plan, "_LEAST", KERNEL_CASES[name].get("least", _plan._LEAST))
  x, w, dy = kernel_case(KERNEL_CASES[name], transposed)
  if "least" in KERNEL_CASES[name]:
    plan = _plan.plans_of(w).forward
    assert plan.parts[0] > plan.starts.shape[0] - 1
  tiles = tuning.Tuning(**{"stages": 2, **KERNEL_CASES[name]["tuning"]})
  out = jnp.float32 if transposed and x.shape[0] == 8 else None
  y = interpreted(
    _hopper.block_matmul_hopper, dy if transposed else x, w, transposed=transposed, tuning=tiles, out_dtype=out
  )
  want = all_products64(x, w, dy)[int(transposed)]
  assert y.shape == want.shape and y.dtype == (out or x.dtype) and relative_error(y, want) < limit(y.dtype)


# The interpreter plays three blocks of threads: so many tiles make a round, and those that are left are cut.
SAMPLED_CASES = {
  "128": KERNEL_CASES["128"],
  "32, tall": KERNEL_CASES["32, split"],
  "high": KERNEL_CASES["high"] | dict(meeting=math.inf),
  "wide": KERNEL_CASES["wide"],
  "all zero": KERNEL_CASES["all zero"],
  "64, flat, empty row": dict(block=(64, 64), mask=np.arange(30).reshape(2, 15) > 26, batch=8),
  "32, flat, ragged": dict(block=(32, 32), grid=(5, 20), density=0.12, batch=8),
}


@needs_pallas
@pytest.mark.parametrize("name", SAMPLED_CASES)
def test_sampled_kernel_interpreted(name):
  from jaxsparse.ops.sampled_matmul import _hopper

  options = {"tuning": None, "meeting": 0.0} | SAMPLED_CASES[name]
  tiles = sampled_tuning.Tuning(stages=2, meeting=options.pop("meeting"))
  x, w, dy = kernel_case(options, True)
  x, dy = (jnp.concatenate([a] * (80 // a.shape[0])) for a in (x, dy))  # a second, ragged step
  out = jnp.float32 if len(name) % 2 else None
  got = interpreted(_hopper.sampled_matmul_hopper, x, dy, w, tuning=tiles, out_dtype=out)
  want = all_products64(x, w, dy)[2]
  assert got.dtype == (out or x.dtype) and relative_error(got, want) < limit(got.dtype)


def spec(k, o, block, count, dtype=jnp.bfloat16):
  """A dynamic weight without values."""
  shape = jax.ShapeDtypeStruct
  leaves = (shape((count, *block), dtype), shape((count,), jnp.int32), shape((count,), jnp.int32), None)
  return js.BlockArray.tree_unflatten(((k, o), None), leaves)


MACHINE_CODE = {
  "128": ((4096, 4096, 8192), (128, 128), 200, {}),
  "64": ((4096, 4096, 4096), (64, 64), 400, {}),
  "32": ((4096, 4096, 4096), (32, 32), 1600, {}),
  "few rows, float32": ((16, 4096, 14336), (256, 32), 2000, dict(out_dtype=jnp.float32)),
}


@needs_compiler
@pytest.mark.parametrize(
  "name, product",
  [
    ("128", "forward"),
    ("32", "forward"),
    ("64", "transposed"),
    ("few rows, float32", "transposed"),
    ("128", "sampled"),
    ("32", "sampled"),
    ("few rows, float32", "sampled"),
  ],
)
def test_machine_code(name, product, tmp_path, monkeypatch):
  """Reaches sm_90a with dense wgmma, without spills, and without ptxas putting instructions in a row (C7510)."""
  from jaxsparse.ops.sampled_matmul import _hopper as sampled

  (batch, k, o), block, count, options = MACHINE_CODE[name]
  x, dy = (jax.ShapeDtypeStruct((batch, n), jnp.bfloat16) for n in (k, o))
  for key, value in (("PTX", "1"), ("PTXAS", "1"), ("TO", str(tmp_path))):
    monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{key}", value)
  if product == "sampled":
    f = lambda x, dy, w: sampled.sampled_matmul_hopper(x, dy, w, **options)
  else:
    transposed = product == "transposed"
    f = lambda x, dy, w: _hopper.block_matmul_hopper(dy if transposed else x, w, transposed=transposed, **options)
  ahead_of_time.compile_for_h100(f, x, dy, spec(k, o, block, count))
  (ptx,) = (path.read_text() for path in tmp_path.glob("*.ptx"))
  (report,) = (path.read_text() for path in tmp_path.glob("*.ptxas"))
  assert "wgmma.mma_async.sync.aligned.m64n" in ptx and "k16.f32.bf16.bf16" in ptx
  assert ("st.shared::cluster.v4.f32" in ptx) == ("few rows" in name and product != "sampled")  # two share a list
  assert "for 'sm_90a'" in report and "C7510" not in report
  assert int(report.split(" bytes spill stores")[0].split()[-1]) == 0, report


@needs_compiler
def test_gradient_runs_the_kernels():
  """Unnamed, on an H100: forward and both backward products are kernels."""
  w = spec(1024, 1024, (64, 64), 30)
  x = jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16)

  def step(x, w):
    y, pull = jax.vjp(lambda x, b: js.ops.block_matmul(x, dataclasses.replace(w, blocks=b)), x, w.blocks)
    return pull(y)

  text = ahead_of_time.compile_for_h100(step, x, w).as_text()
  for kernel in ("block_matmul", "block_matmul_transposed", "sampled_matmul"):
    assert kernel in text


@needs_pallas
def test_shard_map_of_kernels_needs_check_vma_off(monkeypatch):
  """Pallas loses over which mesh axes values vary: an error that says what to do, where JAX would name a loop."""
  from jax.sharding import PartitionSpec as P

  monkeypatch.setattr(_dispatch, "current_target", lambda: _dispatch.Target("gpu", ahead_of_time.KIND, (9, 0)))
  mesh = jax.sharding.AbstractMesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  x, w = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16), spec(1024, 1024, (64, 64), 30)

  def trace(**options):
    op = jax.shard_map(js.ops.block_matmul, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"), **options)
    return jax.make_jaxpr(op)(x, w)

  with pytest.raises(NotImplementedError, match=r"mesh axes \['d'\].*shard_map\(..., check_vma=False\)"):
    trace()
  assert "block_matmul" in str(trace(check_vma=False))


@needs_pallas
def test_which_on_gpu(monkeypatch):
  limits = {"fwd": 0.4, "dx": 0.4, "dw": 0.2}
  rows = [[8192, 8192, "64x64", 8192, product, 0.8] for product in limits]
  rows += [[8192, 8192, "32x32", 8192, product, limit] for product, limit in limits.items()]
  monkeypatch.setattr(preference, "measured", lambda: {"device": "an H100", "rows": rows})
  x, w, dy = case((64, 64), (4, 4), 0.3, 8, jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(ahead_of_time.h100_mesh()):
    assert js.ops.which_block_matmul(x, w).implementation == "hopper"
    assert js.ops.which_block_matmul(dy, w, transposed=True).implementation == "hopper"
    assert js.ops.which_sampled_matmul(x, dy, w).implementation == "hopper"
    full = js.BlockArray.from_dense(jnp.ones((256, 256), jnp.bfloat16), (64, 64))
    assert js.ops.which_block_matmul(x, full).implementation == "dense"
    # Each product by itself: with blocks of 32 the dense dot wins dw at a lower density than the others.
    x, small, dy = case((32, 32), (8, 8), 0, 8, jnp.bfloat16, mask=np.arange(64).reshape(8, 8) % 10 < 3)
    assert js.ops.which_block_matmul(x, small).implementation == "hopper"
    choice = js.ops.which_sampled_matmul(x, dy, small)
    assert choice.implementation == "dense" and "above 0.2: measured with 8192 x 8192, blocks of 32" in choice.reason
    wide = case((48, 64), (4, 4), 0.3, 8, jnp.bfloat16)
    assert "sides of 32, 64, 128 and 256" in js.ops.which_block_matmul(*wide[:2]).rejected["hopper"]
    single = case((64, 64), (4, 4), 0.3, 8)
    assert "bfloat16 or float16" in js.ops.which_block_matmul(*single[:2]).rejected["hopper"]


def test_some_rows_get_what_was_measured_to_be_fastest():
  """Up to 1024 rows: within some per cent of the best of all tilings that were tried, by the kernel of their choice."""
  path = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "block_matmul_some_rows_h100.json"
  lost = []
  for k, o, batch, size, density, us in json.loads(path.read_text())["rows"]:
    w = spec(k, o, (size, size), int(density * (k // size) * (o // size)))
    few = tuning.takes_few_rows(batch, o, size, density)
    t = _decode.best_tuning(batch, w) if few else _hopper.tuning_for(batch, w, False)
    if isinstance(t, _narrow.Tuning):  # a kernel that was not among them
      continue
    name = f"d{t.split}" if few else f"o{t.tile_b}/{t.split_k}" if t.once else f"p{t.tile_b}"
    lost.append(us[name] / min(us.values()))
    assert lost[-1] < 1.13, (k, o, batch, size, density, name, us)
  assert len(lost) >= 170 and np.exp(np.mean(np.log(lost))) < 1.01


@needs_pallas
def test_lists_that_are_known_to_be_uneven_get_tiles_from_a_counter():
  """Such tiles alone know parts of lists; positions that are traced are not looked at."""
  mask = np.arange(64 * 8).reshape(64, 8) % 8 == 0  # one full column
  for skewed, once in ((False, True), (True, False)):
    x, w, _ = case(
      (64, 128), (64, 8), 1, 200, jnp.bfloat16, mask=mask if skewed else mask.reshape(8, 64).T, static=True
    )
    assert _hopper.tuning_for(200, w, False).once == once
    assert _hopper.tuning_for(200, w.thaw(), False).once
  for skewed in (False, True):
    mask = np.arange(64 * 16).reshape(64, 16) % (16 if skewed else 15) == 0
    _, w, _ = case((32, 32), mask.shape, 1, 1, jnp.bfloat16, mask=mask, static=True)
    assert isinstance(_hopper.tuning_for(30_000, w, False), _narrow.Tuning) != skewed
    assert isinstance(_hopper.tuning_for(30_000, w.thaw(), False), _narrow.Tuning)


def test_tunings():
  for batch in (1, 8, 16, 100, 300, 512, 4096, 100_000):
    for outputs in (128, 4096, 28672):
      t = tuning.best_tuning(batch, outputs, 6.4, 128, 128)
      assert t.shared_bytes() <= tuning.SHARED_BYTES and t.tile_b <= 256
      cut = tuning.best_tuning(batch, outputs, 6.4, 128, 128, longest=20)
      assert not cut.once and cut.split_k == 1 and cut.tile_b <= t.tile_b
  assert not tuning.best_tuning(8192, 8192, 6.4, 128, 128).once
  for bad, message in (
    (dict(tile_b=20), "multiple of 8"),
    (dict(tile_b=256, stages=6), "shared memory"),
    (dict(tile_b=64, split_k=3), "split_k of 1, 2, 4 or 8"),
    (dict(tile_b=24, split_k=2, once=True), "tile_b to be a multiple"),
    (dict(tile_b=64, split_k=2), "needs once"),
    (dict(tile_b=64, split_k=2, once=True, stages=3), "256 of the sum"),
    (dict(tile_b=64, once=True, cluster=2), "a cluster of 1 for once"),
    (dict(tile_b=64, step=16), "step of 32 or 64"),
  ):
    with pytest.raises(ValueError, match=message):
      tuning.Tuning(**bad)
  with pytest.raises(ValueError, match="cluster of 1, 2 or 4"):
    tuning.Tuning(256, cluster=3)
  with pytest.raises(ValueError, match="stages in"):
    sampled_tuning.Tuning(stages=9)
  with pytest.raises(ValueError, match="meeting of at least 0"):
    sampled_tuning.Tuning(meeting=math.nan)
