"""Quantised values inside sparse arrays: prune first, then quantise the survivors."""

from jaxsparse.quant._symmetric import dequantize
from jaxsparse.quant._symmetric import quantize

__all__ = ["dequantize", "quantize"]
