"""Post-training pruning methods by name, as the `prune` of `jaxsparse.calibration.prune_blocks`."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import difflib
import functools
import inspect
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from experiments import compilation
from jaxsparse import calibration
from jaxsparse import structures


@dataclasses.dataclass(frozen=True)
class Pruner:
  """A method with its arguments.

  Attributes:
    name: of the method.
    structure: what is removed; `FixedFanIn()` ranks the weights of each output, `Unstructured()` those of a layer.
    sparsity: fraction to remove; None where the structure says it.
    arguments: of the method.
    ridge: where given, the method's target is not the dense weight but the one that also makes up for the error of the
      pruned layers before (`calibration.corrected_target`).
    gptq: (bits, group), where the kept weights become integers at once, by `calibration.gptq`: later rows of an output
      make up for the rounding of earlier ones, and later layers are calibrated on what integers make of these.
  """

  name: str
  structure: structures.AbstractStructure
  sparsity: float | None
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ridge: float | None = None
  gptq: tuple[int, int] | None = None

  def __post_init__(self):
    if self.name not in METHODS:
      near = difflib.get_close_matches(self.name, METHODS, n=1)
      hint = f" Did you mean {near[0]!r}?" if near else ""
      raise ValueError(f"There is no method {self.name!r}.{hint} The methods are: {', '.join(METHODS)}.")
    known = list(inspect.signature(METHODS[self.name]).parameters)[4:]
    unknown = sorted(set(self.arguments) - set(known))
    if unknown:
      raise ValueError(f"{self.name} has no argument {', '.join(unknown)}; it has: {', '.join(known) or 'none'}.")
    if self.ridge is not None and not self.gram:
      raise ValueError(f"ridge= changes the target of a method that fits outputs; {self.name} does not.")

  @property
  def gram(self) -> bool:
    """Whether Gram matrices are needed."""
    return self.name in _WITH_GRAM or bool(self.arguments.get("refit")) or self.gptq is not None

  def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
    """ValueError, naming the layer, where the structure and the sparsity do not fit weights of these shapes."""
    for name, shape in shapes.items():
      calibration.keep_units(self.structure, shape, self.sparsity, name)
      if self.gptq is not None and shape[0] % self.gptq[1]:
        raise ValueError(f"{name} has {shape[0]} inputs, which groups of {self.gptq[1]} do not divide.")

  def callback(self, sparsities: Sequence[float] | None = None, scales: dict[str, jax.Array] | None = None) -> Callable:
    """The `prune` of `prune_blocks`.

    Args:
      sparsities: of each block, as `calibration.owl_sparsities` gives them; None for the same everywhere.
      scales: with `gptq`, receives those of each layer by name; its weight divided by them is whole.
    """

    def prune(weights, statistics):
      # Outputs that are pruned by themselves may be those of several layers: what depends on the Gram matrix is done once.
      together = self.gram and isinstance(self.structure, (structures.FixedFanIn, structures.NM))
      out = {}
      for names in [tuple(weights)] if together else [(name,) for name in weights]:
        pruned = self._prune(names, [weights[name] for name in names], statistics, sparsities)
        out |= dict(zip(names, pruned))
      if self.gptq is None:
        return out
      for name, (w, mask) in out.items():
        bits, group = self.gptq
        whole = calibration.gptq(w, statistics.gram, mask, bits=bits, group=group, scale_dtype=jnp.bfloat16)
        out[name], scales[name] = (whole.to_dense(w.dtype), mask), whole.scales
      return out

    return prune

  def _prune(self, names, weights, statistics, sparsities):
    label = " ".join(names)
    sparsity = self.sparsity if sparsities is None else sparsities[int(names[0].split("/")[1])]
    outputs = tuple(part.shape[-1] for part in weights)
    keep = jnp.int32(calibration.keep_units(self.structure, (weights[0].shape[0], sum(outputs)), sparsity, label))
    arguments = self.arguments
    if self.name == "alps":  # ranked weight by weight, many times: fewer outputs at a time stay in a CPU's cache
      arguments = arguments | {"splits": outputs}
    arguments = tuple(sorted(arguments.items()))
    pruned, finite = _program()(weights, statistics, keep, self.ridge, self.name, self.structure, arguments)
    if not bool(finite):
      raise FloatingPointError(
        f"{label}: {self.name} gave weights that are not finite; its Gram matrix could not be factored. Calibrate with "
        "more tokens, or with more damping."
      )
    return pruned


def magnitude(w, statistics, structure, keep):
  """The smallest weights go."""
  del statistics
  return calibration.prune(w, calibration.magnitude_scores(w), structure, keep)


def wanda(w, statistics, structure, keep, *, refit=0, damping=0.01):
  """|w| |x|; with `refit`, that many steps of least squares on the kept weights."""
  pruned, mask = calibration.prune(w, calibration.wanda_scores(w, statistics.norm), structure, keep)
  if refit:
    pruned = calibration.refit(pruned, w, statistics.gram, mask, damping=damping, iterations=refit)
  return pruned, mask


def dsnot(w, statistics, structure, keep, *, cycles=50, stop_on_sign_flip=True):
  """Wanda's mask, improved by swaps."""
  _, mask = wanda(w, statistics, structure, keep)
  mask = calibration.dsnot(w, mask, statistics, structure, cycles=cycles, stop_on_sign_flip=stop_on_sign_flip)
  return jnp.where(mask, w, 0), mask


def sparsegpt(w, statistics, structure, keep, *, damping=0.01, block=128):
  """Optimal brain surgery in blocks."""
  return calibration.sparsegpt(w, statistics.gram, structure, keep, damping=damping, block=block)[:2]


def alps(
  w, statistics, structure, keep, *, damping=0.01, growth=2.0, levels=8, every=8, refit_iterations=10, splits=()
):
  """Support and weights together."""
  arguments = dict(damping=damping, growth=growth, levels=levels, every=every, refit_iterations=refit_iterations)
  arguments["splits"] = splits
  return calibration.alps(w, statistics.gram, structure, keep, **arguments)[:2]


METHODS = {method.__name__: method for method in (magnitude, wanda, dsnot, sparsegpt, alps)}
_WITH_GRAM = ("sparsegpt", "alps")


@functools.cache
def _program():
  """`_run`, compiled when it is first called: only then is it known for what."""
  return jax.jit(_run, static_argnames=("name", "structure", "arguments"), compiler_options=compilation.untuned())


def _run(weights, statistics, keep, ridge, name, structure, arguments):
  """((pruned, mask) of each of the weights, which lie side by side meanwhile; whether all of them are finite)."""
  w = weights[0] if len(weights) == 1 else jnp.concatenate(weights, -1)
  target = w
  if ridge is not None:
    moment = jnp.matmul(statistics.cross, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    target = calibration.corrected_target(w, statistics.gram, moment, ridge)
  pruned, mask = METHODS[name](target, statistics, structure, keep, **dict(arguments))
  pruned = pruned.astype(w.dtype)
  ends = list(itertools.accumulate(part.shape[-1] for part in weights))[:-1]
  return list(zip(jnp.split(pruned, ends, -1), jnp.split(mask, ends, -1))), jnp.isfinite(pruned).all()
