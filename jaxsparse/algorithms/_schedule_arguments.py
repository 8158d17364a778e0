"""The schedule arguments that pruning factories share."""

from jaxsparse import schedules


def ramp(
  name: str,
  every: int,
  start: int,
  stop: int | None,
  schedule: schedules.AbstractMaskSchedule | None,
  power: float = 3.0,
) -> schedules.AbstractMaskSchedule:
  """`schedule` if given, else a polynomial ramp over [start, stop)."""
  if schedule is not None:
    return schedule
  if stop is None:
    raise ValueError(f"{name} needs stop=, the count of updates at which pruning has ended, or schedule=.")
  return schedules.Polynomial(every=every, stop=stop, start=start, power=power)


def check_stop(name: str, stop: int | None) -> None:
  """ValueError where a drop fraction has no time to decay in."""
  if stop is None:
    raise ValueError(
      f"{name} needs stop=, the count of updates at which the drop fraction has decayed to zero (the papers: 75 % of training)."
    )


def fraction(name: str, given, default, stop: int | None) -> schedules.AbstractDropFraction:
  """A number in the paper's schedule, or the schedule that was given."""
  fraction = given if isinstance(given, schedules.AbstractDropFraction) else default(given)
  if stop is None and not isinstance(fraction, schedules.ConstantFraction):
    raise ValueError(
      f"{name} needs stop= for drop_fraction={fraction!r}: without an end no share of the time has passed."
    )
  return fraction


def check_last_part(name: str, every: int, start: int, stop: int, boundary: float) -> None:
  """ValueError where no refresh falls behind the last boundary, so that a surplus would never be removed."""
  last = (stop - 1 - start) // every * every
  if last < boundary * (stop - start):
    raise ValueError(
      f"{name}: the last refresh, at {start + last}, comes before {boundary:.0%} of [{start}, {stop}) have passed, so the "
      "final sparsity would not be reached. Use a smaller every=, a later stop=, or earlier boundaries=."
    )
