"""N:M from scratch with a gradual start: decaying masks (MdGF), changing patterns (SdGF), and the recipe before them."""

from typing import Literal

from jaxsparse import _updater
from jaxsparse import forwards
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse import structures
from jaxsparse.algorithms import _registry

_DECAYS = {"exponential": schedules.ExponentialDecay, "linear": schedules.LinearDecay}


@_registry.algorithm
def mdgf(
  sparsity: float | None = None,
  *,
  decay: Literal["exponential", "linear"] = "exponential",
  rate: float | None = None,
  flow: Literal["straight_through", "chain"] = "straight_through",
  every: int = 1,
  start: int = 0,
  stop: int | None = None,
  **common,
) -> _updater.Updater:
  """Mask-decay gradient flow: the forward pass sees w (m + b_t (1 - m)), b_t falling from 1 to 0; made for high N:M.

  m keeps the largest |w|. b_t = exp(-rate (t - start)) or max(0, 1 - rate (t - start)), and exactly 0 from `stop` on.

  Args:
    sparsity: None with `structure=NM(n, m)`, which implies it.
    decay: "exponential" or "linear".
    rate: per update; 1e-4 for "exponential" (the authors' 1:32 configuration). None lets "linear" end at `stop`.
    flow: what comes back to removed weights. "straight_through", all of the gradient, is what the authors' code does;
      "chain", b_t of it, is what the paper says, and was better in small experiments at 1:16.
    every: updates between new masks.
    start: dense training before this count.
    stop: removed weights count for nothing from this count on; masks go on following the weights.
    **common: as in `magnitude`.

  >>> from jaxsparse import structures
  >>> mdgf(structure=structures.NM(1, 16), flow="chain", stop=8000).forward
  DecayingMask(decay=ExponentialDecay(stop=8000, rate=0.0001, start=0), flow='chain')

  References:
    Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers, 2024,
    https://arxiv.org/abs/2402.04744. No known differences; paper and authors' code differ in the backward pass, see
    `flow`.
  """
  return _closing_mask("mdgf", sparsity, decay, rate, flow, every, start, stop, common)


@_registry.algorithm
def mask_decay(
  sparsity: float | None = None,
  *,
  decay: Literal["exponential", "linear"] = "linear",
  rate: float | None = None,
  every: int = 1,
  start: int = 0,
  stop: int | None = None,
  **common,
) -> _updater.Updater:
  """Decaying pruning mask: dense training, then a mask that closes over [start, stop), then fine-tuning behind it.

  The preset `mdgf(flow="straight_through")` with a linear decay. Experimental: the paper's text was not at hand beyond
  its abstract, and its authors' schedules are taken from the code of their next paper (`mdgf`).

  Args:
    sparsity, decay, rate, every, start, stop, **common: as in `mdgf`.

  >>> from jaxsparse import structures
  >>> mask_decay(structure=structures.NM(2, 8), start=100, stop=800).forward.decay
  LinearDecay(stop=800, rate=None, start=100)

  References:
    Kao et al., Training Recipe for N:M Structured Sparsity with Decaying Pruning Mask, 2022,
    https://arxiv.org/abs/2209.07617. Differs from the paper: not known; see above.
  """
  return _closing_mask("mask_decay", sparsity, decay, rate, "straight_through", every, start, stop, common)


@_registry.algorithm
def sdgf(
  n: int = 2,
  m: int = 4,
  *,
  frames: Literal["fine", "sparsify", "densify"] | tuple[tuple[int, int], ...] = "fine",
  axis: int | tuple[int, ...] | None = None,
  every: int = 1,
  start: int = 0,
  stop: int | None = None,
  **common,
) -> _updater.Updater:
  """Structure-decay gradient flow: straight-through training whose pattern changes in equal frames until it is n:m.

  "fine": 8n:8m, 4n:4m, 2n:2m, n:m. "sparsify": (m-1):m, m/2:m, m/4:m, ..., n:m. "densify": n:8m, n:4m, n:2m, n:m.

  Args:
    n, m: the final pattern.
    frames: one of the above, or pairs (n, m) of which the last is the final one.
    axis: reduction axis, as in `NM`.
    every: updates between new masks.
    start: dense training before this count.
    stop: the frames share [start, stop) equally; the last pattern stays.
    **common: as in `magnitude`, without `structure`.

  >>> sdgf(1, 8, stop=300, frames="sparsify").structure
  Frames(frames=(NM(n=7, m=8), NM(n=4, m=8), NM(n=2, m=8), NM(n=1, m=8)), boundaries=(75, 150, 225))

  References:
    Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers, 2024,
    https://arxiv.org/abs/2402.04744. No known differences.
  """
  return _in_frames("sdgf", n, m, frames, axis, every, start, stop, common)


