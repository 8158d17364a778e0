"""Kernels that read sparse arrays: every op is a folder with its reference beside it. Importing this brings no Pallas."""

from jaxsparse.ops._dispatch import Choice
from jaxsparse.ops._dispatch import Target
from jaxsparse.ops.nm_matmul._prune_matmul import prune_matmul
from jaxsparse.ops.nm_matmul._prune_matmul import which_prune_matmul
from jaxsparse.ops.nm_matmul._prune_pack import PrunedWeight
from jaxsparse.ops.nm_matmul._prune_pack import prune_and_pack
from jaxsparse.ops.nm_matmul._prune_pack import transposable_mask
from jaxsparse.ops.nm_matmul._prune_pack import which_prune_and_pack
from jaxsparse.ops.nm_matmul.api import nm_matmul
from jaxsparse.ops.nm_matmul.api import pack
from jaxsparse.ops.nm_matmul.api import unpack
from jaxsparse.ops.nm_matmul.api import which_nm_matmul

__all__ = [
  "Choice",
  "PrunedWeight",
  "Target",
  "nm_matmul",
  "pack",
  "prune_and_pack",
  "prune_matmul",
  "transposable_mask",
  "unpack",
  "which_nm_matmul",
  "which_prune_and_pack",
  "which_prune_matmul",
]
