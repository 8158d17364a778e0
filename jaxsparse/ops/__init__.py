"""Kernels that read sparse arrays: every op is a folder with its reference beside it. Importing this brings no Pallas."""

from jaxsparse.ops._dispatch import Choice
from jaxsparse.ops._dispatch import Target
from jaxsparse.ops.nm_matmul.api import nm_matmul
from jaxsparse.ops.nm_matmul.api import pack
from jaxsparse.ops.nm_matmul.api import unpack
from jaxsparse.ops.nm_matmul.api import which_nm_matmul

__all__ = ["Choice", "Target", "nm_matmul", "pack", "unpack", "which_nm_matmul"]
