"""Compact training: parameters, gradients and optimizer moments hold only what is kept."""
