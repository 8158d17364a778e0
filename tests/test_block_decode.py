"""The block-sparse kernel for few rows: interpreted on a CPU with race detection, and compiled to machine code of an H100."""

import dataclasses

import ahead_of_time
from block_cases import all_products64
from block_cases import case
from block_cases import limit
from block_cases import relative_error
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_block_hopper import interpreted
from test_block_hopper import kernel_case
from test_block_hopper import KERNEL_CASES
from test_block_hopper import needs_compiler
from test_block_hopper import needs_pallas
from test_block_hopper import spec

import jaxsparse as js
from jaxsparse.ops.block_matmul import _decode
from jaxsparse.ops.block_matmul import _heads
from jaxsparse.ops.block_matmul import _plan

# (strip, depth, stages, split) for the cases of the other kernel; ...
TUNINGS = {
  "128": (64, 64, 2),  # half a block to a step
  "64, ragged tiles": (64, 128, 2),  # two blocks to a step, of which one may be absent
  "32, ragged tiles": (32, 128, 2),
  "32, split": (32, 64, 2, 2),
  "high": (64, 128, 2),
  "wide": (32, 64, 2),
  "skewed": (32, 64, 2),
  "all zero": (32, 64, 2, 2),
  "all dense, float16": (64, 64, 3),
  "empty row": (64, 64, 2, 2),
  # ... and for a list that its line does not hold, of which a second block of threads has the end.
  "long": (32, 64, 2, 2),
  # ... and for one that is cut, beside lists that are not, one of them empty.
  "cut": (32, 128, 2),
}
CASES = KERNEL_CASES | {
  "long": dict(block=(32, 32), grid=(40, 1), density=0.95, batch=11, tuning={}),
  "cut": dict(block=(32, 32), mask=[[1, 0, 1, 0]] + [[1, 0, 0, 0]] * 49, batch=5, tuning={}, static=True),
}


@needs_pallas
@pytest.mark.parametrize("name", TUNINGS)
def test_interpreted(name):
  options = dict(CASES[name], batch=min(CASES[name]["batch"], 20))
  x, w, dy = kernel_case(options, len(name) % 2 == 0)  # with and without room to spare
  out = jnp.float32 if name in ("128", "32, split", "empty row") else None
  heads, tuning = _plan.plans_of(w).heads, _decode.Tuning(*TUNINGS[name])
  assert (lines_of(w)[3] > 1).any() == (name == "cut")
  y = interpreted(_decode.block_matmul_decode, x, w, heads, tuning=tuning, out_dtype=out)
  want = all_products64(x, w, dy)[0]
  assert y.shape == want.shape and y.dtype == (out or x.dtype) and relative_error(y, want) < limit(y.dtype)


class _Other(Exception):
  """The other kernel was to be built."""


@needs_pallas
def test_few_rows_of_a_product_that_names_no_tuning(monkeypatch):
  """`block_matmul_hopper` hands them over, unless blocks lie in the order in which they are trained."""
  from jaxsparse.ops.block_matmul import _hopper

  def build(*args, **kwargs):
    raise _Other

  monkeypatch.setattr(_decode, "block_matmul_decode", lambda x, w, heads, **options: heads)
  monkeypatch.setattr(_hopper, "_build", build)
  x, w, dy = case((64, 64), (2, 3), 0.5, 64, jnp.bfloat16)
  plans = _plan.plans_of(w)
  for few in (w, w.freeze(), js.ops.plan_blocks(w)):
    np.testing.assert_array_equal(_hopper.block_matmul_hopper(x[:1], few), plans.heads)
  trained = dataclasses.replace(w, plan=plans._replace(heads=None))
  tuning = _hopper.tuning_for(64, w, False)
  for x, w, options in (
    (jnp.concatenate([x, x, x]), w, {}),
    (dy, w, dict(transposed=True)),
    (x, w, dict(tuning=tuning)),
    (x, trained, {}),
  ):
    with pytest.raises(_Other):
      _hopper.block_matmul_hopper(x, w, **options)


def lines_of(w):
  """(columns, starts, counts, pieces, places, indices, rows) of the lines of a weight's heads."""
  heads = np.asarray(_plan.plans_of(w).heads)
  assert heads.dtype == np.int32 and heads.shape[1] == _heads.LINE
  assert (np.diff(heads[:, 2]) <= 1).all()  # longest first, but pieces of a list may differ by one
  return (*heads[:, : _heads.LINE - _heads.ROWS].T, heads[:, -_heads.ROWS :])


@pytest.mark.parametrize("density", [0, 0.8])
def test_heads(density):
  """A line for every column, longest list first, that says where its blocks are."""
  _, w, _ = case((32, 32), (40, 7), density, 1, extra=3)
  all_rows, cols = np.asarray(w.rows), np.asarray(w.cols)
  columns, starts, counts, pieces, _, _, rows = lines_of(w)
  assert sorted(columns) == list(range(7)) and (pieces == 1).all()
  for column, start, count, first in zip(columns, starts, counts, rows, strict=True):
    assert (cols[start : start + count] == column).all() and count == (cols == column).sum()
    known = min(count, _heads.ROWS)
    assert first[:known].tolist() == all_rows[start : start + known].tolist()
  unordered = _plan._plans(w.rows, w.cols, w.grid, w.block_shape, False)
  assert unordered.heads is None


