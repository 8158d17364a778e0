"""Models with sparse weights: flax.nnx models converted in place, and a sparse Dense layer for flax.linen; and learned
parameters that make up for removed weights.

The only part of the package that imports Flax; `pip install 'jaxsparse[nn]'`.
"""

from jaxsparse.nn._compensation import init_group_scale
from jaxsparse.nn._compensation import init_slorb
from jaxsparse.nn._compensation import scale_groups
from jaxsparse.nn._compensation import slorb
from jaxsparse.nn._dot_general import nm_dot_general
from jaxsparse.nn._dot_general import promote_dtype
from jaxsparse.nn._linen import SparseDense
from jaxsparse.nn._linen import linen_variables
from jaxsparse.nn._nnx import SparseParam
from jaxsparse.nn._nnx import compress_linears
from jaxsparse.nn._prune_dot_general import prune_dot_general

__all__ = [
  "SparseDense",
  "SparseParam",
  "compress_linears",
  "init_group_scale",
  "init_slorb",
  "linen_variables",
  "nm_dot_general",
  "promote_dtype",
  "prune_dot_general",
  "scale_groups",
  "slorb",
]
