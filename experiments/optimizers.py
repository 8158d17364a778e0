"""Optimizers and learning rates from a configuration."""

from collections.abc import Mapping
import difflib
from typing import Any

from ml_collections import ConfigDict
import optax

import jaxsparse as js

# What a configuration may name beside everything in optax.
_OURS = {"adamw_nm": js.adamw_nm, "AutoSwitch": js.AutoSwitch}


def create(config: ConfigDict, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """An optimizer and its learning rate.

  Args:
    config: `name`, an optimizer of optax or `adamw_nm`; `learning_rate`, the highest; `decay`, how it changes over the
      run: "cosine" (to zero), "warmup_cosine" (after a linear rise in the first twentieth) or "constant"; `cycles`, how
      often that is gone through (1); the rest are the optimizer's arguments. An argument that is a dictionary with a
      `name` is made first: `{"name": "linear_schedule", "init_value": 0.0, ...}`, `{"name": "AutoSwitch", ...}`.
    steps: length of the run.

  Raises:
    ValueError: for a name that there is not.
  """
  arguments = config.to_dict()
  name, rate, decay = arguments.pop("name"), arguments.pop("learning_rate"), arguments.pop("decay")
  cycles = arguments.pop("cycles", 1)
  length = steps // cycles
  decays = {
    "cosine": lambda: optax.cosine_decay_schedule(rate, length),
    "constant": lambda: optax.constant_schedule(rate),
    "warmup_cosine": lambda: optax.warmup_cosine_decay_schedule(0.0, rate, max(1, length // 20), length),
  }
  if decay not in decays:
    raise ValueError(f"config.optimizer.decay must be one of {', '.join(decays)}, got {decay!r}.")
  learning_rate = decays[decay]()
  if cycles > 1:
    learning_rate = optax.join_schedules([learning_rate] * cycles, [length * i for i in range(1, cycles)])
  make = _find(name, "optimizer")
  return make(learning_rate, **{key: _argument(value) for key, value in arguments.items()}), learning_rate


def _argument(value: Any) -> Any:
  if not (isinstance(value, Mapping) and "name" in value):
    return value
  arguments = dict(value)
  return _find(arguments.pop("name"), "schedule")(**arguments)


def _find(name: str, what: str) -> Any:
  found = _OURS.get(name) or getattr(optax, name, None)
  if not callable(found):
    near = difflib.get_close_matches(name, [*_OURS, *dir(optax)], n=1)
    raise ValueError(f"optax has no {what} {name!r}.{f' Did you mean {near[0]!r}?' if near else ''}")
  return found
