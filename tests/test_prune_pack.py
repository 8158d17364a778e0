"""Pruning to 2:4 and packing against a slow NumPy reference."""

import ahead_of_time
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import prune_pack as slow

from jaxsparse.ops import _mosaic_gpu
from jaxsparse.ops.nm_matmul import _hopper_layout
from jaxsparse.ops.nm_matmul import _prune_pack
from jaxsparse.ops.nm_matmul._prune_pack import prune_and_pack

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_no_compiler = _mosaic_gpu.unavailable() or ahead_of_time.unavailable()
needs_compiler = pytest.mark.skipif(_no_compiler is not None, reason=str(_no_compiler))


def weights(shape, dtype, seed=0):
  """Random weights; a third is rounded, for ties and zeros."""
  rng = np.random.default_rng(seed)
  w = rng.standard_normal(shape)
  return jnp.asarray(np.where(rng.random(shape) < 0.33, np.round(w), w), dtype)


def as_bits(x):
  return np.asarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def masks(w, mask):
  forward = np.asarray(_prune_pack.transposable_mask(w)) if mask == "transposable" else slow.two_of_four(w)
  return forward, slow.two_of_four(np.asarray(w).T).T if mask == "bdwp" else forward


def test_there_are_ninety_transposable_patterns():
  assert len(slow.transposable_patterns()) == 90


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposable_mask_is_valid_and_keeps_most(dtype):
  w = weights((64, 96), dtype)
  mask = np.asarray(_prune_pack.transposable_mask(w))
  blocks = mask.reshape(16, 4, 24, 4)
  assert (blocks.sum(1) == 2).all() and (blocks.sum(3) == 2).all()
  np.testing.assert_allclose(slow.kept(w, mask), slow.best_kept(w), rtol=0 if dtype != jnp.float32 else 1e-6)


def test_every_transposable_pattern_is_found():
  patterns = slow.transposable_patterns()
  w = np.where(patterns, 2.0, 1.0) + np.random.default_rng(0).random(patterns.shape) / 4
  found = _prune_pack.transposable_mask(jnp.asarray(w.transpose(1, 0, 2).reshape(4, -1), jnp.float32))
  np.testing.assert_array_equal(np.asarray(found).reshape(4, 90, 4).transpose(1, 0, 2), patterns)


def test_transposable_mask_of_ties_zeros_nan_and_infinity():
  w = np.zeros((4, 16), np.float32)
  w[:, 4:8] = 1
  w[:, 8:12] = np.nan
  w[:, 12:] = np.diag([np.inf, np.nan, -np.inf, 1])
  blocks = np.asarray(_prune_pack.transposable_mask(jnp.asarray(w))).reshape(4, 4, 4)
  assert (blocks.sum(0) == 2).all() and (blocks.sum(2) == 2).all()
  assert blocks[0, 3, 0] and blocks[2, 3, 2]


