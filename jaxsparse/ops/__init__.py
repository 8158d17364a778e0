"""Kernels that read sparse arrays: every op is a folder with its reference beside it. Importing this brings no Pallas."""

from jaxsparse.ops._dispatch import Choice
from jaxsparse.ops._dispatch import Target
from jaxsparse.ops.nm_matmul._prune_matmul import prune_matmul
from jaxsparse.ops.nm_matmul._prune_matmul import which_prune_matmul
from jaxsparse.ops.nm_matmul._prune_pack import PrunedWeight
from jaxsparse.ops.nm_matmul._prune_pack import prune_and_pack
from jaxsparse.ops.nm_matmul._prune_pack import transposable_mask
from jaxsparse.ops.nm_matmul._prune_pack import which_prune_and_pack
