"""Every algorithm and every optimizer, structure and dtype against the laws."""

import laws
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
  if name in OWN_OPTIMIZER and optimizer != MAIN_OPTIMIZERS[0]:
    pytest.skip("needs an optimizer of its own, and has been run with it")
  laws.check(laws.train(name, laws.OPTIMIZERS[optimizer]()))


@pytest.mark.parametrize("name", MAIN_ALGORITHMS)
@pytest.mark.parametrize("optimizer", [o for o in laws.OPTIMIZERS if o not in MAIN_OPTIMIZERS])
def test_optimizer(name, optimizer):
  laws.check(laws.train(name, laws.OPTIMIZERS[optimizer]()))


@pytest.mark.laws
@pytest.mark.parametrize("optimizer", [o for o in laws.OPTIMIZERS if o not in MAIN_OPTIMIZERS])
@pytest.mark.parametrize("name", [n for n in sorted(laws.EXPECTED) if n not in [*MAIN_ALGORITHMS, *OWN_OPTIMIZER]])
def test_full_product(name, optimizer):
  laws.check(laws.train(name, laws.OPTIMIZERS[optimizer]()))
