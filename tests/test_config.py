"""Updaters from dictionaries and back."""

import dataclasses
import json

import laws
import ml_collections
import pytest

import jaxsparse as js

VARIANTS = {
  "block": {"structure": js.Block((4, 8)), "distribution": js.ERK(power=0.5)},
  "nm": {"structure": js.NM(2, 4, axis=(0, 1), stack_axes=()), "sparsity": None},
  "fan_in": {
    "structure": js.FixedFanIn(4, stack_axes=(0,)),
    "pack_masks": True,
    "on_mismatch": "skip",
    "sparsity": None,
  },
  "rules": {"rules": js.Rules(("embed", None), ("a", 0.5), ("b", js.NM(2, 4)), (".*", (js.Channel(axis=0), 0.25)))},
  "uniform_plus": {"distribution": js.UniformPlus(first="conv_0", last="head", last_density=0.3)},
}


def same(a, b):
  assert a == b and hash(a) == hash(b) and repr(a) == repr(b), (a, b)


@pytest.mark.parametrize("name", sorted(laws.EXPECTED))
def test_round_trip(name):
  updater = js.get_algorithm(name)(**laws.EXPECTED[name].arguments)
  config = js.updater_config(updater)
  assert config.name == name
  same(js.create_updater(config), updater)
  same(js.create_updater(config.to_dict()), updater)
  same(js.create_updater(json.loads(json.dumps(config.to_dict()))), updater)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["magnitude", "rigl", "sr_ste"])
def test_round_trip_of_axes(name, variant):
  updater = js.get_algorithm(name)(**{**laws.EXPECTED[name].arguments, **VARIANTS[variant]})
  same(js.create_updater(js.updater_config(updater)), updater)
  assert js.create_updater(json.loads(json.dumps(js.updater_config(updater).to_dict()))) == updater


def test_round_trip_of_a_hand_made_updater():
  updater = js.Updater(
    schedule=js.schedules.Cosine(every=5, stop=50),
    drop=js.scorers.Fisher(0.9),
    sparsity=0.7,
    forward=js.forwards.SRSTE(0.1),
  )
  config = js.updater_config(updater)
  assert config.name == "Updater" and config.schedule == {"name": "Cosine", "every": 5, "stop": 50}
  same(js.create_updater(config), updater)
  growing = js.Updater(
    schedule=js.schedules.Periodic(every=5, stop=50),
    drop=js.scorers.Magnitude(),
    grow=js.scorers.Momentum(0.5),
    drop_fraction=js.schedules.CosineFraction(0.2, end=0.01),
    init=js.scorers.Random(),
    sparsity=0.5,
    skip_step_when_due=True,
  )
  same(js.create_updater(js.updater_config(growing)), growing)
  elastic = dataclasses.replace(
    growing,
    grow=js.scorers.Unused(js.scorers.Momentum(0.5)),
    drop_fraction=js.schedules.PiecewiseFraction((0.0, js.schedules.CosineFraction(0.5)), (0.25,)),
    surplus=js.schedules.PiecewiseFraction((0.5, 0.0), (0.25,)),
    distribution=js.Global(),
    init_distribution=js.ERK(0.5),
  )
  same(js.create_updater(json.loads(json.dumps(js.updater_config(elastic).to_dict()))), elastic)
  shuffled = js.Updater(schedule=js.schedules.Static(), drop=js.scorers.Shuffled(js.scorers.Snip()), sparsity=0.5)
  same(js.create_updater(js.updater_config(shuffled)), shuffled)


def test_config_dict_with_names_alone():
  config = ml_collections.ConfigDict({"name": "rigl", "sparsity": 0.9, "stop": 100})
  config.distribution = "Uniform"
  config.structure = ml_collections.ConfigDict({"name": "Block", "shape": [4, 4]})
  want = js.rigl(sparsity=0.9, stop=100, distribution=js.Uniform(), structure=js.Block((4, 4)))
  same(js.create_updater(config), want)
  config.sparsity = 0.5
  assert js.create_updater(config).sparsity == 0.5
  assert config.name == "rigl", "create_updater must not change the configuration"
  config.lock()
  js.create_updater(config)


