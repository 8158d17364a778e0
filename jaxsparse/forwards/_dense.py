"""Masks that only the optimizer sees."""

import dataclasses
from typing import ClassVar

from jaxsparse.forwards import _base


@dataclasses.dataclass(frozen=True)
class Dense(_base.AbstractForward):
  """The forward pass sees all stored weights; masks steer the inner optimizer, and are applied outside training.

  For methods that pull removed weights to zero continuously: evaluation and export show the masked weights, which are
  what the method is on its way to.
  """

  storage: ClassVar[str] = "dense"

  def forward(self, param, mask, count):
    return param

  def gradient(self, grad, param, mask, count):
    return grad
