"""Learned extras of sparse layers: low-rank compensation of removed weights, scales of groups."""

from jaxsparse.nn._compensation import init_group_scale
from jaxsparse.nn._compensation import init_slorb
from jaxsparse.nn._compensation import scale_groups
from jaxsparse.nn._compensation import slorb

__all__ = ["init_group_scale", "init_slorb", "scale_groups", "slorb"]
