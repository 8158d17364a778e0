"""Fashion-MNIST, dense: a 784-300-100-10 MLP, 10 epochs; the other fashion_mnist configurations start from it.

    apt-get install dataset-fashion-mnist  # or --config.data_dir=DIRECTORY with the IDX files
    python experiments/train.py --config=configs/fashion_mnist_no_prune.py --workdir=runs/fashion_mnist_no_prune

About 25 s on two CPU cores. Test accuracy, mean of three seeds, in percent: 89.84
(experiments/fashion_mnist_table.py).
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0
  config.dataset = "fashion_mnist"
  config.data_dir = ""
  config.model = ConfigDict(dict(name="mlp", features=(300, 100)))
  config.optimizer = ConfigDict(dict(name="adam", learning_rate=1e-3, decay="cosine"))
  config.batch_size = 128
  config.steps = 10 * (60_000 // 128)  # 10 epochs; the last, incomplete batch of each is left out.
  config.updater = ConfigDict(dict(name="no_prune"))
  config.log_every = 50
  config.eval_every = 60_000 // 128
  config.checkpoint_every = 1000
  return config
