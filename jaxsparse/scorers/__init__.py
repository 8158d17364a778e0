"""Scorers: which entries matter. One type serves for dropping, growing and the first masks."""

from jaxsparse.scorers._accumulated import AdamFisher
from jaxsparse.scorers._accumulated import Fisher
from jaxsparse.scorers._accumulated import Momentum
from jaxsparse.scorers._accumulated import Movement
from jaxsparse.scorers._at_init import AbstractModelScorer
from jaxsparse.scorers._at_init import Grasp
from jaxsparse.scorers._at_init import Shuffled
from jaxsparse.scorers._at_init import Snip
from jaxsparse.scorers._at_init import SynFlow
from jaxsparse.scorers._at_init import mean_gradient
from jaxsparse.scorers._base import AbstractElementwiseScorer
from jaxsparse.scorers._base import AbstractScorer
from jaxsparse.scorers._base import LeafInputs
from jaxsparse.scorers._extra import Correlation
from jaxsparse.scorers._extra import Unused
from jaxsparse.scorers._instant import GradientMagnitude
from jaxsparse.scorers._instant import Magnitude
from jaxsparse.scorers._instant import MagnitudePlusGradient
from jaxsparse.scorers._instant import Random
from jaxsparse.scorers._instant import WeightTimesGradient
from jaxsparse.scorers._random import Modular
from jaxsparse.scorers._random import RandomUnfired

__all__ = [
  "AbstractElementwiseScorer",
  "AbstractModelScorer",
  "AbstractScorer",
  "AdamFisher",
  "Correlation",
  "Fisher",
  "GradientMagnitude",
  "Grasp",
  "LeafInputs",
  "Magnitude",
  "MagnitudePlusGradient",
  "Modular",
  "Momentum",
  "Movement",
  "Random",
  "RandomUnfired",
  "Shuffled",
  "Snip",
  "SynFlow",
  "Unused",
  "WeightTimesGradient",
  "mean_gradient",
]
