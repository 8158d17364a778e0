"""SmolLM2-135M-Instruct, ALPS at 2:4, then 300 steps of repair; for a GPU.

python experiments/prune_lm.py --config=configs/smollm2_repair.py --workdir=runs/smollm2_repair
"""

from configs import smollm2_alps


def get_config():
  config = smollm2_alps.get_config()
  config.repair.steps = 300
  config.repair.attention = "cudnn"
  return config
