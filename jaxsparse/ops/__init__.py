"""Sparse matrix products and what prepares their operands."""
