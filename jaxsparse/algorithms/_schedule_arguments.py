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
