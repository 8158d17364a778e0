"""SmolLM2-135M-Instruct, ALPS at 2:4, each layer making up for the error of those before it.

python experiments/prune_lm.py --config=configs/smollm2_alps.py --workdir=runs/smollm2_alps
"""

from ml_collections import ConfigDict

from configs import smollm2_wanda


def get_config():
  config = smollm2_wanda.get_config()
  config.method = ConfigDict(dict(name="alps", damping=0.01))
  config.structure = ConfigDict(dict(name="NM", n=2, m=4))
  config.sparsity = None
  config.layer_by_layer = True
  config.ridge = 0.1
  return config
