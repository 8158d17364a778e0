"""Prune and pack on an NVIDIA GPU: one pass over the weight, at the speed of memory.

A thread owns 16 rows and 8 columns. That is the smallest tile for which every word of both metadata is made by one
thread (or a pair of neighbours), every load is 16 bytes and every store fills sectors that its neighbours continue; so
nothing goes through shared memory. Along the rows everything is elementwise, two columns in one 32-bit register. Along
the columns two rows share a register after four byte permutes, and the same code runs again.
"""

import dataclasses
from typing import Any

from jax import lax
import jax
import jax.numpy as jnp

from jaxsparse.ops import _mosaic_gpu as gpu
from jaxsparse.ops._mosaic_gpu import arith, ir, llvm, plgpu
from jaxsparse.ops.nm_matmul import _transposable

_ROWS, _COLS = 16, 8  # of a thread's tile
_THREADS = 128  # of a block; they lie side by side
_LOW, _HIGH = 0x5410, 0x7632  # prmt: the low (high) halves of two words
_SPREAD_SIGNS = 0xBB99  # prmt: the sign of each half, over the half


def prune_and_pack(w, mask, dtype):
  """One kernel for `_prune_pack.prune_and_pack`; the arguments are checked there.

  Args:
    w: `[K, O]` bf16, f16 or f32; K and O divisible by 16.
    mask: "transposable", "columnwise" or "bdwp".
    dtype: of the values, bf16 or f16; w's own unless that is f32.

  Returns:
    values `[K/2, O]` and metadata `[K/16, O]`; unless columnwise also values `[K, O/2]` and metadata `[O/16, K]`.
  """
  rows, cols = w.shape
  pairs = cols // (2 * _COLS)  # of neighbours, in a row of tiles
  across = -(-pairs // (_THREADS // 2))
  out = [jax.ShapeDtypeStruct((rows // 2, cols), dtype), jax.ShapeDtypeStruct((rows // 16, cols), jnp.uint16)]
  if mask != "columnwise":
    out += [jax.ShapeDtypeStruct((rows, cols // 2), dtype), jax.ShapeDtypeStruct((cols // 16, rows), jnp.uint16)]

  def body(*refs):
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * len(refs)))
    def emit(_, block, *refs):
      block, thread = _Word(block.registers.item()), _Word(gpu.thread_index())
      pair = block % across * (_THREADS // 2) + (thread >> 1)
      # Threads past the edge repeat the last tiles, so that a shuffle always finds both of its lanes.
      tile = _Tile(mask, rows, cols, w.dtype, dtype, block // across, pair.at_most(pairs - 1), thread & 1)
      tile.run(*(_Word(gpu.global_address(ref)) for ref in refs))

    emit(lax.axis_index("block"), *refs)

  return plgpu.kernel(
    body,
    out_type=tuple(out),
    grid=(rows // _ROWS * across,),
    grid_names=("block",),
    compiler_params=gpu.COMPILER_PARAMS,
    kernel_name=f"prune_and_pack_{mask}",
  )(w)


@dataclasses.dataclass(frozen=True)
class _Tile:
  """The code of one thread. Words are 32 bits: two columns of a row, or two rows of a column, low half first."""

  mask: str
  rows: int
  cols: int
  source: Any
  target: Any
  down: "_Word"  # which 16 rows
  pair: "_Word"  # which 16 columns; a thread has one half of them
  odd: "_Word"

  def run(self, w, values, metadata, values_t=None, metadata_t=None):
    size = 4 if self.source == jnp.float32 else 2
    row, col = self.down * _ROWS, self.pair * (2 * _COLS) + self.odd * _COLS
    at = lambda base, row, width, col, size: base + (row.wide() * width + col.wide()) * size
    w = at(w, row, self.cols, col, size)
    values = at(values, self.down * (_ROWS // 2), self.cols, col, 2)
    metadata = at(metadata, self.down, self.cols, col, 2)
    if values_t is not None:
      values_t = at(values_t, row, self.cols // 2, self.pair * _COLS + self.odd * (_COLS // 2), 2)
      metadata_t = at(metadata_t, self.pair, self.rows, row + self.odd * (_ROWS // 2), 2)

    load = lambda r: [x for i in range(size // 2) for x in _load(w, r * self.cols * size + 16 * i)]
    words = [_Word(0)] * (_COLS // 2)  # forward metadata, two columns a word
    bytes_t = []  # of the backward metadata, two rows a word
    for group in range(0, _ROWS, 4):
      block = [load(r) for r in range(group, group + 4)]
      kept, kept_t = self._masks(block)
      block = [self._to_target(line) for line in block]
      low, high, nibbles = zip(*(_take_two(lines, masks) for lines, masks in zip(zip(*block), kept)))
      _store(values, group // 2 * self.cols * 2, low)
      _store(values, (group // 2 + 1) * self.cols * 2, high)
      words = [word | nibble << group for word, nibble in zip(words, nibbles)]
      if values_t is not None:
        for first in (0, 2):
          left, right = [_take_two(_turn(block[first], block[first + 1], i), kept_t[first // 2][i]) for i in (0, 1)]
          for r, half in ((first, _LOW), (first + 1, _HIGH)):
            line = [_permute(low, high, half) for low, high, _ in (left, right)]
            _store(values_t, (group + r) * self.cols, line)
          bytes_t.append(left[2] | right[2] << 4)
    _store(metadata, 0, words)
    if values_t is not None:
      _store(metadata_t, 0, self._join_bytes(bytes_t))

  def _masks(self, block):
    """Half masks for `_take_two`: [column pair][row], and [row pair][block of 4 columns][column]."""
    if self.mask == "transposable":
      return self._transposable(block)
    if self.source == jnp.float32:
      lines = [_magnitudes(line, self.source) for line in block]
      beats = lambda a, b: (a[0] > b[0]).choose(0xFFFF, 0) | (a[1] > b[1]).choose(0xFFFF0000, 0)
      pair = lambda i: [(line[2 * i], line[2 * i + 1]) for line in lines]
      turn = lambda first, i: [(lines[first][4 * i + c], lines[first + 1][4 * i + c]) for c in range(4)]
    else:
      kind = "bf16x2" if self.source == jnp.bfloat16 else "f16x2"
      # max drops a NaN.
      lines = [[_asm(f"max.{kind} $0, $1, $2;", x & 0x7FFF7FFF, _Word(0)) for x in line] for line in block]
      beats = lambda a, b: _asm(f"set.gt.u32.{kind} $0, $1, $2;", a, b)
      pair = lambda i: [line[i] for line in lines]
      turn = lambda first, i: _turn(lines[first], lines[first + 1], i)
    kept = [_keep_two(pair(i), beats) for i in range(_COLS // 2)]
    if self.mask == "columnwise":
      return kept, None
    return kept, [[_keep_two(turn(first, i), beats) for i in (0, 1)] for first in (0, 2)]

  def _transposable(self, block):
    lines = [_magnitudes(line, self.source) for line in block]
    # A kept cell sets two bits, so that one shift serves two columns of a row (bits 0-7 of both halves), another two
    # rows of a column (bits 8-15).
    across, along = lambda r, c: 2 * r + c // 2, lambda r, c: 8 + 4 * (r // 2) + c
    cell = lambda r, c: 1 << (16 * (c % 2) + across(r, c)) | 1 << (16 * (r % 2) + along(r, c))
    found = [
      _transposable.best_mask([line[4 * i : 4 * i + 4] for line in lines], cell, lambda p, a, b: p.choose(a, b))
      for i in (0, 1)
    ]
    spread = lambda word, bit: _permute(word << (15 - bit), _Word(0), _SPREAD_SIGNS)
    kept = [[spread(found[i // 2], across(r, 2 * (i % 2))) for r in range(4)] for i in range(_COLS // 2)]
    return kept, [[[spread(found[i], along(r, c)) for c in range(4)] for i in (0, 1)] for r in (0, 2)]

  def _to_target(self, line):
    if self.source != jnp.float32:
      return line
    kind = "bf16x2" if self.target == jnp.bfloat16 else "f16x2"
    return [_asm(f"cvt.rn.{kind}.f32 $0, $1, $2;", line[i + 1], line[i]) for i in range(0, len(line), 2)]

  def _join_bytes(self, halves):
    """Two neighbours have the two bytes of 16 words: each gives away one half of its rows and completes the other."""
    odd = self.odd == _Word(1)
    done = []
    for upper, lower in zip(halves[:4], halves[4:]):
      mine, other = odd.choose(lower, upper), _swap(odd.choose(upper, lower))
      done.append(odd.choose(other, mine) | odd.choose(mine, other) << 8)
    return done


def _keep_two(lines, beats):
  """Half masks of the two largest of four; the lower index wins a tie."""
  a, b, c, d = lines
  ab, ac, ad, bc, bd, cd = beats(b, a), beats(c, a), beats(d, a), beats(c, b), beats(d, b), beats(d, c)
  two_of = lambda x, y, z: (x & y) | (z & (x | y))
  return [~two_of(ab, ac, ad), ~two_of(~ab, bc, bd), ~two_of(~ac, ~bc, cd), two_of(ad, bd, cd)]


def _take_two(lines, masks):
  """The two kept of four, in order, and the nibble of their positions in each half."""
  pick = lambda mask, a, b: (a & mask) | (b & ~mask)
  a, b, c, d = masks
  low = pick(a, lines[0], pick(b, lines[1], lines[2]))
  high = pick(d, lines[3], pick(c, lines[2], lines[1]))
  first = (~a & b & 0x00010001) | (~(a | b) & 0x00020002)
  second = ((d | ~c) & 0x00040004) | ((d | c) & 0x00080008)
  return low, high, first | second


def _turn(upper, lower, i):
  """Two rows of a block of 4 columns -> a word a column, the upper row in the low half."""
  halves = ((2 * i, _LOW), (2 * i, _HIGH), (2 * i + 1, _LOW), (2 * i + 1, _HIGH))
  return [_permute(upper[word], lower[word], half) for word, half in halves]


def _magnitudes(line, dtype):
  """The words of a line as absolute values in float32, two for each word of 16-bit numbers; NaN becomes 0."""
  f32, f16, i16 = ir.F32Type.get(), ir.F16Type.get(), ir.IntegerType.get_signless(16)
  if dtype == jnp.float16:
    narrow = lambda word: arith.bitcast(f16, arith.trunci(i16, word.value))
    floats = [arith.extf(f32, narrow(half)) for word in line for half in (word & 0x7FFF, (word & 0x7FFF0000) >> 16)]
  else:
    words = [word & 0x7FFFFFFF for word in line]
    if dtype == jnp.bfloat16:
      words = [half for word in words for half in ((word & 0x7FFF) << 16, word & 0xFFFF0000)]
    floats = [arith.bitcast(f32, word.value) for word in words]
  return [_Float(arith.maxnumf(x, arith.constant(f32, 0.0))) for x in floats]


# The scalars of a kernel under construction.


@dataclasses.dataclass(frozen=True)
class _Word:
  """An unsigned integer: 32 bits unless made wide. Python ints stay ints until they meet a register."""

  value: Any

  def __post_init__(self):
    if isinstance(self.value, int):
      object.__setattr__(self, "value", _constant(self.value, ir.IntegerType.get_signless(32)))

  def _with(self, op, other):
    other = other.value if isinstance(other, _Word) else _constant(other, self.value.type)
    return _Word(op(self.value, other))

  def __or__(self, other):
    return self._with(arith.ori, other)

  __ror__ = __or__

  def __and__(self, other):
    return self._with(arith.andi, other)

  def __invert__(self):
    return self._with(arith.xori, 0xFFFFFFFF)

  def __lshift__(self, bits):
    return self._with(arith.shli, bits) if bits else self

  def __rshift__(self, bits):
    return self._with(arith.shrui, bits) if bits else self

  def __add__(self, other):
    return self._with(arith.addi, other)

  def __mul__(self, other):
    return self._with(arith.muli, other)

  def __floordiv__(self, other):
    return self._with(arith.divui, other)

  def __mod__(self, other):
    return self._with(arith.remui, other)

  def __eq__(self, other):
    return _Bool(arith.cmpi(arith.CmpIPredicate.eq, self.value, other.value))

  def at_most(self, bound):
    return self._with(arith.minui, bound)

  def wide(self):
    return _Word(arith.extui(ir.IntegerType.get_signless(64), self.value))


@dataclasses.dataclass(frozen=True)
class _Float:
  value: Any

  def __add__(self, other):
    return _Float(arith.addf(self.value, other.value))

  def __gt__(self, other):
    return _Bool(arith.cmpf(arith.CmpFPredicate.OGT, self.value, other.value))


@dataclasses.dataclass(frozen=True)
class _Bool:
  value: Any

  def choose(self, a, b):
    a, b = (_Word(x) if isinstance(x, int) else x for x in (a, b))
    return type(a)(arith.select(self.value, a.value, b.value))


def _constant(value, type_):
  bits = ir.IntegerType(type_).width
  return arith.constant(type_, value - (1 << bits) if value >> (bits - 1) else value)


def _permute(low, high, selector):
  return _asm(f"prmt.b32 $0, $1, $2, {selector:#x};", low, high)


def _asm(ptx, *words):
  i32 = ir.IntegerType.get_signless(32)
  out = llvm.inline_asm(i32, [w.value for w in words], ptx, "=r" + ",r" * len(words), has_side_effects=False)
  return _Word(out)


def _swap(word):
  """The word of the neighbouring lane; the whole warp takes part."""
  i32 = ir.IntegerType.get_signless(32)
  return _Word(gpu.inline_ptx("shfl.sync.bfly.b32 $0, $1, 1, 31, -1;", [word.value], "=r,r", i32))


def _load(base, offset):
  """16 bytes as four words, through the read-only path: the compiler can move it up past any store."""
  i32 = ir.IntegerType.get_signless(32)
  struct = llvm.StructType.get_literal([i32] * 4)
  ptx = f"ld.global.nc.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];"
  out = llvm.inline_asm(struct, [base.value], ptx, "=r,=r,=r,=r,l", has_side_effects=False)
  return [_Word(llvm.extractvalue(i32, out, [i])) for i in range(4)]


def _store(base, offset, words):
  names = ", ".join(f"${i + 1}" for i in range(len(words)))
  ptx = f"st.global.v{len(words)}.b32 [$0+{offset}], {{{names}}};"
  gpu.inline_ptx(ptx, [base.value, *(w.value for w in words)], "l" + ",r" * len(words))
