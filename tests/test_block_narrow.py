"""The kernel for blocks of 32: its plan, interpreted on a CPU with race detection, and compiled to machine code of an H100."""

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
from test_block_hopper import needs_compiler
from test_block_hopper import needs_pallas
from test_block_hopper import spec

import jaxsparse as js
from jaxsparse.ops.block_matmul import _narrow
from jaxsparse.ops.block_matmul import _narrow_device
from jaxsparse.ops.block_matmul import _narrow_plan
from jaxsparse.ops.block_matmul import _plan

BLOCK = (32, 32)
# (mask or its shape, density, rows of x, dtype, result, tuning): more tiles than blocks of threads, lists of odd length,
# columns that there are not; steps that have no room for two full block rows; nothing at all. Chunks have three entries.
KERNEL_CASES = {
  "ragged": ((3, 10), 0.4, 130, jnp.bfloat16, None, {}),
  "few columns, stripes": ([[1, 0, 1, 1, 0], [1, 1, 0, 1, 0]], None, 140, jnp.float16, None, dict(grid_width=2)),
  "no room": ([[1] * 8] * 3 + [[1] * 4 + [0] * 4] * 4, None, 8, jnp.bfloat16, jnp.float32, {}),
  "empty": ((2, 9), 0.0, 8, jnp.bfloat16, None, {}),
}
INTERPRETED = [(name, False) for name in KERNEL_CASES] + [("ragged", True), ("no room", True)]


@needs_pallas
@pytest.mark.parametrize("name, transposed", INTERPRETED)
def test_kernel_interpreted(name, transposed, monkeypatch):
  from jaxsparse.ops.block_matmul import _hopper

  mask, density, batch, dtype, out, options = KERNEL_CASES[name]
  monkeypatch.setattr(_narrow_device, "CHUNK", 3)
  listed = isinstance(mask, list)
  grid, options = np.shape(mask) if listed else mask, _narrow.Tuning(**{"stages": 2, **options})
  x, w, dy = case(BLOCK, grid, density, batch, dtype, extra=2 if transposed else 0, mask=mask if listed else None)
  operand = dy if transposed else x
  y = interpreted(_hopper.block_matmul_hopper, operand, w, transposed=transposed, tuning=options, out_dtype=out)
  want = all_products64(x, w, dy)[int(transposed)]
  assert y.shape == want.shape and y.dtype == (out or dtype) and relative_error(y, want) < limit(y.dtype)


@pytest.mark.parametrize("grid, density", [((9, 19), 0.3), ((5, 6), 0.1), ((2, 3), 0.0)])
def test_plan(grid, density):
  """Every block is in one list, where the plan says; lists are sorted, whatever the weight carries."""
  _, w, _ = case(BLOCK, grid, density, 1, extra=0)
  plans = [_plan.narrow_of(w, transposed) for transposed in (False, True)]
  jax.tree.map(np.testing.assert_array_equal, plans, [_plan.narrow_of(w.freeze(), t) for t in (False, True)])
  few = w.capacity < _narrow_plan.PAYS_FROM * grid[0] * grid[1]
  assert (js.ops.plan_blocks(w).plan.narrow is None) == few
  rows, cols = np.asarray(w.rows), np.asarray(w.cols)
  for plan, major, minor, majors in ((plans[0], cols, rows, grid[1]), (plans[1], rows, cols, grid[0])):
    plan, seen = jax.tree.map(np.asarray, plan), []
    assert sorted(plan.units)[:majors] == list(range(majors)) and len(set(plan.units)) == plan.units.size
    for which, (lo, hi) in enumerate(zip(plan.starts[:-1], plan.starts[1:], strict=True)):
      assert (np.diff(plan.minor[lo:hi]) > 0).all() and (plan.present[lo:hi] > 0).all()
      for e in range(lo, hi):
        slots = plan.slots[e * _narrow_plan.COLUMNS : (e + 1) * _narrow_plan.COLUMNS]
        assert _narrow_plan.count_of(plan.present[e]) == (slots < w.capacity).sum()
        for j, slot in enumerate(slots):
          assert (slot < w.capacity) == (_narrow_plan.bits_of(plan.present[e]) >> j & 1)
          if slot < w.capacity:
            seen.append(slot)
            assert (major[slot], minor[slot]) == (plan.units[which * _narrow_plan.COLUMNS + j], plan.minor[e])
    assert sorted(seen) == list(range(int(w.count)))
    assert (np.diff(np.diff(plan.starts)[plan.order]) <= 0).all()


@needs_compiler
@pytest.mark.parametrize("batch, transposed, out", [(8192, False, None), (8100, True, jnp.float32)])
def test_machine_code(batch, transposed, out, tmp_path, monkeypatch):
  """Where no tuning is named, many tiles get this kernel: no spills, and no instructions put in a row (C7510, C7512, C7520)."""
  from jaxsparse.ops.block_matmul import _hopper

  k, o = 4096, 4096
  x = jax.ShapeDtypeStruct((batch, k), jnp.bfloat16)
  for key, value in (("PTX", "1"), ("PTXAS", "1"), ("TO", str(tmp_path))):
    monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{key}", value)
  f = lambda x, w: _hopper.block_matmul_hopper(x, w, transposed=transposed, out_dtype=out)
  w = jax.eval_shape(js.ops.plan_blocks, spec(k, o, BLOCK, 3300))
  ahead_of_time.compile_for_h100(f, x, w)
  (ptx,) = (path.read_text() for path in tmp_path.glob("*.ptx"))
  (report,) = (path.read_text() for path in tmp_path.glob("*.ptxas"))
  assert "block_matmul_narrow" in ptx and "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16" in ptx
  assert "for 'sm_90a'" in report and not any(code in report for code in ("C7510", "C7512", "C7520"))
  assert int(report.split(" bytes spill stores")[0].split()[-1]) == 0, report


def test_which_products():
  assert _narrow.pays(8192, 8192, BLOCK, 0.25) and not _narrow.pays(8192, 8192, BLOCK, _narrow_plan.PAYS_FROM / 2)
  assert not _narrow.pays(16, 8192, BLOCK, 0.25) and not _narrow.pays(8192, 8192, (64, 64), 0.25)
  with pytest.raises(ValueError, match="2, 3 or 4 stages"):
    _narrow.Tuning(stages=5)


@needs_pallas
def test_tuning_needs_narrow_blocks():
  from jaxsparse.ops.block_matmul import _hopper

  x, w, _ = case((64, 32), (2, 2), 1, 8, jnp.bfloat16)
  with pytest.raises(ValueError, match="blocks of 32x32; these are 64x32"):
    _hopper.block_matmul_hopper(x, w, tuning=_narrow.Tuning())
