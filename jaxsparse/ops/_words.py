"""Device code by the scalar: 32-bit words with operators, inline PTX, loops and branches.

For kernels that place every register themselves; call these inside `plgpu.inline_mgpu`. A `Word` is an i32 that every
thread has its own of; Python ints mix with it as constants.
"""

from jaxlib.mlir.dialects import scf

from jaxsparse.ops import _mosaic_gpu as mg

ir, arith, llvm = mg.ir, mg.arith, mg.llvm


def i32():
  """Type of a word."""
  return ir.IntegerType.get_signless(32)


def f32():
  """Type of a float."""
  return ir.F32Type.get()


def _const(value):
  return arith.constant(i32(), ir.IntegerAttr.get(i32(), value - (1 << 32) if value >= 1 << 31 else value))


def float32(value):
  """A float constant."""
  return arith.constant(f32(), ir.FloatAttr.get(f32(), value))


class Word:
  """An i32 with operators."""

  def __init__(self, value):
    self.v = _const(value) if isinstance(value, int) else value

  def _op(self, op, other):
    return Word(op(self.v, Word(other).v if isinstance(other, int) else other.v))

  def __and__(self, o):
    return self._op(arith.andi, o)

  def __or__(self, o):
    return self._op(arith.ori, o)

  def __xor__(self, o):
    return self._op(arith.xori, o)

  def __lshift__(self, o):
    return self._op(arith.shli, o) if not (isinstance(o, int) and o == 0) else self

  def __rshift__(self, o):
    return self._op(arith.shrui, o) if not (isinstance(o, int) and o == 0) else self

  def __add__(self, o):
    return self._op(arith.addi, o)

  def __sub__(self, o):
    return self._op(arith.subi, o)

  def __mul__(self, o):
    return self._op(arith.muli, o)

  def __floordiv__(self, o):
    return self._op(arith.divui, o)

  def __mod__(self, o):
    return self._op(arith.remui, o)

  def __invert__(self):
    return self ^ 0xFFFFFFFF

  def compare(self, kind, o):
    """i1: signed comparison, kind one of lt, ge, eq, ne."""
    predicate = getattr(arith.CmpIPredicate, {"lt": "slt", "ge": "sge"}.get(kind, kind))
    return arith.cmpi(predicate, self.v, Word(o).v if isinstance(o, int) else o.v)

  def min(self, o):
    return self._op(arith.minsi, o)

  def max(self, o):
    return self._op(arith.maxsi, o)


def select(condition, a, b):
  """Word: a where the i1 holds, else b."""
  return Word(
    arith.select(condition, Word(a).v if isinstance(a, int) else a.v, Word(b).v if isinstance(b, int) else b.v)
  )


def shift_left(value: int, by: Word):
  """value << by."""
  return Word(value) << by


def population_count(word: Word):
  """How many bits are set."""
  return asm("popc.b32 $0, $1;", "r", [word], effects=False)[0]


def _constraint(kind):
  return "f" if kind == f32() else {16: "h", 32: "r", 64: "l"}[ir.IntegerType(kind).width]


def asm(ptx, outputs, inputs, *, effects=True):
  """Inline PTX.

  Args:
   ptx: the instructions; $0, $1 ... are the results, then the inputs.
   outputs: a letter for each result: r word, f float, l 64 bits, h 16 bits.
   inputs: Words and MLIR values.
   effects: whether it must stay in its place; it then also orders memory accesses around it.

  Returns:
   List of results (Words for r), or None if there are none.
  """
  types = {"r": i32(), "f": f32(), "l": ir.IntegerType.get_signless(64), "h": ir.IntegerType.get_signless(16)}
  results = [types[o] for o in outputs]
  inputs = [i.v if isinstance(i, Word) else i for i in inputs]
  code = ["=" + o for o in outputs] + [_constraint(i.type) for i in inputs]
  if effects:
    code.append("~{memory}")
  result_type = llvm.StructType.get_literal(results) if len(results) != 1 else results[0]
  if not results:
    result_type = ir.Type.parse("!llvm.void")
  out = llvm.inline_asm(result_type, inputs, ptx, ",".join(code), has_side_effects=effects)
  if len(results) > 1:
    out = [llvm.extractvalue(t, out, [i]) for i, t in enumerate(results)]
  elif results:
    out = [out]
  else:
    return None
  return [Word(o) if k == "r" else o for o, k in zip(out, outputs, strict=True)]


def shared_load(address, offset, count, kind="r"):
  """`count` 32-bit words from shared memory."""
  names = "{" + ", ".join(f"${i}" for i in range(count)) + "}" if count > 1 else "$0"
  vector = f".v{count}" if count > 1 else ""
  return asm(f"ld.shared{vector}.b32 {names}, [${count} + {offset}];", kind * count, [address])


def fma(a, b, c):
  """a * b + c, floats."""
  return asm("fma.rn.f32 $0, $1, $2, $3;", "f", [a, b, c], effects=False)[0]


def loop(low, high, carry, body):
  """`for i in range(low, high): carry = body(i, carry)` over Words, with a list of MLIR values carried."""
  op = scf.ForOp(low.v, high.v, _const(1), carry)
  with ir.InsertionPoint(op.body):
    scf.yield_(body(Word(op.induction_variable), list(op.inner_iter_args)))
  return list(op.results)


def when(condition, body):
  """Runs body() where the i1 holds."""
  branch = scf.IfOp(condition)
  with ir.InsertionPoint(branch.then_block):
    body()
    scf.yield_([])


def offset64(base, offset, scale=1):
  """base + offset * scale, of an i64 and a Word."""
  i64 = ir.IntegerType.get_signless(64)
  wide = arith.muli(arith.extui(i64, offset.v), arith.constant(i64, ir.IntegerAttr.get(i64, scale)))
  return arith.addi(base, wide)


def floats(word, dtype):
  """The floats in a word: one of float32, or two 16-bit ones."""
  if dtype == "float32":
    return [arith.bitcast(f32(), word.v)]
  if dtype == "bfloat16":
    return [arith.bitcast(f32(), (word << 16).v), arith.bitcast(f32(), (word & 0xFFFF0000).v)]
  return asm(
    "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }", "ff", [word], effects=False
  )
