"""R-Sparse (experimental): few inputs through the whole weight, the others through a low rank."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsparse.calibration import _gram


class RSparse(NamedTuple):
  """A linear layer that reads whole weight rows only for inputs that matter.

  Attributes:
    weight: `[K, O]`, the dense weight.
    norms: `[K]`, `||w_k||`, the effect of a unit of input k.
    threshold: shape=(): inputs with `|x_k| * norms_k` above it go through the whole weight.
    left: `[K, rank]`.
    right: `[rank, O]`.
  """

  weight: jax.Array
  norms: jax.Array
  threshold: jax.Array
  left: jax.Array
  right: jax.Array


def rsparse_budget(inputs: int, outputs: int, sparsity: float, share: float) -> tuple[int, int]:
  """Inputs that go through the whole weight, and the rank for the others, that read `1 - sparsity` of the weight.

  Args:
    inputs, outputs: K and O.
    sparsity: fraction of the weight that is not read.
    share: alpha in [0, 1], the part of what is read that whole rows get.

  Raises:
    ValueError: sparsity or share outside [0, 1].

  >>> rsparse_budget(4096, 4096, 0.5, 0.9)
  (1843, 102)
  """
  if not (0 <= sparsity <= 1 and 0 <= share <= 1):
    raise ValueError(f"sparsity={sparsity!r} and share={share!r} must be in [0, 1].")
  channels = int(inputs * (1 - sparsity) * share)
  return channels, int((inputs * outputs * (1 - sparsity) - channels * outputs) / (inputs + outputs))


def rsparse(w: jax.Array, x: jax.Array, sparsity: float, share: float = 0.9) -> RSparse:
  """Calibrates a layer on a sample of its inputs.

  Args:
    w: `[K, O]`.
    x: `[..., K]`, some hundred inputs.
    sparsity, share: as `rsparse_budget`.

  Returns:
    An `RSparse` for `rsparse_matmul`, float32.

  References:
    Zhang et al., R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference, 2025
    (https://arxiv.org/abs/2504.19449). The paper's scores `||(V Sigma)_k||` are the norms of the weight's rows. Differs
    from the paper: one share for all layers unless the caller searches; the products are dense, so that this says
    what accuracy costs, not how fast a kernel would be.
  """
  w = w.astype(jnp.float32)
  channels, rank = rsparse_budget(*w.shape, sparsity, share)
  norms = jnp.linalg.norm(w, axis=1)
  threshold = jnp.quantile(jnp.abs(x.astype(jnp.float32)).reshape(-1, w.shape[0]) * norms, 1 - channels / w.shape[0])
  u, s, v = jnp.linalg.svd(w, full_matrices=False)
  return RSparse(w, norms, threshold, u[:, :rank] * s[:rank], v[:rank])


def rsparse_matmul(x: jax.Array, layer: RSparse) -> jax.Array:
  """`x @ w`, nearly: `[..., K]` -> `[..., O]`."""
  whole = jnp.abs(x) * layer.norms > layer.threshold
  rest = jnp.where(whole, 0, x)
  return _gram.dot(jnp.where(whole, x, 0), layer.weight) + _gram.dot(_gram.dot(rest, layer.left), layer.right)
