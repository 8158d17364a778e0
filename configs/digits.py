"""Digits, with any algorithm: a 64-256-128-10 MLP, sparse in every layer.

    python experiments/train.py --config=configs/digits.py:rigl --workdir=runs/digits_rigl

What stands behind the colon is a name of `jaxsparse.all_algorithm_names()`; nothing means `no_prune`. About 20 s on two
CPU cores. Test accuracy in percent with seed 0 (360 images: one image is 0.3 points), at 90 % sparsity where the settings
below do not say otherwise:

| acdc             | 94.4 | adam_fisher      | 98.1 | asp              | 97.8 |
| ast              | 97.5 | cast             | 98.1 | chase            | 97.5 |
| dsl              | 97.8 | g2gnet           | 97.5 | global_magnitude | 95.6 |
| global_saliency  | 97.5 | gmp              | 97.2 | granet           | 97.5 |
| grasp            | 97.2 | grasp_ratio      | 97.5 | iterative_nm     | 97.5 |
| magnitude        | 97.5 | magnitude_ste    | 97.8 | mask_decay       | 97.8 |
| mdgf             | 97.5 | mest             | 97.5 | movement         | 97.2 |
| no_prune         | 97.8 | random           | 95.6 | random_ste       | 96.1 |
| rigl             | 97.8 | saliency         | 97.8 | sdgf             | 97.8 |
| set              | 97.8 | snfs             | 98.1 | snip             | 97.8 |
| snip_ratio       | 97.5 | sparcl           | 97.5 | sr_ste           | 98.3 |
| srigl            | 98.1 | static_sparse    | 97.5 | step             | 97.8 |
| structure_decay  | 98.1 | synflow          | 97.5 | top_kast         | 97.2 |
"""

from ml_collections import ConfigDict


def get_config(algorithm: str = "no_prune") -> ConfigDict:
  """The configuration for an algorithm; a name that there is not is an error of `create_updater`."""
  config = ConfigDict()
  config.seed = 0
  config.dataset = "digits"
  # Directory of the Fashion-MNIST files; "" looks where Debian's package puts them. Digits need none.
  config.data_dir = ""
  # "mlp" (sizes of the hidden layers) or "cnn" (channels of its convolutions).
  config.model = ConfigDict(dict(name="mlp", features=(256, 128)))
  # See experiments/optimizers.py.
  config.optimizer = ConfigDict(dict(name="adam", learning_rate=1e-3, decay="cosine"))
  config.batch_size = 128
  config.steps = 1000
  # Given to jaxsparse.create_updater as it is.
  steps = config.get_ref("steps")
  config.updater = ConfigDict(_settings(steps * 3 // 4).get(algorithm, {}) | {"name": algorithm})
  if algorithm in _optimizers(steps):
    config.optimizer = ConfigDict(_optimizers(steps)[algorithm])
  config.log_every = 20
  config.eval_every = 100
  config.checkpoint_every = 250
  return config


def _settings(stop) -> dict[str, dict]:
  """Arguments of every factory; `stop` follows the steps."""
  refresh = dict(sparsity=0.9, every=50, stop=stop)
  competing = refresh | dict(sparsity=0.95)
  erk = refresh | dict(distribution="ERK")
  at_init = dict(sparsity=0.9)
  pattern = dict(n=2, m=4)
  nm = dict(structure=dict(name="NM", **pattern))
  return {
    "acdc": dict(sparsity=0.9, sparse_steps=100, dense_steps=100, start=100, stop=stop, distribution="Global"),
    "adam_fisher": refresh,
    "asp": nm | dict(at=stop),
    "ast": nm,
    "cast": nm,
    "chase": competing,
    "dsl": refresh,
    "g2gnet": refresh,
    "global_magnitude": competing,
    "global_saliency": competing,
    "gmp": erk | dict(sparsity=0.95, initial_sparsity=0.5, start=200),
    "granet": competing,
    "grasp": at_init,
    "grasp_ratio": at_init,
    "iterative_nm": pattern | dict(every=50, stop=stop),
    "magnitude": erk,
    "magnitude_ste": nm,
    "mask_decay": nm | dict(stop=stop),
    "mdgf": nm | dict(stop=stop, decay="linear", flow="chain"),
    "mest": refresh,
    "movement": refresh,
    "random": refresh,
    "random_ste": dict(sparsity=0.5, every=50, stop=stop),
    "rigl": erk,
    "saliency": refresh,
    "sdgf": pattern | dict(stop=stop),
    "set": erk,
    "snfs": erk,
    "snip": at_init,
    "snip_ratio": at_init,
    "sparcl": refresh,
    "sr_ste": nm | dict(decay=2e-4),
    "srigl": erk,
    "static_sparse": at_init | dict(distribution="ERK"),
    "step": nm,
    "structure_decay": pattern | dict(stop=stop),
    "synflow": at_init | dict(iterations=100),
    "top_kast": dict(sparsity=0.9),
  }


def _optimizers(steps) -> dict[str, dict]:
  """Optimizers that belong to their method."""
  adam_nm = dict(name="adamw_nm", learning_rate=1e-3, decay="cosine")
  rising = dict(name="linear_schedule", init_value=0.0, transition_steps=steps * 3 // 4)
  return {
    "ast": adam_nm | dict(masked_decay="l2", strength=rising | dict(end_value=1e-2)),
    "cast": adam_nm | dict(masked_decay="l1", strength=1e-2, mix=rising | dict(end_value=1.0)),
    "sr_ste": dict(name="sgd", learning_rate=0.1, momentum=0.9, decay="cosine"),
    "step": adam_nm | dict(freeze_nu=dict(name="AutoSwitch", earliest=steps // 10, latest=steps // 2)),
  }
