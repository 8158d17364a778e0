"""Algorithms: one factory for each method, named after its paper. `set` and `random` are reached by `get_algorithm`."""

from jaxsparse.algorithms._registry import algorithm
from jaxsparse.algorithms._registry import all_algorithm_names
from jaxsparse.algorithms._registry import get_algorithm
from jaxsparse.algorithms.acdc import acdc
from jaxsparse.algorithms.adam_nm import ast
from jaxsparse.algorithms.adam_nm import cast
from jaxsparse.algorithms.adam_nm import step
from jaxsparse.algorithms.asp import asp
from jaxsparse.algorithms.at_init import grasp
from jaxsparse.algorithms.at_init import snip
from jaxsparse.algorithms.at_init import synflow
from jaxsparse.algorithms.dsl import dsl
from jaxsparse.algorithms.dynamic_sparse import rigl
from jaxsparse.algorithms.dynamic_sparse import set_
from jaxsparse.algorithms.dynamic_sparse import snfs
from jaxsparse.algorithms.elastic import chase
from jaxsparse.algorithms.elastic import mest
from jaxsparse.algorithms.elastic import sparcl
from jaxsparse.algorithms.g2gnet import g2gnet
from jaxsparse.algorithms.granet import granet
from jaxsparse.algorithms.magnitude import global_magnitude
from jaxsparse.algorithms.magnitude import gmp
from jaxsparse.algorithms.magnitude import iterative_nm
from jaxsparse.algorithms.magnitude import magnitude
from jaxsparse.algorithms.movement import movement
from jaxsparse.algorithms.no_prune import no_prune
from jaxsparse.algorithms.progressive_flow import mask_decay
from jaxsparse.algorithms.progressive_flow import mdgf
from jaxsparse.algorithms.progressive_flow import sdgf
from jaxsparse.algorithms.progressive_flow import structure_decay
from jaxsparse.algorithms.random_pruning import grasp_ratio
from jaxsparse.algorithms.random_pruning import random_
from jaxsparse.algorithms.random_pruning import snip_ratio
from jaxsparse.algorithms.random_pruning import static_sparse
from jaxsparse.algorithms.saliency import adam_fisher
from jaxsparse.algorithms.saliency import global_saliency
from jaxsparse.algorithms.saliency import saliency
from jaxsparse.algorithms.srigl import srigl
from jaxsparse.algorithms.straight_through import magnitude_ste
from jaxsparse.algorithms.straight_through import random_ste
from jaxsparse.algorithms.straight_through import sr_ste
from jaxsparse.algorithms.top_kast import top_kast

__all__ = [
  "acdc",
  "adam_fisher",
  "algorithm",
  "all_algorithm_names",
  "asp",
  "ast",
  "cast",
  "chase",
  "dsl",
  "g2gnet",
  "get_algorithm",
  "global_magnitude",
  "global_saliency",
  "gmp",
  "granet",
  "grasp",
  "grasp_ratio",
  "iterative_nm",
  "magnitude",
  "magnitude_ste",
  "mask_decay",
  "mdgf",
  "mest",
  "movement",
  "no_prune",
  "random_",
  "random_ste",
  "rigl",
  "saliency",
  "sdgf",
  "set_",
  "snfs",
  "snip",
  "snip_ratio",
  "sparcl",
  "sr_ste",
  "srigl",
  "static_sparse",
  "step",
  "structure_decay",
  "synflow",
  "top_kast",
]
