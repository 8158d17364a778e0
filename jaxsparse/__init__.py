"""jaxsparse: pruning and sparse training for JAX, as Optax transformations."""

from jaxsparse import algorithms
from jaxsparse import distributions
from jaxsparse import forwards
from jaxsparse import metrics
from jaxsparse import schedules
from jaxsparse import scorers
from jaxsparse import selection
from jaxsparse import structures
from jaxsparse._state import SparsityState
from jaxsparse._state import get_masks
from jaxsparse._state import get_sparsity_state
from jaxsparse._state import set_masks
from jaxsparse._updater import Updater
from jaxsparse.algorithms import acdc
from jaxsparse.algorithms import adam_fisher
from jaxsparse.algorithms import algorithm
from jaxsparse.algorithms import all_algorithm_names
from jaxsparse.algorithms import get_algorithm
from jaxsparse.algorithms import global_magnitude
from jaxsparse.algorithms import global_saliency
from jaxsparse.algorithms import gmp
from jaxsparse.algorithms import grasp
from jaxsparse.algorithms import iterative_nm
from jaxsparse.algorithms import magnitude
from jaxsparse.algorithms import magnitude_ste
from jaxsparse.algorithms import no_prune
from jaxsparse.algorithms import random_ste
from jaxsparse.algorithms import rigl
from jaxsparse.algorithms import saliency
from jaxsparse.algorithms import snfs
from jaxsparse.algorithms import snip
from jaxsparse.algorithms import sr_ste
from jaxsparse.algorithms import static_sparse
from jaxsparse.algorithms import synflow
from jaxsparse.config import create_updater
from jaxsparse.config import updater_config
from jaxsparse.distributions import ERK
from jaxsparse.distributions import ERKPlus
from jaxsparse.distributions import ErdosRenyi
from jaxsparse.distributions import Global
from jaxsparse.distributions import Uniform
from jaxsparse.distributions import UniformPlus
from jaxsparse.masks import PackedMask
from jaxsparse.masks import masks_from_zeros
from jaxsparse.metrics import count_flops
from jaxsparse.metrics import count_parameters
from jaxsparse.metrics import mask_churn
from jaxsparse.metrics import mask_nbytes
from jaxsparse.metrics import summarize_intersection
from jaxsparse.metrics import summarize_sparsity
from jaxsparse.rules import Rules
from jaxsparse.structures import Block
from jaxsparse.structures import Channel
from jaxsparse.structures import FixedFanIn
from jaxsparse.structures import NM
from jaxsparse.structures import Unstructured

__version__ = "0.1.0.dev0"

__all__ = [name for name in dir() if not name.startswith("_")] + ["__version__"]
