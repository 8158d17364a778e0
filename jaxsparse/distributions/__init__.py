"""Distributions: how a total sparsity is shared out over the leaves."""

from jaxsparse.distributions._base import AbstractDistribution
from jaxsparse.distributions._base import LeafShape
from jaxsparse.distributions._erdos_renyi import ERK
from jaxsparse.distributions._erdos_renyi import ERKPlus
from jaxsparse.distributions._erdos_renyi import ErdosRenyi
from jaxsparse.distributions._global import Global
from jaxsparse.distributions._uniform import Uniform
from jaxsparse.distributions._uniform import UniformPlus

__all__ = ["AbstractDistribution", "ERK", "ERKPlus", "ErdosRenyi", "Global", "LeafShape", "Uniform", "UniformPlus"]
