"""Recipes: loops over the contract, and models, that are not gradient transformations."""

from jaxsparse.recipes import sparse_ift
from jaxsparse.recipes._densify import densify
from jaxsparse.recipes._distillation import distill
from jaxsparse.recipes._distillation import kl_divergence
from jaxsparse.recipes._distillation import mutual
from jaxsparse.recipes._hebbian import correlation
from jaxsparse.recipes._imp import all_kept
from jaxsparse.recipes._imp import iterative_pruning
from jaxsparse.recipes._imp import round_sparsity
from jaxsparse.recipes._random_search import random_search
from jaxsparse.recipes._soups import greedy_soup
from jaxsparse.recipes._soups import soup
from jaxsparse.recipes._soups import sparse_model_soups
from jaxsparse.recipes._tasks import Tasks

__all__ = [
  "Tasks",
  "all_kept",
  "correlation",
  "densify",
  "distill",
  "greedy_soup",
  "iterative_pruning",
  "kl_divergence",
  "mutual",
  "random_search",
  "round_sparsity",
  "soup",
  "sparse_ift",
  "sparse_model_soups",
]
