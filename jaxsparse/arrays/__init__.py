"""Storage of sparse weights: pytree nodes, files, and what of them trains."""

from jaxsparse.arrays._block_array import BlockArray
from jaxsparse.arrays._fixed_fan_in_array import FixedFanInArray
from jaxsparse.arrays._nm_array import NMArray
from jaxsparse.arrays._partition import combine
from jaxsparse.arrays._partition import partition
from jaxsparse.arrays._safetensors import load_safetensors
from jaxsparse.arrays._safetensors import save_safetensors

__all__ = ["BlockArray", "FixedFanInArray", "NMArray", "combine", "load_safetensors", "partition", "save_safetensors"]
