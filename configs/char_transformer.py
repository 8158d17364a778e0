"""Characters of the State of the Union addresses: a decoder of 2.6 million parameters.

    python experiments/char_transformer.py --config=configs/char_transformer.py

The dense baseline; experiments/char_transformer_table.py changes `updater` and `optimizer`. For a GPU: a CPU takes
seconds for a step.
"""

from ml_collections import ConfigDict

# Products of the layers; the embedding, which is the output layer too, and the norms stay dense.
WEIGHTS = "/(qkv|out|gate_up|down)$"


def get_config():
  config = ConfigDict()
  # Seeds 0, 1, ... train side by side.
  config.seeds = 3
  # Where the corpus is kept; "" is data/ beside experiments/.
  config.folder = ""
  # `unroll` layers to a pass of the loop over layers; attention "xla", or "cudnn" on a GPU that has it.
  config.model = ConfigDict(dict(dim=256, layers=4, heads=4, hidden=512, unroll=4, attention="xla"))
  config.batch_size = 64
  # Characters in a sequence.
  config.length = 256
  config.steps = 1120
  # Calls of the device program; after each, the held-out loss is taken on a quarter of the windows.
  config.chunks = 8
  # Held-out windows; all that there are, if fewer.
  config.windows = 2048
  # Largest global norm of the gradient, before the updater sees it.
  config.clip = 1.0
  # See experiments/optimizers.py. Of 5e-4, 1e-3, 2e-3, 4e-3 and 8e-3 this rate was the best for the dense model.
  config.optimizer = ConfigDict(
    dict(name="adamw", learning_rate=2e-3, decay="warmup_cosine", cycles=1, b2=0.99, weight_decay=0.1)
  )
  # Given to jaxsparse.create_updater as it is.
  config.updater = ConfigDict(dict(name="no_prune"))
  return config


def nm_rules(n: int, m: int) -> list:
  """Rules of an updater that keeps n of every m inputs in each product of the layers."""
  return [[WEIGHTS, {"name": "NM", "n": n, "m": m, "axis": -2}], [".*", None]]
