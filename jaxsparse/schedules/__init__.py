"""Schedules: when masks are refreshed, how sparse they are then, and how much of them moves."""

from jaxsparse.schedules._base import AbstractMaskSchedule
from jaxsparse.schedules._constant import Alternating
from jaxsparse.schedules._constant import Periodic
from jaxsparse.schedules._constant import Static
from jaxsparse.schedules._drop_fraction import AbstractDropFraction
from jaxsparse.schedules._drop_fraction import ConstantFraction
from jaxsparse.schedules._drop_fraction import CosineFraction
from jaxsparse.schedules._drop_fraction import PiecewiseFraction
from jaxsparse.schedules._ramps import Cosine
from jaxsparse.schedules._ramps import Linear
from jaxsparse.schedules._ramps import OneShot
from jaxsparse.schedules._ramps import Polynomial
from jaxsparse.schedules._ramps import RampThenHold

__all__ = [
  "AbstractDropFraction",
  "AbstractMaskSchedule",
  "Alternating",
  "ConstantFraction",
  "Cosine",
  "CosineFraction",
  "Linear",
  "OneShot",
  "Periodic",
  "PiecewiseFraction",
  "Polynomial",
  "RampThenHold",
  "Static",
]
