"""N:M sparse weights as they are stored: kept values and their positions inside each group."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NMArray:
  """A weight `[*S, K, O]` of which every group of m consecutive entries along K keeps n.

  Invariants, with G = K / m groups (leading axes S stack layers; `nm_matmul` takes one layer):

  - `values[..., g, j, o]` is the dense entry `[..., g * m + indices[..., g, j, o], o]`; all other entries are 0.
  - `indices` are uint8 in [0, m) and strictly increasing along axis -2, so a weight has one representation for given
    positions. A kept entry may be 0: a group with fewer than n non-zeros keeps some zeros.
  - `scales` is None, or the array is quantised: `dense = values * scales`, with one scale for each of K / R runs
    of R consecutive entries along K (R a multiple of m), and `values` are int8 or int4.
  - `values` hold no NaN.

  The constructor checks the invariants and copies nothing; it looks at values only outside of tracing. Unflattening,
  as every JAX transformation does it, checks nothing.

  It is a pytree with three leaves: `values` and `scales` can be trained, `indices` cannot
  (`jaxsparse.arrays.partition` takes them apart).

  Attributes:
    values: `[*S, G, n, O]`, bfloat16, float16 or float32; int8 or int4 when quantised.
    indices: `[*S, G, n, O]`, uint8.
    scales: None, or `[*S, K / R, O]`, float32, bfloat16 or float16.
    n: entries kept in each group, static.
    m: group size, static; at most 256.

  Raises:
    ValueError, TypeError: for values, indices or scales that break an invariant; the message names the first place.

  >>> w = NMArray.from_dense(jnp.array([[0., 1.], [2., 0.], [3., 0.], [0., 4.]]), 2, 4)
  >>> w
  NMArray(2:4, shape=(4, 2), dtype=float32)
  >>> w.indices[0].tolist()
  [[1, 0], [2, 3]]
  """

  values: jax.Array
  indices: jax.Array
  scales: jax.Array | None = None
  n: int = dataclasses.field(kw_only=True)
  m: int = dataclasses.field(kw_only=True)

  def __post_init__(self):
    check(self)

  def tree_flatten_with_keys(self):
    names = ("values", "indices", "scales")
    return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], (self.n, self.m)

  def tree_flatten(self):
    return (self.values, self.indices, self.scales), (self.n, self.m)

  @classmethod
  def tree_unflatten(cls, static, leaves) -> Self:
    # Leaves may be anything here (tracers, None, specs, object()): the constructor's checks would be in the way.
    self = object.__new__(cls)
    for name, leaf in zip(("values", "indices", "scales"), leaves, strict=True):
      object.__setattr__(self, name, leaf)
    object.__setattr__(self, "n", static[0])
    object.__setattr__(self, "m", static[1])
    return self

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the dense weight, `(*S, K, O)`."""
    *stack, groups, _, outputs = self.values.shape
    return (*stack, groups * self.m, outputs)

  @property
  def ndim(self) -> int:
    return len(self.values.shape) - 1

  @property
  def dtype(self) -> Any:
    """Dtype of the dense weight: that of the values, or of the scales when quantised."""
    return jnp.dtype(self.values.dtype if self.scales is None else self.scales.dtype)

  @property
  def pattern(self) -> str:
    """ "2:4"."""
    return f"{self.n}:{self.m}"

  @property
  def bits(self) -> int:
    """Bits of a stored value."""
    return _bits(self.values.dtype)

  @property
  def scale_group(self) -> int | None:
    """Entries along K that share a scale, None when not quantised."""
    return None if self.scales is None else self.shape[-2] // self.scales.shape[-2]

  @property
  def nbytes(self) -> int:
    """Bytes when packed: values, ceil(log2 m) bits for each position, and scales.

    The hardware layouts and the files of `save_safetensors` have (about) this size. In this canonical form every
    position takes a whole byte: `sum(leaf.nbytes for leaf in jax.tree.leaves(w))`.
    """
    count = int(np.prod(self.values.shape))
    scales = 0 if self.scales is None else int(np.prod(self.scales.shape)) * _bits(self.scales.dtype)
    return -(-(count * (self.bits + (self.m - 1).bit_length()) + scales) // 8)

  def __repr__(self):
    try:
      kind = str(self.dtype) if self.scales is None else f"{self.values.dtype} x {self.scales.dtype}"
      return f"NMArray({self.pattern}, shape={self.shape}, dtype={kind})"
    except (AttributeError, TypeError, ValueError):  # Leaves that are no arrays, between flattening and unflattening.
      return f"NMArray({self.pattern}, {self.values!r}, {self.indices!r}, {self.scales!r})"

  @classmethod
  def from_dense(cls, w: Any, n: int, m: int, mask: Any = None, *, name: str = "w") -> Self:
    """Compresses a dense weight whose zeros, or whose mask, have the pattern n:m along axis -2.

    Args:
      w: `[*S, K, O]`, floating point.
      n: entries kept in each group.
      m: group size; divides K.
      mask: bool (or 0/1) of w's shape, True = kept; entries outside are taken as 0 whatever they are. None: what is
        not 0 is kept. A group may keep fewer than n, and is filled up with zeros.
      name: what errors call the weight.

    Returns:
      An NMArray of w's dtype; `to_dense` gives back `where(mask, w, 0)`, bit for bit.

    Raises:
      ValueError: a group keeps more than n entries (the first one is named), K is not divisible, shapes differ, or a
        kept entry is NaN. Under `jit` groups cannot be looked at: one that keeps too many loses its last entries.
      TypeError: w is not bfloat16, float16 or float32.
    """
    if is_concrete(w) and (mask is None or is_concrete(mask)):
      # Constants inside a traced function still have values: compute on them now, so that they can be looked at.
      with jax.ensure_compile_time_eval():
        return cls._from_dense(w, n, m, mask, name)
    return cls._from_dense(w, n, m, mask, name)

  @classmethod
  def _from_dense(cls, w, n, m, mask, name) -> Self:
    w = jnp.asarray(w)
    if len(w.shape) < 2:
      raise ValueError(f"{name} has shape {w.shape}; an N:M array needs two dimensions [K, O] or more.")
    _check_pattern(n, m, name)
    _check_float(w.dtype, name)
    if w.shape[-2] % m:
      raise ValueError(
        f"{name} has shape {w.shape}; {n}:{m} needs its reduction axis (-2) divisible by {m}. "
        "Pad the weight, or leave it dense."
      )
    mask = None if mask is None else jnp.asarray(mask)
    if mask is not None and mask.shape != w.shape:
      raise ValueError(f"{name} has shape {w.shape}, its mask {mask.shape}; they must be equal.")
    values, indices, overfull, nan = _pack(w, mask, n, m)
    if is_concrete(overfull) and bool(overfull):
      problem = group_problem(w != 0 if mask is None else mask.astype(bool), n, m, "weight" if mask is None else "mask")
      raise ValueError(
        f"{name}: {problem} js.magnitude(structure=js.NM({n}, {m}), stop=1).instant_sparsify makes a mask."
      )
    if is_concrete(nan) and bool(nan):
      raise ValueError(_nan_message(name, "values", values))
    return cls.tree_unflatten((n, m), (values, indices, None))

  def to_dense(self, dtype: Any = None) -> jax.Array:
    """The dense weight, `[*S, K, O]`.

    Args:
      dtype: of the result; None takes `self.dtype`. Quantised values are scaled in float32 and rounded once.
    """
    dtype = self.dtype if dtype is None else jnp.dtype(dtype)
    values = self.values
    if self.scales is None:
      dense = _scatter(values, self.indices, self.m)
    else:
      # Scales belong to runs of whole groups, so they apply before the scatter, to fewer entries.
      per_group = jnp.repeat(self.scales, self.scale_group // self.m, axis=-2)[..., :, None, :]
      dense = _scatter(values.astype(jnp.float32) * per_group.astype(jnp.float32), self.indices, self.m)
    return dense.astype(dtype)

  def astype(self, dtype: Any) -> Self:
    """The same weight with values (scales, when quantised) of another floating-point dtype."""
    _check_float(jnp.dtype(dtype), "NMArray.astype")
    if self.scales is None:
      return dataclasses.replace(self, values=self.values.astype(dtype))
    return dataclasses.replace(self, scales=self.scales.astype(dtype))


_FLOATS = ("bfloat16", "float16", "float32")
_QUANTISED = ("int8", "int4")


def is_concrete(x: Any) -> bool:
  """Whether x has values that can be looked at here: an array that is no tracer and no spec."""
  if isinstance(x, jax.core.Tracer):
    return False
  return isinstance(x, np.ndarray) or (isinstance(x, jax.Array) and x.is_fully_addressable)


def check(w: NMArray) -> None:
  """The invariants of `NMArray`: ValueError or TypeError that names the field and the first place."""
  values, indices, scales = w.values, w.indices, w.scales
  for name, leaf in (("values", values), ("indices", indices), ("scales", scales)):
    if not hasattr(leaf, "shape") and leaf is not None:
      raise TypeError(f"NMArray: {name} must be an array, got {type(leaf).__name__}.")
  if values is None or indices is None:
    raise TypeError("NMArray: values and indices are needed; compress a dense weight with NMArray.from_dense.")
  _check_pattern(w.n, w.m, "NMArray")
  name = f"NMArray({w.n}:{w.m})"
  if len(values.shape) < 3 or values.shape[-2] != w.n:
    raise ValueError(f"{name}: values has shape {values.shape}; allowed is [*S, K/{w.m}, {w.n}, O], n on axis -2.")
  if tuple(indices.shape) != tuple(values.shape):
    raise ValueError(f"{name}: indices has shape {indices.shape}, values {values.shape}; they must be equal.")
  if jnp.dtype(indices.dtype) != jnp.uint8:
    raise TypeError(f"{name}: indices are {indices.dtype}; uint8 is needed.")
  _check_scales(w, name)
  _check_entries(w, name)


def _check_scales(w: NMArray, name: str) -> None:
  dtype = jnp.dtype(w.values.dtype).name
  if w.scales is None:
    if dtype in _QUANTISED:
      raise TypeError(f"{name}: {dtype} values need scales; jaxsparse.quant.quantize makes both.")
    return _check_float(w.values.dtype, f"{name}: values")
  if dtype not in _QUANTISED:
    raise TypeError(f"{name}: values are {dtype}; with scales they must be one of {_QUANTISED}.")
  _check_float(w.scales.dtype, f"{name}: scales")
  k, groups = w.shape[-2], w.scales.shape[-2] if len(w.scales.shape) >= 2 else 0
  if (*w.shape[:-2], groups, w.shape[-1]) != tuple(w.scales.shape) or not groups or k % groups or k // groups % w.m:
    raise ValueError(
      f"{name}: scales has shape {w.scales.shape} for a weight of shape {w.shape}; allowed is [*S, K/R, O] with R a "
      f"multiple of {w.m} that divides K."
    )


def _check_pattern(n: int, m: int, name: str) -> None:
  if not (isinstance(n, int) and isinstance(m, int) and 0 < n < m <= 256):
    raise ValueError(f"{name}: n={n!r} of m={m!r} is no pattern; integers with 0 < n < m <= 256 are needed.")


def _check_float(dtype: Any, name: str) -> None:
  if jnp.dtype(dtype).name not in _FLOATS:
    raise TypeError(f"{name} is {jnp.dtype(dtype).name}; allowed are {', '.join(_FLOATS)}.")


def _check_entries(w: NMArray, name: str) -> None:
  """What only values can tell; leaves that are traced or specs are left out."""
  floats = {"values" if w.scales is None else "scales": w.values if w.scales is None else w.scales}
  floats = {what: leaf for what, leaf in floats.items() if is_concrete(leaf)}
  indices = w.indices if is_concrete(w.indices) else None
  # Constants inside a traced function still have values: compute on them now, not in the trace.
  with jax.ensure_compile_time_eval():
    large, falling, nan = (bool(flag) for flag in _broken(indices, floats, w.m))
    if large:
      at = _first(jnp.asarray(indices) >= w.m)
      raise ValueError(f"{name}: indices{list(at)} is {int(indices[at])}; allowed are 0 to {w.m - 1}.")
    if falling:
      *lead, j, o = _first(_falling(jnp.asarray(indices)))
      pair = int(indices[(*lead, j, o)]), int(indices[(*lead, j + 1, o)])
      raise ValueError(
        f"{name}: indices{[*lead, j, o]} is {pair[0]} and the next one {pair[1]}; positions must strictly increase "
        "along axis -2. Sort them together with the values."
      )
    if nan:
      raise ValueError(_nan_message(name, *next(iter(floats.items()))))


@jax.jit(static_argnums=2)
def _broken(indices, floats, m):
  """(a position is too large, positions do not increase, there is a NaN), in one pass."""
  none = jnp.zeros((), bool)
  large, falling = (none, none) if indices is None else ((indices > m - 1).any(), _falling(indices).any())
  return large, falling, sum((jnp.isnan(leaf).any() for leaf in floats.values()), none)


def _falling(indices):
  return indices[..., 1:, :] <= indices[..., :-1, :]


def _nan_message(name: str, what: str, values: Any) -> str:
  bad = jnp.isnan(jnp.asarray(values))
  return (
    f"{name}: {what}{list(_first(bad))} is NaN ({int(bad.sum())} in all); a compressed weight holds numbers only. "
    "Look for the step that made it."
  )


def group_problem(keep: Any, n: int, m: int, what: str = "mask") -> str | None:
  """Why a mask `[*S, K, O]` with K divisible by m is not n:m along axis -2, or None if it is."""
  with jax.ensure_compile_time_eval():
    count = _group_counts(jnp.asarray(keep), m)
    if int(count.max(initial=0)) <= n:
      return None
    bad = count > n
    *lead, g, o = at = _first(bad)
    stack = "".join(f"layer {i}, " for i in lead)
    return (
      f"the {what} is not {n}:{m} along axis -2: rows {g * m}-{g * m + m - 1} of {stack}column {o} keep "
      f"{int(count[at])} entries, at most {n} are allowed ({int(bad.sum())} of {bad.size} groups keep too many)."
    )


@jax.jit(static_argnums=1)
def _group_counts(keep, m):
  *stack, k, outputs = keep.shape
  return keep.reshape(*stack, k // m, m, outputs).sum(-2, dtype=jnp.int32)


def _first(flags: Any) -> tuple[int, ...]:
  return tuple(int(i) for i in np.unravel_index(int(jnp.argmax(flags)), flags.shape))


def _bits(dtype: Any) -> int:
  return jax.dtypes.itemsize_bits(jnp.dtype(dtype))


@jax.jit(static_argnums=(2, 3))
def _pack(w, mask, n, m):
  """(values, positions) of the kept entries, `[*S, K/m, n, O]`, and whether a group is overfull or a kept entry NaN.

  Short groups are filled with zeros from the left; overfull ones lose their last entries.
  """
  *stack, k, outputs = w.shape
  split = lambda a: a.reshape(*stack, k // m, m, outputs)
  keep = w != 0 if mask is None else mask.astype(bool)
  w, keep = split(jnp.where(keep, w, 0)), split(keep)
  count = keep.sum(-2, dtype=jnp.int32)
  short = n - count
  at = jnp.zeros(short.shape, jnp.int32)
  slots = [(jnp.zeros(short.shape, w.dtype), jnp.zeros(short.shape, jnp.uint8)) for _ in range(n)]
  # Slot by slot and not by a sort: everything fuses to one pass over the weight.
  for p in range(m):
    kept = keep[..., p, :]
    take = kept | (short > 0)
    short = short - (take & ~kept).astype(jnp.int32)
    for j, (value, index) in enumerate(slots[: p + 1]):
      here = take & (at == j)
      slots[j] = jnp.where(here, w[..., p, :], value), jnp.where(here, jnp.uint8(p), index)
    at = at + take.astype(jnp.int32)
  values, indices = zip(*slots)
  return jnp.stack(values, -2), jnp.stack(indices, -2), (count > n).any(), jnp.isnan(w).any()


def _scatter(values, indices, m):
  """`[*S, K/m, n, O]` -> `[*S, K, O]`; elementwise, so that XLA fuses it with what comes before and after."""
  *stack, groups, n, outputs = values.shape
  position = jax.lax.broadcasted_iota(jnp.uint8, (*(1,) * (len(stack) + 1), m, outputs), len(stack) + 1)
  dense = jnp.zeros((*stack, groups, m, outputs), values.dtype)
  for j in range(n):
    dense = jnp.where(indices[..., j, None, :] == position, values[..., j, None, :], dense)
  return dense.reshape(*stack, groups * m, outputs)
