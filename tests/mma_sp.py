"""`mma.sp` m16n8k32 and the decode kernel's register program on NumPy arrays of 32 lanes, slowly and plainly."""

import numpy as np

from jaxsparse.ops.nm_matmul import _decode_program as program

LANES = np.arange(32)
G, C = LANES // 4, LANES % 4


class NumpyOps:
  """The `ops` of `_decode_program` over the bytes of one chunk; words are uint32 [32]."""

  def __init__(self, data, dtype):
    self.data, self.dtype = np.ascontiguousarray(data).view(np.uint8), dtype

  def load(self, offset, index, count):
    at = {"lane": LANES, "g": G, "gs": 2 * G + C // 2}[index]
    words = self.data[offset : offset + 4 * count * (at.max() + 1)].view(np.uint32).reshape(-1, count)
    return [words[at, j] for j in range(count)]

  def short(self, offset):
    return self.data[offset : offset + 64].view(np.uint16).astype(np.uint32)

  def prmt(self, a, selector, b=None):
    b = np.zeros_like(a) if b is None else np.broadcast_to(np.uint32(b), a.shape)
    source = [(word >> np.uint32(8 * i)) & np.uint32(255) for word in (a, b) for i in range(4)]
    out = np.zeros_like(a)
    for i in range(4):
      nibble = selector >> 4 * i & 15
      byte = source[nibble & 7]
      if nibble & 8:
        byte = np.where(byte & 128, np.uint32(255), np.uint32(0))
      out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out

  def sub2(self, a, b):
    a, b = floats(a, self.dtype), floats(np.broadcast_to(np.uint32(b), a.shape), self.dtype)
    return np.ascontiguousarray((a - b).astype(a.dtype)).view(np.uint32)[..., 0]


def floats(words, dtype):
  """uint32 [...] -> float [..., 2], low half first."""
  import ml_dtypes

  dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
  return np.ascontiguousarray(np.asarray(words, np.uint32)[..., None]).view(dtype)


def mma_sp(a, b, meta, selector, dtype, ordered=True):
  """One warp's mma.sp (::ordered_metadata if ordered) m16n8k32, from PTX ISA 9.7.15.6.

  Args:
   a: four uint32 [32], the lanes' registers of the sparse operand.
   b: float64 [32 (k), 8 (n)].
   meta: uint32 [32].
   selector: 0 or 1, which lanes of a quad hold the metadata.
   dtype: "bfloat16" or "float16".

  Returns:
   float64 [16, 8].
  """
  dense = np.zeros((16, 32))
  for r in range(4):
    low_row, half = r % 2 == 0, r // 2
    word = meta[4 * G + 2 * selector + half] >> np.uint32(0 if low_row else 16)
    nibble = (word >> (4 * C).astype(np.uint32)) & 15
    first, second = (nibble & 3).astype(int), (nibble >> 2).astype(int)
    assert (first != second).all(), "metadata names a position twice"
    assert (first < second).all() or not ordered, "metadata is not ordered"
    row, column = G + (0 if low_row else 8), 16 * half + 4 * C
    pair = floats(a[r], dtype).astype(np.float64)
    dense[row, column + first] += pair[:, 0]
    dense[row, column + second] += pair[:, 1]
  return dense @ b


def position_of_k(m):
  """Where each of 64 logical K entries sits for the kernel: int [64]."""
  k = np.arange(64)
  group = k // 4
  if m > 4:
    group = 8 * (group // 2 % 2) + 4 * (group % 2) + group // 4
  return 4 * group + k % 4


def decode(x, layout, dtype):
  """y [B, O] float64 of x float64 [B, K] with a DecodeLayout, chunk by chunk as the kernel does it."""
  chunk, (k, outputs) = layout.chunk, layout.shape
  data = np.asarray(layout.data)
  units, chunks, _ = data.shape
  batch = x.shape[0]
  x = np.pad(x, ((0, -batch % 8), (0, chunks * layout.step - k)))
  inverse = np.argsort(position_of_k(layout.m))
  out = np.zeros((x.shape[0], units * 64))
  for u in range(units):
    for kc in range(chunks):
      ops = NumpyOps(data[u, kc], dtype)
      for part in range(chunk.parts):
        x64 = x[:, kc * layout.step + part * 64 :][:, :64][:, inverse]
        for layer in chunk.layers:
          registers, metas = program.operand(ops, layer, layout.m, layout.bits, dtype, part * chunk.part)
          for t in range(4):
            for s in range(2):
              step = part * 2 + s
              scale = 1.0
              if chunk.scales:
                size = np.dtype(np.float32).itemsize if layout.scale_dtype == "float32" else 2
                words = program.scale_words(ops, chunk, size, 0, step * chunk.scales // 4)
                scale = _row_scales(words, layout.scale_dtype, t)
              for n in range(0, x.shape[0], 8):
                d = mma_sp(registers[t][s], x64[n : n + 8, 32 * s : 32 * s + 32].T, metas[t], s, dtype, layer.pairs)
                out[n : n + 8, u * 64 + 16 * t : u * 64 + 16 * t + 16] += (d * scale).T
  return out[:batch, :outputs]


def _row_scales(words, dtype, t):
  """float64 [16, 1]: the scales of tile t's rows as the lanes hold them."""
  if dtype == "float32":
    pair = [np.asarray(words[2 * t + e]).view(np.float32) for e in range(2)]
  else:
    both = floats(words[t], dtype)
    pair = [both[:, e] for e in range(2)]
  return np.concatenate([p[::4].astype(np.float64) for p in pair])[:, None]
