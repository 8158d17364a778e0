"""Slow, obvious NumPy versions of what jaxsparse computes. Nothing here may import jaxsparse."""
