"""SmolLM2-135M-Instruct, SparseGPT at 2:4.

python experiments/prune_lm.py --config=configs/smollm2_sparsegpt.py --workdir=runs/smollm2_sparsegpt
"""

from ml_collections import ConfigDict

from configs import smollm2_wanda


def get_config():
  config = smollm2_wanda.get_config()
  config.method = ConfigDict(dict(name="sparsegpt", damping=0.01))
  config.structure = ConfigDict(dict(name="NM", n=2, m=4))
  config.sparsity = None
  return config
