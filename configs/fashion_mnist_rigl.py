"""Fashion-MNIST, RigL.

    python experiments/train.py --config=configs/fashion_mnist_rigl.py --workdir=runs/fashion_mnist_rigl

About 25 s on two CPU cores. Test accuracy, mean of three seeds, in percent: 88.70 at 90 %, 87.60 at 95 %, 85.76 at 98 %
(experiments/fashion_mnist_table.py).
"""

from ml_collections import ConfigDict

from configs import fashion_mnist_no_prune


def get_config():
  config = fashion_mnist_no_prune.get_config()
  config.updater = ConfigDict(
    dict(name="rigl", sparsity=0.9, every=100, stop=config.get_ref("steps") * 3 // 4, distribution="ERK")
  )
  return config