@pytest.mark.parametrize("static", [True, False])
def test_heads_of_long_lists(static):
  """They are cut where positions are known, their pieces have places of their own, and every block is somebody's."""
  mask = np.zeros((70, 20), bool)
  mask[:, 3], mask[:50, 11], mask[::7] = True, True, True
  _, w, _ = case((32, 64), mask.shape, None, 1, mask=mask, static=static)
  columns, starts, counts, pieces, places, indices, _ = lines_of(w)
  slots = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
  assert sorted(slots) == list(range(mask.sum()))
  assert (np.asarray(w.cols)[slots] == np.repeat(columns, counts)).all()
  cut = pieces > 1
  if not static:
    assert not cut.any() and len(columns) == 20
    return
  assert set(columns[cut]) == {3, 11} and pieces[columns == 3].tolist() == [3] * 3 and counts.max() <= 32
  assert len(set((places + indices)[cut])) == cut.sum() and (places + pieces)[cut].max() <= 2 * (len(columns) - 20)
  for column in (3, 11):
    assert indices[columns == column].tolist() == list(range(pieces[columns == column][0]))
    assert len(set(places[columns == column])) == 1


def test_tunings():
  """Whatever the shape, blocks of threads fit a multiprocessor, as many of them as were meant to."""
  aligned = lambda size: -(-size // 1024) * 1024  # as the backend lays out what shares a block's memory
  for batch in (1, 7, 16, 17, 33, 48, 64, 72, 128):
    for k, o in ((4096, 14336), (14336, 4096), (8192, 28672), (512, 256)):
      for block in ((32, 32), (64, 64), (128, 128), (256, 32)):
        for density in (0.5, 0.02):
          w = spec(k, o, block, max(1, int(density * (k // block[0]) * (o // block[1]))))
          t = _decode.best_tuning(batch, w)
          columns, strips = -(-batch // 8) * 8, o // t.strip
          inbox = _decode.inbox_words(t.strip, t.split, columns)
          w_and_x = aligned(2 * t.stages * t.depth * t.strip) + aligned(2 * t.stages * t.depth * columns)
          # Less than 227 KB: a launch that asks for all of it fails on the device, for a static byte is there too.
          assert w_and_x + aligned(16 * t.stages) + aligned(4 * inbox) < 227 * 1024
          assert t.strip == (64 if min(block) >= 64 else 32)
          assert t.split == (2 if strips <= 132 and w.density > 0.08 and columns * 64 // t.strip <= 128 else 1)
          assert t.loaders == (4 if t.strip == 32 and t.stages >= 4 else 1)
  for bad in (
    dict(strip=16),
    dict(depth=96),
    dict(split=3),
    dict(stages=1),
    dict(stages=33),
    dict(loaders=2),
    dict(loaders=4, stages=3),
  ):
    with pytest.raises(ValueError, match="needs"):
      _decode.Tuning(**(dict(strip=64, depth=64, stages=4) | bad))
  x, w, _ = case((32, 64), (2, 2), 1, 8, jnp.bfloat16)
  with pytest.raises(ValueError, match="wider than a side of blocks 32x64"):
    _decode.block_matmul_decode(x, w, _plan.plans_of(w).heads, tuning=_decode.Tuning(64, 64, 4))


MACHINE_CODE = {
  "up, 128": ((16, 4096, 14336), (128, 128), 200, jnp.bfloat16, jnp.bfloat16),
  "up, 32": ((63, 4096, 14336), (32, 32), 1600, jnp.float16, jnp.float32),
  "down, 64, in clusters": ((16, 14336, 4096), (64, 64), 1400, jnp.bfloat16, jnp.bfloat16),
  "down, 32, in clusters": ((1, 14336, 4096), (32, 256), 700, jnp.bfloat16, jnp.float16),
}


@needs_compiler
@pytest.mark.parametrize("name", [*MACHINE_CODE, "cut, in clusters"])
def test_machine_code(name, tmp_path, monkeypatch):
  """Reaches sm_90a by way of the product's own function; nothing spills, waits or fences that need not."""
  from jaxsparse.ops.block_matmul import _hopper

  for key, value in (("PTX", "1"), ("PTXAS", "1"), ("TO", str(tmp_path))):
    monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{key}", value)
  f = lambda x, w: _hopper.block_matmul_hopper(x, w, out_dtype=out_dtype)
  if "cut" in name:  # one column keeps all of its blocks, as is known while tracing
    batch, block, dtype, out_dtype = 16, (64, 64), jnp.bfloat16, jnp.float32
    mask = np.arange(96 * 8).reshape(96, 8) % 8 == 0
    x, w, _ = case(block, mask.shape, None, batch, dtype, mask=mask, static=True)
    assert _plan.plans_of(w).heads.shape[0] > 8
  else:
    (batch, k, o), block, count, dtype, out_dtype = MACHINE_CODE[name]
    x, w = jax.ShapeDtypeStruct((batch, k), dtype), spec(k, o, block, count, dtype)
  assert "block_matmul_decode" in ahead_of_time.compile_for_h100(f, x, w).as_text()
  (ptx,) = (path.read_text() for path in tmp_path.glob("*.ptx"))
  (report,) = (path.read_text() for path in tmp_path.glob("*.ptxas"))
  kind, columns = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name], -(-batch // 8) * 8
  assert f"wgmma.mma_async.sync.aligned.m64n{columns * (2 if min(block) < 64 else 1)}k16.f32.{kind}.{kind}" in ptx
  assert ("mapa.shared::cluster" in ptx) == ("clusters" in name)
  assert ("atom.relaxed.gpu.global.add" in ptx) == ("cut" in name)
  assert "fence.proxy.async" not in ptx  # waits for all memory, most of a microsecond
  assert "for 'sm_90a'" in report and "C7510" not in report
  assert int(report.split(" bytes spill stores")[0].split()[-1]) == 0, report
