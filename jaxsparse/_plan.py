"""What an updater does with each leaf of a model: settled from shapes alone, before any training."""

import dataclasses
from typing import Any

from absl import logging
import jax.numpy as jnp

from jaxsparse import _tree
from jaxsparse import distributions
from jaxsparse import rules as rules_lib
from jaxsparse import selection
from jaxsparse import structures


@dataclasses.dataclass(frozen=True)
class LeafPlan:
  """The treatment of one leaf.

  Attributes:
    name, label: its path, for rules and for errors.
    shape: of the leaf.
    structure: None where the leaf stays dense.
    reason: why it stays dense, or where its pattern comes from.
    initial_keep, final_keep: units kept per group before and after the schedule; `final_keep` is None when a joint
      distribution decides at each refresh.
    compact: whether the parameter holds only what is kept; `shape` is then that of the dense leaf.
  """

  name: str
  label: str
  shape: tuple[int, ...]
  structure: structures.AbstractStructure | None
  reason: str
  initial_keep: int = 0
  final_keep: int | None = None
  compact: bool = False

  def with_counts(self, keep: int) -> "LeafPlan":
    """The plan with one count throughout."""
    return dataclasses.replace(self, initial_keep=keep, final_keep=keep)

  @property
  def leaf_shape(self) -> distributions.LeafShape:
    s = self.structure
    units, groups = s.units_per_group(self.shape), s.group_count(self.shape)
    size = 1
    for d in self.shape:
      size *= d
    return distributions.LeafShape(self.name, s.layer_shape(self.shape), units, groups, size // (units * groups))

  def in_frame(self, index: int) -> "LeafPlan":
    """The plan with one frame of a pattern schedule as its structure; itself where there is one pattern only."""
    if not isinstance(self.structure, structures.Frames):
      return self
    frame = self.structure.frames[index]
    return dataclasses.replace(self, structure=frame, initial_keep=frame.m, final_keep=frame.n)


def make_plan(updater: Any, leaves: _tree.Leaves) -> list[LeafPlan]:
  """The plan of every leaf, in order; all configuration errors that depend on the model are raised here."""
  plans, pinned = [], []
  present = [n for n, v in zip(leaves.names, leaves.values) if not _tree.is_masked_node(v)]
  updater.rules.check_used(present)
  for name, label, value in zip(leaves.names, leaves.labels, leaves.values, strict=True):
    plan, sparsity = _plan_leaf(updater, name, label, value)
    plans.append(plan)
    pinned.append(sparsity)
  plans = _settle_counts(updater, plans, pinned)
  if updater.sparsity != 0 and all(p.structure is None for p in plans):
    reasons = "; ".join(f"{p.label}: {p.reason}" for p in plans[:8]) or "there are no parameters"
    raise ValueError(
      f"{updater!r} sparsifies no leaf, so training would be dense ({reasons}). Say no_prune() if that is wanted."
    )
  return plans


def _plan_leaf(updater, name: str, label: str, value) -> tuple[LeafPlan, float | None]:
  """Structure of one leaf, and the sparsity that a rule pins it to."""
  if _tree.is_masked_node(value):
    return LeafPlan(name, label, (), None, "left to another transformation"), None
  if not hasattr(value, "shape") or not hasattr(value, "dtype"):
    raise TypeError(f"{label} is a {type(value).__name__}, not an array; parameters must be arrays.")
  shape = tuple(value.shape)
  structure, sparsity = updater.structure, None
  index = updater.rules.find(name)
  if index is not None:
    pattern, said = updater.rules.entries[index]
    if said is None:
      return LeafPlan(name, label, shape, None, f"dense by rule {pattern!r}"), None
    own, sparsity = rules_lib.split(said)
    structure, reason = own or structure, f"rule {pattern!r}"
  elif len(shape) < 2:
    return LeafPlan(name, label, shape, None, "fewer than two dimensions"), None
  else:
    reason = "default"
  if not jnp.issubdtype(value.dtype, jnp.floating):
    raise TypeError(
      f"{label} has dtype {value.dtype}; only real floating-point leaves can be sparsified. Exclude it with the rule ({name!r}, None)."
    )
  if 0 in shape or not shape:
    raise ValueError(
      f"{label} has shape {shape}: there is nothing to sparsify. Exclude it with the rule ({name!r}, None)."
    )
  compact = isinstance(structure, structures.Compact)
  if compact:
    shape, structure = structure.shape, structure.structure
  if updater.surplus is not None and structure.swaps_within_groups:
    raise ValueError(
      f"{label}: {structure!r} keeps the count of every group, so nothing can grow beyond it for a while (surplus=); use "
      "another structure, or pin the leaf by a rule."
    )
  try:
    structure.validate(shape)
  except ValueError as error:
    if updater.on_mismatch == "skip" and not compact:
      logging.warning("jaxsparse leaves %s dense: it has shape %s; %s", label, shape, error)
      return LeafPlan(name, label, shape, None, f"skipped: {error}"), None
    raise ValueError(
      f"{label} has shape {shape}; {error} Exclude the leaf with the rule ({name!r}, None), or pass "
      "on_mismatch='skip' to leave such leaves dense."
    ) from None
  if isinstance(structure, structures.Frames) and (updater.forward.storage != "dense" or updater.distribution.joint):
    raise ValueError(
      f"{label}: a finer pattern may want back what a coarser one has removed, so {structure!r} needs dense storage, "
      f"such as forward=StraightThrough(), and a distribution with counts per leaf (not Global())."
    )
  return LeafPlan(name, label, shape, structure, reason, compact=compact), sparsity


def _settle_counts(updater, plans: list[LeafPlan], pinned: list[float | None]) -> list[LeafPlan]:
  """Fills in how many units each leaf keeps: fixed by its structure, by its rule, or shared out by the distribution."""
  final: dict[int, int | None] = {}
  shared = []
  default = updater.structure.structure if isinstance(updater.structure, structures.Compact) else updater.structure
  for i, plan in enumerate(plans):
    if plan.structure is None:
      continue
    leaf = plan.leaf_shape
    implied = plan.structure.implied_keep(plan.shape)
    if implied is not None:
      asked = updater.sparsity if pinned[i] is None and plan.structure == default else pinned[i]
      _check_implied(plan, leaf, implied, asked)
      final[i] = implied
    elif pinned[i] is not None:
      final[i] = selection.keep_count(leaf.units, pinned[i])
    else:
      shared.append(i)
  if shared:
    if updater.sparsity is None:
      raise ValueError(
        f"{updater!r} needs sparsity=: {plans[shared[0]].label} with {plans[shared[0]].structure!r} has no sparsity of its own."
      )
    shapes = [plans[i].leaf_shape for i in shared]
    if updater.distribution.joint:
      for i in shared:
        if plans[i].structure.swaps_within_groups or plans[i].structure.stack_axes:
          raise ValueError(
            f"{plans[i].label}: {updater.distribution!r} ranks leaves against each other and cannot keep the groups "
            f"of {plans[i].structure!r}; use another distribution, or pin the leaf by a rule."
          )
      final |= {i: None for i in shared}
    else:
      final |= dict(zip(shared, updater.distribution.keep_counts(shapes, updater.sparsity)))
  return [_with_counts(updater, plan, final[i]) if i in final else plan for i, plan in enumerate(plans)]


def _with_counts(updater, plan: LeafPlan, final: int | None) -> LeafPlan:
  units = plan.leaf_shape.units
  if final == 0:
    raise ValueError(
      f"{plan.label} with shape {plan.shape} would keep none of its {units} units per group ({plan.structure!r}); "
      "lower its sparsity, use smaller units, or exclude it by a rule."
    )
  if final == units and not updater.distribution.joint:
    return dataclasses.replace(plan, structure=None, reason="its share of the sparsity is 0")
  initial = selection.keep_count(units, updater.initial_sparsity)
  return dataclasses.replace(plan, initial_keep=max(initial, final or 0), final_keep=final)


def _check_implied(plan: LeafPlan, leaf, implied: int, sparsity: float | None) -> None:
  if sparsity is None:
    return
  density = implied / leaf.units
  if abs((1.0 - sparsity) - density) > 1e-6:
    raise ValueError(
      f"{plan.label}: {plan.structure!r} keeps {implied} of {leaf.units}, a sparsity of {1 - density:g}, but sparsity="
      f"{sparsity:g} was asked for. Leave the sparsity out, or make the two agree."
    )
