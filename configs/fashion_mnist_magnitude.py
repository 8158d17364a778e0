"""Fashion-MNIST, magnitude pruning on a cubic ramp.

    python experiments/train.py --config=configs/fashion_mnist_magnitude.py --workdir=runs/fashion_mnist_magnitude

About 25 s on two CPU cores. Test accuracy, mean of three seeds, in percent: 89.22 at 90 %, 88.35 at 95 %, 86.62 at 98 %
(experiments/fashion_mnist_table.py).
"""

from ml_collections import ConfigDict

from configs import fashion_mnist_no_prune


def get_config():
  config = fashion_mnist_no_prune.get_config()
  config.updater = ConfigDict(
    dict(name="magnitude", sparsity=0.9, every=100, stop=config.get_ref("steps") * 3 // 4, distribution="ERK")
  )
  return config
