"""Schedules: due counts, progress, and drop fractions, against plain Python."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import schedules

COUNTS = np.arange(130)
RAMPS = {
  "polynomial": (lambda **k: schedules.Polynomial(**k), lambda tau: 1 - (1 - tau) ** 3),
  "square": (lambda **k: schedules.Polynomial(**k, power=2.0), lambda tau: 1 - (1 - tau) ** 2),
  "linear": (lambda **k: schedules.Linear(**k), lambda tau: tau),
  "cosine": (lambda **k: schedules.Cosine(**k), lambda tau: (1 - math.cos(math.pi * tau)) / 2),
}
windows = st.builds(
  lambda every, start, length: {"every": every, "start": start, "stop": start + length},
  st.integers(1, 40),
  st.integers(0, 30),
  st.integers(1, 70),
)


@pytest.mark.parametrize("name", RAMPS)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(windows)
def test_ramps_end_at_exactly_one(name, window):
  make, formula = RAMPS[name]
  schedule = make(**window)
  due = list(range(window["start"], window["stop"], window["every"]))
  assert list(np.flatnonzero(schedule.due(COUNTS))) == due
  progress = np.asarray(schedule.progress(COUNTS))
  assert progress[due[-1]] == 1 and (progress[due[-1] :] == 1).all(), "the final sparsity is missed"
  assert (np.diff(progress) >= -1e-6).all() and (progress >= 0).all()
  for d in due[:-1]:
    tau = (d - due[0]) / (due[-1] - due[0])
    assert abs(progress[d] - formula(tau)) < 2e-6, (d, progress[d], formula(tau))
  if len(due) > 1:
    assert (progress[: due[0] + 1] == 0).all()


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(windows, st.booleans())
def test_periodic(window, endless):
  schedule = schedules.Periodic(**{**window, "stop": None if endless else window["stop"]})
  end = len(COUNTS) if endless else window["stop"]
  due = [t for t in range(window["start"], end, window["every"]) if t < len(COUNTS)]
  assert list(np.flatnonzero(schedule.due(COUNTS))) == due
  np.testing.assert_array_equal(schedule.progress(COUNTS), COUNTS >= window["start"])
  elapsed = [float(schedule.elapsed(t)) for t in (0, window["start"], window["stop"], 10_000)]
  assert elapsed == ([0, 0, 0, 0] if endless else [0, 0, 1, 1])


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 20), st.integers(1, 80))
def test_alternating(sparse_steps, dense_steps, start, length):
  """Walks the turns one by one: sparse, dense, sparse, ..., and the last turn is sparse and stays."""
  stop = start + length
  schedule = schedules.Alternating(sparse_steps=sparse_steps, dense_steps=dense_steps, start=start, stop=stop)
  closed, opened, t = [start], [], start
  while t + sparse_steps + dense_steps <= stop:
    opened.append(t + sparse_steps)
    t += sparse_steps + dense_steps
    closed.append(t)
  switches = sorted(closed + opened)
  assert list(np.flatnonzero(schedule.due(COUNTS))) == switches
  state, want = 0, []
  for t in COUNTS:
    state = 1 if t in closed else 0 if t in opened else state
    want.append(state)
  np.testing.assert_array_equal(schedule.progress(COUNTS), want)
  assert want[-1] == 1


def test_one_shot_and_static():
  shot = schedules.OneShot(at=7)
  assert list(np.flatnonzero(shot.due(COUNTS))) == [7]
  np.testing.assert_array_equal(shot.progress(COUNTS), COUNTS >= 7)
  static = schedules.Static()
  assert not static.refreshes and not static.due(0) and static.progress(0) == 1 and not static.ramps


@pytest.mark.parametrize("ramp", [schedules.Polynomial, schedules.Linear, schedules.Cosine])
def test_a_ramp_that_ends_before_the_refreshes(ramp):
  """Due until `stop`, progress of the shorter ramp, time of the whole."""
  long, short = ramp(every=4, start=2, ramp_stop=20, stop=60), ramp(every=4, start=2, stop=20)
  assert list(np.flatnonzero(long.due(COUNTS))) == list(range(2, 60, 4))
  np.testing.assert_array_equal(long.progress(COUNTS), short.progress(COUNTS))
  np.testing.assert_allclose(long.elapsed(COUNTS), np.clip((COUNTS - 2) / 58, 0, 1), atol=1e-6)


def test_piecewise_fraction():
  piecewise = schedules.PiecewiseFraction((0.5, schedules.CosineFraction(0.4), 0.0), (0.25, 0.75))
  got = [float(piecewise.value(jnp.float32(t))) for t in (0, 0.2, 0.25, 0.5, 0.75, 1)]
  np.testing.assert_allclose(got, [0.5, 0.5, 0.2 * (1 + 0.5**0.5), 0.2, 0, 0], atol=1e-6)


def test_gmp_cubic_numbers():
  """Zhu and Gupta: s_t = s_f + (s_i - s_f)(1 - tau)^3 over ten refreshes, s_f = 0.9."""
  progress = schedules.Polynomial(every=100, start=0, stop=1001).progress(np.arange(0, 1001, 100))
  want = [1 - (1 - k / 10) ** 3 for k in range(11)]
  np.testing.assert_allclose(progress, want, atol=1e-6)
  assert float(progress[-1]) == 1


def test_cosine_fraction_closed_form():
  """RigL: alpha / 2 (1 + cos(pi t / T)): 0.3, 0.256, 0.15, 0.044, 0."""
  got = schedules.CosineFraction(0.3).value(jnp.array([0, 0.25, 0.5, 0.75, 1]))
  np.testing.assert_allclose(got, [0.3, 0.2560660, 0.15, 0.0439340, 0], atol=1e-6)
  granet = schedules.CosineFraction(0.5, end=0.005).value(jnp.array([0.0, 1.0]))
  np.testing.assert_allclose(granet, [0.5, 0.005], atol=1e-6)
  np.testing.assert_array_equal(schedules.ConstantFraction(0.3).value(jnp.zeros(2)), np.float32([0.3, 0.3]))


ALL = [
  schedules.Polynomial(every=3, stop=20),
  schedules.Linear(every=3, stop=20),
  schedules.Cosine(every=3, stop=20, ramp_stop=11),
  schedules.Periodic(every=3, stop=20),
  schedules.Periodic(),
  schedules.OneShot(3),
  schedules.Alternating(2, 2, stop=20),
  schedules.Static(),
]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_traced_equals_eager(schedule):
  for fn, dtype in ((schedule.due, bool), (schedule.progress, jnp.float32), (schedule.elapsed, jnp.float32)):
    traced = jax.jit(jax.vmap(fn))(jnp.arange(25))
    assert traced.dtype == dtype
    np.testing.assert_allclose(traced, [fn(t) for t in range(25)], atol=1e-6)
    assert fn(5).shape == () and (fn(5) <= 1)


@pytest.mark.parametrize(
  "make",
  [
    lambda: schedules.Polynomial(every=10, start=10, stop=10),
    lambda: schedules.Polynomial(every=10, start=20, stop=10),
    lambda: schedules.Polynomial(every=0, stop=10),
    lambda: schedules.Polynomial(every=1, stop=10, start=-1),
    lambda: schedules.Polynomial(every=1, stop=10, power=0.0),
    lambda: schedules.Polynomial(every=1, stop=10, power=float("nan")),
    lambda: schedules.Polynomial(every=1.5, stop=10),
    lambda: schedules.Polynomial(every=True, stop=10),
    lambda: schedules.Linear(every=1, start=5, stop=5),
    lambda: schedules.Cosine(every=1, start=5, stop=4),
    lambda: schedules.Linear(every=1, ramp_stop=9, stop=8),
    lambda: schedules.Polynomial(every=1, start=3, ramp_stop=3, stop=8),
    lambda: schedules.PiecewiseFraction((0.5, 0.1), (0.5, 0.6)),
    lambda: schedules.PiecewiseFraction((0.5, 0.2, 0.1), (0.6, 0.5)),
    lambda: schedules.PiecewiseFraction((0.5, 1.2), (0.5,)),
    lambda: schedules.Periodic(every=0),
    lambda: schedules.Periodic(every=2, start=3, stop=3),
    lambda: schedules.OneShot(at=-1),
    lambda: schedules.Alternating(0, 2, stop=20),
    lambda: schedules.Alternating(2, 0, stop=20),
    lambda: schedules.Alternating(2, 2, start=20, stop=20),
    lambda: schedules.ConstantFraction(1.5),
    lambda: schedules.ConstantFraction(float("nan")),
    lambda: schedules.CosineFraction(-0.1),
    lambda: schedules.CosineFraction(0.3, end=2.0),
  ],
)
def test_impossible_schedules(make):
  with pytest.raises(ValueError):
    make()


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_schedules_are_values(schedule):
  assert eval(repr(schedule), vars(schedules)) == schedule and hash(schedule) == hash(
    eval(repr(schedule), vars(schedules))
  )
