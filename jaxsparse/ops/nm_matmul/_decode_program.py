"""What a lane does with its bytes of a chunk: register words and metadata for `mma.sp`.

Written once over an `ops` object, so that the kernel emits it and the tests run it on NumPy arrays of 32 lanes. A word is
anything with & | ^ ~ << >> * + by Python ints, modulo 2**32. `ops` has
  load(offset, index, count): `count` words at byte `offset` + 4 * `count` * index, index one of "lane", "g", "gs"
   (g = lane // 4, gs = 2 * g + lane % 4 // 2);
  byte(offset): the byte at `offset` + lane;
  prmt(a, selector, b=None): bytes picked from a (0-3) and b (4-7); 8 in a nibble spreads the byte's sign bit;
  sub2(a, b): the difference of two pairs of 16-bit floats.
"""

_HIGH = 0xFFFF0000
# Bits of 128 in bfloat16 and 1024 in float16: the value whose last mantissa bit counts 1. Integers or'ed into the
# mantissa are offset by it.
_MAGIC = {"bfloat16": 0x4300, "float16": 0x6400}


def _twice(half):
  return half << 16 | half


def _widen(ops, word, bits, dtype):
  """The register words (pairs of `dtype`) held in one stored word."""
  if bits == 16:
    return [word]
  magic = _MAGIC[dtype]
  if bits == 4:
    fields = [(word >> 4 * j if j else word) & 0x000F000F | _twice(magic) for j in range(4)]
    return [ops.sub2(f, _twice(magic + 8)) for f in fields]
  spread = [ops.prmt(word, selector, _twice(magic >> 8 | magic & 0xFF00)) for selector in (0x4140, 0x4342)]
  if dtype == "float16":
    return [ops.sub2(s ^ 0x00800080, _twice(magic + 128)) for s in spread]
  # bfloat16 has 7 mantissa bits: (128 + low 7 bits) - (128, or 256 where the sign bit is set), both exact.
  return [ops.sub2(s & 0xFF7FFF7F, s & 0xFF80FF80) for s in spread]


def _values(ops, layer, bits, dtype, base):
  piece = min(4, layer.words)
  words = []
  for p in range(layer.words // piece):
    words += ops.load(base + layer.values + p * piece * 128, "lane", piece)
  return [w for word in words for w in _widen(ops, word, bits, dtype)]


def _sign(ops, word, byte):
  """All ones where the sign bit of a byte of `word` is set, else zero."""
  return ops.prmt(word, 0x1111 * (8 + byte))


def operand(ops, layer, m, bits, dtype, base):
  """Registers of the sparse operand of one layer for 64 outputs x 64 of K.

  Args:
   ops: where to compute (see the module).
   layer: a `_decode_layout.Layer`.
   m: group size.
   bits: bits of a stored value.
   dtype: "bfloat16" or "float16", what to multiply in.
   base: byte offset of the K-64 part.

  Returns:
   (registers, metadata): registers[mt][s] lists the four of step s in mma order, metadata[mt] is the word.
  """
  values = _values(ops, layer, bits, dtype, base)
  if layer.pairs:
    registers = [[values[8 * t + 4 * s : 8 * t + 4 * s + 4] for s in range(2)] for t in range(4)]
    return registers, ops.load(base + layer.meta, "lane", 4)
  if m == 4:
    meta, place = ops.load(base + layer.place, "lane", 2)
  elif m == 8:
    (meta,), (place,) = ops.load(base + layer.meta, "gs", 1), ops.load(base + layer.place, "lane", 1)
  else:
    (meta,) = ops.load(base + layer.meta, "g", 1)
    planes = [ops.byte(base + layer.place + 32 * p) for p in range(3)]
    place = planes[0] | planes[1] << 8 | planes[2] << 16
  zero = place & 0
  registers = [[[zero] * 4 for _ in range(2)] for _ in range(4)]
  shifted = {}

  def mask(shift, byte):
    if shift not in shifted:
      shifted[shift] = place << shift
    return _sign(ops, shifted[shift], byte)

  per_tile = 32 * 2 // m // 2
  for j in range(4 * per_tile):
    t, e = j // per_tile, j % 2
    both = ops.prmt(values[j // 2], 0x3232 if e else 0x1010)
    slot = mask(7 - j, 2) if m == 16 else mask(j // 4, j % 4)
    value = both & ~(slot ^ _HIGH)  # the entry in the high half where slot, else in the low half
    if m == 4:
      s, h = j % per_tile // 4, j // 2 % 2
      registers[t][s][2 * h + e] = value
    elif m == 8:
      s, half = j // 2 % 2, mask(4 + j // 4, j % 4)
      registers[t][s][e], registers[t][s][2 + e] = value & ~half, value & half
    else:
      step, half = mask(7 - j, 0), mask(7 - j, 1)
      registers[t][0][e], registers[t][0][2 + e] = value & ~step & ~half, value & ~step & half
      registers[t][1][e], registers[t][1][2 + e] = value & step & ~half, value & step & half
  return registers, [((meta >> t if t else meta) & 0x11111111) * 5 + 0x88888888 for t in range(4)]


def scale_words(ops, chunk, itemsize, base, row):
  """Words of the scales that a lane needs from scale row `row`: (mt, e) in order, two per word for 16-bit scales."""
  offset = base + chunk.part * chunk.parts + row * 64 * itemsize
  if itemsize == 4:
    # A lane's eight floats are 32 bytes.
    return ops.load(offset, "g", 8)
  return ops.load(offset, "g", 4)
