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
  # What `profiler.measure` does for one program.
  ext = importlib.import_module("jax.experimental.mosaic.gpu.profiler").mosaic_gpu_lib._mosaic_gpu_ext
  ext._cupti_init()
  try:
    jax.block_until_ready([program(*args) for program, args in calls])
  finally:
    timings = ext._cupti_get_timings(True)
  if len(timings) % len(calls):
    raise RuntimeError(f"{len(timings)} kernels ran in {len(calls)} calls, which cannot be told apart.")
  size = len(timings) // len(calls)
  return [1e3 * sum(t for _, t in timings[i : i + size]) for i in range(0, len(timings), size)]
