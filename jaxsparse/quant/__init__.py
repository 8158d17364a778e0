"""Quantised values inside sparse arrays: prune first, then quantise the survivors."""

from jaxsparse.quant._dense import dequantize_dense
from jaxsparse.quant._dense import pack
from jaxsparse.quant._dense import quantize_dense
from jaxsparse.quant._symmetric import dequantize
from jaxsparse.quant._symmetric import quantize

__all__ = ["dequantize", "dequantize_dense", "pack", "quantize", "quantize_dense"]
