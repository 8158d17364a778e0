"""Losses that make one model follow another."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def kl_divergence(student: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> jax.Array:
  """T^2 times the mean of KL(softmax(teacher / T) || softmax(student / T)); no gradient reaches the teacher.

  Args:
    student, teacher: logits, `[..., classes]`; computed in float32.
    temperature: T; the factor T^2 keeps the size of gradients (Hinton et al., 2015, https://arxiv.org/abs/1503.02531).

  Returns:
    shape=(), float32.

  >>> logits = jnp.array([[1.0, 2.0, 3.0]])
  >>> float(kl_divergence(logits, logits, temperature=2.0))
  0.0
  """
  if not temperature > 0:
    raise ValueError(f"kl_divergence: temperature={temperature!r} must be positive.")
  teacher = jax.lax.stop_gradient(teacher)
  theirs, ours = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (teacher, student))
  return temperature**2 * (jnp.exp(theirs) * (theirs - ours)).sum(-1).mean()


def distill(
  loss: jax.Array, student: jax.Array, teacher: jax.Array, *, weight: float = 2 / 3, temperature: float = 2.0
) -> jax.Array:
  """(1 - weight) loss + weight `kl_divergence`. The defaults are near those of Adaptive Sparse Trainer (0.33, 0.67, T = 2).

  Args:
    loss: shape=(), the task's loss of the student.
    student, teacher, temperature: as in `kl_divergence`.
    weight: share of the divergence, in [0, 1].
  """
  return (1 - weight) * loss + weight * kl_divergence(student, teacher, temperature)


def mutual(a: jax.Array, b: jax.Array, distance: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
  """distance(a, stop(b)) + distance(b, stop(a)): each follows the other, neither through the other's gradient.

  >>> jax.grad(lambda a: mutual(a, 2 * a, lambda x, y: (x - y) ** 2))(1.0).item()
  2.0
  """
  return distance(a, jax.lax.stop_gradient(b)) + distance(b, jax.lax.stop_gradient(a))
