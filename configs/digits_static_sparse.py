"""Digits: a random ERK mask that never changes.

python experiments/train.py --config=configs/digits_static_sparse.py --workdir=runs/digits_static_sparse
"""

from ml_collections import ConfigDict

from configs import digits_no_prune


def get_config():
  config = digits_no_prune.get_config()
  config.updater = ConfigDict(dict(name="static_sparse", sparsity=0.9, distribution="ERK"))
  return config
