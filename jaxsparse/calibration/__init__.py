"""Post-training pruning: statistics of a layer's inputs, and methods on `[K, O]` weights that use them."""

from jaxsparse.calibration._alps import alps
from jaxsparse.calibration._cospadi import Dictionary
from jaxsparse.calibration._cospadi import cospadi
from jaxsparse.calibration._dsnot import dsnot
from jaxsparse.calibration._gram import corrected_target
from jaxsparse.calibration._gram import reconstruction_error
from jaxsparse.calibration._gptq import Quantized
from jaxsparse.calibration._gptq import gptq
from jaxsparse.calibration._order import Orthogonality
from jaxsparse.calibration._order import orthogonality_report
from jaxsparse.calibration._order import sparsify_and_quantize
from jaxsparse.calibration._owl import outlier_ratio
from jaxsparse.calibration._owl import owl_sparsities
from jaxsparse.calibration._refit import refit
from jaxsparse.calibration._rsparse import RSparse
from jaxsparse.calibration._rsparse import rsparse
from jaxsparse.calibration._rsparse import rsparse_budget
from jaxsparse.calibration._rsparse import rsparse_matmul
from jaxsparse.calibration._scores import magnitude_scores
from jaxsparse.calibration._scores import prune
from jaxsparse.calibration._scores import wanda_scores
from jaxsparse.calibration._selection import keep_units
from jaxsparse.calibration._selection import select
from jaxsparse.calibration._sequential import Inputs
from jaxsparse.calibration._sequential import PrunedBlock
from jaxsparse.calibration._sequential import collect
from jaxsparse.calibration._sequential import prune_blocks
from jaxsparse.calibration._sequential import stream_statistics
from jaxsparse.calibration._sketch import QuantileSketch
from jaxsparse.calibration._sketch import quantile
from jaxsparse.calibration._sparsegpt import Pruned
from jaxsparse.calibration._sparsegpt import check_pruned
from jaxsparse.calibration._sparsegpt import sparsegpt
from jaxsparse.calibration._statistics import Statistics
from jaxsparse.calibration._statistics import check_statistics
from jaxsparse.calibration._statistics import init_statistics
from jaxsparse.calibration._statistics import merge
from jaxsparse.calibration._statistics import psum
from jaxsparse.calibration._statistics import update

__all__ = [name for name in dir() if not name.startswith("_")]
