"""Every algorithm and every optimizer, structure and dtype against the laws."""

import jax
import laws
import numpy as np
import optax
import pytest

import jaxsparse as js

MAIN_OPTIMIZERS = ("adam", "momentum")
MAIN_ALGORITHMS = ("rigl", "sr_ste", "global_magnitude")
OWN_OPTIMIZER = [n for n, expected in laws.EXPECTED.items() if expected.inner]  # run with that one only


def test_every_algorithm_is_listed():
  assert set(laws.EXPECTED) == set(js.all_algorithm_names())


@pytest.mark.parametrize("optimizer", MAIN_OPTIMIZERS)
@pytest.mark.parametrize("name", sorted(laws.EXPECTED))
def test_algorithm(name, optimizer):
  """With the second optimizer (or with an algorithm's own, a second time) masks are packed: eight to a byte."""
  packed = {"pack_masks": True} if optimizer != MAIN_OPTIMIZERS[0] and name != "no_prune" else {}
  laws.check(laws.train(name, laws.OPTIMIZERS[optimizer](), **packed))


# Joint, hard, a changing pattern, dense, ablated groups.
PACKED = ("global_magnitude", "rigl", "sdgf", "sr_ste", "srigl")


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=() if n in PACKED else pytest.mark.laws) for n in sorted(laws.EXPECTED) if n != "no_prune"],
)
def test_packed_masks_change_nothing(name):
  results = []
  for packed in (False, True):
    h = laws.train(name, laws.OPTIMIZERS["momentum"](), pack_masks=packed)
    laws.check(h)
    state = js.get_sparsity_state(h.states)
    results.append((h.params, h.masks, state.inner_state))
    nodes = jax.tree.leaves(state.masks, is_leaf=lambda x: isinstance(x, js.PackedMask))
    assert {isinstance(n, js.PackedMask) for n in nodes if not isinstance(n, optax.MaskedNode)} == {packed}
  jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("name", MAIN_ALGORITHMS)
@pytest.mark.parametrize("optimizer", [o for o in laws.OPTIMIZERS if o not in MAIN_OPTIMIZERS])
def test_optimizer(name, optimizer):
  laws.check(laws.train(name, laws.OPTIMIZERS[optimizer]()))


@pytest.mark.laws
@pytest.mark.parametrize("optimizer", [o for o in laws.OPTIMIZERS if o not in MAIN_OPTIMIZERS])
@pytest.mark.parametrize("name", [n for n in sorted(laws.EXPECTED) if n not in [*MAIN_ALGORITHMS, *OWN_OPTIMIZER]])
def test_full_product(name, optimizer):
  laws.check(laws.train(name, laws.OPTIMIZERS[optimizer]()))
