"""Rules: which leaves are sparsified, and how, by regular expressions over their paths."""

import dataclasses
import re
from typing import Any

from jaxsparse.structures import AbstractStructure


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Rules:
  """An ordered list of (regular expression, what to do); the first match wins.

  Each expression is searched (`re.search`) in the leaf's path, such as "encoder/dense_0/kernel". What to do is one of

  * `None`: the leaf stays dense;
  * a structure, such as `NM(2, 4)`: used instead of the updater's own;
  * a number in [0, 1): the leaf's own sparsity, taken out of the distribution;
  * a pair (structure, sparsity).

  Leaves that no rule matches follow the updater when they have two dimensions or more, and stay dense otherwise. End
  with `(".*", None)` to leave out everything not named. A rule that matches nothing is an error.

  >>> Rules(("embed", None), ("mlp", 0.9))
  Rules(('embed', None), ('mlp', 0.9))
  """

  entries: tuple[tuple[str, Any], ...]

  def __init__(self, *entries: tuple[str, Any]):
    object.__setattr__(self, "entries", tuple(_check_entry(entry) for entry in entries))

  def __repr__(self):
    return f"Rules({', '.join(map(repr, self.entries))})"

  def find(self, name: str) -> int | None:
    """Position of the first rule whose expression is found in `name`."""
    return next((i for i, (pattern, _) in enumerate(self.entries) if re.search(pattern, name)), None)

  def check_used(self, names: list[str]) -> None:
    """ValueError for a rule whose expression is found in no name."""
    for pattern, _ in self.entries:
      if not any(re.search(pattern, name) for name in names):
        raise ValueError(f"The rule {pattern!r} matches no leaf. The leaves are: {', '.join(names)}.")


def split(value: Any) -> tuple[AbstractStructure | None, float | None]:
  """What a rule (other than None) says -> (structure or None, sparsity or None)."""
  if isinstance(value, tuple):
    return value
  return (value, None) if isinstance(value, AbstractStructure) else (None, float(value))


def check_sparsity(sparsity: Any, what: str) -> float:
  """A float in [0, 1), or an error that says which sparsity is wrong."""
  if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
    raise TypeError(f"{what} must be a number in [0, 1), got {sparsity!r}.")
  if not 0.0 <= sparsity < 1.0:  # NaN fails too
    raise ValueError(f"{what} must be in [0, 1): the fraction of the weights to remove, got {sparsity!r}.")
  return float(sparsity)


def _check_entry(entry: Any) -> tuple[str, Any]:
  if not (isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], str)):
    raise TypeError(f"A rule is a pair (regular expression, structure, sparsity or None), got {entry!r}.")
  pattern, value = entry
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(f"The rule {pattern!r} is not a regular expression: {error}.") from error
  if isinstance(value, list):
    value = tuple(value)
  pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], AbstractStructure)
  if pair:
    check_sparsity(value[1], f"The sparsity of the rule {pattern!r}")
  elif isinstance(value, (int, float)):
    check_sparsity(value, f"The sparsity of the rule {pattern!r}")
  elif value is not None and not isinstance(value, AbstractStructure):
    raise TypeError(
      f"The rule {pattern!r} must say None (dense), a structure, a sparsity or (structure, sparsity), got {value!r}."
    )
  return pattern, value
