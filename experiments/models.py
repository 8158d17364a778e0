"""Small classifiers in flax.linen."""

from collections.abc import Mapping
import difflib
from typing import Any

from flax import linen as nn
import jax
import optax

from jaxsparse import recipes

# He's initialisation is derived for ReLU; linen's default has half the variance, which sparse layers feel first.
_INIT = nn.initializers.he_normal()


class Mlp(nn.Module):
  """Dense layers with ReLU between them: `[B, H, W, C] -> [B, classes]`."""

  classes: int
  features: tuple[int, ...] = (300, 100)

  @nn.compact
  def __call__(self, x):
    x = x.reshape(x.shape[0], -1)
    for size in self.features:
      x = nn.relu(nn.Dense(size, kernel_init=_INIT)(x))
    return nn.Dense(self.classes, kernel_init=_INIT)(x)


class Cnn(nn.Module):
  """3x3 convolutions with 2x2 max pooling, a classifier on the mean over positions: `[B, H, W, C] -> [B, classes]`."""

  classes: int
  features: tuple[int, ...] = (32, 64)

  @nn.compact
  def __call__(self, x):
    for size in self.features:
      x = nn.max_pool(nn.relu(nn.Conv(size, (3, 3), kernel_init=_INIT)(x)), (2, 2), strides=(2, 2))
    return nn.Dense(self.classes, kernel_init=_INIT)(x.mean((1, 2)))


def correlations(model: nn.Module, params: Any, x: jax.Array) -> Any:
  """For every Dense kernel the correlation of its inputs with its outputs over a batch; a tree like the parameters."""
  found = {}

  def note(next_function, args, kwargs, context):
    out = next_function(*args, **kwargs)
    if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
      found["/".join((*context.module.path, "kernel"))] = recipes.correlation(args[0], out)
    return out

  with nn.intercept_methods(note):
    model.apply({"params": params}, x)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return jax.tree_util.tree_map_with_path(lambda path, _: found.get(name(path), optax.MaskedNode()), params)


_MODELS = {"mlp": Mlp, "cnn": Cnn}


def create(config: Mapping[str, Any], classes: int) -> nn.Module:
  """The model that `config["name"]` names, with the other entries as its arguments."""
  arguments = dict(config)
  name = arguments.pop("name")
  if name not in _MODELS:
    near = difflib.get_close_matches(name, _MODELS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"There is no model {name!r}.{hint} The models are: {', '.join(_MODELS)}.")
  arguments["features"] = tuple(arguments["features"])
  return _MODELS[name](classes=classes, **arguments)
