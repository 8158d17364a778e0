"""Fashion-MNIST: a random ERK mask that never changes.

python experiments/train.py --config=configs/fashion_mnist_static_sparse.py --workdir=runs/fashion_mnist_static_sparse
"""

from ml_collections import ConfigDict

from configs import fashion_mnist_no_prune


def get_config():
  config = fashion_mnist_no_prune.get_config()
  config.updater = ConfigDict(dict(name="static_sparse", sparsity=0.9, distribution="ERK"))
  return config
