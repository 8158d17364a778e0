"""What a lane does with its bytes of a chunk: register words and metadata for `mma.sp`.

Written once over an `ops` object, so that the kernel emits it and the tests run it on NumPy arrays of 32 lanes. A word is
anything with & | ^ << >> * + - by words or Python ints, modulo 2**32. `ops` has
  load(offset, index, count): `count` words at byte `offset` + 4 * `count` * index, index one of "lane", "g", "gs"
   (g = lane // 4, gs = 2 * g + lane % 4 // 2);
  short(offset): the 16 bits at `offset` + 2 * lane;
  prmt(a, selector, b=None): bytes picked from a (0-3) and b (4-7); 8 in a nibble spreads the byte's sign bit;
  sub2(a, b): the difference of two pairs of 16-bit floats.
"""

_LOW, _HIGH = 0x0000FFFF, 0xFFFF0000
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


def _part(word, mask):
  """(word outside the mask, word inside it); a subtraction, as logic operations have only half the rate."""
  inside = word & mask
  return word - inside, inside


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
  # Fields of two bits, doubled: a position and its neighbour, in the order of the halves (low rows low, high rows high).
  words = ops.load(base + layer.meta, {4: "lane", 8: "gs", 16: "g"}[m], 2)
  metas = [((words[t // 2] >> 2 * (t % 2)) & 0x33333333) * 5 ^ 0x11114444 for t in range(4)]
  registers = [[[None] * 4 for _ in range(2)] for _ in range(4)]
  place = ops.short(base + layer.place) if m > 4 else None
  for w, word in enumerate(values):
    high = word & _HIGH
    rows = (word - high, high)
    if m == 4:
      t, s, h = w // 4, w // 2 % 2, w % 2
      registers[t][s][2 * h : 2 * h + 2] = rows
      continue
    first = ops.prmt(place << w, 0x9988)  # all ones in the halves whose entry has its (first) bit set
    if m == 8:
      t, s = divmod(w, 2)
      registers[t][s] = [half[e] for half in zip(*(_part(r, first) for r in rows), strict=True) for e in (0, 1)]
      continue
    second = ops.prmt(place << 4 + w, 0x9988)
    steps = [_part(r, first) for r in rows]
    for step in range(2):
      halves = [_part(steps[e][step], second) for e in (0, 1)]
      registers[w][step] = [halves[e][h] for h in (0, 1) for e in (0, 1)]
  return registers, metas


def scale_words(ops, chunk, itemsize, base, row):
  """Words of the scales that a lane needs from scale row `row`: (mt, e) in order, two per word for 16-bit scales."""
  offset = base + chunk.part * chunk.parts + row * 64 * itemsize
  if itemsize == 4:
    # A lane's eight floats are 32 bytes.
    return ops.load(offset, "g", 8)
  return ops.load(offset, "g", 4)
