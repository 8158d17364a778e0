"""SmolLM2-135M-Instruct, ALPS at 2:4, then 300 steps of retraining in which AST's masks move; for a GPU.

python experiments/prune_lm.py --config=configs/smollm2_retrain.py --workdir=runs/smollm2_retrain
"""

from configs import smollm2_repair


def get_config():
  config = smollm2_repair.get_config()
  config.repair.algorithm = "ast"
  # Adam with a pull divides by the size of its first moment, so its steps are longer (docs/decisions.md).
  config.repair.learning_rate = 5e-4
  return config
