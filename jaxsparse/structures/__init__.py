"""Structures: which entries of a leaf are kept or removed together."""

from jaxsparse.structures._base import AbstractStructure
from jaxsparse.structures._block import Block
from jaxsparse.structures._channel import Channel
from jaxsparse.structures._compact import Compact
from jaxsparse.structures._fixed_fan_in import FixedFanIn
from jaxsparse.structures._frames import Frames
from jaxsparse.structures._nm import NM
from jaxsparse.structures._unstructured import Unstructured

__all__ = ["AbstractStructure", "Block", "Channel", "Compact", "FixedFanIn", "Frames", "NM", "Unstructured"]
