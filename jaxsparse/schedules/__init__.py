"""Schedules: when masks are refreshed, how sparse they are then, how much of them moves, and how fast they close."""

from jaxsparse.schedules._base import AbstractMaskSchedule
from jaxsparse.schedules._constant import Alternating
from jaxsparse.schedules._constant import Periodic
from jaxsparse.schedules._constant import Static
from jaxsparse.schedules._decays import AbstractDecay
from jaxsparse.schedules._decays import ExponentialDecay
from jaxsparse.schedules._decays import LinearDecay
from jaxsparse.schedules._drop_fraction import AbstractDropFraction
from jaxsparse.schedules._drop_fraction import ConstantFraction
from jaxsparse.schedules._drop_fraction import CosineFraction
from jaxsparse.schedules._drop_fraction import PiecewiseFraction
from jaxsparse.schedules._ramps import AbstractRamp
from jaxsparse.schedules._ramps import Cosine
from jaxsparse.schedules._ramps import Linear
from jaxsparse.schedules._ramps import OneShot
from jaxsparse.schedules._ramps import Polynomial

__all__ = [
  "AbstractDecay",
  "AbstractDropFraction",
  "AbstractMaskSchedule",
  "AbstractRamp",
  "Alternating",
  "ConstantFraction",
  "Cosine",
  "CosineFraction",
  "ExponentialDecay",
  "Linear",
  "LinearDecay",
  "OneShot",
  "Periodic",
  "PiecewiseFraction",
  "Polynomial",
  "Static",
]
