"""Weights with a fixed fan-in as they are stored: kept values, and the input of each."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.arrays import _nm_array

_FLOATS = ("bfloat16", "float16", "float32")
_INDICES = ("uint8", "uint16", "uint32", "int32")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FixedFanInArray:
  """A weight `[K, O]` of which every output keeps F inputs.

  Invariants:

  - `values[f, o]` is the dense entry `[indices[f, o], o]`; all other entries are 0.
  - The indices of an output are different, in any order: `from_dense` sorts them, training replaces them in place.

  The constructor checks the invariants and copies nothing; it looks at values only outside of tracing. Unflattening,
  as every JAX transformation does it, checks nothing. `values` can be trained; indices cannot
  (`jaxsparse.arrays.partition` takes them apart).

  Attributes:
    values: `[F, O]`, bfloat16, float16 or float32.
    indices: `[F, O]`, unsigned integers or int32, each in [0, K).
    inputs: K, static.

  Raises:
    ValueError, TypeError: for values or indices that break an invariant; the message names the first place.

  >>> w = FixedFanInArray.from_dense(jnp.array([[0., 1.], [2., 0.], [3., 0.], [0., 4.]]), 2)
  >>> w
  FixedFanInArray(2 of 4 inputs, shape=(4, 2), dtype=float32)
  >>> w.indices.tolist()
  [[1, 0], [2, 3]]
  """

  values: jax.Array
  indices: jax.Array
  inputs: int = dataclasses.field(kw_only=True)

  def __post_init__(self):
    check(self)

  def tree_flatten_with_keys(self):
    return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ("values", "indices")], self.inputs

  def tree_flatten(self):
    return (self.values, self.indices), self.inputs

  @classmethod
  def tree_unflatten(cls, static, leaves) -> Self:
    # Leaves may be anything here (tracers, None, specs, object()): the constructor's checks would be in the way.
    self = object.__new__(cls)
    for name, leaf in zip(("values", "indices"), leaves, strict=True):
      object.__setattr__(self, name, leaf)
    object.__setattr__(self, "inputs", static)
    return self

  @property
  def shape(self) -> tuple[int, int]:
    """(K, O), of the dense weight."""
    return self.inputs, self.values.shape[1]

  @property
  def ndim(self) -> int:
    return 2

  @property
  def dtype(self) -> Any:
    return jnp.dtype(self.values.dtype)

  @property
  def fan_in(self) -> int:
    """Inputs that each output keeps, F."""
    return self.values.shape[0]

  @property
  def pattern(self) -> str:
    """ "fan-in 128"."""
    return f"fan-in {self.fan_in}"

  @property
  def nbytes(self) -> int:
    """Bytes of values and indices."""
    return self.values.size * self.dtype.itemsize + self.indices.size * jnp.dtype(self.indices.dtype).itemsize

  def __repr__(self):
    try:
      return f"FixedFanInArray({self.fan_in} of {self.inputs} inputs, shape={self.shape}, dtype={self.dtype})"
    except (AttributeError, TypeError, ValueError):  # Leaves that are no arrays, between flattening and unflattening.
      return f"FixedFanInArray({self.values!r}, {self.indices!r}, inputs={self.inputs})"

  @classmethod
  def from_dense(cls, w: Any, fan_in: int, mask: Any = None, *, name: str = "w") -> Self:
    """Keeps F inputs of every output of a dense weight.

    Args:
      w: `[K, O]`, floating point.
      fan_in: F, inputs that each output keeps.
      mask: bool (or 0/1) `[K, O]`, True = kept. None: what is not 0. An output with fewer keeps some zeros.
      name: what errors call the weight.

    Returns:
      A FixedFanInArray of w's dtype with sorted indices; `to_dense` gives back `where(mask, w, 0)`.

    Raises:
      ValueError: shapes do not fit, or an output keeps more than F inputs (that cannot be seen inside `jit`: the last are
        lost).
      TypeError: w is not bfloat16, float16 or float32.
    """
    w = jnp.asarray(w)
    if w.ndim != 2 or not 1 <= fan_in <= w.shape[0]:
      raise ValueError(
        f"{name} has shape {w.shape}; a fan-in of {fan_in} needs two axes [K, O] with at least {fan_in} inputs."
      )
    if mask is not None and tuple(mask.shape) != w.shape:
      raise ValueError(f"{name} has shape {w.shape}, its mask {tuple(mask.shape)}.")
    keep = w != 0 if mask is None else jnp.asarray(mask).astype(bool)
    if _nm_array.is_concrete(keep) and keep.shape[1]:
      most = np.asarray(keep).sum(0)
      if most.max() > fan_in:
        o = int(most.argmax())
        raise ValueError(f"{name}: output {o} keeps {most[o]} inputs, more than the fan-in of {fan_in}.")
    # Kept ones first, each part in order; then the chosen ones in order.
    chosen = jnp.sort(jnp.argsort(~keep, axis=0, stable=True)[:fan_in], axis=0)
    values = jnp.where(jnp.take_along_axis(keep, chosen, 0), jnp.take_along_axis(w, chosen, 0), 0)
    return cls(values.astype(w.dtype), chosen.astype(index_dtype(w.shape[0])), inputs=w.shape[0])

  def to_dense(self, dtype: Any = None) -> jax.Array:
    """The dense weight, `[K, O]`, of `dtype`, or of the values' dtype."""
    outputs = jnp.arange(self.shape[1])
    dense = jnp.zeros(self.shape, self.dtype).at[self.indices, outputs].set(self.values, unique_indices=True)
    return dense if dtype is None else dense.astype(dtype)

  def astype(self, dtype: Any) -> Self:
    """The same weight with values of another floating-point dtype."""
    if jnp.dtype(dtype).name not in _FLOATS:
      raise TypeError(f"FixedFanInArray.astype: {jnp.dtype(dtype).name}; allowed are {', '.join(_FLOATS)}.")
    return dataclasses.replace(self, values=self.values.astype(dtype))


