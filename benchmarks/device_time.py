"""Time of one product in a program that repeats it over several weights."""

import importlib
import time

import jax


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
