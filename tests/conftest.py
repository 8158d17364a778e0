"""Set before JAX starts: run on the CPU, and compile quickly: most of the suite's time is compiling what runs once."""

import gc
import itertools
import os

# Without LLVM's optimisations, and with XLA's older emitters of fusions, which a JAX from 0.12 on no longer has, compiling
# takes half of the time. A part of `make test-laws` compiles as users do.
if "JAXSPARSE_OPTIMISED_TESTS" not in os.environ:
  QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
  )
  os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *QUICK))

# The tests are for the CPU; compiling for a GPU (`ahead_of_time.py`) needs none, but its packages would look for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tracing and compiling make and drop many small objects. Together these two save a fifth of the processor's time: glibc
# keeps freed memory (read when a process starts, so by xdist's workers), and Python looks for cycles less often.
os.environ.setdefault("MALLOC_TOP_PAD_", str(64 << 20))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(512 << 20))
gc.set_threshold(200_000, 20, 20)


_TESTS = itertools.count(1)


def pytest_collection_finish():
  gc.collect()
  gc.freeze()  # what was imported stays


def pytest_runtest_teardown():
  if next(_TESTS) % 50 == 0:
    gc.collect()  # compiled programs lie in cycles, and are too few and too large to wait for
