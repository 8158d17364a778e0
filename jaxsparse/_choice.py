"""Which units of the sparsified leaves are kept: masks from scores, counts and the masks before.

The leaves of one call are ranked against each other where the distribution is joint, else each by itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse import _plan
from jaxsparse import scorers
from jaxsparse import selection
from jaxsparse import structures


class Leaf(NamedTuple):
  """One sparsified leaf during an update, with all that scorers may ask for."""

  index: int
  plan: _plan.LeafPlan
  param: jax.Array
  grad: jax.Array | None
  key: jax.Array
  extra: dict[str, jax.Array]
  drop_state: Any
  grow_state: Any

  @property
  def inputs(self) -> scorers.LeafInputs:
    return scorers.LeafInputs(self.param, self.grad, self.key, self.extra)


def choose_in_frame(updater, sparse, masks, count):
  """`choose` at a count; a leaf with a pattern schedule (which is refreshed alone) takes the pattern of its frame."""
  now = masks, updater.schedule.progress(count), updater.schedule.elapsed(count)
  structure = sparse[0].plan.structure
  if not isinstance(structure, structures.Frames):
    return choose(updater, sparse, *now)
  frames = [[leaf._replace(plan=leaf.plan.in_frame(i)) for leaf in sparse] for i in range(len(structure.frames))]
  return jax.lax.switch(structure.index(count), [lambda f=f: choose(updater, f, *now) for f in frames])


def choose(updater, sparse, masks, progress, elapsed):
  """Masks of the sparsified leaves at a given progress of the schedule.

  Methods that grow drop a share of what is kept and grow as much back. Others rank all entries (dense storage), or
  only what is still kept (hard storage: a removed weight has no value to be judged by).
  """
  views = [leaf.plan.structure for leaf in sparse]
  drop = [unit_scores(updater.drop, leaf, leaf.drop_state, leaf.inputs) for leaf in sparse]
  kept = None if masks is None else [view.mask_to_units(mask) for view, mask in zip(views, masks)]
  grow = None
  if updater.grow is not None and masks is not None:
    grow = [
      unit_scores(updater.grow, leaf, leaf.grow_state, leaf.inputs._replace(key=jax.random.fold_in(leaf.key, 1)))
      for leaf in sparse
    ]
  units = choose_units(updater, sparse, kept, drop, grow, progress, elapsed)
  return [view.from_units(u, leaf.plan.shape) for view, u, leaf in zip(views, units, sparse)]


def choose_units(updater, sparse, kept, drop, grow, progress, elapsed):
  """`choose` on scores of units: masks of units from those kept now and their scores; None for `grow` only prunes."""
  if grow is not None:
    return _drop_and_grow(updater, sparse, kept, drop, grow, progress, elapsed)
  return prune(updater, sparse, drop, kept if updater.forward.storage == "hard" else None, progress)


def unit_scores(scorer, leaf, state, inputs):
  """Scores of a leaf's units. Where every entry is a unit of its own, elementwise scores stay a function of what they
  are computed from, and the ranking stores no copy of the leaf."""
  structure = leaf.plan.structure
  if isinstance(scorer, scorers.AbstractElementwiseScorer) and isinstance(structure, structures.Unstructured):
    return selection.Elementwise(*scorer.terms(state, inputs))
  return structure.to_units(scorer.score(state, inputs))


def select(updater, sparse, scores, masks, progress):
  """Masks from scores of entries: the best among what `masks` keeps, with the counts of this progress."""
  views = [leaf.plan.structure for leaf in sparse]
  units = prune(
    updater,
    sparse,
    [v.to_units(s) for v, s in zip(views, scores)],
    [v.mask_to_units(m) for v, m in zip(views, masks)],
    progress,
  )
  return [v.from_units(u, leaf.plan.shape) for v, u, leaf in zip(views, units, sparse)]


def prune(updater, sparse, scores, among, progress):
  """Unit masks with the counts of this progress, best scores first; units outside `among` come last."""
  among = among or [None] * len(scores)
  keeps = _keep_counts(updater, sparse, scores, among, progress)
  return [
    selection.topk_mask(s, keep, leaf.plan.structure.unit_axes(leaf.plan.shape), where=a)
    for s, a, keep, leaf in zip(scores, among, keeps, sparse)
  ]


def _keep_counts(updater, sparse, scores, among, progress):
  """Units kept per group of every leaf at this progress; a joint distribution shares its total out by the scores."""
  keeps = [None if leaf.plan.final_keep is None else keep_at(leaf.plan, progress) for leaf in sparse]
  joint = [i for i, keep in enumerate(keeps) if keep is None]
  if joint:
    shapes = [sparse[i].plan.leaf_shape for i in joint]
    size = sum(shape.size for shape in shapes)
    first, last = (selection.keep_count(size, s) for s in (updater.initial_sparsity, updater.sparsity))
    total = _interpolate(size - first, size - last, size, progress)
    ranked = [scores[i] if among[i] is None else selection.rank_last(scores[i], among[i]) for i in joint]
    for i, keep in zip(joint, updater.distribution.allocate(ranked, shapes, total)):
      keeps[i] = keep
  return keeps


def _drop_and_grow(updater, sparse, kept, drop, grow, progress, elapsed):
  """Replaces a share of the kept units of every leaf, rounded up so that small leaves move too; grows the surplus."""
  fraction = updater.drop_fraction.value(elapsed)
  keeps = _keep_counts(updater, sparse, drop, kept, progress)
  share = None if updater.surplus is None else updater.surplus.value(elapsed)
  units = []
  for leaf, mask, dropped, grown, keep in zip(sparse, kept, drop, grow, keeps):
    plan, axes = leaf.plan, leaf.plan.structure.unit_axes(leaf.plan.shape)
    if plan.structure.swaps_within_groups:
      total = ceil(fraction * (keep * plan.leaf_shape.groups).astype(jnp.float32))
      low, high = plan.structure.counts_around_swap(mask, dropped, grown, keep, total, axes)
    else:
      low = keep - ceil(fraction * keep.astype(jnp.float32))
      here = share is not None and plan.final_keep is not None
      high = keep + ceil(share * keep.astype(jnp.float32)) if here else keep
    units.append(selection.drop_and_grow(mask, dropped, grown, low, high, axes))
  joint = [i for i, leaf in enumerate(sparse) if leaf.plan.final_keep is None]
  if share is None or not joint:
    return units
  # Where leaves compete for what is kept, they compete for what grows beyond it, too.
  shapes = [sparse[i].plan.leaf_shape for i in joint]
  total = sum(keeps[i] * (shape.size // shape.units) for i, shape in zip(joint, shapes))
  ranked = [selection.rank_last(grow[i], ~units[i]) for i in joint]
  extra = updater.distribution.allocate(ranked, shapes, ceil(share * total.astype(jnp.float32)))
  for i, more in zip(joint, extra):
    axes = sparse[i].plan.structure.unit_axes(sparse[i].plan.shape)
    units[i] = selection.drop_and_grow(units[i], drop[i], grow[i], keeps[i], keeps[i] + more, axes)
  return units


def keep_at(plan: _plan.LeafPlan, progress: jax.Array) -> jax.Array:
  """shape=(), int32: units kept per group at this progress; exactly `initial_keep` at 0 and `final_keep` at 1.

  Between the ends the removed *counts* are interpolated, first + floor((last - first) progress), since the last count is
  the distribution's and need not be a sparsity times a size. Under a uniform distribution this may keep one unit more
  than units - floor(units s_t) does. Progress is float32: a product that would be whole may be rounded down.
  """
  units = plan.leaf_shape.units
  return _interpolate(units - plan.initial_keep, units - plan.final_keep, units, progress)


def _interpolate(first: int, last: int, size: int, progress) -> jax.Array:
  # Both ends are exact integers; between them float32 rounds: by a unit, or by some 1e-7 of the units where that is more.
  between = first + jnp.floor((last - first) * progress).astype(jnp.int32)
  return size - jnp.where(progress >= 1, last, jnp.where(progress <= 0, first, between)).astype(jnp.int32)


def ceil(x: jax.Array) -> jax.Array:
  """x rounded up, as int32; products that are whole but for float32's rounding stay what they are."""
  # 0.3 * 10 is a little above 3 in float32; the slack keeps whole products whole.
  return jnp.ceil(x * (1 - 1e-6)).astype(jnp.int32)
