"""Kernels that read sparse arrays: every op is a folder with its reference beside it. Importing this brings no Pallas."""

from jaxsparse.ops._dispatch import Choice
from jaxsparse.ops._dispatch import Target
from jaxsparse.ops.block_matmul.api import block_matmul
from jaxsparse.ops.block_matmul.api import block_matmul_transposed
from jaxsparse.ops.block_matmul.api import masked_block_matmul
from jaxsparse.ops.block_matmul.api import plan_blocks
from jaxsparse.ops.block_matmul.api import which_block_matmul
from jaxsparse.ops.candidates import Candidates
from jaxsparse.ops.candidates import block_gradient_scores
from jaxsparse.ops.candidates import fan_in_candidates
from jaxsparse.ops.compact import Compact
from jaxsparse.ops.compact import compact
from jaxsparse.ops.compact import compact_matmul
from jaxsparse.ops.fan_in_matmul.api import fan_in_matmul
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
from jaxsparse.ops.sampled_matmul.api import sampled_matmul
from jaxsparse.ops.sampled_matmul.api import which_sampled_matmul

__all__ = [
  "Candidates",
  "Choice",
  "Compact",
  "PrunedWeight",
  "Target",
  "block_gradient_scores",
  "block_matmul",
  "block_matmul_transposed",
  "compact",
  "compact_matmul",
  "fan_in_candidates",
  "fan_in_matmul",
  "masked_block_matmul",
  "nm_matmul",
  "pack",
  "plan_blocks",
  "prune_and_pack",
  "prune_matmul",
  "sampled_matmul",
  "transposable_mask",
  "unpack",
  "which_block_matmul",
  "which_nm_matmul",
  "which_prune_and_pack",
  "which_prune_matmul",
  "which_sampled_matmul",
]
