"""The device code of prune-and-pack, carried out by NumPy: every thread of a launch at once, word by word."""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsparse.ops import _mosaic_gpu
from jaxsparse.ops.nm_matmul import _prune_pack

if _mosaic_gpu.unavailable():
  pytest.skip(_mosaic_gpu.unavailable(), allow_module_level=True)
from jaxsparse.ops.nm_matmul import _prune_pack_gpu as gpu

FLOATS = {"bf16x2": ml_dtypes.bfloat16, "f16x2": np.float16}


class Bool:
  def __init__(self, value):
    self.value = value

  def choose(self, a, b):
    if isinstance(a, Float):
      return Float(np.where(self.value, a.value, b.value))
    return Word(np.where(self.value, Word(a).value, Word(b).value))


class Float:
  def __init__(self, value):
    self.value = value

  def __add__(self, other):
    return Float(self.value + other.value)

  def __gt__(self, other):
    return Bool(self.value > other.value)


class Word:
  """32 bits in every thread."""

  def __init__(self, value):
    self.value = np.asarray(value.value if isinstance(value, Word) else value, np.uint32)

  def __or__(self, other):
    return Word(self.value | Word(other).value)

  __ror__ = __or__

  def __and__(self, other):
    return Word(self.value & Word(other).value)

  def __invert__(self):
    return Word(~self.value)

  def __lshift__(self, bits):
    return Word(self.value << np.uint32(bits))

  def __rshift__(self, bits):
    return Word(self.value >> np.uint32(bits))

  def __add__(self, other):
    return Word(self.value + Word(other).value)

  def __mul__(self, other):
    return Word(self.value * Word(other).value)

  def __eq__(self, other):
    return Bool(self.value == other.value)

  def wide(self):
    return self


class Pointer:
  """A buffer, and an offset into it in every thread; counts what is written where."""

  def __init__(self, data, offset=0, written=None):
    self.data, self.offset = data, offset
    self.written = np.zeros(data.size, int) if written is None else written

  def __add__(self, offset):
    return Pointer(self.data, self.offset + offset.value.astype(np.int64), self.written)

  def at(self, offset, size):
    assert ((self.offset + offset) % size == 0).all(), "a vector access must be aligned"
    return (self.offset + offset)[:, None] + np.arange(size)


def load(base, offset):
  return [Word(w) for w in base.data[base.at(offset, 16)].copy().view(np.uint32).T]


def store(base, offset, words):
  at = base.at(offset, 4 * len(words))
  values = np.stack([np.broadcast_to(w.value, at.shape[0]) for w in words], 1).copy().view(np.uint8)
  # Threads that repeat a tile must agree.
  assert (~(base.written[at] > 0) | (base.data[at] == values)).all()
  base.data[at], base.written[at] = values, 1


def asm(ptx, *words):
  name = ptx.split()[0]
  shape = np.broadcast_shapes(*(w.value.shape for w in words))
  words = [np.broadcast_to(w.value, shape).copy() for w in words]
  halves = lambda x, kind: x[..., None].view(np.uint16).view(FLOATS[kind])
  kind = name.rsplit(".", 1)[-1]
  if name == "prmt.b32":
    selector = int(re.search(r"0x[0-9a-f]+", ptx).group(), 16)
    taken = np.stack(words, -1).view(np.uint8)
    byte = [taken[..., selector >> (4 * i) & 7] for i in range(4)]
    sign = [selector >> (4 * i) & 8 for i in range(4)]
    spread = [np.where(b & 0x80, 0xFF, 0).astype(np.uint8) if s else b for b, s in zip(byte, sign)]
    return Word(np.stack(spread, -1).view(np.uint32)[..., 0])
  if name.startswith("max."):
    a, b = (halves(w, kind) for w in words)
    return Word(np.where(np.isnan(a), b, np.maximum(a, b)).view(np.uint32)[..., 0])
  if name.startswith("set.gt.u32."):
    a, b = (halves(w, kind) for w in words)
    return Word(np.where(a > b, 0xFFFF, 0).astype(np.uint16).view(np.uint32)[..., 0])
  if name.startswith("cvt.rn."):
    kind = name.split(".")[2]
    both = np.stack([words[1], words[0]], -1).view(np.float32).astype(FLOATS[kind])
    return Word(both.view(np.uint32)[..., 0])
  raise AssertionError(f"unknown instruction {ptx}")


def magnitudes(line, dtype):
  words = np.stack([w.value for w in line], 1)
  values = np.abs(words.view(np.dtype(dtype)).astype(np.float32))
  return [Float(x) for x in np.where(np.isnan(values), 0, values).T]


def launch(monkeypatch, w, mask, dtype):
  """What the kernel writes for w, every block and thread of the launch."""
  for name, fake in dict(_Word=Word, _asm=asm, _load=load, _store=store, _magnitudes=magnitudes).items():
    monkeypatch.setattr(gpu, name, fake)
  monkeypatch.setattr(gpu, "_swap", lambda word: Word(word.value.reshape(-1, 2)[:, ::-1].reshape(-1)))
  rows, cols = w.shape
  pairs = cols // 16
  across = -(-pairs // (gpu._THREADS // 2))
  block, thread = np.divmod(np.arange(rows // 16 * across * gpu._THREADS), gpu._THREADS)
  pair = np.minimum(block % across * (gpu._THREADS // 2) + thread // 2, pairs - 1)
  tile = gpu._Tile(
    mask, rows, cols, jnp.dtype(w.dtype), jnp.dtype(dtype), Word(block // across), Word(pair), Word(thread % 2)
  )
  shapes = [(rows // 2, cols), (rows // 16, cols), (rows, cols // 2), (cols // 16, rows)]
  out = [Pointer(np.full(2 * a * b, 0xA5, np.uint8)) for a, b in shapes[: 2 if mask == "columnwise" else 4]]
  tile.run(Pointer(w.copy().reshape(-1).view(np.uint8)), *out)
  assert all(p.written.all() for p in out), "every byte is written"
  return [p.data.view(np.uint16).reshape(s) for p, s in zip(out, shapes)]


@pytest.mark.parametrize("mask", _prune_pack.MASKS)
@pytest.mark.parametrize(
  "source, target",
  [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16"), ("float32", "float16")],
)
@pytest.mark.parametrize("shape", [(64, 64), (64, 1088)])
def test_program_writes_the_reference_bit_for_bit(monkeypatch, shape, source, target, mask):
  rng = np.random.default_rng(0)
  w = rng.standard_normal(shape)
  w = np.where(rng.random(shape) < 0.3, np.round(w), w).astype(jnp.dtype(source))
  w[3, 5], w[7, 2], w[8:12, 9] = np.nan, np.inf, -0.0
  want = _prune_pack.prune_and_pack(jnp.asarray(w), mask=mask, dtype=target, implementation="xla")
  layouts = [layout for layout in (want.forward, want.backward) if layout is not None]
  want = [np.asarray(a).view(np.uint16) for layout in layouts for a in (layout.values, layout.metadata)]
  for got, expected in zip(launch(monkeypatch, w, mask, target), want, strict=True):
    np.testing.assert_array_equal(got, expected)
