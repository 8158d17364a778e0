"""Dense training through the same code path."""

from jaxsparse import _updater
from jaxsparse import rules
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse.algorithms import _registry


@_registry.algorithm
def no_prune() -> _updater.Updater:
  """Keeps every weight: the dense baseline, bit for bit the wrapped optimizer.

  >>> no_prune()
  no_prune()
  """
  return _updater.Updater(
    schedule=schedules.Static(), drop=scorers.Magnitude(), sparsity=0.0, rules=rules.Rules((".*", None))
  )
