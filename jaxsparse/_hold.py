"""An optimizer step that can be held back without a second copy of the optimizer's state.

`where(hold, old, new)` on the finished state makes XLA keep both: the update still reads the new moments while the
held-back ones take their place, so on a CPU every moment is copied in every step (1.7 times the time of a training
step was measured). Selecting each state value where it is *computed* lets the rest of the step read the selected one.
The two agree: where `hold` is off the selection is the new value, and where it is on the update is thrown away.
"""

import collections
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
import optax


def update_unless(
  hold: jax.Array, inner: optax.GradientTransformationExtraArgs, grads: Any, state: Any, params: Any, extra: Any
) -> tuple[Any, Any]:
  """`inner.update(grads, state, params, **extra)`, or (zeros, `state`) where `hold`.

  Args:
    hold: shape=(), bool.
    inner: the optimizer.
    grads, state, params, extra: its arguments.
  """

  def step(grads, state, params, extra):
    return inner.update(grads, state, params, **extra)

  closed, shapes = jax.make_jaxpr(step, return_shape=True)(grads, state, params, extra)
  old = jax.tree.leaves(state)
  new = closed.jaxpr.outvars[len(closed.jaxpr.outvars) - len(old) :]
  computed = {var for equation in closed.jaxpr.eqns for var in equation.outvars}
  # One value that goes to two slots has two old values; it is selected slot by slot, when it is finished.
  slots = collections.Counter(var for var in new if not isinstance(var, core.Literal))
  held = {
    var: value
    for var, value in zip(new, old)
    if not isinstance(var, core.Literal) and var in computed and slots[var] == 1
  }
  results = _evaluate(closed, jax.tree.leaves((grads, state, params, extra)), hold, held)
  updates, state_shape = shapes
  split = len(results) - len(old)
  zeros = [jnp.where(hold, jnp.zeros_like(u), u) for u in results[:split]]
  # What is in `held` has been selected; constants, inputs that come out unchanged and shared values have not.
  state = [
    n if not isinstance(v, core.Literal) and v in held else jnp.where(hold, o, n)
    for v, o, n in zip(new, old, results[split:])
  ]
  return jax.tree.unflatten(jax.tree.structure(updates), zeros), jax.tree.unflatten(
    jax.tree.structure(state_shape), state
  )


def _evaluate(closed: Any, arguments: list[Any], hold: jax.Array, held: dict[Any, Any]) -> list[Any]:
  """Evaluates a jaxpr; a variable in `held` takes its held value where `hold`, for everything that reads it."""
  values: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts)) | dict(zip(closed.jaxpr.invars, arguments))

  def read(atom):
    return atom.val if isinstance(atom, core.Literal) else values[atom]

  for equation in closed.jaxpr.eqns:
    parameters = equation.primitive.get_bind_params(equation.params)
    outputs = equation.primitive.bind(*map(read, equation.invars), **parameters)
    outputs = outputs if equation.primitive.multiple_results else [outputs]
    for var, value in zip(equation.outvars, outputs):
      values[var] = jnp.where(hold, held[var], value) if var in held else value
  return [read(atom) for atom in closed.jaxpr.outvars]
