"""Updaters from nested dictionaries, one to one with the Python call.

`{"name": "rigl", "sparsity": 0.9, "structure": {"name": "Block", "shape": (4, 4)}}` is
`rigl(sparsity=0.9, structure=Block(shape=(4, 4)))`. A value that takes no arguments may be given by its name alone:
`distribution="ERK"`.
"""

from collections.abc import Mapping
import dataclasses
import inspect
from typing import Any

import ml_collections

from jaxsparse import _updater
from jaxsparse import algorithms
from jaxsparse import distributions
from jaxsparse import forwards
from jaxsparse import rules as rules_lib
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse import structures
from jaxsparse.algorithms import _registry

_MODULES = (structures, distributions, schedules, scorers, forwards)
_CLASSES = {
  name: getattr(module, name)
  for module in _MODULES
  for name in module.__all__
  if dataclasses.is_dataclass(getattr(module, name)) and not name.startswith("Abstract")
}

_WORDS = ("on_mismatch", "flow", "decay", "frames")  # arguments that may be words; other words name an axis


def create_updater(config: Mapping[str, Any] | ml_collections.ConfigDict) -> _updater.Updater:
  """Makes an updater from a configuration.

  Args:
    config: `name`, one of `all_algorithm_names()` (or "Updater"), and the arguments of that factory. Structures,
      distributions, schedules, scorers and forwards are dictionaries with the class's `name` and its arguments, or the
      name alone; rules are a list of (regular expression, None | number | structure | [structure, number]).

  Raises:
    ValueError: for an unknown name, with the nearest known one.
    TypeError: for an unknown argument, with the nearest spelling and the signature.

  >>> create_updater({"name": "rigl", "sparsity": 0.9, "stop": 1000, "distribution": "Uniform"})
  rigl(sparsity=0.9, stop=1000, distribution=Uniform())
  """
  config = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
  if "name" not in config:
    raise ValueError(
      f"The updater's configuration needs 'name', one of: {', '.join(algorithms.all_algorithm_names())}. It has: {sorted(config)}."
    )
  name = config.pop("name")
  factory = _updater.Updater if name == "Updater" else algorithms.get_algorithm(name)
  arguments = {key: _value(key, value) for key, value in config.items()}
  _registry.check_arguments(name, inspect.signature(factory), arguments)
  return factory(**arguments)


def updater_config(updater: _updater.Updater) -> ml_collections.ConfigDict:
  """The configuration that `create_updater` turns into this updater.

  >>> from jaxsparse import algorithms
  >>> updater_config(algorithms.rigl(sparsity=0.9, stop=1000)).to_dict()
  {'name': 'rigl', 'sparsity': 0.9, 'stop': 1000}
  """
  if updater.call is not None:
    name, arguments = updater.call
  else:
    name = "Updater"
    arguments = [
      (f.name, getattr(updater, f.name))
      for f in dataclasses.fields(updater)
      if f.name != "call" and getattr(updater, f.name) != f.default
    ]
  return ml_collections.ConfigDict(
    {"name": name} | {key: _plain(value) for key, value in arguments}, convert_dict=False
  )


def _value(key: str, value: Any) -> Any:
  if key == "rules":
    return value if isinstance(value, rules_lib.Rules) else rules_lib.Rules(*((p, _rule_value(v)) for p, v in value))
  if isinstance(value, str) and key not in _WORDS:
    value = {"name": value}
  return _argument(key, value)


def _rule_value(value: Any) -> Any:
  if isinstance(value, (list, tuple)):
    return tuple(_rule_value(v) for v in value)
  return _value("structure", value)


def _make(key: str, config: Mapping[str, Any]) -> Any:
  """A dictionary with "name" -> an instance of the class of that name."""
  arguments = {k: v for k, v in config.items() if k != "name"}
  name = config.get("name")
  if name not in _CLASSES:
    kind = _updater.FIELDS[key][0] if key in _updater.FIELDS else object
    known = sorted(known for known, cls in _CLASSES.items() if issubclass(cls, kind))
    near = _registry.nearest(str(name), known)
    problem = f"there is no {name!r}.{near}" if "name" in config else f"{arguments} needs a name."
    raise ValueError(f"{key}: {problem} Known names: {', '.join(known)}.")
  cls = _CLASSES[name]
  _registry.check_arguments(name, inspect.signature(cls), arguments)
  return cls(**{k: _argument(k, v) for k, v in arguments.items()})


def _argument(key: str, value: Any) -> Any:
  """Dictionaries to axes, also inside others (a forward's decay) and in lists (a pattern schedule's frames)."""
  if isinstance(value, (list, tuple)):
    return tuple(_argument(key, v) for v in value)
  return _make(key, value) if isinstance(value, Mapping) else value


def _plain(value: Any) -> Any:
  """An axis or rules -> dictionaries, numbers and strings."""
  if isinstance(value, rules_lib.Rules):
    return [(pattern, _plain(said)) for pattern, said in value.entries]
  if isinstance(value, tuple):
    return tuple(_plain(v) for v in value)
  if dataclasses.is_dataclass(value):
    return {"name": type(value).__name__} | {
      f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default
    }
  return value
