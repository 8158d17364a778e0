"""Digits, SR-STE: 2:4 from scratch, on SGD as in the paper.

    python experiments/train.py --config=configs/digits_sr_ste.py --workdir=runs/digits_sr_ste

About 20 s on two CPU cores. Test accuracy 98.3 % at 2:4 (seed 0, 360 images: one image is 0.3 points).
"""

from ml_collections import ConfigDict

from configs import digits_no_prune


def get_config():
  config = digits_no_prune.get_config()
  config.optimizer = ConfigDict(dict(name="sgd", learning_rate=0.1, momentum=0.9, decay="cosine"))
  config.updater = ConfigDict(dict(name="sr_ste", structure=dict(name="NM", n=2, m=4), decay=2e-4, every=1))
  return config
