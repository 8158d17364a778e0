"""SmolLM2-135M-Instruct, ALPS at 60 % of each output, each layer making up for the error of those before it.

python experiments/prune_lm.py --config=configs/smollm2_alps_60.py --workdir=runs/smollm2_alps_60
"""

from ml_collections import ConfigDict

from configs import smollm2_alps


def get_config():
  config = smollm2_alps.get_config()
  config.structure = ConfigDict(dict(name="FixedFanIn"))
  config.sparsity = 0.6
  return config