@pytest.mark.parametrize("mask", _prune_pack.MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_words_and_values_are_the_reference_bit_for_bit(mask, dtype):
  w = weights((64, 128), dtype, seed=1)
  packed = prune_and_pack(w, mask=mask, dtype=dtype, implementation="xla")
  forward, backward = masks(w, mask)
  values, metadata = slow.pack(np.asarray(w), forward)
  np.testing.assert_array_equal(as_bits(packed.forward.values), as_bits(values))
  np.testing.assert_array_equal(packed.forward.metadata, metadata)
  np.testing.assert_array_equal(packed.dense(), np.where(forward, w, 0))
  if mask == "columnwise":
    assert packed.backward is None
    return
  values, metadata = slow.pack(np.asarray(w).T, backward.T)
  np.testing.assert_array_equal(as_bits(packed.backward.values), as_bits(values.T))
  np.testing.assert_array_equal(packed.backward.metadata, metadata)
  np.testing.assert_array_equal(packed.dense_backward(), np.where(backward, w, 0))


def test_golden_words():
  column = np.zeros((64, 64), np.float32)
  # Kept: (0, 1), (2, 3), (1, 3), (0, 3): nibbles 4, e, d, c from the low end.
  column[:16, 0] = [9, 8, 1, 0, 0, 1, 8, 9, 0, -9, 1, 8, 7, 1, 2, -7]
  # Ties go to the lower index: (0, 1), (0, 1), (1, 2), (0, 2).
  column[:16, 1] = [5, 5, 5, 5, 0, 0, 0, 0, 1, 2, 2, 2, 3, 0, 3, 3]
  # NaN counts as 0 and loses ties to nothing: (2, 3), (0, 1), (0, 2), (0, 1).
  nan = np.nan
  column[:16, 2] = [nan, nan, 1, 1, nan, 0, nan, 0, nan, nan, 2, nan, 3, 1, nan, -1]
  packed = prune_and_pack(jnp.asarray(column), mask="columnwise")
  assert [hex(word) for word in np.asarray(packed.forward.metadata)[0, :3]] == ["0xcde4", "0x8944", "0x484e"]
  assert np.asarray(packed.forward.values, np.float32)[:8, 0].tolist() == [9, 8, 8, 9, -9, 8, 7, -7]


@pytest.mark.parametrize("shape", [(4, 4), (68, 20), (128, 132)])
def test_ragged_weights_are_padded_with_nothing(shape):
  w = weights(shape, jnp.bfloat16)
  packed = prune_and_pack(w)
  assert packed.shape == shape and packed.backward.shape == shape[::-1]
  assert packed.forward.values.shape == (-(-shape[0] // 64) * 32, -(-shape[1] // 64) * 64)
  mask = _prune_pack.transposable_mask(w)
  np.testing.assert_array_equal(packed.dense(), np.where(mask, w, 0))
  np.testing.assert_array_equal(packed.dense_backward(), np.where(mask, w, 0))
  assert not np.isin(np.asarray(packed.forward.metadata)[:, :, None] >> np.arange(0, 16, 4) & 15, [0, 5, 10, 15]).any()


def test_packing_agrees_with_the_packer_of_finished_weights():
  w = weights((64, 64), jnp.bfloat16)
  packed = prune_and_pack(w)
  for layout in (packed.forward, packed.backward):
    again = _hopper_layout.pack(layout.unpack(), reduction_contiguous=layout.reduction_contiguous)
    assert jax.tree.structure(again) == jax.tree.structure(layout)
    jax.tree.map(np.testing.assert_array_equal, again, layout)


def test_a_float32_master_is_ranked_before_it_is_rounded():
  w = jnp.ones((64, 64), jnp.float32).at[3, :].add(1e-4).at[2, :].add(2e-4)  # equal as bfloat16
  packed = prune_and_pack(w, mask="columnwise")
  assert packed.forward.values.dtype == jnp.bfloat16
  assert (np.asarray(packed.forward.metadata)[0] & 15 == 0b1110).all()


def test_errors_name_what_is_wrong():
  with pytest.raises(ValueError, match=r"shape \(6, 8\); a transposable mask needs .* divisible by 4"):
    prune_and_pack(jnp.ones((6, 8)))
  with pytest.raises(ValueError, match="mask must be one of .*'bdwp'"):
    prune_and_pack(jnp.ones((8, 8)), mask="rowwise")
  with pytest.raises(TypeError, match="int32"):
    prune_and_pack(jnp.ones((8, 8), jnp.int32))
  with pytest.raises(ValueError, match="transposable 2:4 mask"):
    _prune_pack.transposable_mask(jnp.ones((8, 6)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks what is missing on a CPU")
def test_a_named_implementation_that_cannot_run_says_why():
  with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
    prune_and_pack(jnp.ones((64, 64)), implementation="mosaic_gpu")
  assert _prune_pack.which_prune_and_pack(jnp.ones((64, 64))).implementation == "xla"


@needs_compiler
@pytest.mark.parametrize("mask", _prune_pack.MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_compiles_for_an_h100(mask, dtype):
  w = jax.ShapeDtypeStruct((192, 320), dtype)
  with jax.sharding.use_abstract_mesh(ahead_of_time.h100_mesh()):
    assert _prune_pack.which_prune_and_pack(w, mask=mask).implementation == "mosaic_gpu"
    assert _prune_pack.which_prune_and_pack(w, dtype=jnp.float32).implementation == "xla"
  compiled = ahead_of_time.compile_for_h100(lambda w: prune_and_pack(w, mask=mask), w)
  assert "mosaic_gpu" in compiled.as_text()


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="runs the kernel")
@pytest.mark.parametrize("mask", _prune_pack.MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_the_reference_bit_for_bit(mask, dtype):
  w = weights((192, 2112), dtype).at[3, 5].set(jnp.nan).at[7, 2].set(jnp.inf)
  both = [prune_and_pack(w, mask=mask, implementation=name) for name in ("xla", "mosaic_gpu")]
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(as_bits(a), as_bits(b)), *both)
