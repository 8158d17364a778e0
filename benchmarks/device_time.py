"""Time of products on the device: of one program that repeats them, or of several programs that take turns."""

from collections.abc import Callable, Mapping, Sequence
import importlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

_MARK = "atan2"  # of the name of a kernel that parts one program's kernels from the next one's


def timer(iterations: int):
  """(program, x, weights) -> list of microseconds a product, one for each iteration."""
  if jax.default_backend() == "gpu":
    profiler = importlib.import_module("jax.experimental.mosaic.gpu.profiler")

    def device_time(program, x, weights):
      _, times = profiler.measure(program, iterations=iterations)(x, weights)
      return [1e3 * t / len(weights) for t in (times if isinstance(times, list) else [times])]

    return device_time

  def wall_time(program, x, weights):
    jax.block_until_ready(program(x, weights))
    times = []
    for _ in range(iterations):
      start = time.perf_counter()
      jax.block_until_ready(program(x, weights))
      times.append(1e6 * (time.perf_counter() - start) / len(weights))
    return times

  return wall_time


def in_turn(
  programs: Mapping[str, Sequence[Callable[[], Any]]],
  rounds: int,
  iterations: int,
  finish: Callable[[], None] = lambda: None,
  uneven: Sequence[str] = (),
) -> dict[str, float]:
  """Median microseconds a call of each program, on the device (CUPTI); wall clock where there is no GPU.

  Args:
    programs: name -> calls, one for each copy of its weight; each call launches the same kernels. Every call has run
      before.
    rounds: rounds in which all programs take their turn.
    iterations: calls of a program in a turn, at least; all of its copies are called.
    finish: waits for what other libraries have launched.
    uneven: programs whose calls may launch different kernels: the mean of a turn counts.

  Raises:
    RuntimeError: the profiler lost kernels.
  """
  turns = [(name, max(1, -(-iterations // len(calls))), calls) for name, calls in programs.items()] * rounds
  if jax.default_backend() != "gpu":
    times = {name: [] for name in programs}
    for name, repeats, calls in turns:
      start = time.perf_counter()
      jax.block_until_ready([call() for _ in range(repeats) for call in calls])
      times[name].append(1e6 * (time.perf_counter() - start) / (repeats * len(calls)))
    return {name: statistics.median(found) for name, found in times.items()}
  mark, angle = jax.jit(jnp.arctan2), jnp.ones(1)
  jax.block_until_ready(mark(angle, angle))

  def run():
    for _, repeats, calls in turns:
      jax.block_until_ready(mark(angle, angle))
      out = [call() for _ in range(repeats) for call in calls]
      jax.block_until_ready([a for a in out if isinstance(a, jax.Array)])
      finish()
      del out

  found = []
  for name, ms in _kernels(run):
    if _MARK in name:
      found.append([])
    elif found:
      found[-1].append(ms)
  if len(found) != len(turns):
    raise RuntimeError(f"{len(found)} turns of {len(turns)} were found among the kernels.")
  times = {name: [] for name in programs}
  for (name, repeats, calls), turn in zip(turns, found, strict=True):
    if name in uneven and turn:
      times[name].append(1e3 * sum(turn) / (repeats * len(calls)))
    else:
      times[name] += _per_call(turn, repeats * len(calls), name)
  return {name: statistics.median(found) for name, found in times.items()}


def each(calls) -> list[float]:
  """Microseconds of every `(program, arguments)` of a list, run one after the other; programs need not differ."""
  calls = list(calls)
  if jax.default_backend() != "gpu":
    times = []
    for program, args in calls:
      start = time.perf_counter()
      jax.block_until_ready(program(*args))
      times.append(1e6 * (time.perf_counter() - start))
    return times
  kernels = _kernels(lambda: jax.block_until_ready([program(*args) for program, args in calls]))
  return _per_call([ms for _, ms in kernels], len(calls), "a list of calls")


def _kernels(run: Callable[[], Any]) -> list[tuple[str, float]]:
  """(name, milliseconds) of all kernels that `run` launches and waits for: what `profiler.measure` does for one program."""
  cupti = importlib.import_module("jax.experimental.mosaic.gpu.profiler").mosaic_gpu_lib._mosaic_gpu_ext
  cupti._cupti_init()
  try:
    run()
  finally:
    kernels = cupti._cupti_get_timings(True)
  return kernels


def _per_call(kernels: Sequence[float], calls: int, name: str) -> list[float]:
  """Milliseconds of kernels, as many in each call -> microseconds of each call."""
  launched, rest = divmod(len(kernels), calls)
  if rest or not launched:
    raise RuntimeError(f"{name}: {len(kernels)} kernels ran in {calls} calls, which cannot be told apart.")
  return [1e3 * sum(kernels[i : i + launched]) for i in range(0, len(kernels), launched)]