def test_drop_fraction_takes_a_number_or_a_schedule():
  """A number goes into the paper's schedule: constant for SET, a cosine for the others."""
  decaying = {"name": "set", "sparsity": 0.9, "stop": 100, "drop_fraction": {"name": "CosineFraction", "end": 0.1}}
  updater = js.create_updater(decaying)
  assert updater.drop_fraction == js.schedules.CosineFraction(0.3, end=0.1)
  same(js.create_updater(js.updater_config(updater)), updater)
  assert js.create_updater(decaying | {"drop_fraction": 0.2}).drop_fraction == js.schedules.ConstantFraction(0.2)
  for name in ("rigl", "snfs"):
    assert js.create_updater(decaying | {"name": name, "drop_fraction": 0.2}).drop_fraction.fraction == 0.2
    constant = js.create_updater(decaying | {"name": name, "drop_fraction": "ConstantFraction"})
    assert constant.drop_fraction == js.schedules.ConstantFraction(0.3)
  with pytest.raises(ValueError, match="set needs stop= for drop_fraction=CosineFraction"):
    js.create_updater(decaying | {"stop": None})


def test_prints_as_the_call():
  for name in laws.EXPECTED:
    updater = js.get_algorithm(name)(**laws.EXPECTED[name].arguments)
    names = {**vars(js), "set": js.get_algorithm("set"), "random": js.get_algorithm("random")}
    assert eval(repr(updater), names) == updater, repr(updater)
  by_hand = js.Updater(schedule=js.schedules.OneShot(3), drop=js.scorers.Magnitude(), sparsity=0.5)
  assert repr(by_hand) == "Updater(schedule=OneShot(at=3), drop=Magnitude(), sparsity=0.5)"
  assert by_hand == js.magnitude(sparsity=0.5, schedule=js.schedules.OneShot(3)), "equal fields are equal updaters"


def test_jaxpruner_names_exist():
  theirs = {
    "no_prune", "magnitude", "random", "saliency", "magnitude_ste", "random_ste", "global_magnitude", "global_saliency",
    "static_sparse", "rigl", "set",
  }  # fmt: skip
  assert theirs <= set(js.all_algorithm_names())
  assert list(js.all_algorithm_names()) == sorted(js.all_algorithm_names())


@pytest.mark.parametrize(
  "config,kind,words",
  [
    ({"sparsity": 0.5}, ValueError, "needs 'name'"),
    ({"name": "rigel"}, ValueError, "Did you mean 'rigl'"),
    ({"name": "zzz"}, ValueError, "The algorithms are: acdc"),
    ({"name": "rigl", "sparsity": 0.9, "stopp": 5}, TypeError, r"no argument 'stopp'. Did you mean 'stop'\?.*rigl\("),
    ({"name": "rigl", "sparsity": 0.9, "stop": 5, "distribution": "XX"}, ValueError, "Known names: ERK, ERKPlus, ErdosRenyi, Global, Uniform, UniformPlus.$"),
    ({"name": "rigl", "sparsity": 0.9, "stop": 5, "structure": "Blok"}, ValueError, "structure: there is no 'Blok'. Did you mean 'Block'"),
    ({"name": "rigl", "sparsity": 0.9, "stop": 5, "structure": {"name": "NM", "n": 2, "mm": 4}}, TypeError, "NM.. has no argument 'mm'. Did you mean 'm'"),
    ({"name": "rigl", "sparsity": 0.9, "stop": 5, "structure": {"n": 2, "m": 4}}, ValueError, "structure: {'n': 2, 'm': 4} needs a name. Known names: Block,"),
    ({"name": "rigl", "sparsity": 1.9, "stop": 5}, ValueError, "sparsity must be in"),
    ({"name": "magnitude", "sparsity": 0.9, "schedule": {"name": "Polynomial", "every": 5, "stop": 0}}, ValueError, "stop=0"),
  ],
)  # fmt: skip
def test_bad_configurations(config, kind, words):
  with pytest.raises(kind, match=words):
    js.create_updater(config)


def test_user_algorithms_join():
  @js.algorithm
  def my_method(sparsity, *, at=3, **common):
    return js.Updater(schedule=js.schedules.OneShot(at), drop=js.scorers.Magnitude(), sparsity=sparsity, **common)

  try:
    updater = js.create_updater({"name": "my_method", "sparsity": 0.5, "structure": "Channel"})
    assert repr(updater).startswith("my_method(sparsity=0.5, structure=Channel(")
    assert updater == my_method(0.5, structure=js.Channel()) and "my_method" in js.all_algorithm_names()
    with pytest.raises(TypeError, match="Did you mean 'at'"):
      my_method(0.5, att=4)
  finally:
    from jaxsparse.algorithms import _registry

    del _registry._FACTORIES["my_method"]
