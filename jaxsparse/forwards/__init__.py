"""Forwards: what the forward pass sees of stored weights, and what the optimizer gets back."""

from jaxsparse.forwards._base import AbstractForward
from jaxsparse.forwards._decaying_mask import DecayingMask
from jaxsparse.forwards._dense import Dense
from jaxsparse.forwards._hard import Hard
from jaxsparse.forwards._selective import MaskedGradient
from jaxsparse.forwards._selective import TopKast
from jaxsparse.forwards._straight_through import SRSTE
from jaxsparse.forwards._straight_through import StraightThrough

__all__ = ["AbstractForward", "DecayingMask", "Dense", "Hard", "MaskedGradient", "SRSTE", "StraightThrough", "TopKast"]