def index_dtype(inputs: int) -> Any:
  """The smallest unsigned integers for numbers below `inputs`.

  >>> index_dtype(256).name, index_dtype(257).name, index_dtype(65536).name
  ('uint8', 'uint16', 'uint16')
  """
  return jnp.dtype("uint8" if inputs <= 2**8 else "uint16" if inputs <= 2**16 else "uint32")


def check(w: FixedFanInArray) -> None:
  """The invariants of `FixedFanInArray`: ValueError or TypeError that names the field and the first place."""
  for name, allowed in (("values", _FLOATS), ("indices", _INDICES)):
    value = getattr(w, name)
    if not hasattr(value, "shape"):
      raise TypeError(f"FixedFanInArray: {name} must be an array, got {type(value).__name__}.")
    if jnp.dtype(value.dtype).name not in allowed:
      raise TypeError(f"FixedFanInArray: {name} is {value.dtype}; allowed are {', '.join(allowed)}.")
    if len(value.shape) != 2:
      raise ValueError(f"FixedFanInArray: {name} has shape {tuple(value.shape)}; allowed is [F, O].")
  if tuple(w.values.shape) != tuple(w.indices.shape):
    raise ValueError(f"FixedFanInArray: values have shape {tuple(w.values.shape)}, indices {tuple(w.indices.shape)}.")
  if not isinstance(w.inputs, int) or not 1 <= w.values.shape[0] <= w.inputs:
    raise ValueError(f"FixedFanInArray: {w.values.shape[0]} of inputs={w.inputs}; allowed are 1 to K of K inputs.")
  if _nm_array.is_concrete(w.indices):
    problem = index_problem(w.indices, w.inputs)
    if problem:
      raise ValueError(f"FixedFanInArray: {problem}.")


def index_problem(indices: Any, inputs: int) -> str:
  """The first output whose indices lie outside of [0, inputs) or are not different, in words; "" where there is none."""
  with jax.ensure_compile_time_eval():  # values may be known inside `jit` too
    bad = np.asarray(_flawed(jnp.asarray(indices), inputs))
  if not bad.any():
    return ""
  o = int(bad.argmax())
  return (
    f"the indices of output {o}, {np.asarray(indices[:8, o]).tolist()}..., are not different numbers in [0, {inputs})"
  )


@functools.partial(jax.jit, static_argnums=1)
def _flawed(indices, inputs):
  ordered = jnp.sort(indices, axis=0)
  return (ordered[0] < 0) | (ordered[-1] >= inputs) | (ordered[1:] == ordered[:-1]).any(0)
