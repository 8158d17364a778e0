"""The list of algorithms, and what makes a function one of them."""

from collections.abc import Callable
import dataclasses
import difflib
import functools
import inspect

from jaxsparse import _updater

Factory = Callable[..., _updater.Updater]

# Fields of Updater that every factory takes beside its own arguments.
COMMON = ("structure", "distribution", "rules", "pack_masks", "on_mismatch")

_FACTORIES: dict[str, Factory] = {}


def algorithm(factory: Factory) -> Factory:
  """Registers a factory under its name (less a trailing underscore) and makes its updaters print as the call.

  The factory's `**common` stands for the fields in `COMMON`; unknown arguments are an error that names the nearest.
  """
  name = factory.__name__.rstrip("_")
  signature = _full_signature(factory)

  @functools.wraps(factory)
  def wrapped(*args, **kwargs):
    check_arguments(name, signature, kwargs)
    try:
      bound = signature.bind(*args, **kwargs)
    except TypeError as error:
      raise TypeError(f"{name}(): {error}. Its signature is {name}{_short(signature)}.") from None
    updater = factory(*args, **kwargs)
    if not isinstance(updater, _updater.Updater):
      raise TypeError(f"{name}() must return an Updater, got {updater!r}.")
    return dataclasses.replace(updater, call=(name, tuple(bound.arguments.items())))

  wrapped.__signature__ = signature
  _FACTORIES[name] = wrapped
  return wrapped


def all_algorithm_names() -> tuple[str, ...]:
  """Names that `get_algorithm` and `create_updater` know, in alphabetical order."""
  return tuple(sorted(_FACTORIES))


def get_algorithm(name: str) -> Factory:
  """The factory of an algorithm.

  Args:
    name: one of `all_algorithm_names()`.

  Raises:
    ValueError: for an unknown name; the message holds the nearest known one.

  >>> get_algorithm("rigl")(sparsity=0.9, stop=1000)
  rigl(sparsity=0.9, stop=1000)
  """
  if name not in _FACTORIES:
    raise ValueError(
      f"There is no algorithm {name!r}.{nearest(name, _FACTORIES)} The algorithms are: {', '.join(all_algorithm_names())}."
    )
  return _FACTORIES[name]


def check_arguments(name: str, signature: inspect.Signature, arguments) -> None:
  """TypeError for an argument that the signature does not have, with the nearest spelling and the signature."""
  for argument in arguments:
    if argument not in signature.parameters:
      raise TypeError(
        f"{name}() has no argument {argument!r}.{nearest(argument, signature.parameters)} Its signature is {name}{_short(signature)}."
      )


def nearest(word: str, known) -> str:
  """ " Did you mean 'x'?" or nothing."""
  found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
  return f" Did you mean {found[0]!r}?" if found else ""


def _short(signature: inspect.Signature) -> str:
  parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
  return str(inspect.Signature(parameters))


def _full_signature(factory: Factory) -> inspect.Signature:
  """The factory's signature with its `**common` spelled out."""
  own = [p for p in inspect.signature(factory).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
  takes_common = len(own) < len(inspect.signature(factory).parameters)
  fields = {f.name: f for f in dataclasses.fields(_updater.Updater)}
  names = [p.name for p in own]
  common = [
    inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=fields[n].default, annotation=fields[n].type)
    for n in COMMON
    if takes_common and n not in names
  ]
  return inspect.Signature(own + common, return_annotation=_updater.Updater)
