"""Shapes of what methods on a weight are given, looked at before any arithmetic."""

from typing import Any


def check_shapes(method: str, w: Any, **given: Any) -> None:
  """Refuses arguments that are of another layer than the weight.

  Args:
    method: what errors say.
    w: `[K, O]`.
    **given: arrays by the name of the argument: `gram` `[K, K]`, `norm` `[K]`, all others `[K, O]`.

  Raises:
    ValueError: for a weight that is no matrix, or an argument of another shape.
  """
  shape = tuple(w.shape)
  if len(shape) != 2:
    raise ValueError(f"{method}: w has shape {shape}; one layer [K, O] is needed.")
  inputs = shape[0]
  special = {
    "gram": ((inputs, inputs), ", X^T X of the layer's inputs X"),
    "norm": ((inputs,), ", one for each input"),
  }
  for name, array in given.items():
    wanted, what = special.get(name, (shape, ""))
    if tuple(array.shape) != wanted:
      raise ValueError(
        f"{method}: {name} has shape {tuple(array.shape)}; for w of shape {shape} it must be {wanted}{what}."
      )