@_registry.algorithm
def structure_decay(
  n: int = 2,
  m: int = 4,
  *,
  axis: int | tuple[int, ...] | None = None,
  every: int = 1,
  start: int = 0,
  stop: int | None = None,
  **common,
) -> _updater.Updater:
  """Decaying sparse structure: dense training, then (m-1):m, m/2:m, ..., n:m in equal frames over [start, stop).

  The preset `sdgf(frames="sparsify")`. Experimental, as `mask_decay` is.

  Args:
    n, m, axis, every, start, stop, **common: as in `sdgf`.

  >>> structure_decay(2, 4, stop=100).structure
  Frames(frames=(NM(n=3, m=4), NM(n=2, m=4)), boundaries=(50,))

  References:
    Kao et al., Training Recipe for N:M Structured Sparsity with Decaying Pruning Mask, 2022,
    https://arxiv.org/abs/2209.07617. Differs from the paper: not known; the frames are those of the authors' next
    paper.
  """
  return _in_frames("structure_decay", n, m, "sparsify", axis, every, start, stop, common)


def patterns(
  n: int, m: int, frames: str | tuple[tuple[int, int], ...], name: str = "sdgf"
) -> tuple[tuple[int, int], ...]:
  """The pairs (n, m) that `sdgf` goes through; `name` is what errors call it.

  >>> patterns(1, 4, "fine"), patterns(1, 4, "sparsify"), patterns(1, 4, "densify")
  (((8, 32), (4, 16), (2, 8), (1, 4)), ((3, 4), (2, 4), (1, 4)), ((1, 32), (1, 16), (1, 8), (1, 4)))
  """
  if frames == "fine":
    return tuple((n * k, m * k) for k in (8, 4, 2, 1))
  if frames == "densify":
    return tuple((n, m * k) for k in (8, 4, 2, 1))
  if frames == "sparsify":
    halvings = (m // n).bit_length() - 1
    if n * 2**halvings != m or halvings < 1:
      raise ValueError(f"{name}: m={m} is halved until n={n} is left, so m / n must be a power of two above 1.")
    return ((m - 1, m), *((m >> i, m) for i in range(1, halvings + 1)))
  if isinstance(frames, str):
    raise ValueError(f"{name}: frames must be 'fine', 'sparsify', 'densify' or pairs (n, m), got {frames!r}.")
  pairs = tuple(tuple(pair) for pair in frames)
  if not pairs or pairs[-1] != (n, m):
    raise ValueError(f"{name}: the last of frames={frames!r} must be the final pattern ({n}, {m}).")
  return pairs


def _closing_mask(name, sparsity, decay, rate, flow, every, start, stop, common) -> _updater.Updater:
  _check_stop(name, stop, "removed weights count for nothing")
  if decay not in _DECAYS:
    raise ValueError(f"{name}: decay must be 'exponential' or 'linear', got {decay!r}.")
  rates = {} if rate is None else {"rate": rate}
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, start=start),
    drop=scorers.Magnitude(),
    forward=forwards.DecayingMask(_DECAYS[decay](stop, start=start, **rates), flow),
    sparsity=sparsity,
    **common,
  )


def _in_frames(name, n, m, frames, axis, every, start, stop, common) -> _updater.Updater:
  if "structure" in common:
    raise TypeError(
      f"{name}(n, m) makes its own structure; use magnitude_ste(structure=Frames(...)) for other patterns."
    )
  _check_stop(name, stop, "the frames before the last have ended")
  pairs = patterns(n, m, frames, name)
  boundaries = tuple(start + (stop - start) * i // len(pairs) for i in range(1, len(pairs)))
  structure = structures.Frames(tuple(structures.NM(*pair, axis=axis) for pair in pairs), boundaries)
  return _updater.Updater(
    schedule=schedules.Periodic(every=every, start=start),
    drop=scorers.Magnitude(),
    forward=forwards.StraightThrough(),
    structure=structure,
    **common,
  )


def _check_stop(name: str, stop: int | None, what: str) -> None:
  if stop is None:
    raise ValueError(f"{name} needs stop=, the count of updates from which {what}.")
