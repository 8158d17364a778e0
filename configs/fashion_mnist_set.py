"""Fashion-MNIST, SET.

python experiments/train.py --config=configs/fashion_mnist_set.py --workdir=runs/fashion_mnist_set
"""

from ml_collections import ConfigDict

from configs import fashion_mnist_no_prune


def get_config():
  config = fashion_mnist_no_prune.get_config()
  config.updater = ConfigDict(
    dict(
      name="set",
      sparsity=0.9,
      every=100,
      stop=config.get_ref("steps") * 3 // 4,
      drop_fraction=0.1,  # JaxPruner's default; the paper's 0.3 is as good within 0.2 points.
      distribution="ERK",
    )
  )
  return config
